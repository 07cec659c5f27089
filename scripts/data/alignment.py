"""Whether the T2 of a subject shows its brain, and lies where its T1 does."""

import numpy as np
from scipy.ndimage import find_objects, uniform_filter

# share of a scan's brain that may be below 0, as a voxel here and there is after resampling
LARGEST_NEGATIVE_SHARE = 0.01
# mm by which T2 is moved to see whether it fits T1 as well elsewhere
STEP = 3
# Of what T1 tells of a T2 in its place, it tells this share at most of one moved by 3 mm. On synthetic scans it was
# 0.15 to 0.45, with a bias field, noise or blur as well; 0.4 to 0.6 where T2 was off by 1 mm, over 1 from 2 mm on.
LARGEST_SHARE_ELSEWHERE = 0.9
FEWEST_VOXELS = 10_000  # that are looked at; few agree by chance
LEVELS = 16
# mm over which intensities are made even, as a bias field that T1 and T2 have in common isn't
BIAS_WIDTH = 25
# share of the spread inside the brain within which two values are the same, as interpolation leaves them
SAME = 1e-3


def has_values(t1: np.ndarray, t2: np.ndarray) -> np.ndarray:
    """Where in the brain T2 shows anything: its value isn't the median outside, nor 0 in a scan with none below.

    Args:
        t1: (X, Y, Z), above 0 in the brain and there alone.
        t2: (X, Y, Z), stripped or not.

    Returns:
        A boolean for each value of `t2[t1 > 0]`.
    """
    brain = t1 > 0
    in_brain = t2[brain]
    tolerance = SAME * float(in_brain.std())
    outside = t2[~brain][::16]  # which is enough
    shown = np.abs(in_brain - np.median(outside)) > tolerance if outside.size else np.ones(in_brain.shape, bool)
    if np.count_nonzero(in_brain < -tolerance) <= LARGEST_NEGATIVE_SHARE * in_brain.size:
        shown &= np.abs(in_brain) > tolerance
    return shown


def not_registered(t1: np.ndarray, t2: np.ndarray, sizes: np.ndarray) -> str | None:
    """Warning of a T2 that fits T1 as well or better when it is moved, so that it hardly lies where T1 does.

    Measured is the mutual information of the two inside the brain, which, unlike a difference, doesn't ask which tissue
    is the brighter one.

    Args:
        t1: (X, Y, Z), above 0 in the brain and there alone.
        t2: (X, Y, Z), stripped or not.
        sizes: of a voxel along the three axes, in mm.

    Returns:
        None also where there are too few voxels to tell.
    """
    brain = t1 > 0
    shown = brain.copy()
    shown[brain] = has_values(t1, t2)
    box = find_objects(brain.view(np.uint8))[0]
    t1, t2, shown = t1[box], t2[box], shown[box]
    steps = np.maximum(1, np.round(STEP / np.asarray(sizes))).astype(int)
    if (np.array(t1.shape) <= 4 * steps).any():
        return None
    moves = [np.zeros(3, int), *(sign * steps * np.eye(3, dtype=int)[axis] for axis in range(3) for sign in (-1, 1))]
    # every second voxel along each axis is enough
    places = [
        tuple(slice(step + m, side - step + m, 2) for step, m, side in zip(steps, move, t1.shape, strict=True))
        for move in moves
    ]
    t1, moved = t1[places[0]], [t2[place] for place in places]
    # where a stripped T2 ends says how the two were stripped
    inside = (t1 > 0) & np.all([shown[place] for place in places], axis=0)
    if np.count_nonzero(inside) < FEWEST_VOXELS:
        return None
    width = np.maximum(1, np.round(BIAS_WIDTH / 2 / np.asarray(sizes))).astype(int)
    levels = _levels((t1 - _mean_around(t1, inside, width))[inside])
    mean = _mean_around(moved[0], inside, width)  # hardly another where it is moved
    in_place, *elsewhere = (_mutual_information(levels, _levels((t2 - mean)[inside])) for t2 in moved)
    if max(elsewhere) < LARGEST_SHARE_ELSEWHERE * in_place:
        return None
    return f"T2 fits T1 as well, or nearly, when it is moved by {STEP} mm; register it to T1"


def _mean_around(values: np.ndarray, mask: np.ndarray, width: np.ndarray) -> np.ndarray:
    """The mean over so many voxels around each of a mask, of those that are in it."""
    sums, weights = (uniform_filter(np.where(mask, each, 0).astype(np.float32), width) for each in (values, 1))
    return sums / np.maximum(weights, 1e-6)


def _levels(values: np.ndarray) -> np.ndarray:
    """The LEVELS-th part in which each value is, which is as large as the others."""
    return np.searchsorted(np.quantile(values, np.linspace(0, 1, LEVELS + 1)[1:-1]), values)


def _mutual_information(first: np.ndarray, second: np.ndarray) -> float:
    """In nats."""
    both = np.bincount(first * LEVELS + second, minlength=LEVELS**2).reshape(LEVELS, LEVELS) / len(first)
    independent = both.sum(1, keepdims=True) @ both.sum(0, keepdims=True)
    occur = both > 0
    return float((both[occur] * np.log(both[occur] / independent[occur])).sum())
