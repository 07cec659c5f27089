"""A head around a phantom's brain, so that its scans are as a scanner gives them."""

import numpy as np
from scipy.ndimage import affine_transform, distance_transform_edt, gaussian_filter
from scipy.spatial.transform import Rotation

from scripts.synthesis.contrast import smooth_noise

# voxels of 1 mm that a phantom's volume is widened by, to the left, to the front and so on, for skin and face
MARGIN = (16, 16, 0)
# mm; an infant's bone is thin
BONE, SCALP = 2.5, 5.0
# intensities beside those of the brain: bone, scalp, soft tissue, eyes
IN_T1, IN_T2 = (30, 330, 210, 90), (30, 220, 140, 620)
# mm from the middle of the brain, to the left, front and top, and half axes
FACE = ((0, 58, -48), (44, 36, 46))
EYES = (((-30, 78, -30), (11, 11, 11)), ((30, 78, -30), (11, 11, 11)))
NECK = ((0, -18), (44, 42))
# of the noise in the air, and of the bias field
NOISE, BIAS = 8, 0.08
# degrees and mm by which the child moves between the two scans, at most
LARGEST_TURN, LARGEST_SHIFT = 12.0, 15.0


def with_margin(values: np.ndarray) -> np.ndarray:
    """Return a phantom's volume (X, Y, Z) on the grid of its raw T1."""
    return np.pad(values, [(side, side) for side in MARGIN])


def raw_scans(t1: np.ndarray, t2: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return T1 and T2 of the head around a brain: with noise and a bias field, and T2 turned and moved.

    Args:
        t1, t2: of the brain, 0 around it, (X, Y, Z), voxels of 1 mm, axes to the left, the front and the top.
        rng: the source of all randomness.

    Returns:
        int16 (X + 32, Y + 32, Z) each: T1 and T2 on one grid; and the matrix in mm from places in T1 to those in T2.
    """
    t1, t2 = map(with_margin, (t1, t2))
    brain = t1 > 0
    places = np.indices(brain.shape, dtype=np.float32) - np.argwhere(brain).mean(0)[:, None, None, None].astype(
        np.float32
    )
    outside = distance_transform_edt(~brain)
    classes = np.zeros(brain.shape, np.uint8)
    lowest = places[2][brain].min()
    neck = sum(((axis - c) / a) ** 2 for axis, c, a in zip(places, *NECK, strict=False)) < 1
    classes[(neck & (places[2] < lowest + 40)) | _inside(places, *FACE)] = 3
    classes[outside <= BONE + SCALP] = 2
    classes[outside <= BONE] = 1
    for eye in EYES:
        classes[_inside(places, *eye) & (outside > BONE)] = 4
    heads = []
    for scan, outer in ((t1, IN_T1), (t2, IN_T2)):
        around = np.array([0, *outer], np.float32)[classes] * (1 + 0.15 * smooth_noise(rng, brain.shape, 5))
        around = gaussian_filter(around, 0.6) * np.exp(BIAS * smooth_noise(rng, brain.shape, 40))
        heads.append(np.where(brain, scan, np.abs(around + rng.normal(0, NOISE, brain.shape))))
    direction = rng.normal(size=3)
    turn = rng.uniform(0.4, 1) * np.radians(LARGEST_TURN) * direction / np.linalg.norm(direction)
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(turn).as_matrix()
    middle = (np.array(brain.shape) - 1) / 2
    matrix[:3, 3] = middle - matrix[:3, :3] @ middle + rng.uniform(-1, 1, 3) * LARGEST_SHIFT / np.sqrt(3)
    back = np.linalg.inv(matrix)
    heads[1] = affine_transform(heads[1].astype(np.float32), back[:3, :3], back[:3, 3], order=1)
    raw = [np.rint(head).astype(np.int16) for head in heads]
    return raw[0], raw[1], matrix


def _inside(places: np.ndarray, centre: tuple[float, ...], half_axes: tuple[float, ...]) -> np.ndarray:
    """Where an ellipsoid is, bool (X, Y, Z)."""
    return sum(((axis - c) / a) ** 2 for axis, c, a in zip(places, centre, half_axes, strict=True)) < 1
