"""Tissue label maps, from which images are synthesized."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.utils import ensure_tuple

from scripts.data.volumes import read_volume
from scripts.errors import InputError
from scripts.tissues import Tissue, tissue_labels

SUFFIXES = (".nii.gz", ".nii", ".hdr")
# range of voxel sides in mm for which noise, texture and myelination are plausible; their smoothness is set in voxels
VOXEL_SIDES = (0.7, 1.5)


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A tissue label map.

    Attributes:
        name: its file name without suffix.
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
    require_usable(path, label, affine)
    image = nib.as_closest_canonical(nib.Nifti1Image(label, affine))
    return LabelMap(label_map_name(path), np.asarray(image.dataobj), image.affine)


def require_usable(path: Path, label: np.ndarray, affine: np.ndarray) -> None:
    """Raise InputError if a label (X, Y, Z, 0 to 3) lacks a tissue, or its voxels aren't near 1 mm."""
    if missing := [tissue.name for tissue in Tissue if not (label == tissue).any()]:
        raise InputError(f"{path}: has no {', '.join(missing)}; give a label map of CSF, GM and WM")
    sides = nib.affines.voxel_sizes(affine)
    if sides.min() < VOXEL_SIDES[0] or sides.max() > VOXEL_SIDES[1]:
        raise InputError(f"{path}: voxels of {' x '.join(f'{side:g}' for side in sides)} mm; resample it to 1 mm")


def label_map_name(path: Path) -> str:
    """Return the file name without its suffix, one of SUFFIXES."""
    return path.name.removesuffix(next(suffix for suffix in SUFFIXES if path.name.endswith(suffix)))


def find_label_maps(labels_dir: str, names: str | Sequence[str] | None = None, option: str = "names") -> list[Path]:
    """Return the label maps in a folder, sorted by name.

    Args:
        labels_dir: the folder.
        names: label maps to return, without suffix; all by default.
        option: the setting that gives `names`, for messages.

    Raises:
        InputError: the folder has no label map, two with one name, or none with one of the names.
    """
    paths = sorted(path for path in Path(labels_dir).glob("*") if path.name.endswith(SUFFIXES) and path.name[0] != ".")
    if not paths:
        raise InputError(f"{labels_dir}: has no label map ({', '.join(SUFFIXES)}); name the folder that holds them")
    available = [label_map_name(path) for path in paths]
    require_different_names(paths, available)
    if names is None:
        return paths
    wanted = [str(name) for name in ensure_tuple(names)]
    if missing := sorted(set(wanted) - set(available)):
        raise InputError(
            f"--{option} {', '.join(missing)}: no such label map in {labels_dir}; it has {', '.join(available)}"
        )
    return [path for path, name in zip(paths, available, strict=True) if name in wanted]


def require_different_names(paths: list[Path], names: list[str]) -> None:
    """Raise InputError if two label maps would have one name."""
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"{path}: another label map would be called {name} too; rename one")
