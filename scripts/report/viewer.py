"""The pictures of report.html: the layers of its viewers, and static slices for printing."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from monai.data import MetaTensor
from PIL import Image

from scripts.results.pictures import (
    DISAGREEMENT_COLOR,
    TISSUE_COLORS,
    UNCERTAINTY_COLORS,
    brain_box,
    canonical,
    canonical_voxel_size,
    slice_position,
    slices,
    white_level,
)

LONGEST_SIDE = 256  # voxels of a viewer; a box longer than this in mm is shown coarser
STATIC_SCALE = 2  # pixels per voxel of the viewer
# A report of 13 subjects should stay below 10 MB. Noise takes nearly all of it, so each scan gets the best of these
# qualities that fits.
QUALITIES = (60, 50, 40, 30, 20, 10)
LARGEST_SCAN, LARGEST_STATIC = 190_000, 70_000  # bytes
UNCERTAINTY_STEP = 2  # side in voxels of the cubes whose mean uncertainty is shown
OPAQUE_UNCERTAINTY = 85  # of 255; below, the scan shines through
LABEL_STEP = 16  # grey levels between labels, so that rounding can't change one


@dataclass(frozen=True)
class Pictures:
    """The encoded images of a subject: labels and static slices as WebP, everything else as JPEG.

    Attributes:
        shape: voxels of the viewer to the right, front and top.
        scans: T1 and T2, or the only one of them.
        layers: `t1`, `t2` or one of them, `labels` and, if computed, `uncertainty`, coarser by UNCERTAINTY_STEP. Each
            has all axial slices, arranged by `side_by_side`. Grey levels of `labels` are LABEL_STEP times the sum of
            the segmentation's label and 4 times the true one; those of `uncertainty` go up to 255.
        static: slices near the middle, for printing and for browsers without JavaScript.
    """

    shape: tuple[int, ...]
    scans: tuple[str, ...]
    layers: dict[str, bytes]
    static: bytes


def draw_pictures(
    t1: MetaTensor,
    t2: MetaTensor | None,
    prediction: MetaTensor,
    label: MetaTensor | None = None,
    uncertainty: MetaTensor | None = None,
) -> Pictures:
    """Draw the brain's box and a margin of a voxel, in 1 mm cubes with the value of the voxel at their centre.

    Args:
        t1, t2: intensities, (1, X, Y, Z), with an affine. Without `t2`, `t1` is the only contrast, see `CheckSubjectd`.
        prediction: labels 0 background, 1 CSF, 2 GM, 3 WM, on the same grid.
        label: the true labels, on the same grid.
        uncertainty: from 0 to 1, on the same grid.
    """
    box = brain_box(canonical(t1))
    brain = canonical(t1)[box] > 0
    size = canonical_voxel_size(t1)
    sides = size * brain.shape
    cube = max(1.0, sides.max() / LONGEST_SIDE)
    indices = [
        np.minimum((np.arange(max(1, round(side / cube))) + 0.5) * cube / mm, side / mm - 1).astype(int)
        for side, mm in zip(sides, size, strict=True)
    ]

    def on_grid(values: MetaTensor) -> np.ndarray:
        return np.pad(canonical(values)[box][np.ix_(*indices)], 1)

    def grey(values: MetaTensor) -> np.ndarray:
        # white depends on all voxels of the brain, not on the coarser grid's
        return (np.clip(on_grid(values) / white_level(canonical(values)[box][brain]), 0, 1) * 255).astype(np.uint8)

    def shaded(values: np.ndarray) -> bytes:
        # JPEG takes a tenth of WebP's time, which would slow down the network that runs meanwhile
        return _within(LARGEST_SCAN, side_by_side(values), "JPEG", optimize=True)

    named = {t1.meta.get("contrast", "T1"): t1} | ({} if t2 is None else {"T2": t2})
    scans = {name.lower(): grey(scan) for name, scan in named.items()}
    segmented = on_grid(prediction).astype(np.uint8)
    truth = None if label is None else on_grid(label).astype(np.uint8)
    labels = LABEL_STEP * (segmented if truth is None else segmented + 4 * truth)
    layers = {name: shaded(values) for name, values in scans.items()}
    layers["labels"] = encoded(side_by_side(labels), "WEBP", lossless=True, quality=0, method=1)
    uncertain = None
    if uncertainty is not None:
        uncertain = np.round(255 * on_grid(uncertainty)).astype(np.uint8)
        layers["uncertainty"] = shaded(_coarser(uncertain))
    static = _static([*scans.values()], segmented, truth, uncertain)
    return Pictures(segmented.shape, tuple(named), layers, _within(LARGEST_STATIC, static, "WEBP", method=0))


def side_by_side(values: np.ndarray) -> np.ndarray:
    """Arrange all axial slices (X, Y, Z) in one roughly square picture, the lowest first, the front up.

    Each row has `ceil(sqrt(Z Y / X))` slices, as `viewer.js` expects.
    """
    width, depth, height = values.shape
    columns = math.ceil(math.sqrt(height * depth / width))
    rows = math.ceil(height / columns)
    in_order = np.pad(values[:, ::-1], ((0, 0), (0, 0), (0, rows * columns - height)))
    tiles = in_order.reshape(width, depth, rows, columns).transpose(2, 1, 3, 0)
    return tiles.reshape(rows * depth, columns * width)


def _coarser(values: np.ndarray) -> np.ndarray:
    """The mean of each cube with sides of UNCERTAINTY_STEP voxels."""
    padded = np.pad(values, [(0, -size % UNCERTAINTY_STEP) for size in values.shape])
    split = [length for size in padded.shape for length in (size // UNCERTAINTY_STEP, UNCERTAINTY_STEP)]
    return padded.reshape(split).mean((1, 3, 5)).round().astype(np.uint8)


def encoded(picture: np.ndarray, kind: str, **options: Any) -> bytes:
    """Return a grey or RGB picture in a file format of Pillow."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, kind, **options)
    return content.getvalue()


