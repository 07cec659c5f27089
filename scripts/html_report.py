"""report.html: pictures, figures and warnings by which a person trusts a segmentation, or doesn't, in one file."""

import base64
import hashlib
import io
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import matplotlib
import monai
import numpy as np
import torch
from ignite.engine import Engine, Events
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from monai.data import MetaTensor
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from scripts.distributed import gathered
from scripts.exported import is_exported
from scripts.inferers import network_precision
from scripts.metrics import tissue_volumes
from scripts.report import (
    DISAGREEMENT_COLOR,
    TISSUE_COLORS,
    UNCERTAINTY_COLORS,
    brain_box,
    canonical,
    canonical_voxel_size,
    middle,
    slices,
)
from scripts.storage import without_credentials
from scripts.transforms import Tissue
from scripts.weights import checkpoint_paths, holds
from scripts.writers import BackgroundWriter, read_csv, whole_files

HERE = Path(__file__).parent
METADATA = HERE.parent / "configs" / "metadata.json"
NAME = "report.html"
GIVEN = "not used: weights were given by the calling program"

# ml, mean and standard deviation as reported for these; this project hasn't measured them
SOURCE = "the ten training subjects of iSeg-2017"
SIX_MONTHS = {Tissue.CSF: (170, 14), Tissue.GM: (380, 40), Tissue.WM: (246, 39)}
# Ten leave mean and deviation uncertain: by the prediction interval of a normal sample of ten, 2 in 100 such children
# lie beyond 3 deviations of a tissue, and 5 in 100 beyond 2.4, too many to be warned of.
DEVIATIONS = 3
# ml; half the mean brain at 6 months, about that of a newborn: less is a part of a brain, or voxels of a wrong size
SMALLEST_BRAIN = sum(mean for mean, _ in SIX_MONTHS.values()) / 2
# ml; a brain whose tissues are all at the upper end of their ranges; a head has more, with its skull
LARGEST_USUAL_BRAIN = sum(mean + DEVIATIONS * deviation for mean, deviation in SIX_MONTHS.values())
# share of the voxels on the faces of the volume where T1 may be above 0: where a brain is cut to its box it is 1 in
# 100, while a head is cut off at the neck, and noise in the air is everywhere
LARGEST_SHARE_OF_FACES = 0.1
# share of the brain that may be labelled background: in iSeg's labels and those of phantoms none is
LARGEST_BACKGROUND = 0.05
# share of the brain that may be without T2: on iSeg's scans T1 and T2 differ by a voxel here and there
LARGEST_WITHOUT_T2 = 0.01
# difference of the two sides of a tissue as a share of their sum: hemispheres differ by a few percent, each millimetre
# by which the middle of the box misses that of the brain adds two or three, and phantoms come to 0.12
LARGEST_ASYMMETRY = 0.15

# names of TensorBoard's curves
TRAINING_LOSS = "train_loss"
VALIDATION_DICE = {
    "val_mean_dice": "mean",
    **{f"val_mean_dice_{tissue.name.lower()}": tissue.name for tissue in Tissue},
}
# scores in the tables and box plots: their columns, and the factor for what is shown
SCORES = (("dice", "Dice in percent", 100), ("hd95", "HD95 in mm", 1), ("asd", "ASD in mm", 1))

LONGEST_SIDE = 256  # voxels of a viewer; a box of more than so many mm is shown coarser
MOST_VIEWERS = 50  # in one file, so that a browser can still open it
STATIC_SCALE = 2  # pixels for a voxel of the viewer
# The file of 13 subjects shall stay below 10 MB. Noise takes nearly all of it, so a scan gets the best of these
# qualities that fits.
QUALITIES = (50, 30, 20, 10)
LARGEST_SCAN, LARGEST_STATIC = 160_000, 70_000  # bytes
UNCERTAINTY_STEP = 2  # voxels along a side of the cubes whose mean uncertainty is shown
OPAQUE_UNCERTAINTY = 85  # of 255; less lets the scan shine through
LABEL_STEP = 16  # grey levels from one label to the next, which rounding then can't mistake


def usual_range(tissue: Tissue) -> tuple[float, float]:
    """Lowest and highest volume in ml that is no reason for a warning at 6 months."""
    mean, deviation = SIX_MONTHS[tissue]
    return mean - DEVIATIONS * deviation, mean + DEVIATIONS * deviation


