"""Procedural 6-month brains: tissue label maps with folds, ventricles, deep nuclei and cerebellum.

All lengths are millimetres on a 1 mm grid. The axes are those of an iSeg file: x from right to left, y from back to
front, z from bottom to top; the origin is the middle of the cerebrum.
"""

from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt, map_coordinates
from tqdm import tqdm

from scripts.errors import InputError, require_whole_numbers
from scripts.files import made_already, whole_files
from scripts.results.label_images import write_analyze
from scripts.synthesis import T1_CONTRAST, T2_CONTRAST, six_month_image, smooth_noise
from scripts.tissues import ISEG_VALUES, Tissue

# of the generator: another one makes other subjects of a seed
VERSION = 2
VOLUME_SHAPE = (144, 192, 256)
BRAIN_SHAPE = (128, 164, 136)  # the part of the volume that a brain lies in
CEREBRUM = (53.0, 67.0, 56.0)  # half axes; the lower half is flatter
CEREBRUM_LOWER = 42.0

# (centre, half axes) of ellipsoids; those with x != 0 stand on both sides
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
    """Level set that is 1 on the ellipsoid, less inside; mirrored in x where the centre isn't on the midline."""
    x = np.abs(position[0]) if centre[0] else position[0]
    coordinates = (x, position[1], position[2])
    return sum(((p - c) / a) ** 2 for p, c, a in zip(coordinates, centre, half_axes, strict=True))


def _sheets(field: np.ndarray) -> np.ndarray:
    """Voxels where the field changes sign towards a neighbour: thin sheets."""
    positive = field > 0
    return np.logical_or.reduce([positive != np.roll(positive, 1, axis) for axis in range(3)])


def _folds(rng: np.random.Generator, position: np.ndarray, wavelength: float) -> np.ndarray:
    """Sheets that stand upright on the surface, about half a wavelength apart, meandering like sulci."""
    noise = smooth_noise(rng, (64, 64, 64), wavelength / 8)  # a grid of 2 mm
    radius = np.sqrt(_ellipsoid(position, (0, 0, 0), CEREBRUM)) + 1e-3
    # almost the same field at every depth, so that its zeros go straight down
    direction = position / radius * (0.85 + 0.15 * radius)
    return _sheets(map_coordinates(noise, direction / 2 + 32, order=1, mode="wrap"))


def label_map(rng: np.random.Generator) -> np.ndarray:
    """Tissue labels of one brain.

    Returns:
        uint8 0 background, 1 CSF, 2 GM, 3 WM, (144, 192, 256). The brain has about 740 to 850 ml, of which, in
        percent, CSF 20 to 24, GM 45 to 49 and WM the rest.
    """
    # own proportions and smooth deformation, so that no two brains are alike
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
    # CSF fills the gaps and covers the brain, the cortex lines it: both as thick as their share of the brain asks
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


def phantom(output_dir: str, subjects: int = 6, unlabeled: int = 1, seed: int = 0) -> None:
    """Write synthetic subjects in the layout and format of iSeg-2017: Analyze, int16 T1 and T2, uint8 label.

    A subject depends on the seed and its own number only. Files that are there already are kept.

    Args:
        output_dir: the folder to write to.
        subjects: number of labelled subjects, 1 to `subjects`.
        unlabeled: number of subjects without label, numbered on from there.
        seed: for another population.

    Raises:
        InputError: a number is out of range, or a file of that name is there that isn't the same phantom subject.
    """
    require_whole_numbers(1, subjects=subjects)
    require_whole_numbers(0, unlabeled=unlabeled, seed=seed)
    for number in tqdm(range(1, subjects + unlabeled + 1), desc="phantom subjects", unit="subject"):
        kinds = ("T1", "T2", "label") if number <= subjects else ("T1", "T2")
        description = f"phantom version {VERSION} seed {seed} subject {number}"
        if number > subjects and (surplus := Path(output_dir) / f"subject-{number}-label.hdr").exists():
            raise InputError(f"{surplus}: subject {number} shall have no label; choose another --output_dir")
        if made_already([Path(output_dir) / f"subject-{number}-{kind}.hdr" for kind in kinds], description):
            continue
        rng = np.random.default_rng([seed, number])
        label = label_map(rng)
        volumes = {
            "T1": six_month_image(label, T1_CONTRAST, rng),
            "T2": six_month_image(label, T2_CONTRAST, rng),
            "label": np.array(ISEG_VALUES, dtype=np.uint8)[label],
        }
        with whole_files(output_dir) as temporary:
            for kind in kinds:
                write_analyze(temporary / f"subject-{number}-{kind}.hdr", volumes[kind], description)
    print(f"phantom subjects: {subjects} labelled and {unlabeled} unlabelled in {output_dir}")