def _within(largest: int, picture: np.ndarray, kind: str, **options: Any) -> bytes:
    """A picture in the best of QUALITIES that takes at most `largest` bytes, else in the last."""
    for quality in QUALITIES:
        content = encoded(picture, kind, quality=quality, **options)
        if len(content) <= largest:
            break
    return content


def _static(
    scans: Sequence[np.ndarray], segmented: np.ndarray, truth: np.ndarray | None, uncertain: np.ndarray | None
) -> np.ndarray:
    """Three planes side by side, in rows for each scan and, where known, errors and uncertainty over the first."""
    position = slice_position(segmented.shape)
    colors = np.array([(0, 0, 0), *(to_rgb(color) for color in TISSUE_COLORS.values())])

    def planes(values: np.ndarray) -> list[np.ndarray]:
        return [plane[::-1].repeat(STATIC_SCALE, 0).repeat(STATIC_SCALE, 1) for plane in slices(values, position)]

    def row(scan: np.ndarray, opacities: Sequence[np.ndarray], overlays: Sequence[Any]) -> np.ndarray:
        """The planes of a scan under overlays of RGB colours (…, 3), with opacities from 0 to 1."""
        painted = [
            grey[..., None] / 255 * (1 - opacity[..., None]) + color * opacity[..., None]
            for grey, opacity, color in zip(planes(scan), opacities, overlays, strict=True)
        ]
        tallest = max(map(len, painted))
        gap = 2 * STATIC_SCALE
        return np.concatenate([np.pad(p, ((tallest - len(p), 0), (0, gap), (0, 0))) for p in painted], axis=1)

    edges = [outlines(plane) for plane in planes(segmented)]
    rows = [row(scan, [edge > 0 for edge in edges], [colors[edge] for edge in edges]) for scan in scans]
    if truth is not None:
        rows.append(row(scans[0], planes(segmented != truth), 3 * [to_rgb(DISAGREEMENT_COLOR)]))
    if uncertain is not None:
        shades = matplotlib.colormaps[UNCERTAINTY_COLORS]
        levels = planes(uncertain)
        opacities = [np.minimum(level / OPAQUE_UNCERTAINTY, 1) for level in levels]
        rows.append(row(scans[0], opacities, [shades(level)[..., :3] for level in levels]))
    return (255 * np.concatenate(rows)).round().astype(np.uint8)


def outlines(labels: np.ndarray) -> np.ndarray:
    """Return the borders in a slice of labels: the higher label of the two that meet, 0 elsewhere.

    The slice must have background at its margin.
    """
    edges = np.zeros_like(labels)
    for axis in (0, 1):
        after = np.roll(labels, -1, axis)
        edges = np.maximum(edges, np.where(labels == after, 0, np.maximum(labels, after)))
    return edges
