"""Scores and volumes of each tissue, a row per subject."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.metrics import compute_dice
from monai.metrics.utils import get_edge_surface_distance
from monai.networks import one_hot

from scripts.distributed import gathered
from scripts.errors import InputError
from scripts.files import whole_files
from scripts.results.tables import markdown_table, read_csv, write_csv
from scripts.results.writers import segmented_subjects
from scripts.tissues import TISSUES, Tissue


def tissue_dice(prediction: torch.Tensor | np.ndarray, label: torch.Tensor | np.ndarray) -> dict[str, float]:
    """Return the Dice (0 to 1) of `csf`, `gm` and `wm`, and their `mean` over the tissues that the label has.

    Args:
        prediction, label: labels 0 background, 1 CSF, 2 GM, 3 WM, of one shape. A tissue that the label lacks scores
            NaN.
    """
    pair = [
        one_hot(torch.as_tensor(x).reshape(1, 1, -1).long(), num_classes=1 + len(Tissue)) for x in (prediction, label)
    ]
    return _with_mean(compute_dice(*pair, include_background=False)[0].tolist())


def tissue_scores(prediction: torch.Tensor, label: torch.Tensor, spacing: tuple[float, ...]) -> dict[str, float]:
    """Return the agreement of a segmentation with a label.

    Args:
        prediction, label: labels 0 background, 1 CSF, 2 GM, 3 WM, (1, X, Y, Z), on one grid.
        spacing: voxel size in mm.

    Returns:
        For each tissue, and as mean over the tissues that the label has: `dice_` (0 to 1), and in mm `hd95_` and
        `hd_max_` (95th percentile and maximum of the surface distances, the greater of both directions) and `asd_`
        (mean surface distance over both directions). Surfaces are the outermost voxels of a tissue. NaN where the label
        lacks the tissue; an infinite distance where only the prediction lacks it.
    """
    # distances within a box around both labels need less memory and time than in the whole volume
    occupied = torch.nonzero((prediction[0] > 0) | (label[0] > 0))
    if len(occupied):
        low, high = occupied.amin(0), occupied.amax(0) + 1
        box = (slice(None), *(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)))
        prediction, label = prediction[box], label[box]
    distances = [_surface_distances(prediction[0] == tissue, label[0] == tissue, spacing) for tissue in Tissue]
    scores = {"dice": tissue_dice(prediction, label)}
    scores |= zip(("hd95", "hd_max", "asd"), map(_with_mean, zip(*distances, strict=True)), strict=True)
    return {f"{name}_{tissue}": value for name, by_tissue in scores.items() for tissue, value in by_tissue.items()}


def _with_mean(values: Sequence[float]) -> dict[str, float]:
    """Values by tissue, and their mean."""
    return dict(zip((*TISSUES, "mean"), (*values, mean_and_deviation(values)[0].item()), strict=True))


def _surface_distances(prediction: torch.Tensor, label: torch.Tensor, spacing: tuple[float, ...]) -> tuple[float, ...]:
    """95th percentile, maximum and mean of the surface distances of two masks (X, Y, Z), see `tissue_scores`."""
    if not label.any() or not prediction.any():
        return (np.inf if label.any() else np.nan,) * 3
    # MONAI has a metric for each of the three, and each would measure the distances again
    _, distances, _ = get_edge_surface_distance(prediction, label, spacing=spacing, symmetric=True)
    percentile, maximum = (max(torch.quantile(each, q).item() for each in distances) for q in (0.95, 1.0))
    return percentile, maximum, torch.cat(distances).mean().item()


def mean_and_deviation(scores: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and sample standard deviation over the first axis, without NaN, the score of an absent tissue.

    Both are NaN where all scores are.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of no score, one score, or an infinite one
        return np.nanmean(scores, axis=0), np.nanstd(scores, axis=0, ddof=1)


def tissue_volumes(prediction: MetaTensor) -> dict[str, float]:
    """Return the volume of each tissue and of the brain (their sum) in ml.

    Args:
        prediction: integer labels 0 to 3 with an affine in mm.
    """
    voxel = abs(float(torch.linalg.det(prediction.affine[:3, :3]))) / 1000
    voxels = torch.bincount(prediction.as_tensor().flatten(), minlength=len(Tissue) + 1).tolist()
    volumes = {tissue.name.lower(): voxels[tissue] * voxel for tissue in Tissue}
    return {f"{name}_ml": round(ml, 3) for name, ml in (volumes | {"brain": sum(volumes.values())}).items()}


class _SubjectTable(ABC):
    """Handler that measures each subject of an evaluator, and rewrites the table after each so that no row is lost.

    With several processes, the first writes its own subjects during the run and those of all at the end of the epoch.
    So the table is complete before any handler at COMPLETED reads it.

    Args:
        path: the CSV file, with the column `subject` and those of `measure`.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.rows.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.gather)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.gather_from_all)

    def gather(self, engine: Engine) -> None:
        self.rows += [{"subject": item["subject"]} | self.measure(item) for item in segmented_subjects(engine)]
        if idist.get_rank() == 0:
            self.write()

    def gather_from_all(self, engine: Engine) -> None:
        # by subject: a sampler may give one subject to two processes
        self.rows = list({row["subject"]: row for row in gathered(self.rows)}.values())
        if idist.get_rank() == 0:
            self.write()
            self.finish(engine)

    def write(self) -> None:
        write_csv(self.path, self.rows)

    @abstractmethod
    def measure(self, item: dict[str, Any]) -> dict[str, float]:
        """Return the columns of one subject, see `segmented_subjects`."""

    @abstractmethod
    def finish(self, engine: Engine) -> None:
        """Report the table once it has all subjects."""


