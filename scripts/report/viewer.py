"""The pictures of report.html: what its viewers show, and what is printed."""

import io
import math
from collections.abc import Mapping, Sequence
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
    middle,
    slices,
)

LONGEST_SIDE = 256  # voxels of a viewer; a box of more than so many mm is shown coarser
STATIC_SCALE = 2  # pixels for a voxel of the viewer
# The file of 13 subjects shall stay below 10 MB. Noise takes nearly all of it, so a scan gets the best of these
# qualities that fits.
QUALITIES = (60, 50, 40, 30, 20, 10)
LARGEST_SCAN, LARGEST_STATIC = 190_000, 70_000  # bytes
UNCERTAINTY_STEP = 2  # voxels along a side of the cubes whose mean uncertainty is shown
OPAQUE_UNCERTAINTY = 85  # of 255; less lets the scan shine through
LABEL_STEP = 16  # grey levels from one label to the next, which rounding then can't mistake


@dataclass(frozen=True)
class Pictures:
    """What of a subject is shown, as images: labels and slices for paper as WebP, all else as JPEG.

    Attributes:
        shape: voxels of the viewer to the right, front and top.
        layers: `t1`, `t2`, `labels` and, where it was computed, `uncertainty`, by UNCERTAINTY_STEP coarser: of each all
            axial slices, as `side_by_side` has them. Grey levels of `labels` are LABEL_STEP times the segmentation's
            label and 4 times that of the true one; of `uncertainty` they go to 255.
        static: slices through the middle, for paper and for browsers without JavaScript.
    """

    shape: tuple[int, ...]
    layers: dict[str, bytes]
    static: bytes


def draw(
    t1: MetaTensor,
    t2: MetaTensor,
    prediction: MetaTensor,
    label: MetaTensor | None = None,
    uncertainty: MetaTensor | None = None,
) -> Pictures:
    """The brain's box with a margin of a voxel, on a grid of cubes of 1 mm that each show the voxel at their centre.

    Args:
        t1, t2: intensities, (1, X, Y, Z), with an affine.
        prediction: labels 0 background, 1 CSF, 2 GM, 3 WM, on the same grid.
        label: the true ones likewise.
        uncertainty: from 0 to 1 likewise.
    """
    box = brain_box(canonical(t1))
    brain = canonical(t1)[box] > 0
    size = canonical_voxel_size(t1)
    sides = size * [part.stop - part.start for part in box]
    voxel = max(1.0, sides.max() / LONGEST_SIDE)
    places = [
        np.minimum((np.arange(max(1, round(side / voxel))) + 0.5) * voxel / mm, side / mm - 1).astype(int)
        for side, mm in zip(sides, size, strict=True)
    ]

    def shown(values: MetaTensor) -> np.ndarray:
        return np.pad(canonical(values)[box][np.ix_(*places)], 1)

    def grey(values: MetaTensor) -> np.ndarray:
        """Of all voxels, shown or not, the brightest of the brain but 1 in 200 has the highest level."""
        brightest = max(float(np.percentile(canonical(values)[box][brain], 99.5)), np.finfo(np.float32).tiny)
        return (np.clip(shown(values) / brightest, 0, 1) * 255).astype(np.uint8)

    layers = {"t1": grey(t1), "t2": grey(t2)}
    segmented = shown(prediction).astype(np.uint8)
    true = None if label is None else shown(label).astype(np.uint8)
    layers["labels"] = LABEL_STEP * (segmented if true is None else segmented + 4 * true)

    def shaded(values: np.ndarray) -> bytes:
        # JPEG takes a tenth of WebP's time, which would slow down the network beside it
        return _within(LARGEST_SCAN, side_by_side(values), "JPEG", optimize=True)

    images = {name: shaded(layers[name]) for name in ("t1", "t2")}
    images["labels"] = _encoded(side_by_side(layers["labels"]), "WEBP", lossless=True, quality=0, method=1)
    if uncertainty is not None:
        layers["uncertainty"] = np.round(255 * shown(uncertainty)).astype(np.uint8)
        images["uncertainty"] = shaded(_coarser(layers["uncertainty"]))
    static = _within(LARGEST_STATIC, _static(layers, segmented, true), "WEBP", method=0)
    return Pictures(shape=segmented.shape, layers=images, static=static)


