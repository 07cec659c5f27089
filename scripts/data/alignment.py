"""Whether a T2 shows the brain of its T1, and is registered to it."""

import numpy as np
from scipy.ndimage import find_objects, uniform_filter

# largest share of the brain's voxels that may be below 0; resampling makes a few so
LARGEST_NEGATIVE_SHARE = 0.01
# mm by which T2 is moved to test whether it fits T1 elsewhere
STEP = 3
# largest mutual information of T1 and the moved T2, as a share of that in place. On synthetic scans, also with a bias
# field, noise or blur, it was 0.15 to 0.45; with T2 off by 1 mm 0.4 to 0.6, and from 2 mm on over 1.
LARGEST_SHARE_ELSEWHERE = 0.9
FEWEST_VOXELS = 10_000  # fewer may agree by chance
LEVELS = 16
# mm over which the local mean is removed: a bias field that T1 and T2 share would count as agreement
BIAS_WIDTH = 25
# tolerance for equal values after interpolation, as a share of the standard deviation in the brain
SAME = 1e-3


def has_values(t1: np.ndarray, t2: np.ndarray) -> np.ndarray:
    """Return where in the brain T2 has values: neither the median outside nor, unless T2 has negative values, 0.

    Args:
        t1: (X, Y, Z), above 0 only in the brain.
        t2: (X, Y, Z), skull-stripped or not.

    Returns:
        A boolean for each value of `t2[t1 > 0]`.
    """
    brain = t1 > 0
    in_brain = t2[brain]
    tolerance = SAME * float(in_brain.std())
    outside = t2[~brain][::16]  # enough for a median
    valid = np.abs(in_brain - np.median(outside)) > tolerance if outside.size else np.ones(in_brain.shape, bool)
    if np.count_nonzero(in_brain < -tolerance) <= LARGEST_NEGATIVE_SHARE * in_brain.size:
        valid &= np.abs(in_brain) > tolerance
    return valid


def not_registered(t1: np.ndarray, t2: np.ndarray, sizes: np.ndarray) -> str | None:
    """Return a warning if T2 fits T1 as well or better when it is moved, and so may not be registered.

    The fit is the mutual information inside the brain. Unlike a difference, it doesn't depend on which tissue is
    brighter.

    Args:
        t1: (X, Y, Z), above 0 only in the brain.
        t2: (X, Y, Z), skull-stripped or not.
        sizes: voxel size along the three axes, in mm.

    Returns:
        The warning; None if T2 fits best in place, or if there are too few voxels to decide.
    """
    brain = t1 > 0
    valid = brain.copy()
    valid[brain] = has_values(t1, t2)
    box = find_objects(brain.view(np.uint8))[0]
    t1, t2, valid = t1[box], t2[box], valid[box]
    steps = np.maximum(1, np.round(STEP / np.asarray(sizes))).astype(int)
    if (np.array(t1.shape) <= 4 * steps).any():
        return None
    moves = [np.zeros(3, int), *(sign * steps * np.eye(3, dtype=int)[axis] for axis in range(3) for sign in (-1, 1))]
    # every second voxel along each axis is enough
    crops = [
        tuple(slice(step + m, side - step + m, 2) for step, m, side in zip(steps, move, t1.shape, strict=True))
        for move in moves
    ]
    t1, moved = t1[crops[0]], [t2[crop] for crop in crops]
    # leave out the edge of a stripped T2, which depends on the masks and not on the tissues
    inside = (t1 > 0) & np.all([valid[crop] for crop in crops], axis=0)
    if np.count_nonzero(inside) < FEWEST_VOXELS:
        return None
    width = np.maximum(1, np.round(BIAS_WIDTH / 2 / np.asarray(sizes))).astype(int)
    levels = _levels((t1 - _mean_around(t1, inside, width))[inside])
    mean = _mean_around(moved[0], inside, width)  # nearly the same when it is moved
    in_place, *elsewhere = (_mutual_information(levels, _levels((t2 - mean)[inside])) for t2 in moved)
    if max(elsewhere) < LARGEST_SHARE_ELSEWHERE * in_place:
        return None
    return f"T2 fits T1 as well, or nearly, when it is moved by {STEP} mm; register it to T1"


def _mean_around(values: np.ndarray, mask: np.ndarray, width: np.ndarray) -> np.ndarray:
    """The mean over the masked voxels in a box around each voxel, `width` voxels wide."""
    sums, weights = (uniform_filter(np.where(mask, each, 0).astype(np.float32), width) for each in (values, 1))
    return sums / np.maximum(weights, 1e-6)


def _levels(values: np.ndarray) -> np.ndarray:
    """The quantile bin of each value, from 0 to LEVELS - 1."""
    return np.searchsorted(np.quantile(values, np.linspace(0, 1, LEVELS + 1)[1:-1]), values)


def _mutual_information(first: np.ndarray, second: np.ndarray) -> float:
    """The mutual information of two arrays of levels, in nats."""
    both = np.bincount(first * LEVELS + second, minlength=LEVELS**2).reshape(LEVELS, LEVELS) / len(first)
    independent = both.sum(1, keepdims=True) @ both.sum(0, keepdims=True)
    occur = both > 0
    return float((both[occur] * np.log(both[occur] / independent[occur])).sum())
