"""Label maps of heads with all structures, and smooth boundaries between the tissues."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter, label

from scripts.data.volumes import read_volume
from scripts.errors import InputError
from scripts.synthesis.label_maps import label_map_name, require_usable
from scripts.tissues import ISEG_VALUES, LARGEST_ROUNDING, Tissue


class Structure(NamedTuple):
    """A structure of the brain that gets an intensity of its own.

    Attributes:
        tissue: the tissue that it is made of.
        numbers: its labels in FreeSurfer's table, left and right.
        hindbrain: whether scans cut to the cerebrum lack it.
    """

    tissue: Tissue
    numbers: tuple[int, ...]
    hindbrain: bool = False


# the number of a structure in memory is its place in this table, from 1; 0 is outside the brain
STRUCTURES = {
    "CSF around the brain": Structure(Tissue.CSF, (24, 30, 62, 257)),
    "ventricles": Structure(Tissue.CSF, (4, 5, 14, 31, 43, 44, 63, 72)),
    "fourth ventricle": Structure(Tissue.CSF, (15,), hindbrain=True),
    "cortex": Structure(Tissue.GM, (3, 42, 19, 55, 20, 56)),
    "thalamus": Structure(Tissue.GM, (9, 10, 48, 49)),
    "caudate": Structure(Tissue.GM, (11, 50)),
    "putamen": Structure(Tissue.GM, (12, 51)),
    "pallidum": Structure(Tissue.GM, (13, 52)),
    "hippocampus and amygdala": Structure(Tissue.GM, (17, 18, 53, 54)),
    "basal forebrain": Structure(Tissue.GM, (26, 58, 27, 59, 136, 137, 163, 164)),
    "cerebellar cortex": Structure(Tissue.GM, (8, 47), hindbrain=True),
    "cerebral white matter": Structure(Tissue.WM, (2, 41, 25, 57, 77, 78, 79, 80, 85, 251, 252, 253, 254, 255)),
    "cerebellar white matter": Structure(Tissue.WM, (7, 46), hindbrain=True),
    "brain stem": Structure(Tissue.WM, (16,), hindbrain=True),
    "ventral diencephalon": Structure(Tissue.WM, (28, 60)),
}
NAMES = tuple(STRUCTURES)
# by number in memory
TISSUE_OF = np.array([0, *(structure.tissue for structure in STRUCTURES.values())], dtype=np.uint8)
IN_HINDBRAIN = np.array([False, *(structure.hindbrain for structure in STRUCTURES.values())])
# a map of three tissues has one structure for each
MAIN = {Tissue.CSF: "CSF around the brain", Tissue.GM: "cortex", Tissue.WM: "cerebral white matter"}
# from here on, labels are of the head around the brain: air, bone, skin and so on
OUTER_LABELS = range(500, 532)
# of the quantiles of a map
PERCENT = np.linspace(0, 1, 101)
# mm around the brain that are kept
RIM = 10
# mm from the brain's tissue to the CSF around it that is kept; beyond it is the spinal canal
CSF_AROUND = 12


@dataclass(frozen=True, eq=False)
class StructureMap:
    """The shape of a head, cropped to the brain and RIM around it, on axes to the right, the front and the top.

    The three boundaries are signed distances in voxels, float16, (3, X, Y, Z), negative inside, smoothed a little:
    of WM against GM, also where there is CSF; of GM and WM against all else; of the brain against all else. So tissue
    can be moved by parts of a voxel, and each voxel has shares of tissues.

    Attributes:
        name: of the file, without suffix.
        boundaries: see above.
        nearest: uint8 (3, X, Y, Z), number of the nearest structure that is CSF, GM and WM.
        outer: uint8 (X, Y, Z), label of the head around the brain, from 1, by its place in OUTER_LABELS; 0 elsewhere.
        sizes: voxels of each structure, by number.
        tissue_quantiles, white_quantiles: percentiles, 0 to 100, of the second boundary over the brain and of the first
            over GM and WM: by how much to move it so that the tissue within gets a given share.
    """

    name: str
    boundaries: np.ndarray
    nearest: np.ndarray
    outer: np.ndarray
    sizes: np.ndarray
    tissue_quantiles: np.ndarray
    white_quantiles: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Sides in voxels."""
        return self.outer.shape


def tissues_of_structures(values: np.ndarray, path: str | Path) -> np.ndarray:
    """Return the tissue of each voxel, uint8, 0 outside the brain, from FreeSurfer's numbers or from three tissues.

    Raises:
        InputError: a number isn't known.
    """
    return TISSUE_OF[_structures_and_outer(values, path)[0]]


