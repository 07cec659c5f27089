"""`python -m scripts synthesize`: subjects with T1, T2 and label, made from tissue label maps of real brains."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.utils import ensure_tuple
from tqdm import tqdm

from scripts.data.volumes import read_volume
from scripts.errors import InputError, require_whole_numbers
from scripts.files import made_already, whole_files
from scripts.results.tables import markdown_table
from scripts.synthesis import APPEARANCES, histogram_overlap, six_month_subject
from scripts.tissues import Tissue, tissue_labels

SUFFIXES = (".nii.gz", ".nii", ".hdr")
# voxel sides in mm between which the smoothness of noise, texture and myelination, which is in voxels, makes sense
VOXEL_SIDES = (0.7, 1.5)


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A tissue label map.

    Attributes:
        name: that of its file, without suffix.
        label: uint8 0 background, 1 CSF, 2 GM, 3 WM, (X, Y, Z), axes to the right, the front and the top.
        affine: 4 x 4, from voxels to RAS mm.
    """

    name: str
    label: np.ndarray
    affine: np.ndarray


def read_label_map(path: str | Path) -> LabelMap:
    """Read a label map.

    Args:
        path: Analyze or NIfTI, values 0 to 3 or those of iSeg.

    Raises:
        InputError: as `read_volume` and `tissue_labels`, or a tissue is missing, or the voxels aren't near 1 mm.
    """
    path = Path(path)
    values, affine = read_volume(str(path))
    label = tissue_labels(values, str(path))
    if missing := [tissue.name for tissue in Tissue if not (label == tissue).any()]:
        raise InputError(f"{path}: has no {', '.join(missing)}; give a label map of CSF, GM and WM")
    sides = nib.affines.voxel_sizes(affine)
    if sides.min() < VOXEL_SIDES[0] or sides.max() > VOXEL_SIDES[1]:
        raise InputError(f"{path}: voxels of {' x '.join(f'{side:g}' for side in sides)} mm; resample it to 1 mm")
    image = nib.as_closest_canonical(nib.Nifti1Image(label, affine))
    return LabelMap(_name(path), np.asarray(image.dataobj), image.affine)


def _name(path: Path) -> str:
    return path.name.removesuffix(next(suffix for suffix in SUFFIXES if path.name.endswith(suffix)))


def find_label_maps(labels_dir: str, names: str | Sequence[str] | None = None) -> list[Path]:
    """The label maps in a folder, by name.

    Args:
        labels_dir: the folder.
        names: of those to take, without suffix; all of them if not given.

    Raises:
        InputError: there is none, or two have one name, or one of the names has none.
    """
    paths = sorted(path for path in Path(labels_dir).glob("*") if path.name.endswith(SUFFIXES) and path.name[0] != ".")
    if not paths:
        raise InputError(f"{labels_dir}: has no label map ({', '.join(SUFFIXES)}); name the folder that holds them")
    there = [_name(path) for path in paths]
    _require_different(paths, there)
    if names is None:
        return paths
    wanted = [str(name) for name in ensure_tuple(names)]
    if missing := sorted(set(wanted) - set(there)):
        raise InputError(f"--names {', '.join(missing)}: no such label map in {labels_dir}; it has {', '.join(there)}")
    return [path for path, name in zip(paths, there, strict=True) if name in wanted]


def _require_different(paths: list[Path], names: list[str]) -> None:
    """Refuse label maps of which two would have one name."""
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"{path}: another label map would be called {name} too; rename one")


def synthesize(
    labels_dir: str,
    output_dir: str,
    contrast: str = "nominal",
    draws: int = 1,
    seed: int = 0,
    names: str | Sequence[str] | None = None,
) -> None:
    """Write a subject, T1, T2 and label, for each label map: 6-month contrast on the shape of that brain.

    A subject depends on the seed, its own name and draw only, and is called as the label map, with `-2` and so on added
    to further draws. Files that are there already are kept. The overlaps of histograms that came out are printed.

    Args:
        labels_dir: label maps of skull-stripped brains (0 background, 1 CSF, 2 GM, 3 WM, or as iSeg has them) of about
            1 mm and the size of a 6-month-old's brain.
        output_dir: the folder to write to.
        contrast: 'nominal', 'varied' or 'patchwork', see `scripts.synthesis`.
        draws: subjects that are made of each label map.
        seed: for other images.
        names: of the label maps to take, without suffix; all of them if not given.

    Raises:
        InputError: a setting can't be, as `find_label_maps` and `read_label_map`, or a file of that name is there that
            isn't the same subject.
    """
    require_whole_numbers(1, draws=draws)
    require_whole_numbers(0, seed=seed)
    if contrast not in APPEARANCES:
        raise InputError(f"--contrast {contrast}: must be {', '.join(APPEARANCES)}")
    wanted = [(path, draw) for path in find_label_maps(labels_dir, names) for draw in range(draws)]
    subjects = [_name(path) + (f"-{draw + 1}" if draw else "") for path, draw in wanted]
    _require_different([path for path, _ in wanted], subjects)
    rows = []
    for (path, draw), subject in tqdm(list(zip(wanted, subjects, strict=True)), desc="synthetic subjects"):
        brain = read_label_map(path)
        files = {kind: Path(output_dir) / f"subject-{subject}-{kind}.nii.gz" for kind in ("T1", "T2", "label")}
        content = hashlib.sha256(brain.label.tobytes()).hexdigest()[:12]
        description = f"synthetic {contrast} seed {seed} draw {draw + 1} of label map {content}"
        if made_already(files.values(), description):
            continue
        rng = np.random.default_rng([seed, draw, *brain.name.encode()])
        volumes = six_month_subject(brain.label, APPEARANCES[contrast](brain.label, rng), rng)
        with whole_files(output_dir) as temporary:
            for kind, values in (volumes | {"label": brain.label}).items():
                image = nib.Nifti1Image(values, brain.affine)
                image.header.set_xyzt_units("mm")
                image.header["descrip"] = description.encode()
                nib.save(image, temporary / files[kind].name)
        rows.append({"subject": subject} | _overlaps(volumes, brain.label))
    if rows:
        print(markdown_table(rows))
    print(f"synthetic subjects: {len(wanted)} in {output_dir}, {len(rows)} of them new")


def _overlaps(volumes: dict[str, np.ndarray], label: np.ndarray) -> dict[str, float]:
    """Overlaps of the histograms of two tissues each in T1 and T2."""
    return {
        f"{kind} {first.name}/{second.name}": histogram_overlap(values[label == first], values[label == second])
        for kind, values in volumes.items()
        for first, second in ((Tissue.GM, Tissue.WM), (Tissue.CSF, Tissue.GM), (Tissue.CSF, Tissue.WM))
    }
