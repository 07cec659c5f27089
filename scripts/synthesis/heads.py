"""Images of whole heads of any contrast, with the mask of the brain, made from label maps of heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import binary_closing, binary_fill_holes
from scipy.spatial.transform import Rotation

from scripts.data.structures import OUTER_LABELS, STRUCTURES, TISSUE_OF
from scripts.preparation.brain import VOXEL
from scripts.synthesis.fields import blurred, smooth_field, with_thick_slices
from scripts.synthesis.label_maps import label_map_name
from scripts.synthesis.structures import read_head

# mm of a voxel of a label map, by which an adult's head is multiplied to that of a newborn up to two years
HEAD_SCALE = (0.55, 1.0)
# voxels of the gaps in a brain that are closed in its mask
WIDEST_GAP = 6
# what an image looks like, and how often: the contrast of a T1, of a T2, or any
CONTRASTS, SHARES = ("T1", "T2", "any"), (0.35, 0.35, 0.3)
# mm along each axis of a whole head
FIELD = 224
# classes of a head: 0 air, the structures of the brain, then the labels around it, then the spinal CSF
FIRST_OUTER = len(STRUCTURES) + 1
SPINAL = FIRST_OUTER + len(OUTER_LABELS)
CLASSES = SPINAL + 1


class Kind(NamedTuple):
    """Labels around the brain that look alike, with the ranges of their intensity, where fat in T1 is about 1."""

    labels: tuple[int, ...]
    in_t1: tuple[float, float]
    in_t2: tuple[float, float]


BONE = (515, 516)
SCALP, SOFT_TISSUE, FAT = 511, 507, 502
KINDS = (
    Kind((506,), (0.0, 0.1), (0.0, 0.1)),
    Kind(BONE, (0.03, 0.35), (0.02, 0.3)),
    Kind((FAT,), (0.6, 1.3), (0.4, 1.1)),
    Kind((SCALP,), (0.35, 1.2), (0.2, 0.9)),
    Kind((SOFT_TISSUE, 509), (0.25, 0.8), (0.1, 0.6)),
    Kind((508,), (0.2, 0.7), (0.1, 0.7)),
    Kind((512,), (0.05, 0.9), (0.0, 0.8)),
    Kind((514,), (0.1, 0.35), (0.7, 1.4)),
    Kind((530,), (0.3, 0.7), (0.3, 0.8)),
)


@dataclass(frozen=True, eq=False)
class HeadMap:
    """The classes of a head.

    Attributes:
        name: of the file, without suffix.
        classes: uint8 (X, Y, Z), voxels of about 1 mm on axes to the right, the front and the top.
        mask: bool (X, Y, Z), the brain with the folds of dura and the gaps within it, which maps leave out.
        brain: positions of voxels of the mask, (N, 3).
    """

    name: str
    classes: np.ndarray
    mask: np.ndarray
    brain: np.ndarray


def read_head_map(path: str | Path) -> HeadMap:
    """Read a label map of a whole head.

    Args:
        path: see `scripts.synthesis.structures.read_head`.

    Raises:
        InputError: as `read_head`.
    """
    structures, outer, spinal = read_head(path)
    classes = np.where(outer > 0, outer + np.uint8(FIRST_OUTER - 1), structures)
    classes[spinal > 0] = SPINAL
    mask = binary_fill_holes(binary_closing(structures > 0, iterations=WIDEST_GAP // 2))
    return HeadMap(label_map_name(Path(path)), classes, mask, np.argwhere(mask)[::50].astype(np.int16))


def draw_head(source: HeadMap, rng: np.random.Generator, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a part of a head around a random voxel near the brain, with voxels of 2 mm.

    Args:
        source: the map of the head.
        rng: the source of all randomness.
        size: voxels along each axis.

    Returns:
        Intensities, float32 (1, X, Y, Z), with the 99th percentile near 1, and the mask of the brain, uint8
        (1, X, Y, Z).
    """
    centre = source.brain[rng.integers(len(source.brain))] + rng.normal(0, 30, 3)
    classes, mask = _part(source, rng, size, VOXEL, centre)
    return _image(classes, mask, _shown(classes, mask, rng), rng, rng.choice(CONTRASTS, p=SHARES))


