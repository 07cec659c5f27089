"""Checks that T1, T2 and label of a subject are plausible and belong together."""

import logging
from collections.abc import Mapping

import numpy as np
from scipy.ndimage import binary_erosion, find_objects
from scipy.ndimage import label as connected
from scipy.stats import skew

from scripts.data.alignment import FEWEST_VOXELS, LARGEST_NEGATIVE_SHARE, SAME, has_values
from scripts.errors import InputError
from scripts.tissues import Tissue

logger = logging.getLogger(__name__)

# ml, with CSF; without skull-stripping more is above 0: the head, and noise in the air around it
LARGEST_BRAIN = 2000
# largest share of the brain without T2, where a label would be a guess; two masks of one brain differ by less, and the
# report warns of less
LARGEST_SHARE_WITHOUT_T2 = 0.25
# share of the voxels outside the brain in which a stripped T2 may show something: masks differ, and boxes are tight
LARGEST_SHARE_SHOWN = 0.2
# largest share of a label outside the brain; a fifth of it gives a warning
LARGEST_SHARE_OUTSIDE = 0.25
# CSF is a tail of dark voxels in T1 and of bright ones in T2, so T1 is skewed to the left of T2: by 0.4 and more on
# twelve synthetic scans, by 0.07 and 0.29 on two averages of infants' scans
LARGEST_SKEW_OF_T1 = 0.1
# voxels at the edge of the brain, of which a mask may hold something else
EDGE = 3
# voxels at either end that may be artefacts, and by how much they may widen the spread: by at most 1 % on twelve
# synthetic scans and two averages of infants' scans
EXTREME_SHARE = 0.001
LARGEST_GROWTH_OF_SPREAD = 1.15


def require_found_brain(t1: np.ndarray, label: np.ndarray, path: str) -> None:
    """Refuse a subject unless its brain can be told from the background in the published HDF5 layout.

    That layout has no mask: the background is T1's lowest value, found in the corners.

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
    """Raise InputError if much of a label (X, Y, Z) is outside the brain; warn of a smaller share."""
    outside = np.count_nonzero(label[t1 <= 0]) / max(1, np.count_nonzero(label))
    message = (
        f"{path}: {outside:.0%} of the label lies outside the brain of the scan; check that the two belong together"
    )
    if outside > LARGEST_SHARE_OUTSIDE:
        raise InputError(message)
    if outside > LARGEST_SHARE_OUTSIDE / 5:
        logger.warning(message)


def require_brain_only(scan: np.ndarray, affine: np.ndarray, path: str, name: str = "T1") -> None:
    """Refuse a scan (X, Y, Z), called T1 or T2, that isn't skull-stripped.

    Raises:
        InputError: it is above 0 nowhere, everywhere or in a whole head, or below 0 in many voxels.
    """
    brain = np.count_nonzero(scan > 0)
    if not brain:
        raise InputError(f"{path}: {name} is nowhere above 0, so it has no brain; give a skull-stripped {name}")
    volume = brain * abs(np.linalg.det(affine[:3, :3])) / 1000
    if volume > LARGEST_BRAIN:
        raise InputError(
            f"{path}: {name} is above 0 in {volume:,.0f} ml, more than any brain has; give a skull-stripped {name}, "
            f"which is 0 outside the brain"
        )
    if brain == scan.size:
        raise InputError(
            f"{path}: {name} is above 0 everywhere, so the brain can't be told from its background; give a "
            f"skull-stripped {name}, which is 0 outside the brain"
        )
    below = np.count_nonzero(scan < 0)
    if below > LARGEST_NEGATIVE_SHARE * brain:
        raise InputError(
            f"{path}: {name} is below 0 in {below:,} voxels and above it in {brain:,}, so it doesn't show the brain; "
            f"give a skull-stripped {name}, which is above 0 in the brain and 0 outside"
        )


def fill_holes(scan: np.ndarray, where: np.ndarray, path: str, name: str) -> None:
    """Give voxels of the brain that are 0 the lowest intensity of the brain, in place, and log how many there are.

    Such holes are CSF, if a scan was scaled or clipped so that its darkest tissue became 0.

    Args:
        scan: (X, Y, Z), 0 outside the brain.
        where: bool (X, Y, Z), what may be filled: where the other contrast shows something, and a mask has no gap.
        path, name: of the scan, for the message; the name is T1 or T2.
    """
    brain = scan > 0
    box = find_objects(brain.view(np.uint8))[0]
    regions, _ = connected(np.pad(~brain[box], 1, constant_values=True))
    holes = (regions > 0) & (regions != regions[0, 0, 0])
    holes = holes[1:-1, 1:-1, 1:-1] & where[box]
    if holes.any():
        scan[box][holes] = scan[brain].min()
        logger.warning("%s: %d voxels inside the brain are 0 in %s; they count as brain", path, holes.sum(), name)


def require_t2_of_brain(t1: np.ndarray, t2: np.ndarray, path: str) -> None:
    """Raise InputError if T2 has no values in much of the brain of T1.

    Args:
        t1: (X, Y, Z), 0 outside the brain.
        t2: (X, Y, Z), skull-stripped or not.
        path: of T2, for the message.
    """
    missing = np.mean(~has_values(t1, t2))
    if missing > LARGEST_SHARE_WITHOUT_T2:
        raise InputError(
            f"{path}: T2 shows nothing in {missing:.0%} of the brain of T1; register it to T1, and mask both alike"
        )


def shows_more(t1: np.ndarray, t2: np.ndarray) -> bool:
    """Return whether a T2 (X, Y, Z) isn't skull-stripped, unlike its T1, which is above 0 only in the brain."""
    brain = t1 > 0
    outside = t2[~brain]
    if not outside.size:
        return False
    differs = np.abs(outside - np.median(outside[::16])) > SAME * float(t2[brain].std())
    return bool(differs.mean() > LARGEST_SHARE_SHOWN)