def volume_out_of_range(volumes: Mapping[str, float]) -> str | None:
    """Warning of tissues that are smaller or larger than at 6 months.

    Args:
        volumes: as `scripts.metrics.tissue_volumes` has them.
    """
    outside = []
    for tissue in Tissue:
        (low, high), volume = usual_range(tissue), volumes[f"{tissue.name.lower()}_ml"]
        if not low <= volume <= high:
            outside.append(f"{tissue.name} {volume:.0f} ml, usual at 6 months {low:.0f} to {high:.0f}")
    return "; ".join(outside) or None


def few_foreground_voxels(t1: np.ndarray, voxel_ml: float) -> str | None:
    """Warning of a T1 (X, Y, Z) that is above 0 in less than a whole brain."""
    volume = np.count_nonzero(t1 > 0) * voxel_ml
    return f"T1 is above 0 in only {volume:.0f} ml" if volume < SMALLEST_BRAIN else None


def brain_left_unlabelled(t1: np.ndarray, prediction: np.ndarray) -> str | None:
    """Warning of a segmentation (X, Y, Z) that calls much background of where T1 is above 0."""
    share = np.count_nonzero(prediction[t1 > 0] == 0) / np.count_nonzero(t1 > 0)
    return f"{share:.0%} of the brain is labelled background" if share > LARGEST_BACKGROUND else None


def not_skull_stripped(t1: np.ndarray, voxel_ml: float) -> str | None:
    """Warning of a T1 (X, Y, Z) that is above 0 in more than a brain, or on much of the faces of its volume."""
    volume = np.count_nonzero(t1 > 0) * voxel_ml
    if volume > LARGEST_USUAL_BRAIN:
        return f"T1 is above 0 in {volume:.0f} ml, and a brain at 6 months has up to {LARGEST_USUAL_BRAIN:.0f}"
    faces = [face for axis in range(3) for face in (t1.take(0, axis), t1.take(-1, axis))]
    share = sum(np.count_nonzero(face > 0) for face in faces) / sum(face.size for face in faces)
    return f"T1 is above 0 on {share:.0%} of the faces of its volume" if share > LARGEST_SHARE_OF_FACES else None


def t2_missing(t1: np.ndarray, t2: np.ndarray) -> str | None:
    """Warning of a T2 (X, Y, Z) that isn't above 0 where T1 is."""
    share = np.count_nonzero(t2[t1 > 0] <= 0) / np.count_nonzero(t1 > 0)
    return f"T2 isn't above 0 in {share:.0%} of the brain" if share > LARGEST_WITHOUT_T2 else None


def left_right_asymmetry(prediction: np.ndarray) -> str | None:
    """Warning of tissues that have more on one side of the middle of the segmentation's box than on the other.

    Args:
        prediction: labels 0 to 3, (X, Y, Z), where X runs to the subject's right.
    """
    occupied = np.flatnonzero(prediction.any((1, 2)))
    if len(occupied) < 2:
        return None
    low, high = occupied[0], occupied[-1] + 1
    half = (high - low) // 2
    sides = {"left": prediction[low : low + half], "right": prediction[high - half : high]}
    uneven = []
    for tissue in Tissue:
        voxels = {side: np.count_nonzero(part == tissue) for side, part in sides.items()}
        both, larger = sum(voxels.values()), max(voxels, key=voxels.get)
        if both and 2 * voxels[larger] - both > LARGEST_ASYMMETRY * both:
            uneven.append(f"{voxels[larger] / both:.0%} of {tissue.name} is on the {larger}")
    return "; ".join(uneven) or None


