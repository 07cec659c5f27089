"""Pictures of a subject by which a person judges its segmentation."""

from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from monai.data import MetaTensor

from scripts.files import whole_files
from scripts.results.paths import result_path
from scripts.results.writers import BackgroundWriter
from scripts.tissues import Tissue

# distinct from each other and from grey for every kind of colour blindness: three colours of Okabe and Ito, and violet
TISSUE_COLORS = {Tissue.CSF: "#56b4e9", Tissue.GM: "#d55e00", Tissue.WM: "#f0e442"}
DISAGREEMENT_COLOR = "#aa00ff"
UNCERTAINTY_COLORS = "inferno"  # brightens evenly, so it needs no colour vision


def canonical(values: MetaTensor) -> np.ndarray:
    """Return the only channel, with its axes running to the right, front and top."""
    return nib.apply_orientation(values[0].cpu().numpy(), nib.io_orientation(values.affine.cpu().numpy()))


def canonical_voxel_size(values: MetaTensor) -> np.ndarray:
    """Return the size of a voxel in mm to the right, front and top."""
    affine = values.affine.cpu().numpy()
    return nib.affines.voxel_sizes(affine)[nib.io_orientation(affine)[:, 0].argsort()]


def brain_box(t1: np.ndarray) -> tuple[slice, slice, slice]:
    """Return the smallest box that holds every voxel of T1 (X, Y, Z) above 0."""
    occupied = [np.flatnonzero((t1 > 0).any(others)) for others in ((1, 2), (0, 2), (0, 1))]
    return tuple(slice(indices[0], indices[-1] + 1) for indices in occupied)


def white_level(brain: np.ndarray) -> float:
    """Return the intensity to show as white: the 99.5th percentile of the brain's voxels, above 0."""
    return max(float(np.percentile(brain, 99.5)), np.finfo(np.float32).tiny)


def slice_position(shape: Sequence[int]) -> np.ndarray:
    """Return a voxel of the brain's box near its middle, but beside the gap between the hemispheres."""
    return (np.array(shape) * (0.4, 0.5, 0.55)).astype(int)


def slices(values: np.ndarray, position: np.ndarray) -> list[np.ndarray]:
    """Return the axial, coronal and sagittal slice, front or top up and the subject's right on the left.

    Rows run upwards, as `imshow` draws them with `origin="lower"`.
    """
    x, y, z = position
    return [values[::-1, :, z].T, values[::-1, y, :].T, values[x, :, :].T]


def segmentation_picture(
    t1: MetaTensor,
    prediction: MetaTensor,
    label: MetaTensor | None = None,
    title: str = "",
    uncertainty: MetaTensor | None = None,
) -> Figure:
    """Draw slices near the middle of the brain: a column for the scan, one for the segmentation, and one for the label.

    Args:
        t1: intensities of T1, (1, X, Y, Z), with an affine; or of the T2 of a subject without T1, see `CheckSubjectd`.
        prediction: labels 0 background, 1 CSF, 2 GM, 3 WM, on the same grid.
        label: the true labels, if known; a further column then marks the voxels where the two disagree.
        title: the line above the picture.
        uncertainty: 0 to 1 on the same grid, see `scripts.results.probabilities`; a column shows it inside the brain.
    """
    t1_values, segmented = canonical(t1), canonical(prediction)
    box = brain_box(t1_values)
    brain = t1_values[box]
    x, y, z = canonical_voxel_size(t1)
    aspects = (y / x, z / x, z / y)

    tissues = {"cmap": ListedColormap(TISSUE_COLORS.values()), "vmin": 1, "vmax": 3, "alpha": 0.45}
    columns = {
        t1.meta.get("contrast", "T1"): (None, {}),
        "segmentation": (np.ma.masked_equal(segmented[box], 0), tissues),
    }
    patches = [Patch(color=color, label=tissue.name) for tissue, color in TISSUE_COLORS.items()]
    if label is not None:
        truth = canonical(label)[box]
        columns["label"] = (np.ma.masked_equal(truth, 0), tissues)
        disagreement = np.ma.masked_equal(truth != segmented[box], 0)
        columns["disagreement"] = (disagreement, {"cmap": ListedColormap([DISAGREEMENT_COLOR])})
        patches.append(Patch(color=DISAGREEMENT_COLOR, label="disagreement"))
    if uncertainty is not None:
        inside = np.ma.masked_array(canonical(uncertainty)[box], brain <= 0)
        columns["uncertainty"] = (inside, {"cmap": UNCERTAINTY_COLORS, "vmin": 0, "vmax": 1})

    position = slice_position(brain.shape)
    grey = slices(brain, position)
    heights = [aspect * slice_.shape[0] / slice_.shape[1] for slice_, aspect in zip(grey, aspects, strict=True)]
    figure = Figure(figsize=(3.2 * len(columns), 10), layout="constrained", facecolor="black")
    # no ticks: the layout would reserve room for them although the axes are hidden
    axes = figure.subplots(3, len(columns), height_ratios=heights, subplot_kw={"xticks": [], "yticks": []})
    white = white_level(brain[brain > 0])
    for column, (name, (overlay, style)) in enumerate(columns.items()):
        axes[0, column].set_title(name, color="white")
        for row, (slice_, aspect) in enumerate(zip(grey, aspects, strict=True)):
            axis = axes[row, column]
            axis.imshow(slice_, cmap="gray", vmin=0, vmax=white, origin="lower", aspect=aspect)
            axis.axis("off")
            if row < 2:  # axial and coronal
                axis.text(0.02, 0.98, "R", color="white", transform=axis.transAxes, verticalalignment="top")
            if overlay is not None:
                shades = axis.imshow(slices(overlay, position)[row], origin="lower", aspect=aspect, **style)
    figure.legend(
        handles=patches, loc="outside lower center", ncols=len(patches), facecolor="black", labelcolor="white"
    )
    if uncertainty is not None:  # the last column
        bar = figure.colorbar(shades, ax=axes[:, -1], shrink=0.6, label="0: certain, 1: all classes equally probable")
        bar.ax.tick_params(colors="white")
        bar.ax.yaxis.label.set_color("white")
    figure.suptitle(title, color="white", parse_math=False)
    return figure


class PictureSaver(BackgroundWriter):
    """Handler that draws each subject of an evaluator by `segmentation_picture`.

    The file is `subject-<id>-scored.png` for a subject with a label, else `subject-<id>-label.png`; for a BIDS dataset
    see `scripts.results.paths.derivative_path`.
    """

    what = "pictures (.png)"

    def write(self, item: dict[str, Any]) -> None:
        subject, label = item["subject"], item.get("label")
        figure = segmentation_picture(item["t1"], item["pred"], label, f"subject {subject}", item.get("uncertainty"))
        path = result_path(self.output_dir, item, "label" if label is None else "scored", ".png")
        with whole_files(path.parent) as temporary:
            # noise hardly compresses: level 6 saves 5 % and takes 0.1 s longer
            figure.savefig(temporary / path.name, dpi=80, facecolor="black", pil_kwargs={"compress_level": 1})