def draw_whole_head(
    source: HeadMap, rng: np.random.Generator, contrast: str, voxel: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a whole head with the neck and the air around it, to measure a network; see `draw_head`.

    Args:
        source: the map of the head.
        rng: the source of all randomness.
        contrast: one of CONTRASTS.
        voxel: side in mm.
    """
    size = [round(FIELD / voxel)] * 3
    classes, mask = _part(source, rng, size, voxel, source.brain.mean(0))
    return _image(classes, mask, torch.ones_like(mask), rng, contrast)


def _image(
    classes: torch.Tensor, mask: torch.Tensor, shown: torch.Tensor, rng: np.random.Generator, contrast: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Intensities and mask of classes (X, Y, Z) where the scan shows something."""
    size = classes.shape
    image = torch.from_numpy(_intensities(rng, contrast).astype(np.float32))[classes][None]
    # each class varies: fat and muscle lie side by side in the soft tissue, and WM differs from place to place
    within, around = smooth_field(rng, size, rng.uniform(2, 12), 2)
    image = image * (1 + torch.where(mask, rng.uniform(0, 0.15) * within, rng.uniform(0, 0.3) * around))
    image = blurred(image, float(rng.uniform(0.2, 0.9)))
    if rng.random() < 0.2:
        image = with_thick_slices(image, int(rng.integers(3)), float(rng.uniform(1.2, 3)))
    image = image * torch.exp(float(rng.uniform(0, 0.35)) * smooth_field(rng, size, rng.uniform(25, 60)))
    if rng.random() < 0.1:
        axis = int(rng.integers(1, 4))
        image = image + float(rng.uniform(0.03, 0.2)) * image.roll(int(rng.integers(6, 30)), axis)
    noise = 0.12 * float(rng.uniform(0, 1)) ** 2 * float(rng.random() < 0.8)
    real, imaginary = noise * torch.from_numpy(rng.standard_normal((2, *size), dtype=np.float32))
    image = torch.sqrt((image + real).square() + imaginary.square())
    if rng.random() < 0.3:  # the background set to 0, by the scanner or to hide the face
        shown = shown & (classes > 0)
    image = image * shown
    image = image / image.quantile(0.99).clamp(min=1e-3)
    image = image.clamp(min=0) ** float(np.exp(rng.normal(0, 0.2))) * float(rng.uniform(0.7, 1.4))
    return image, (mask & shown)[None].to(torch.uint8)


def _part(
    source: HeadMap, rng: np.random.Generator, size: Sequence[int], voxel: float, centre: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes, int64, and mask, bool, of a turned, scaled and bent part of the head around a voxel, (X, Y, Z)."""
    scales = rng.uniform(*HEAD_SCALE) * rng.uniform(0.92, 1.08, 3) / voxel
    scales[0] *= rng.choice([-1, 1])
    degrees = rng.normal(0, 12, 3) if rng.random() < 0.8 else rng.uniform(-40, 40, 3)
    turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    where = torch.stack(
        torch.meshgrid(*(torch.arange(side, dtype=torch.float32) - (side - 1) / 2 for side in size), indexing="ij")
    )
    where = torch.einsum("ij,jxyz->ixyz", torch.from_numpy((turn.T / scales[:, None]).astype(np.float32)), where)
    where += torch.from_numpy(centre.astype(np.float32))[:, None, None, None]
    where += rng.uniform(0, 4.0) * smooth_field(rng, size, rng.uniform(6, 20), 3)
    where = where.round().long()
    last = torch.tensor(source.classes.shape)[:, None, None, None] - 1
    beyond = ((where < 0) | (where > last)).any(0)
    x, y, z = torch.minimum(where.clamp(min=0), last)
    classes = torch.from_numpy(source.classes)[x, y, z].long()
    mask = torch.from_numpy(source.mask)[x, y, z] & ~beyond
    classes[beyond] = 0
    if rng.random() < 0.7:  # an infant's bone is thin
        thin = smooth_field(rng, size, rng.uniform(4, 20))[0] > rng.uniform(-1, 1)
        bone = torch.isin(classes, torch.tensor([_class_of(label) for label in BONE]))
        classes[bone & thin] = _class_of(SCALP)
    if rng.random() < 0.5:  # the maps don't tell fat from muscle
        fat = smooth_field(rng, size, rng.uniform(2, 8))[0] > rng.uniform(-0.5, 1.5)
        classes[(classes == _class_of(SOFT_TISSUE)) & fat] = _class_of(FAT)
    return classes, mask


def _class_of(label: int) -> int:
    return FIRST_OUTER + OUTER_LABELS.index(label)


def _shown(classes: torch.Tensor, brain: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Where the scan shows something, bool (X, Y, Z): some are cut off, defaced or skull-stripped."""
    shown = torch.ones_like(classes, dtype=torch.bool)
    size = classes.shape
    for axis in rng.permutation(3)[: rng.choice(3, p=[0.4, 0.4, 0.2])]:
        lost = int(size[axis] * rng.uniform(0.05, 0.35))
        shown.narrow(int(axis), 0 if rng.random() < 0.5 else size[axis] - lost, lost).fill_(False)
    kind = rng.random()
    if kind < 0.12:
        shown &= brain
    elif kind < 0.25:
        shown &= brain | (smooth_field(rng, size, rng.uniform(6, 25))[0] < rng.uniform(-0.5, 1.5))
    return shown


def _intensities(rng: np.random.Generator, contrast: str) -> np.ndarray:
    """Mean intensity of each class."""
    means = np.zeros(CLASSES)
    if contrast == "any":
        means[:] = rng.uniform(0, 1, CLASSES)
        tissues = rng.uniform(0, 1, 4)
    else:
        like_t1 = contrast == "T1"
        means[FIRST_OUTER:] = rng.uniform(0.2, 0.8, CLASSES - FIRST_OUTER)
        for outer, in_t1, in_t2 in KINDS:
            for label in outer:
                means[_class_of(label)] = rng.uniform(*(in_t1 if like_t1 else in_t2))
        grey = rng.uniform(0.35, 0.85)
        white = grey + (rng.uniform(-0.1, 0.35) if like_t1 else rng.uniform(-0.25, 0.15))
        tissues = np.array([0, rng.uniform(0.1, 0.45) * grey / 0.6 if like_t1 else rng.uniform(0.8, 1.5), grey, white])
    means[:FIRST_OUTER] = tissues[TISSUE_OF] + rng.normal(0, rng.uniform(0.01, 0.08), FIRST_OUTER)
    means[SPINAL] = tissues[1] * rng.uniform(0.7, 1.2)
    means[0] = rng.choice([0, rng.uniform(0, 0.06)])
    means[_class_of(BONE[0])] *= rng.choice([1, rng.uniform(0.2, 1)])
    return means.clip(0)