@dataclass(frozen=True)
class Pictures:
    """What of a subject is shown, as WebP images.

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


@dataclass(frozen=True)
class Part:
    """What the report says of a subject, but for its scores.

    Attributes:
        subject: the id.
        files: names of T1, T2 and so on.
        volumes: as `scripts.metrics.tissue_volumes` has them.
        warnings: what is odd, by kind.
        has_label: whether there is a label to compare with.
        pictures: None where there are too many for one file.
    """

    subject: str
    files: dict[str, str]
    volumes: dict[str, float]
    warnings: dict[str, str]
    has_label: bool
    pictures: Pictures | None


def subject_part(item: Mapping[str, Any], with_pictures: bool = True) -> Part:
    """Measure and draw a subject, given as by `scripts.writers.segmented_subjects`, with its `t2` besides."""
    t1, t2, prediction = (canonical(item[name]) for name in ("t1", "t2", "pred"))
    label, volumes = item.get("label"), tissue_volumes(item["pred"])
    voxel_ml = float(canonical_voxel_size(item["t1"]).prod()) / 1000
    found = {
        "volume out of range": volume_out_of_range(volumes),
        "few foreground voxels": few_foreground_voxels(t1, voxel_ml),
        "brain left unlabelled": brain_left_unlabelled(t1, prediction),
        "not skull-stripped": not_skull_stripped(t1, voxel_ml),
        "T2 missing": t2_missing(t1, t2),
        "left-right asymmetry": left_right_asymmetry(prediction),
    }
    files = {name: item[key].meta["filename_or_obj"] for name, key in (("T1", "t1"), ("T2", "t2"))}
    files |= {} if label is None else {"label": label.meta["filename_or_obj"]}
    files |= {"mask": item["mask"]} if "mask" in item else {}
    return Part(
        subject=item["subject"],
        files={name: Path(path).name for name, path in files.items()},
        volumes=volumes,
        warnings={kind: message for kind, message in found.items() if message},
        has_label=label is not None,
        pictures=draw(item["t1"], item["t2"], item["pred"], label, item.get("uncertainty")) if with_pictures else None,
    )


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
        brightest = max(float(np.percentile(canonical(values)[canonical(t1) > 0], 99.5)), np.finfo(np.float32).tiny)
        return (np.clip(shown(values) / brightest, 0, 1) * 255).astype(np.uint8)

    layers = {"t1": grey(t1), "t2": grey(t2)}
    segmented = shown(prediction).astype(np.uint8)
    true = None if label is None else shown(label).astype(np.uint8)
    layers["labels"] = LABEL_STEP * (segmented if true is None else segmented + 4 * true)
    images = {name: _webp(side_by_side(values), LARGEST_SCAN) for name, values in layers.items() if name != "labels"}
    images["labels"] = _webp(side_by_side(layers["labels"]))
    if uncertainty is not None:
        layers["uncertainty"] = np.round(255 * shown(uncertainty)).astype(np.uint8)
        images["uncertainty"] = _webp(side_by_side(_coarser(layers["uncertainty"])), LARGEST_SCAN)
    static = _webp(_static(layers, segmented, true), LARGEST_STATIC)
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


def _webp(picture: np.ndarray, largest: int | None = None) -> bytes:
    """A picture, grey or RGB, as WebP: exact, or in the best of QUALITIES that has at most so many bytes if any has."""
    for quality in QUALITIES:
        content = io.BytesIO()
        how = {"lossless": True, "quality": 50} if largest is None else {"quality": quality}
        Image.fromarray(picture).save(content, "WEBP", method=2, **how)
        if largest is None or content.tell() <= largest:
            break
    return content.getvalue()


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


def training_history(folder: Path) -> dict[str, dict[int, float]]:
    """What the TensorBoard logs in a folder say of the last training, by name and epoch or step.

    Of a training that was stopped and gone on with it is the whole, of several that began anew the last one.
    """
    history: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        own: dict[str, dict[int, float]] = {}
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value") and value.tag in (TRAINING_LOSS, *VALIDATION_DICE):
                    own.setdefault(value.tag, {})[event.step] = value.simple_value
        # the loss alone says where a log begins: what training starts from may be validated as epoch 1, wherever it is
        if first := min(own.get(TRAINING_LOSS, ()), default=0):
            for tag in {*history, *own}:
                earlier = {step: value for step, value in history.get(tag, {}).items() if step < first}
                later = {step: value for step, value in own.get(tag, {}).items() if step >= first}
                history[tag] = earlier | later
    return {tag: steps for tag, steps in history.items() if steps}


def learning_curves(history: Mapping[str, Mapping[int, float]]) -> Figure:
    """The loss of each epoch and the Dice of each validation, as `training_history` gives them."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    loss, dice = figure.subplots(1, 2)
    steps = history.get(TRAINING_LOSS, {})
    loss.plot(list(steps), list(steps.values()), color="black")
    loss.set(xlabel="epoch", ylabel="training loss")
    for (tag, name), marker in zip(VALIDATION_DICE.items(), "osD^", strict=True):
        steps = history.get(tag, {})
        color = TISSUE_COLORS[Tissue[name]] if name in Tissue.__members__ else "black"
        percent = [100 * value for value in steps.values()]
        dice.plot(list(steps), percent, color=color, marker=marker, markersize=4, markeredgecolor="black", label=name)
    dice.set(xlabel="epoch", ylabel="validation Dice in percent")
    dice.legend()
    for axis in (loss, dice):
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def box_plots(panels: Mapping[str, Mapping[str, Sequence[float]]], ranges: bool = False) -> Figure:
    """A panel for each measure with a box for each tissue, and a point for each subject.

    Args:
        panels: by the title of the measure, values by the name of the tissue; what isn't finite is left out.
        ranges: whether the measure is a volume, beside which the usual one at 6 months is drawn.
    """
    figure = Figure(figsize=(9 if len(panels) > 1 else 5, 3), layout="constrained")
    for axis, (title, by_tissue) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        finite = {tissue: [value for value in values if math.isfinite(value)] for tissue, values in by_tissue.items()}
        boxes = axis.boxplot(
            finite.values(), tick_labels=finite, showfliers=False, widths=0.5, patch_artist=True,
            medianprops={"color": "black", "linewidth": 2},
        )  # fmt: skip
        for place, (box, (tissue, values)) in enumerate(zip(boxes["boxes"], finite.items(), strict=True), start=1):
            box.set_facecolor(TISSUE_COLORS[Tissue[tissue]])
            axis.plot(np.linspace(place - 0.15, place + 0.15, len(values) + 2)[1:-1], values, "k.", markersize=4)
            if ranges:
                low, high = usual_range(Tissue[tissue])
                axis.plot([place + 0.38] * 2, [low, high], color="#555555", linewidth=4, solid_capstyle="butt")
        axis.set_title(title)
    return figure


