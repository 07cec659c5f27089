"""What report.html shows of how a raw scan was prepared: the border of the brain, and T1 and T2 in squares."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from monai.data import MetaTensor

from scripts.report.viewer import STATIC_SCALE, encoded, outlines
from scripts.results.pictures import brain_box, canonical, canonical_voxel_size, slices, white_level

BORDER_COLOR = "#f0e442"
# mm of a pixel, and of the squares that show T1 and T2 in turn
PIXEL, SQUARE = 1.5, 18
QUALITY = 60


def what_was_prepared(item: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each step that a subject needed, see `scripts.preparation.transforms`."""
    steps = []
    if "head" in item:
        contrast = item["t1"].meta.get("contrast", "T1")
        steps.append(f"The brain was found in {contrast}: {item['head'].meta['brain_ml']:.0f} ml.")
    if moved := item["t2"].meta.get("registered") if item.get("t2") is not None else "":
        steps.append(f"T2 was registered to T1: {moved}.")
    return steps


def draw_prepared(item: Mapping[str, Any]) -> bytes | None:
    """Draw what was prepared in three planes through the middle of the brain, the subject's right on the left, as WebP.

    The first row shows the scan with the border of the brain, the next T1 and registered T2 in squares.

    Returns:
        None if nothing was prepared.
    """
    t1, t2 = item["t1"], item.get("t2")
    brain, size = canonical(t1) > 0, canonical_voxel_size(t1)
    axes = list(zip(brain.shape, size, strict=True))
    indices = [np.minimum(np.arange(0, side, PIXEL / mm), side - 1).astype(int) for side, mm in axes]
    middle = [(side.start + side.stop) // 2 for side in brain_box(canonical(t1))]
    position = np.array([np.searchsorted(shown, voxel) for shown, voxel in zip(indices, middle, strict=True)])

    def planes(values: np.ndarray) -> list[np.ndarray]:
        """The three planes, in rows from the top."""
        shown = slices(np.pad(values[np.ix_(*indices)], 1), position + 1)
        return [plane[::-1].repeat(STATIC_SCALE, 0).repeat(STATIC_SCALE, 1) for plane in shown]

    def grey(scan: MetaTensor) -> list[np.ndarray]:
        values = canonical(scan)
        return [plane[..., None] for plane in planes(np.clip(values / white_level(values[brain]), 0, 1))]

    rows = []
    if "head" in item:
        borders = [outlines(plane)[..., None] > 0 for plane in planes(brain.astype(np.uint8))]
        rows.append(_chosen(borders, 3 * [np.array(to_rgb(BORDER_COLOR))], grey(item["head"])))
    if t2 is not None and t2.meta.get("registered"):
        squares = [np.arange(side) * mm // SQUARE for side, mm in axes]
        in_turn = [plane[..., None] > 0 for plane in planes(sum(np.ix_(*squares)) % 2)]
        rows.append(_chosen(in_turn, grey(t2), grey(t1)))
    return encoded(np.concatenate(rows), "WEBP", quality=QUALITY, method=0) if rows else None


def _chosen(where: list[np.ndarray], these: list[np.ndarray], those: list[np.ndarray]) -> np.ndarray:
    """A row of planes with these values, from 0 to 1, in the places given, and those elsewhere, as RGB."""
    planes = [np.where(*each) for each in zip(where, these, those, strict=True)]
    planes = [np.broadcast_to(plane, (*plane.shape[:2], 3)) for plane in planes]
    tallest = max(map(len, planes))
    row = np.concatenate([np.pad(plane, ((tallest - len(plane), 0), (0, 0), (0, 0))) for plane in planes], axis=1)
    return (255 * row).round().astype(np.uint8)
