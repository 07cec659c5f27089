"""Whether the T2 of a subject lies where its T1 does."""

import numpy as np

# mm by which T2 is moved to see whether it fits T1 better elsewhere
STEP = 3
# On synthetic scans what T1 tells of T2 where it lies is 2.5 to 3 times what it tells of it 3 mm further on; 1.5 to 2
# times where T2 is off by 1 mm, and as much or less where it is off by 2 mm or more. Little of either is noise.
LARGEST_SHARE_ELSEWHERE = 0.9
FEWEST_VOXELS = 10_000  # that are looked at; few agree by chance
LEVELS = 16


def has_values(t1: np.ndarray, t2: np.ndarray) -> np.ndarray:
    """Where T2 shows anything: it hasn't the value there that it has in the middle outside the brain, mostly 0.

    Args:
        t1: (X, Y, Z), above 0 in the brain and there alone.
        t2: (X, Y, Z); in one that isn't stripped nearly all voxels have values.

    Returns:
        A boolean (X, Y, Z).
    """
    outside = t2[t1 <= 0][::16]  # which is enough
    return t2 != np.median(outside) if outside.size else np.ones(t2.shape, bool)


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
    steps = np.maximum(1, np.round(STEP / np.asarray(sizes))).astype(int)
    if (np.array(t1.shape) <= 4 * steps).any():
        return None
    shown = has_values(t1, t2)
    moves = [np.zeros(3, int), *(sign * steps * np.eye(3, dtype=int)[axis] for axis in range(3) for sign in (-1, 1))]
    # every second voxel along each axis is enough
    places = [
        tuple(slice(step + m, side - step + m, 2) for step, m, side in zip(steps, move, t1.shape, strict=True))
        for move in moves
    ]
    # where a stripped T2 ends says how the two were stripped
    inside = np.all([t1[places[0]] > 0, *(shown[place] for place in places)], axis=0)
    if np.count_nonzero(inside) < FEWEST_VOXELS:
        return None
    levels = _levels(t1[places[0]][inside])
    in_place, *others = (_mutual_information(levels, _levels(t2[place][inside])) for place in places)
    elsewhere = max(others)
    if elsewhere <= LARGEST_SHARE_ELSEWHERE * in_place:
        return None
    return f"T2 tells {elsewhere / in_place:.1f} times as much of T1 when moved by {STEP} mm as in its place"


def _levels(values: np.ndarray) -> np.ndarray:
    """The LEVELS-th part in which each value is, which is as large as the others."""
    return np.searchsorted(np.quantile(values, np.linspace(0, 1, LEVELS + 1)[1:-1]), values)


def _mutual_information(first: np.ndarray, second: np.ndarray) -> float:
    """In nats."""
    both = np.bincount(first * LEVELS + second, minlength=LEVELS**2).reshape(LEVELS, LEVELS) / len(first)
    independent = both.sum(1, keepdims=True) @ both.sum(0, keepdims=True)
    occur = both > 0
    return float((both[occur] * np.log(both[occur] / independent[occur])).sum())
