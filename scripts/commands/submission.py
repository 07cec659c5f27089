"""`python -m scripts submission`: segmentations in the format that the iSeg-2017 challenge expects."""

import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
from tqdm import tqdm

from scripts.data.subjects import Ids, SubjectFolder, find_labels
from scripts.data.volumes import read_volume, require_same_grid
from scripts.errors import InputError
from scripts.files import add_to_zip, whole_files
from scripts.results.label_images import write_label
from scripts.tissues import Tissue, tissue_labels

TEST_SUBJECTS = tuple(range(11, 24))


def _checked_label(path: str, t1_path: str) -> tuple[np.ndarray, str]:
    """Read the label of a subject and set voxels outside the brain to background.

    Returns:
        uint8 (X, Y, Z), 0 background, 1 CSF, 2 GM, 3 WM; and a line to report, empty if there is nothing to report.

    Raises:
        InputError: it isn't on the grid of the T1, has an unknown value, or lacks a tissue.
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
    notes = []
    if outside:
        notes.append(f"{outside} labelled voxels outside the brain (T1 0) set to background")
    if unlabeled := np.count_nonzero(label[brain] == 0):
        notes.append(f"warning: {unlabeled} voxels of the brain (T1 above 0) are background")
    return label, f"{path}: {'; '.join(notes)}" if notes else ""


def _write_pair(header: Path, label: np.ndarray, t1_path: str) -> None:
    """Write an Analyze pair and nothing beside it.

    Raises:
        InputError: the T1 isn't Analyze, and an Analyze header can't describe its orientation.
    """
    write_label(header, label, t1_path)
    # the affine of a T1 in another format, which has no place in a submission
    header.with_suffix(".mat").unlink(missing_ok=True)
    written, t1 = nib.load(header).affine, nib.load(t1_path).affine
    if not np.allclose(written[:3, :3], t1[:3, :3], atol=1e-2):  # the origin is kept in whole voxels
        raise InputError(
            f"{t1_path}: an Analyze header can't describe its orientation; use iSeg's own T1 (.hdr and .img) instead"
        )


def submission(predictions: str, dataset_dir: str, output: str, subjects: Ids = TEST_SUBJECTS) -> None:
    """Check segmentations and pack them into the zip that the iSeg-2017 challenge expects.

    The zip is flat: `subject-<id>-label.hdr` and `.img`, uint8, 0 background, 10 CSF, 150 GM, 250 WM, each on the grid
    of the subject's T1. Equal input gives equal bytes.

    Args:
        predictions: folder with `subject-<id>-label` as inference writes it, in NIfTI or Analyze.
        dataset_dir: folder with the T1 and T2 of these subjects.
        output: the zip to write.
        subjects: the ids; the test subjects by default.

    Raises:
        InputError: a segmentation is missing, isn't on the grid of its T1, has unknown values or lacks a tissue;
            a subject isn't in the dataset; or `output` exists.
    """
    predictions, dataset_dir, output = str(predictions), str(dataset_dir), str(output)
    if Path(output).exists():
        raise InputError(f"{output}: already exists; choose another --output")
    dataset = SubjectFolder(dataset_dir)
    chosen = dataset.to_segment(subjects)
    dataset.require(chosen, "segment")
    t1_paths = {subject["subject"]: subject["image"][0] for subject in chosen}
    labels = find_labels(predictions)
    if missing := [subject for subject in t1_paths if subject not in labels]:
        raise InputError(f"{predictions}: no subject-<id>-label of subject {', '.join(missing)}; segment them first")
    notes = []
    with (
        whole_files(Path(output).parent) as temporary,
        zipfile.ZipFile(temporary / Path(output).name, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for subject, t1_path in tqdm(sorted(t1_paths.items()), desc="checking and packing", unit="subject"):
            label, note = _checked_label(labels[subject], t1_path)
            notes.append(note)
            with TemporaryDirectory() as folder:
                header = Path(folder) / f"subject-{subject}-label.hdr"
                _write_pair(header, label, t1_path)
                for path in (header, header.with_suffix(".img")):
                    add_to_zip(archive, path.name, path.read_bytes())
    print("\n".join([*filter(None, notes), f"{len(t1_paths)} subjects in {output}"]))
