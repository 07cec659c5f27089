"""Segmentations as the iSeg-2017 challenge takes them in."""

import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
from tqdm import tqdm

from scripts.data.subjects import Ids, find_labels, require_subjects, subjects_to_segment
from scripts.data.volumes import read_volume, require_same_grid
from scripts.errors import InputError
from scripts.files import add_to_zip, whole_files
from scripts.results.label_images import write_label
from scripts.tissues import Tissue, tissue_labels

TEST_SUBJECTS = tuple(range(11, 24))


def _checked_label(path: str, t1_path: str) -> tuple[np.ndarray, str]:
    """The label of one subject as it is handed in, and what to tell of it.

    Returns:
        uint8 (X, Y, Z), 0 background, 1 CSF, 2 GM, 3 WM, background wherever T1 is 0; a line, empty if all was well.

    Raises:
        InputError: it isn't on the grid of the T1, has another value, or has no voxel of some tissue.
    """
    t1, t1_affine = read_volume(t1_path)
    values, affine = read_volume(path)
    require_same_grid(path, values, affine, t1_path, t1, t1_affine)
    label, brain = tissue_labels(values, path), t1 > 0
    outside = np.count_nonzero(label[~brain])
    label[~brain] = 0
    for tissue in Tissue:
        if not (label == tissue).any():
            raise InputError(f"{path}: no voxel of the brain is {tissue.name}; is it the segmentation of this subject?")
    told = []
    if outside:
        told.append(f"{outside} labelled voxels outside the brain (T1 0) set to background")
    if unlabeled := np.count_nonzero(label[brain] == 0):
        told.append(f"warning: {unlabeled} voxels of the brain (T1 above 0) are background")
    return label, f"{path}: {'; '.join(told)}" if told else ""


def _write_pair(header: Path, label: np.ndarray, t1_path: str) -> None:
    """Write an Analyze pair and nothing beside it.

    Raises:
        InputError: the T1 isn't Analyze, and lies in a way that an Analyze header can't say.
    """
    write_label(header, label, t1_path)
    # the affine of a T1 in another format; what is handed in has no place for it
    header.with_suffix(".mat").unlink(missing_ok=True)
    written, t1 = nib.load(header).affine, nib.load(t1_path).affine
    if not np.allclose(written[:3, :3], t1[:3, :3], atol=1e-2):  # the origin is kept in whole voxels
        raise InputError(
            f"{t1_path}: an Analyze header can't say how it lies; put iSeg's own T1 (.hdr and .img) in its place"
        )


def submission(predictions: str, dataset_dir: str, output: str, subjects: Ids = TEST_SUBJECTS) -> None:
    """Put segmentations into the zip that the iSeg-2017 challenge takes in, once all of them are in order.

    The zip is flat: `subject-<id>-label.hdr` and `.img`, uint8, 0 background, 10 CSF, 150 GM, 250 WM, each with the
    grid of the subject's T1. Like input gives the same bytes.

    Args:
        predictions: folder with `subject-<id>-label` as inference writes it, in NIfTI or Analyze.
        dataset_dir: folder with the T1 and T2 of these subjects.
        output: the zip to write.
        subjects: the ids; those of the test set unless given.

    Raises:
        InputError: a segmentation is missing, isn't on the grid of its T1, has other values or lacks a tissue;
            a subject isn't in the dataset; or `output` is there already.
    """
    predictions, dataset_dir, output = str(predictions), str(dataset_dir), str(output)
    if Path(output).exists():
        raise InputError(f"{output}: is there already; choose another --output")
    chosen = {subject["subject"]: subject for subject in subjects_to_segment(dataset_dir, subjects)}
    require_subjects(list(chosen.values()), dataset_dir, "segment")
    labels = find_labels(predictions)
    if missing := [subject for subject in chosen if subject not in labels]:
        raise InputError(f"{predictions}: no subject-<id>-label of subject {', '.join(missing)}; segment them first")
    told = []
    with (
        whole_files(Path(output).parent) as temporary,
        zipfile.ZipFile(temporary / Path(output).name, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for subject in tqdm(sorted(chosen), desc="checking and packing", unit="subject"):
            t1_path = chosen[subject]["image"][0]
            label, line = _checked_label(labels[subject], t1_path)
            told.append(line)
            with TemporaryDirectory() as folder:
                header = Path(folder) / f"subject-{subject}-label.hdr"
                _write_pair(header, label, t1_path)
                for path in (header, header.with_suffix(".img")):
                    add_to_zip(archive, path.name, path.read_bytes())
    print("\n".join([*filter(None, told), f"{len(chosen)} subjects in {output}"]))
