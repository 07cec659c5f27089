"""The plots of report.html: learning curves, and scores and volumes of all subjects."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from scripts.report.warnings import usual_range
from scripts.results.pictures import TISSUE_COLORS
from scripts.tissues import Tissue

# tags of TensorBoard
TRAINING_LOSS = "train_loss"
VALIDATION_DICE = {
    "val_mean_dice": "mean",
    **{f"val_mean_dice_{tissue.name.lower()}": tissue.name for tissue in Tissue},
}


def training_history(folder: Path) -> dict[str, dict[int, float]]:
    """Read the last training from the TensorBoard logs in a folder: values by name and by epoch or step.

    The logs of a training that was stopped and resumed are joined; an earlier training is dropped.
    """
    history: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        log = EventAccumulator(str(path), {SCALARS: 0}).Reload()  # 0: keep all
        tags = {TRAINING_LOSS, *VALIDATION_DICE} & {*log.Tags()[SCALARS]}
        own = {tag: {event.step: event.value for event in log.Scalars(tag)} for tag in tags}
        # only the loss says where a log begins: the network to resume from may be validated as epoch 1 in any log
        if first := min(own.get(TRAINING_LOSS, ()), default=0):
            for tag in {*history, *own}:
                earlier = {step: value for step, value in history.get(tag, {}).items() if step < first}
                later = {step: value for step, value in own.get(tag, {}).items() if step >= first}
                history[tag] = earlier | later
    return {tag: steps for tag, steps in history.items() if steps}


def learning_curves(history: Mapping[str, Mapping[int, float]]) -> Figure:
    """Plot the loss of each epoch and the Dice of each validation, see `training_history`."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    loss, dice = figure.subplots(1, 2)
    steps = history.get(TRAINING_LOSS, {})
    loss.plot(list(steps), list(steps.values()), color="black", marker=".")  # a marker shows even a single epoch
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
    """Plot a panel per measure with a box per tissue and a point per subject.

    Args:
        panels: by title of the measure, values by name of the tissue; values that aren't finite are skipped.
        ranges: whether to draw the usual range at 6 months beside each box; for volumes.
    """
    figure = Figure(figsize=(9 if len(panels) > 1 else 5, 3), layout="constrained")
    for axis, (title, by_tissue) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        finite = {tissue: [value for value in values if math.isfinite(value)] for tissue, values in by_tissue.items()}
        boxes = axis.boxplot(
            finite.values(), tick_labels=finite, showfliers=False, widths=0.5, patch_artist=True,
            medianprops={"color": "black", "linewidth": 2},
        )  # fmt: skip
        for position, (box, (tissue, values)) in enumerate(zip(boxes["boxes"], finite.items(), strict=True), start=1):
            box.set_facecolor(TISSUE_COLORS[Tissue[tissue]])
            axis.plot(np.linspace(position - 0.15, position + 0.15, len(values) + 2)[1:-1], values, "k.", markersize=4)
            if ranges:
                low, high = usual_range(Tissue[tissue])
                axis.plot([position + 0.38] * 2, [low, high], color="#555555", linewidth=4, solid_capstyle="butt")
        axis.set_title(title)
    return figure
