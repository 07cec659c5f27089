"""What every run records beside its results: their provenance, an MLflow run, and copies at URLs."""

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
    """Return the handlers of an engine, followed by those that record its run, in the right order.

    For `--tracking mlflow`, MONAI appends an MLFlowHandler to the configured handlers. A `TrackedRun` replaces it.

    Args:
        handlers: as configured.
        kind: 'training', 'evaluation' or 'inference'.
        folders: of the run.
        settings: to record, by name.
        resume: whether the run resumes an earlier one.
        validation_handlers: of a trainer's validator, which records to the same MLflow run.
    """
    output, model = Path(folders.output), Path(folders.checkpoints or "", "model.pt")
    files = {
        "training": [model],
        "evaluation": [output / "metrics.csv", output / "metrics.md"],
        "inference": [output / "volumes.csv", output / "volumes.tsv"],
    }[kind]
    weights = model if kind == "training" else None
    trackers = [each for each in (*handlers, *validation_handlers) if isinstance(each, MLFlowHandler)]
    tracked = [TrackedRun(trackers, kind, folders.output, settings, files, resume)] if trackers else []
    return [
        *(each for each in handlers if each not in trackers),
        ProvenanceSaver(folders.output, kind, settings, weights, resume),
        *tracked,
        CopyOut(folders),
    ]