def _svg(figure: Figure) -> str:
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": NAME}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return _data_uri("image/svg+xml", content.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _number(value: float | str, digits: int = 2) -> str:
    value = float(value)
    return f"{value:.{digits}f}" if math.isfinite(value) else "none" if math.isnan(value) else "∞"


def _range_bar(tissue: Tissue, volume: float) -> dict[str, float]:
    """Places in percent along a bar that ends at 5 deviations, where a volume beyond it stands too."""
    mean, deviation = SIX_MONTHS[tissue]

    def place(deviations: float) -> float:
        return round(50 + 10 * min(max(deviations, -4.8), 4.8), 2)

    return {
        "low": place(-DEVIATIONS),
        "width": place(DEVIATIONS) - place(-DEVIATIONS),
        "inner": place(-1),
        "inner_width": place(1) - place(-1),
        "volume": place((volume - mean) / deviation),
    }


def render(
    parts: Sequence[Part],
    provenance: Mapping[str, str],
    scores: Mapping[str, Mapping[str, str]],
    history: Mapping[str, Mapping[int, float]],
) -> str:
    """The page.

    Args:
        parts: the subjects.
        provenance: how the segmentations came about, by what is told.
        scores: columns of `scripts.metrics.tissue_scores` by subject; empty where there are no labels.
        history: as `training_history` gives it; empty where there is none.
    """
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "number": _number,
        "webp": lambda content: _data_uri("image/webp", content),
    }
    viewer = (HERE / "report_viewer.js").read_text(encoding="utf-8")
    # only this script may run, whatever a name holds, and nothing may be fetched
    digest = base64.b64encode(hashlib.sha256(viewer.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
    policy += "base-uri 'none'; form-action 'none'"
    names = [tissue.name for tissue in Tissue]
    plots = {}
    several = len(parts) > 1
    if scores and several:
        plots["Scores of all subjects"] = box_plots(
            {
                title: {
                    name: [factor * float(row[f"{score}_{name.lower()}"]) for row in scores.values()] for name in names
                }
                for score, title, factor in SCORES
            }
        )
    if several:
        volumes = {name: [part.volumes[f"{name.lower()}_ml"] for part in parts] for name in names}
        plots["Volumes of all subjects"] = box_plots({"Volume in ml; grey: usual at 6 months": volumes}, ranges=True)
    if history:
        plots["Training"] = learning_curves(history)
    inferno = matplotlib.colormaps[UNCERTAINTY_COLORS](np.arange(256), bytes=True)[:, :3]
    return environment.get_template("report.html.jinja").render(
        policy=policy,
        viewer=viewer,
        constants={
            "tissues": list(TISSUE_COLORS.values()),
            "errors": DISAGREEMENT_COLOR,
            "uncertainty": inferno.tolist(),
            "labelStep": LABEL_STEP,
            "uncertaintyStep": UNCERTAINTY_STEP,
            "opaqueUncertainty": OPAQUE_UNCERTAINTY,
            "place": middle((1000, 1000, 1000)).tolist(),
        },
        parts=parts,
        scores=scores,
        score_titles=SCORES,
        plots={title: _svg(figure) for title, figure in plots.items()},
        tissues=[(tissue.name, TISSUE_COLORS[tissue], usual_range(tissue)) for tissue in Tissue],
        range_bars={
            part.subject: {t.name: _range_bar(t, part.volumes[f"{t.name.lower()}_ml"]) for t in Tissue}
            for part in parts
        },
        errors=any(part.has_label for part in parts),
        errors_color=DISAGREEMENT_COLOR,
        uncertain=any(part.pictures and "uncertainty" in part.pictures.layers for part in parts),
        shades=[to_hex(color / 255) for color in inferno[::51]],
        source=SOURCE,
        deviations=DEVIATIONS,
        most_viewers=MOST_VIEWERS,
        provenance=provenance,
    )


def warnings_by_kind(parts: Sequence[Part]) -> dict[str, list[str]]:
    """The subjects of which the report warns, by what it warns of."""
    found: dict[str, list[str]] = {}
    for part in parts:
        for kind in part.warnings:
            found.setdefault(kind, []).append(part.subject)
    return found


class ReportSaver(BackgroundWriter):
    """Handler that writes `report.html`, which replaces one of an earlier run.

    It shows the subjects of this run, of several processes those of all, and scores, where `ScoreTable` has written
    them. It stands after the handlers that write what it reads.

    Args:
        output_dir: the folder to write to, where the TensorBoard log of a training may lie too.
        settings: those to be told, by name; `checkpoints` and `precision` must be among them.
        scores: the table of `scripts.metrics.ScoreTable`; None where nothing is scored.
    """

    def __init__(self, output_dir: str, settings: Mapping[str, Any], scores: str | None = None) -> None:
        super().__init__(output_dir)
        self.settings = settings
        self.scores = scores
        self.parts: list[Part] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.note_provenance)
        super().attach(engine)
        engine.add_event_handler(Events.COMPLETED, self.save)

    def note_provenance(self, engine: Engine) -> None:
        """Say what is about to run; a training may replace a checkpoint meanwhile."""
        self.parts.clear()
        metadata = json.loads(METADATA.read_text(encoding="utf-8"))
        paths = checkpoint_paths(self.settings["checkpoints"])
        exported = any(is_exported(path) for path in paths)
        # MONAI's federated client evaluates weights that it was sent, whether or not a checkpoint is there
        given = len(paths) == 1 and not exported and not holds(paths[0], engine.network)
        device = torch.device(engine.state.device)
        precision = str(network_precision(device, self.settings["precision"])).removeprefix("torch.")
        self.provenance = {
            "date": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            "command": " ".join(
                [Path(sys.orig_argv[0]).name, *map(_quoted, map(without_credentials, sys.orig_argv[1:]))]
            ),
            "bundle": f"{metadata['name']}, version {metadata['version']}",
            "software": f"MONAI {monai.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}",
            "device": f"{device}, {processes} processes" if (processes := idist.get_world_size()) > 1 else str(device),
            "precision": "that of the exported network" if exported else precision,
            **{f"checkpoint {path}": GIVEN if given or not Path(path).is_file() else _sha256(path) for path in paths},
            **{f"setting {name}": without_credentials(str(value)) for name, value in self.settings.items()},
        }

    def write(self, item: dict[str, Any]) -> None:
        self.parts.append(subject_part(item, with_pictures=len(self.parts) < MOST_VIEWERS))

    def save(self) -> None:
        # a subject that two processes had counts once
        parts = list({part.subject: part for part in gathered(self.parts)}.values())
        if idist.get_rank() > 0:
            return
        parts = [part if n < MOST_VIEWERS else replace(part, pictures=None) for n, part in enumerate(parts)]
        rows = read_csv(self.scores) if self.scores else []
        page = render(parts, self.provenance, {row["subject"]: row for row in rows}, training_history(self.output_dir))
        with whole_files(self.output_dir) as temporary:
            # a path in the command needn't be UTF-8; Python has surrogates in place of what isn't
            (temporary / NAME).write_text(page, encoding="utf-8", errors="backslashreplace")
        found = "; ".join(f"{kind} ({', '.join(ids)})" for kind, ids in warnings_by_kind(parts).items())
        print(f"report: {self.output_dir / NAME}; warnings: {found or 'none'}")


def _quoted(argument: str) -> str:
    """An argument as a shell takes it, a list of texts as README.md writes it."""
    return f'"{argument}"' if "'" in argument and not set(argument) & set('"$`\\!') else shlex.quote(argument)


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return f"SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