def _structures_and_outer(values: np.ndarray, path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the structures in memory and of the labels around the brain, from the labels of a file."""
    numbers = {number: NAMES.index(name) + 1 for name, structure in STRUCTURES.items() for number in structure.numbers}
    values = np.where(np.abs(values - np.rint(values)) <= LARGEST_ROUNDING, np.rint(values), values)
    found = np.unique(values)
    tissues_only = next((known for known in (range(4), ISEG_VALUES) if {*found} <= {*known}), None)
    if tissues_only is not None:
        numbers = {tissues_only[tissue]: NAMES.index(name) + 1 for tissue, name in MAIN.items()}
    if (unknown := found[~np.isin(found, [0, *numbers, *OUTER_LABELS])]).size:
        raise InputError(f"{path}: label value {unknown[0]:.7g} isn't known; give a map like FreeSurfer's aseg")
    table = np.zeros(OUTER_LABELS.stop, dtype=np.uint8)
    for number, place in numbers.items():
        table[number] = place
    outer = np.zeros_like(table)
    outer[OUTER_LABELS.start :] = np.arange(len(OUTER_LABELS)) + 1
    values = values.astype(np.int16)
    return table[values], outer[values]


def _signed(inside: np.ndarray) -> np.ndarray:
    """Distance in voxels to the boundary, negative inside."""
    return np.where(inside, 0.5 - distance_transform_edt(inside), distance_transform_edt(~inside) - 0.5)


def read_head(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a label map of a head or a brain, on axes to the right, the front and the top.

    CSF of the spinal canal and single voxels in the neck aren't of the brain.

    Args:
        path: Analyze or NIfTI, with FreeSurfer's numbers, or with those of three tissues (0 to 3 or iSeg's values).

    Returns:
        uint8 (X, Y, Z) each: the number of the structure, 0 outside the brain; the label of the head around the brain,
        from 1, by its place in OUTER_LABELS; where the spinal CSF is.

    Raises:
        InputError: as `read_volume`, a number isn't known, a tissue is missing, or the voxels aren't near 1 mm.
    """
    path = Path(path)
    values, affine = read_volume(str(path))
    structures, outer = _structures_and_outer(values, path)
    require_usable(path, TISSUE_OF[structures], affine)
    structures, outer = (
        np.asarray(nib.as_closest_canonical(nib.Nifti1Image(each, affine)).dataobj) for each in (structures, outer)
    )
    parts, _ = label(structures)
    brain = parts == np.bincount(parts[parts > 0]).argmax()
    brain &= distance_transform_edt(TISSUE_OF[structures * brain] <= Tissue.CSF) <= CSF_AROUND
    return structures * brain, outer, ((structures > 0) & ~brain).astype(np.uint8)


def read_structure_map(path: str | Path) -> StructureMap:
    """Read a label map of a head or a brain, and measure its boundaries.

    Args:
        path: see `read_head`.

    Raises:
        InputError: as `read_head`.
    """
    structures, outer, _ = read_head(path)
    structures, outer = np.pad(structures, RIM), np.pad(outer, RIM)
    box = find_objects((structures > 0).view(np.uint8))[0]
    box = tuple(slice(side.start - RIM, side.stop + RIM) for side in box)
    structures, outer = structures[box], outer[box]
    tissue = TISSUE_OF[structures]
    distances, nearest = [], []
    for which in Tissue:
        distance, indices = distance_transform_edt(tissue != which, return_indices=True)
        distances.append(distance)
        nearest.append(structures[tuple(indices)])
    white = distances[Tissue.WM - 1] - distances[Tissue.GM - 1]
    # between two voxels the boundary is half a voxel from each centre; in CSF it lies where both are as near
    white = np.where(tissue > Tissue.CSF, np.sign(white) * (np.abs(white) - 0.5), white)
    boundaries = np.stack(
        [gaussian_filter(each, 0.4) for each in (white, _signed(tissue > Tissue.CSF), _signed(tissue > 0))]
    )
    return StructureMap(
        name=label_map_name(Path(path)),
        boundaries=boundaries.astype(np.float16),
        nearest=np.stack(nearest),
        outer=outer,
        sizes=np.bincount(structures[structures > 0], minlength=len(STRUCTURES) + 1),
        tissue_quantiles=np.quantile(boundaries[1, tissue > 0], PERCENT),
        white_quantiles=np.quantile(boundaries[0, tissue > Tissue.CSF], PERCENT),
    )