def side_by_side(values: np.ndarray) -> np.ndarray:
    """All axial slices (X, Y, Z) in one picture that is about as wide as high, from the lowest on, the front up.

    Its lines have `ceil(sqrt(Z Y / X))` slices, as many as the viewer takes them to have.
    """
    width, depth, height = values.shape
    columns = math.ceil(math.sqrt(height * depth / width))
    rows = math.ceil(height / columns)
    in_order = np.pad(values[:, ::-1], ((0, 0), (0, 0), (0, rows * columns - height)))
    lines = in_order.reshape(width, depth, rows, columns).transpose(2, 1, 3, 0)
    return lines.reshape(rows * depth, columns * width)


def _coarser(values: np.ndarray) -> np.ndarray:
    """The mean of each cube of UNCERTAINTY_STEP voxels a side."""
    padded = np.pad(values, [(0, -size % UNCERTAINTY_STEP) for size in values.shape])
    pairs = [part for size in padded.shape for part in (size // UNCERTAINTY_STEP, UNCERTAINTY_STEP)]
    return padded.reshape(pairs).mean((1, 3, 5)).round().astype(np.uint8)


def _encoded(picture: np.ndarray, kind: str, **how: Any) -> bytes:
    """A picture, grey or RGB, as a file of a kind that Pillow writes."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, kind, **how)
    return content.getvalue()


def _within(largest: int, picture: np.ndarray, kind: str, **how: Any) -> bytes:
    """A picture in the best of QUALITIES that has at most so many bytes, if any has."""
    for quality in QUALITIES:
        content = _encoded(picture, kind, quality=quality, **how)
        if len(content) <= largest:
            break
    return content


def _static(layers: Mapping[str, np.ndarray], segmented: np.ndarray, true: np.ndarray | None) -> np.ndarray:
    """Three planes side by side, a row for T1, T2 and, where there is one, errors and uncertainty."""
    place = middle(segmented.shape)
    colors = np.array([(0, 0, 0), *(to_rgb(color) for color in TISSUE_COLORS.values())])

    def planes(values: np.ndarray) -> list[np.ndarray]:
        larger = (part[::-1].repeat(STATIC_SCALE, 0).repeat(STATIC_SCALE, 1) for part in slices(values, place))
        return list(larger)

    def row(pictures: Sequence[np.ndarray]) -> np.ndarray:
        tallest = max(len(picture) for picture in pictures)
        parts = [np.pad(p, ((tallest - len(p), 0), (0, 2 * STATIC_SCALE), (0, 0))) for p in pictures]
        return np.concatenate(parts, axis=1)

    def painted(grey: np.ndarray, where: np.ndarray, color: np.ndarray) -> np.ndarray:
        """A slice with colours (…, 3) laid over by `where`, from 0 to 1."""
        return grey[..., None] / 255 * (1 - where[..., None]) + color * where[..., None]

    rows = []
    for name in ("t1", "t2"):
        outlines = [_outlines(part) for part in planes(segmented)]
        pairs = zip(planes(layers[name]), outlines, strict=True)
        rows.append(row([painted(grey, edge > 0, colors[edge]) for grey, edge in pairs]))
    if true is not None:
        pairs = zip(planes(layers["t1"]), planes(segmented != true), strict=True)
        rows.append(row([painted(grey, wrong, to_rgb(DISAGREEMENT_COLOR)) for grey, wrong in pairs]))
    if "uncertainty" in layers:
        shades = matplotlib.colormaps[UNCERTAINTY_COLORS]
        pairs = zip(planes(layers["t1"]), planes(layers["uncertainty"]), strict=True)
        rows.append(row([painted(g, np.minimum(u / OPAQUE_UNCERTAINTY, 1), shades(u)[..., :3]) for g, u in pairs]))
    return (255 * np.concatenate(rows)).round().astype(np.uint8)


def _outlines(labels: np.ndarray) -> np.ndarray:
    """Borders of a slice of labels, background at its margin: the higher label of the two that meet; elsewhere 0."""
    edges = np.zeros_like(labels)
    for axis in (0, 1):
        after = np.roll(labels, -1, axis)
        edges = np.maximum(edges, np.where(labels == after, 0, np.maximum(labels, after)))
    return edges
