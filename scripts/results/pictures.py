"""Pictures by which a person judges a segmentation."""

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

# told apart, and from grey, without colour vision of one kind or another: three of Okabe and Ito's, and violet
TISSUE_COLORS = {Tissue.CSF: "#56b4e9", Tissue.GM: "#d55e00", Tissue.WM: "#f0e442"}
DISAGREEMENT_COLOR = "#aa00ff"
# told apart without colour vision: it brightens evenly
UNCERTAINTY_COLORS = "inferno"


def canonical(values: MetaTensor) -> np.ndarray:
    """The only channel, its axes turned to run right, front, top."""
    return nib.apply_orientation(values[0].cpu().numpy(), nib.io_orientation(values.affine.cpu().numpy()))


def canonical_voxel_size(values: MetaTensor) -> np.ndarray:
    """Size of a voxel in mm to the right, front and top."""
    affine = values.affine.cpu().numpy()
    return nib.affines.voxel_sizes(affine)[nib.io_orientation(affine)[:, 0].argsort()]


def brain_box(t1: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box that holds all of T1 (X, Y, Z) that is above 0."""
    occupied = [np.flatnonzero((t1 > 0).any(others)) for others in ((1, 2), (0, 2), (0, 1))]
    return tuple(slice(places[0], places[-1] + 1) for places in occupied)


def middle(shape: Sequence[int]) -> np.ndarray:
    """A place in the brain's box, a little beside its middle, where a sagittal slice would show the brain's gap."""
    return (np.array(shape) * (0.4, 0.5, 0.55)).astype(int)


def slices(values: np.ndarray, place: np.ndarray) -> list[np.ndarray]:
    """Axial, coronal and sagittal slice, as seen with the front or the top up and the subject's right on the left.

    Rows run upwards, as `imshow` draws them with `origin="lower"`.
    """
    x, y, z = place
    return [values[::-1, :, z].T, values[::-1, y, :].T, values[x, :, :].T]


def segmentation_picture(
    t1: MetaTensor,
    prediction: MetaTensor,
    label: MetaTensor | None = None,
    title: str = "",
    uncertainty: MetaTensor | None = None,
) -> Figure:
    """Slices through the middle of the brain: T1, T1 with the segmentation, and with the label where there is one.

    Args:
        t1: T1 intensities, (1, X, Y, Z), with an affine.
        prediction: labels 0 background, 1 CSF, 2 GM, 3 WM, on the same grid.
        label: the true labels likewise; a last column then marks the voxels where the two disagree.
        title: stands above the picture.
        uncertainty: 0 to 1 likewise, as `scripts.results.probabilities` has it; a column shows it inside the brain.
    """
    t1_values, segmented = canonical(t1), canonical(prediction)
    box = brain_box(t1_values)
    brain = t1_values[box]
    place = middle(brain.shape)
    x, y, z = canonical_voxel_size(t1)
    aspects = (y / x, z / x, z / y)

    colors = ListedColormap(TISSUE_COLORS.values())
    overlays = {"T1": None, "segmentation": segmented[box]}
    if label is not None:
        truth = canonical(label)[box]
        overlays |= {"label": truth, "disagreement": truth != segmented[box]}
    if uncertainty is not None:
        overlays["uncertainty"] = np.ma.masked_array(canonical(uncertainty)[box], brain <= 0)
    figure = Figure(figsize=(3.2 * len(overlays), 10), layout="constrained", facecolor="black")
    grey = slices(brain, place)
    heights = [aspect * slice_.shape[0] / slice_.shape[1] for slice_, aspect in zip(grey, aspects, strict=True)]
    # without ticks, which would be laid out although none is shown
    axes = figure.subplots(3, len(overlays), height_ratios=heights, subplot_kw={"xticks": [], "yticks": []})
    brightest = np.percentile(brain[brain > 0], 99.5)
    for column, (name, overlay) in enumerate(overlays.items()):
        axes[0, column].set_title(name, color="white")
        for row, (slice_, aspect) in enumerate(zip(grey, aspects, strict=True)):
            axis = axes[row, column]
            axis.imshow(slice_, cmap="gray", vmin=0, vmax=brightest, origin="lower", aspect=aspect)
            axis.axis("off")
            if row < 2:  # axial and coronal
                axis.text(0.02, 0.98, "R", color="white", transform=axis.transAxes, verticalalignment="top")
            if overlay is None:
                continue
            marks = slices(overlay, place)[row]
            if name == "uncertainty":
                shades = axis.imshow(marks, cmap=UNCERTAINTY_COLORS, vmin=0, vmax=1, origin="lower", aspect=aspect)
                continue
            marks = np.ma.masked_equal(marks, 0)
            if name == "disagreement":
                axis.imshow(marks, cmap=ListedColormap([DISAGREEMENT_COLOR]), origin="lower", aspect=aspect)
            else:
                axis.imshow(marks, cmap=colors, vmin=1, vmax=3, alpha=0.45, origin="lower", aspect=aspect)
    patches = [Patch(color=color, label=tissue.name) for tissue, color in TISSUE_COLORS.items()]
    if label is not None:
        patches.append(Patch(color=DISAGREEMENT_COLOR, label="disagreement"))
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=len(patches),
        facecolor="black",
        labelcolor="white",
    )
    if uncertainty is not None:
        bar = figure.colorbar(shades, ax=axes[:, -1], shrink=0.6, label="0: certain, 1: all classes equally probable")
        bar.ax.tick_params(colors="white")
        bar.ax.yaxis.label.set_color("white")
    figure.suptitle(title, color="white", parse_math=False)
    return figure


class PictureSaver(BackgroundWriter):
    """Handler that draws each subject of an evaluator by `segmentation_picture`.

    The file is `subject-<id>-scored.png` where there is a label, else `subject-<id>-label.png`; for a BIDS dataset see
    `scripts.results.paths.derivative_path`.

    Args:
        output_dir: the folder to write to.
    """

    what = "pictures (.png)"

    def write(self, item: dict[str, Any]) -> None:
        subject, label = item["subject"], item.get("label")
        figure = segmentation_picture(item["t1"], item["pred"], label, f"subject {subject}", item.get("uncertainty"))
        path = result_path(self.output_dir, item, "label" if label is None else "scored", ".png")
        with whole_files(path.parent) as temporary:
            # noise is hardly made smaller by more effort: level 6 saves 5 % and takes 0.1 s longer
            figure.savefig(temporary / path.name, dpi=80, facecolor="black", pil_kwargs={"compress_level": 1})
