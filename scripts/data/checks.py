"""Whether T1, T2 and label of a subject can be what they should be, and belong together."""

import logging
from collections.abc import Iterable

import numpy as np

from scripts.data.alignment import LARGEST_NEGATIVE_SHARE, has_values
from scripts.errors import InputError

logger = logging.getLogger(__name__)

# ml, CSF included; a scan that wasn't skull-stripped has more above 0: the head, and noise in the air around it
LARGEST_BRAIN = 2000
# share of the brain that may be without T2, where a label would be a guess: more than two masks of one brain differ by;
# the report warns of less
LARGEST_SHARE_WITHOUT_T2 = 0.25
# share of a label that may lie outside the brain; of more than a fifth of this a warning is given
LARGEST_SHARE_OUTSIDE = 0.25


def require_found_brain(t1: np.ndarray, label: np.ndarray, path: str) -> None:
    """Refuse a subject whose brain the published HDF5 layout can't convey: there T1's lowest value is background.

    Args:
        t1: (X, Y, Z), with background 0.
        label: labels 0 to 3 on the same grid.
        path: for the message.

    Raises:
        InputError: T1 is below 0 somewhere or isn't 0 in all corners, or as `require_label_of_brain`.
    """
    if t1.min() < 0 or t1[np.ix_([0, -1], [0, -1], [0, -1])].any():
        raise InputError(
            f"{path}: T1 isn't lowest, and the same, in all corners of the volume, so the brain can't be told from "
            f"its background; give a skull-stripped T1 without negative values, as HDF5 in the published layout"
        )
    require_label_of_brain(label, t1, path)


def require_label_of_brain(label: np.ndarray, t1: np.ndarray, path: str) -> None:
    """Refuse a label (X, Y, Z) with much of its tissues outside the brain of T1, by InputError; warn of some."""
    outside = np.count_nonzero(label[t1 <= 0]) / max(1, np.count_nonzero(label))
    told = f"{path}: {outside:.0%} of the label lies outside the brain of T1; check that the two belong together"
    if outside > LARGEST_SHARE_OUTSIDE:
        raise InputError(told)
    if outside > LARGEST_SHARE_OUTSIDE / 5:
        logger.warning(told)


def require_brain_only(t1: np.ndarray, affine: np.ndarray, path: str) -> None:
    """Refuse a T1 (X, Y, Z) that is above 0 nowhere, everywhere or in a whole head, or below 0 in many voxels.

    Raises:
        InputError: it is so.
    """
    brain = np.count_nonzero(t1 > 0)
    if not brain:
        raise InputError(f"{path}: T1 is nowhere above 0, so there is no brain in it; give a skull-stripped T1")
    volume = brain * abs(np.linalg.det(affine[:3, :3])) / 1000
    if volume > LARGEST_BRAIN:
        raise InputError(
            f"{path}: T1 is above 0 in {volume:,.0f} ml, more than any brain has; give a skull-stripped T1, which is 0 "
            f"outside the brain"
        )
    if brain == t1.size:
        raise InputError(
            f"{path}: T1 is above 0 everywhere, so the brain can't be told from its background; give a skull-stripped "
            f"T1, which is 0 outside the brain"
        )
    below = np.count_nonzero(t1 < 0)
    if below > LARGEST_NEGATIVE_SHARE * brain:
        raise InputError(
            f"{path}: T1 is below 0 in {below:,} voxels and above it in {brain:,}, so it doesn't show the brain; give "
            f"a skull-stripped T1, which is above 0 in the brain and 0 outside"
        )


def require_t2_of_brain(t1: np.ndarray, t2: np.ndarray, path: str) -> None:
    """Refuse a T2 (X, Y, Z) that shows little of the brain of T1, by InputError.

    Args:
        t1: (X, Y, Z), 0 outside the brain.
        t2: likewise, stripped or not.
        path: of T2, for the message.
    """
    missing = np.mean(~has_values(t1, t2))
    if missing > LARGEST_SHARE_WITHOUT_T2:
        raise InputError(
            f"{path}: T2 shows nothing in {missing:.0%} of the brain of T1; register it to T1, and give both one mask"
        )


def require_contrast(spreads: Iterable[float], t1_path: str) -> None:
    """Refuse a subject whose T1 or T2 doesn't vary inside the brain, by InputError; NaN counts as no spread."""
    for name, spread in zip(("T1", "T2"), spreads, strict=True):
        if not spread > 0:
            raise InputError(
                f"{t1_path}: the {name} of this subject is constant inside the brain; give the scan itself, not a mask"
            )
