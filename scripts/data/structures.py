"""Label maps with all structures of the brain, by FreeSurfer's numbers, and the tissues that they are made of."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.errors import InputError
from scripts.tissues import ISEG_VALUES, LARGEST_ROUNDING, Tissue, tissue_labels

# the tissues of BIDS's own list of labels, which segmentations without a table have: 1 GM, 2 WM, 3 CSF
BIDS_TISSUES = np.array([0, Tissue.GM, Tissue.WM, Tissue.CSF], dtype=np.uint8)
# choices of the setting label_numbers
LABEL_NUMBERS = ("tissues", "freesurfer", "bids")


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


def tissues_of_structures(values: np.ndarray, path: str | Path) -> np.ndarray:
    """Return the tissue of each voxel, uint8, 0 outside the brain, from FreeSurfer's numbers or from three tissues.

    Raises:
        InputError: a number isn't known.
    """
    return TISSUE_OF[structures_and_outer(values, path)[0]]


def structures_and_outer(values: np.ndarray, path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the number in memory of each voxel's structure and of its label around the brain, from a file's labels.

    Args:
        values: FreeSurfer's numbers, or those of three tissues (0 to 3 or iSeg's values), of any shape.
        path: for messages.

    Returns:
        uint8 each: the place in STRUCTURES and the place in OUTER_LABELS, from 1, and 0 elsewhere.

    Raises:
        InputError: a number isn't known.
    """
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


def tissues_of_labels(values: np.ndarray, path: str, numbers: str) -> np.ndarray:
    """Return the tissue of each voxel, uint8, 0 outside the brain, from the labels of a file.

    Args:
        values: labels, of any shape.
        path: for messages.
        numbers: what they mean: `tissues`, see `tissue_labels`; `freesurfer`, see `tissues_of_structures`; or `bids`:
            1 GM, 2 WM, 3 CSF.

    Raises:
        InputError: a number isn't known.
    """
    if numbers == "freesurfer":
        return tissues_of_structures(values, path)
    labels = tissue_labels(values, path)
    if numbers == "tissues":
        return labels
    if (labels != np.rint(values)).any():
        raise InputError(f"{path}: has iSeg's label values, not those of BIDS; leave --label_numbers out")
    return BIDS_TISSUES[labels]
