"""Tissues and their label values, in memory and in files."""

from enum import IntEnum

import numpy as np

from scripts.errors import InputError


class Tissue(IntEnum):
    """Labels in memory and in NIfTI files; 0 is background."""

    CSF = 1
    GM = 2
    WM = 3


# names in tables
TISSUES = tuple(tissue.name.lower() for tissue in Tissue)
# label values in iSeg files, by label in memory: background, CSF, GM, WM
ISEG_VALUES = (0, 10, 150, 250)
# labels that went through a resampling or a scale factor are off by rounding
LARGEST_ROUNDING = 1e-3
# affine of an iSeg volume except its origin: LAS, 1 mm; HDF5 files have no affine
ISEG_AFFINE = np.diag([-1.0, 1.0, 1.0, 1.0])


def tissue_labels(values: np.ndarray, path: str) -> np.ndarray:
    """Return labels 0 to 3 as uint8, of any shape, from iSeg's label values (0, 10, 150, 250) or from 0 to 3.

    Values may be off by LARGEST_ROUNDING.

    Raises:
        InputError: there is another value, or the two sets are mixed.
    """
    in_memory, in_iseg = {0, *Tissue}, set(ISEG_VALUES)
    remedy = f"use {ISEG_VALUES} or 0, 1, 2, 3 for background, CSF, GM, WM"
    whole = np.rint(values)
    if (np.abs(values - whole) <= LARGEST_ROUNDING).all():
        values = whole
    found = np.unique(values)
    if (unknown := found[~np.isin(found, [*in_memory, *in_iseg])]).size:
        raise InputError(f"{path}: label value {unknown[0]:.7g} isn't known; {remedy}")
    present = set(found.tolist())
    if present <= in_memory:
        return values.astype(np.uint8)
    if not present <= in_iseg:
        raise InputError(f"{path}: mixes iSeg's label values with 1, 2, 3; {remedy}")
    return np.searchsorted(ISEG_VALUES, values).astype(np.uint8)
