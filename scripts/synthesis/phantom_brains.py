"""Procedural 6-month brains: tissue label maps with folds, ventricles, deep nuclei and cerebellum.

All lengths are millimetres on a 1 mm grid. The axes are those of an iSeg file: x from right to left, y from back to
front, z from bottom to top; the origin is the middle of the cerebrum.
"""

import numpy as np
from scipy.ndimage import distance_transform_edt, map_coordinates

from scripts.synthesis.contrast import smooth_noise
from scripts.tissues import Tissue

VOLUME_SHAPE = (144, 192, 256)
BRAIN_SHAPE = (128, 164, 136)  # the part of the volume that holds the brain
CEREBRUM = (53.0, 67.0, 56.0)  # half axes
CEREBRUM_LOWER = 42.0  # half axis downwards: the lower half is flatter

# (centre, half axes) of ellipsoids; those with x != 0 lie on both sides
VENTRICLES = (
    ((9, 22, 8), (4.5, 12, 6)),  # frontal horns
    ((11, -2, 14), (4.5, 20, 5)),  # bodies
    ((18, -26, 4), (6, 11, 6)),  # atria
    ((27, -6, -14), (3, 14, 3)),  # temporal horns
    ((0, 2, -2), (2, 12, 9)),  # third ventricle
    ((0, -25, -34), (6, 4, 6)),  # fourth ventricle
)
DEEP_NUCLEI = (
    ((16, 14, 8), (4.5, 14, 7)),  # caudate
    ((11, -8, 1), (8, 14, 9)),  # thalamus
    ((26, 4, -1), (6, 15, 9)),  # putamen and pallidum
    ((26, -14, -20), (6, 14, 5)),  # hippocampus
)
BRAIN_STEM = ((0, -14, -36), (11, 10, 26))
CEREBELLUM = ((0, -36, -34), (40, 25, 20))


def _ellipsoid(position: np.ndarray, centre: tuple[float, ...], half_axes: tuple[float, ...]) -> np.ndarray:
    """A field that is 1 on the ellipsoid and less inside; mirrored in x if the centre isn't on the midline."""
    x = np.abs(position[0]) if centre[0] else position[0]
    coordinates = (x, position[1], position[2])
    return sum(((p - c) / a) ** 2 for p, c, a in zip(coordinates, centre, half_axes, strict=True))


def _sheets(field: np.ndarray) -> np.ndarray:
    """Thin sheets: the voxels at which the field changes its sign towards a neighbour."""
    positive = field > 0
    return np.logical_or.reduce([positive != np.roll(positive, 1, axis) for axis in range(3)])


def _folds(rng: np.random.Generator, position: np.ndarray, wavelength: float) -> np.ndarray:
    """Meandering sheets like sulci, perpendicular to the surface, about half a wavelength apart."""
    noise = smooth_noise(rng, (64, 64, 64), wavelength / 8)  # a grid of 2 mm
    radius = np.sqrt(_ellipsoid(position, (0, 0, 0), CEREBRUM)) + 1e-3
    # the field hardly changes with depth, so its zeros go straight down
    direction = position / radius * (0.85 + 0.15 * radius)
    return _sheets(map_coordinates(noise, direction / 2 + 32, order=1, mode="wrap"))


def label_map(rng: np.random.Generator) -> np.ndarray:
    """Return the tissue labels of one brain.

    Returns:
        uint8 0 background, 1 CSF, 2 GM, 3 WM, (144, 192, 256). The brain has about 740 to 850 ml: 20 to 24 % CSF,
        45 to 49 % GM, and the rest WM.
    """
    # random proportions and a smooth deformation, so that no two brains are alike
    position = np.indices(BRAIN_SHAPE, dtype=np.float32)
    position -= np.float32([64, 82, 71])[:, None, None, None]
    proportions = rng.uniform(0.96, 1.04, 3)
    proportions *= (rng.uniform(0.96, 1.06) / np.prod(proportions)) ** (1 / 3)
    position /= proportions.astype(np.float32)[:, None, None, None]
    for axis in position:
        axis += 1.5 * smooth_noise(rng, BRAIN_SHAPE, 16.0)

    half_height = np.where(position[2] > 0, CEREBRUM[2], CEREBRUM_LOWER)
    cerebrum = sum((p / a) ** 2 for p, a in zip(position, (*CEREBRUM[:2], half_height), strict=True)) < 1
    cerebellum = (_ellipsoid(position, *CEREBELLUM) < 1) & ~cerebrum
    brain_stem = _ellipsoid(position, *BRAIN_STEM) < 1
    brain = cerebrum | cerebellum | brain_stem

    # sulci: deep primary and shallow secondary sheets, and the fissure between the hemispheres
    depth = distance_transform_edt(cerebrum)
    reach = 15 + 4 * smooth_noise(rng, BRAIN_SHAPE, 10.0)
    sulci = _folds(rng, position, 22.0) & (depth < reach)
    sulci |= _folds(rng, position, 15.0) & (depth < reach / 2)
    core = _ellipsoid(position, (0, 0, 4), (30, 42, 20)) < 1
    sulci |= _sheets(position[0]) & ~core & (position[2] > -25)
    # folia: level sheets through the cerebellum, and a gap below the cerebrum
    folia = _sheets(np.sin(2 * np.pi * (position[2] + 1.5 * smooth_noise(rng, BRAIN_SHAPE, 8.0)) / 11.0))
    cerebellum_core = _ellipsoid(position, CEREBELLUM[0], (28, 15, 11)) < 1
    gaps = (sulci & cerebrum) | (folia & cerebellum & ~cerebellum_core)
    gaps |= (distance_transform_edt(~cerebrum) <= 1) & cerebellum

    tissue = np.full(BRAIN_SHAPE, Tissue.WM, dtype=np.uint8)
    nuclei = np.logical_or.reduce([_ellipsoid(position, *nucleus) < 1 for nucleus in DEEP_NUCLEI])
    ventricles = np.logical_or.reduce([_ellipsoid(position, *ventricle) < 1 for ventricle in VENTRICLES])
    tissue[nuclei & brain] = Tissue.GM
    tissue[ventricles & brain] = Tissue.CSF
    # CSF fills the gaps and covers the brain, and the cortex lines it; the tissue shares set their thickness
    ribbon = brain & ~ventricles & ~nuclei & ~(brain_stem & ~cerebrum)
    distance = distance_transform_edt(brain & ~gaps) + 0.3 * smooth_noise(rng, BRAIN_SHAPE, 2.0)
    outermost = np.sort(distance[ribbon])
    csf_voxels = int(rng.uniform(0.20, 0.24) * brain.sum()) - np.count_nonzero(tissue[brain] == Tissue.CSF)
    gm_voxels = int(rng.uniform(0.45, 0.49) * brain.sum()) - np.count_nonzero(tissue[brain] == Tissue.GM)
    tissue[ribbon & (distance < outermost[csf_voxels + gm_voxels])] = Tissue.GM
    tissue[ribbon & (distance < outermost[csf_voxels])] = Tissue.CSF
    tissue[~brain] = 0

    volume = np.zeros(VOLUME_SHAPE, dtype=np.uint8)
    start = [(whole - part) // 2 for whole, part in zip(VOLUME_SHAPE, BRAIN_SHAPE, strict=True)]
    volume[tuple(slice(s, s + n) for s, n in zip(start, BRAIN_SHAPE, strict=True))] = tissue
    return volume