class ScoreTable(_SubjectTable):
    """Handler that scores each subject against its label by `tissue_scores`.

    At the end it prints the Dice table, writes it beside the CSV file as `<name>.md`, and adds the mean scores to the
    evaluator's metrics.
    """

    def measure(self, item: dict[str, Any]) -> dict[str, float]:
        if item["pred"].shape != item["t1"].shape:
            raise InputError(
                "the segmentation isn't of the whole volume, because a recipe follows configs/evaluate.json; "
                "name configs/evaluate.json after it"
            )
        spacing = tuple(item["label"].pixdim.tolist())
        return tissue_scores(item["pred"].as_tensor().cpu(), item["label"].as_tensor().cpu(), spacing)

    def finish(self, engine: Engine) -> None:
        table = f"Dice in percent\n\n{dice_table(self.rows)}"
        with whole_files(self.path.parent) as temporary:
            (temporary / self.path.with_suffix(".md").name).write_text(table + "\n")
        print(table)
        print(f"scores per subject, with surface distances: {self.path}")
        scores = [name for name in self.rows[0] if name != "subject"]
        means, _ = mean_and_deviation([[row[name] for name in scores] for row in self.rows])
        engine.state.metrics |= dict(zip(scores, means.tolist(), strict=True))


class VolumeTable(_SubjectTable):
    """Handler that measures each segmented subject by `tissue_volumes`.

    The table keeps the rows of other subjects from earlier runs, as the folder keeps their label images.

    Raises:
        InputError: when the engine starts, if the file exists and is another table.
    """

    columns = ("subject", *(f"{name}_ml" for name in (*TISSUES, "brain")))

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.read_earlier)
        super().attach(engine)

    def read_earlier(self) -> None:
        self.earlier = read_csv(self.path) if self.path.exists() else []
        if self.earlier and tuple(self.earlier[0]) != self.columns:
            raise InputError(f"{self.path}: exists and isn't a table of volumes; choose another --output_dir")

    def write(self) -> None:
        measured = {row["subject"] for row in self.rows}
        write_csv(self.path, [row for row in self.earlier if row["subject"] not in measured] + self.rows)

    def measure(self, item: dict[str, Any]) -> dict[str, float]:
        return tissue_volumes(item["pred"])

    def finish(self, engine: Engine) -> None:
        print(f"subjects segmented: {len(self.rows)}; labels and volumes: {self.path.parent}")


def dice_table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table CSF | GM | WM | Average: Dice in percent, a line per subject and one for their mean."""
    subjects = [row["subject"] for row in rows]
    percent = 100 * np.array([[row[f"dice_{name}"] for name in (*TISSUES, "mean")] for row in rows])
    if len(rows) > 1:
        subjects.append("mean")
        percent = np.vstack([percent, mean_and_deviation(percent)[0]])
    columns = ("CSF", "GM", "WM", "Average")
    return markdown_table(
        [
            {"Subject": subject} | {column: f"{score:.2f}" for column, score in zip(columns, scores, strict=True)}
            for subject, scores in zip(subjects, percent, strict=True)
        ]
    )
