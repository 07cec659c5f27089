"""Tissue label maps, from which images are made."""

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
    require_different_names(paths, there)
    if names is None:
        return paths
    wanted = [str(name) for name in ensure_tuple(names)]
    if missing := sorted(set(wanted) - set(there)):
        raise InputError(f"--names {', '.join(missing)}: no such label map in {labels_dir}; it has {', '.join(there)}")
    return [path for path, name in zip(paths, there, strict=True) if name in wanted]


def require_different_names(paths: list[Path], names: list[str]) -> None:
    """Refuse label maps of which two would have one name."""
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"{path}: another label map would be called {name} too; rename one")
