"""What every run records beside its results: how they came about, an MLflow run, and copies at URLs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.handlers import MLFlowHandler

from scripts.data.storage import Folders
from scripts.results.copy_out import CopyOut
from scripts.results.provenance import ProvenanceSaver
from scripts.results.tracking import TrackedRun


def with_records(
    handlers: Sequence[Any],
    kind: str,
    folders: Folders,
    settings: Mapping[str, Any],
    resume: bool = False,
    validation_handlers: Sequence[Any] = (),
) -> list[Any]:
    """Return the handlers of an engine with those that record its run after them, in the order that these need.

    MONAI appends an MLFlowHandler to the configured handlers for `--tracking mlflow`; a `TrackedRun` takes its place.

    Args:
        handlers: as configured.
        kind: 'training', 'evaluation' or 'inference'.
        folders: those of the run.
        settings: recorded by name.
        resume: whether the run continues an earlier one.
        validation_handlers: those of a trainer's validator, which records to the same MLflow run.
    """
    output, model = Path(folders.output), Path(folders.checkpoints or "", "model.pt")
    files = {
        "training": [model],
        "evaluation": [output / "metrics.csv", output / "metrics.md"],
        "inference": [output / "volumes.csv", output / "volumes.tsv"],
    }[kind]
    made = model if kind == "training" else None
    trackers = [each for each in (*handlers, *validation_handlers) if isinstance(each, MLFlowHandler)]
    tracked = [TrackedRun(trackers, kind, folders.output, settings, files, resume)] if trackers else []
    return [
        *(each for each in handlers if each not in trackers),
        ProvenanceSaver(folders.output, kind, settings, made, resume),
        *tracked,
        CopyOut(folders),
    ]