def require_contrast(spreads: Mapping[str, float], t1_path: str) -> None:
    """Raise InputError if T1 or T2, by name, is constant inside the brain: its spread isn't above 0, or is NaN."""
    for name, spread in spreads.items():
        if not spread > 0:
            raise InputError(
                f"{t1_path}: the {name} of this subject is constant inside the brain; give the scan itself, not a mask"
            )


def exchanged(t1: np.ndarray, t2: np.ndarray) -> str | None:
    """Return a warning if T1 and T2 seem to be exchanged, by the skewness of their intensities in the brain.

    Args:
        t1, t2: (X, Y, Z); T1 is above 0 only in the brain.
    """
    brain = t1 > 0
    if not _skewed_like_exchanged(t1, t2, brain):
        return None
    # the edge of a mask may hold bone and skin, so what is within has to agree
    box = find_objects(brain.view(np.uint8))[0]
    within = binary_erosion(brain[box], iterations=EDGE)
    if np.count_nonzero(within) >= FEWEST_VOXELS and not _skewed_like_exchanged(t1[box], t2[box], within):
        return None
    return "the intensities of T1 look like those of a T2, and the reverse; swap the files if they were mixed up"


def _skewed_like_exchanged(t1: np.ndarray, t2: np.ndarray, brain: np.ndarray) -> bool:
    """Whether T1 is skewed to the right of T2 in a brain (X, Y, Z)."""
    # the outermost voxels are artefacts more often than tissue; every eighth voxel is enough
    samples = [np.sort(each[brain][::8]).astype(np.float64) for each in (t1, t2)]
    end = 1 + len(samples[0]) // 1000
    samples = [sample[end:-end] for sample in samples]
    if len(samples[0]) < FEWEST_VOXELS // 8 or not all(map(np.ptp, samples)):
        return False
    first, second = map(skew, samples)
    return bool(first > second + LARGEST_SKEW_OF_T1)


def extreme_voxels(scans: Mapping[str, np.ndarray]) -> str | None:
    """Return a warning if a few voxels of T1 or T2 greatly widen its spread in the brain, by which it is normalised.

    Args:
        scans: T1, T2 or both, by name, (X, Y, Z); the first is above 0 only in the brain.
    """
    brain = next(iter(scans.values())) > 0
    for name, values in ((name, scan[brain]) for name, scan in scans.items()):
        low, high = np.quantile(values, (EXTREME_SHARE, 1 - EXTREME_SHARE))
        extreme = (values < low) | (values > high)
        if len(values) >= FEWEST_VOXELS and values.std() > LARGEST_GROWTH_OF_SPREAD * values[~extreme].std():
            return (
                f"the {np.count_nonzero(extreme):,} most extreme voxels of {name}, from {values.min():g} to "
                f"{values.max():g}, distort its normalisation; clip them"
            )
    return None


def unlike_its_tissues(label: np.ndarray, t1: np.ndarray, t2: np.ndarray) -> str | None:
    """Return a warning if what a label calls CSF is neither the darkest tissue in T1 nor the brightest in T2.

    Args:
        label: 0 background, 1 CSF, 2 GM, 3 WM, (X, Y, Z), on the grid of T1 and T2.
    """
    present = [tissue for tissue in Tissue if (label == tissue).any()]
    t1_means, t2_means = ([each[label == tissue].mean() for tissue in present] for each in (t1, t2))
    if len(t1_means) < len(Tissue) or t1_means[0] == min(t1_means) or t2_means[0] == max(t2_means):
        return None
    dark, bright = Tissue(1 + int(np.argmin(t1_means))).name, Tissue(1 + int(np.argmax(t2_means))).name
    return (
        f"what the label calls CSF is neither darkest in T1 ({dark} is) nor brightest in T2 ({bright} is); check that "
        f"its values are 1 CSF, 2 GM, 3 WM"
    )
