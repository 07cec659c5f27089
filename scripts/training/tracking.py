"""What is seen of a run from outside: pictures of a training's validation, and MLflow where `--tracking mlflow` asks.

For that MONAI appends an MLFlowHandler to the handlers of each engine, which records its metrics. Here is what this
handler doesn't do.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ignite.engine import Engine, Events
from matplotlib.backends.backend_agg import FigureCanvasAgg
from monai.handlers import MLFlowHandler
from monai.utils import optional_import

from scripts.distributed import own_rank
from scripts.results.copy_out import CopyOut
from scripts.results.pictures import segmentation_picture
from scripts.results.provenance import shown
from scripts.results.writers import segmented_subjects

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

mlflow, _ = optional_import("mlflow")

FOLDER_TAG = "folder"  # of a run: where its results lie
STEP_LOSS = "train_step_loss"  # MONAI would call it train_loss, as the mean of an epoch is called
PICTURE_DPI = 60


def run_name(kind: str, folder: str, tracking_uri: str, experiment_name: str, resume: bool = False) -> str:
    """The name of an MLflow run.

    Args:
        kind: 'training' and the like.
        folder: where the run's results lie.
        tracking_uri: the store, unless MLFLOW_TRACKING_URI names another.
        experiment_name: the experiment in it.
        resume: whether to go on with the newest run of this kind and folder that isn't finished, if there is one.

    Returns:
        `<kind>-<date>-<time>`, or the name of the run to go on with.
    """
    if resume and own_rank() == 0:  # the others don't record
        client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri)
        experiment = client.get_experiment_by_name(experiment_name)
        runs = client.search_runs([experiment.experiment_id], "attributes.status != 'FINISHED'") if experiment else ()
        for run in runs:  # the newest first
            own_folder = run.data.tags.get(FOLDER_TAG) == str(Path(folder).resolve())
            if own_folder and run.info.run_name.startswith(f"{kind}-"):
                return run.info.run_name
    return f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"


class TrackedRun:
    """Handler that stands in for MONAI's MLFlowHandler: it adds settings and files to its run, and ends it.

    Args:
        tracker: MONAI's handler.
        folder: where the results of the run lie.
        parameters: settings by name, or what was made of them, of which the kind is recorded. Those that the run has
            already, because it is gone on with, stay as they are.
        files: go into the run when it ends, if they are there.
    """

    def __init__(
        self, tracker: MLFlowHandler, folder: str, parameters: Mapping[str, Any], files: Sequence[str]
    ) -> None:
        self.tracker = tracker
        self.folder = Path(folder)
        self.parameters = parameters
        self.files = files

    def attach(self, engine: Engine) -> None:
        self.tracker.close_on_complete = False
        self.tracker.tag_name = STEP_LOSS
        self.tracker.attach(engine)
        engine.add_event_handler(Events.STARTED, self.begin)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def begin(self) -> None:
        client, run_id = self.tracker.client, self.tracker.cur_run.info.run_id
        client.set_tag(run_id, FOLDER_TAG, str(self.folder.resolve()))
        known = client.get_run(run_id).data.params
        for name, value in self.parameters.items():
            if name not in known:
                client.log_param(run_id, name, shown(value))

    def finish(self) -> None:
        for file in self.files:
            if Path(file).is_file():
                self.tracker.client.log_artifact(self.tracker.cur_run.info.run_id, file)
        self.tracker.close()
        print(f"MLflow run {self.tracker.run_name}: {self.tracker.client.tracking_uri}")


class PictureLog:
    """Handler of a validator that draws its first subject by `segmentation_picture`, for TensorBoard and MLflow.

    It draws the first validation, and each that comes `interval` epochs or more after the last one drawn.

    Args:
        summary_writer: TensorBoard's log, where the picture is `validation/subject-<id>`.
        interval: epochs from one picture to the next.
    """

    def __init__(self, summary_writer: "SummaryWriter", interval: int) -> None:
        self.summary_writer = summary_writer
        self.interval = interval
        self.due = 0
        self.tracker: MLFlowHandler | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self.draw)

    def draw(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch < self.due:
            return
        self.due = epoch + self.interval
        item = next(segmented_subjects(engine))
        t1 = item["t1"]
        if t1.shape != item["pred"].shape:  # a recipe validates a part of the volume
            t1 = item["image"][:1] - item["image"][:1].min()
        # MONAI Label's subjects have no id
        name = f"subject-{item['subject']}" if "subject" in item else Path(item["t1"].meta["filename_or_obj"]).stem
        figure = segmentation_picture(t1, item["pred"], item["label"], f"{name}, epoch {epoch}")
        figure.set_dpi(PICTURE_DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        picture = np.asarray(canvas.buffer_rgba())[..., :3]
        self.summary_writer.add_image(f"validation/{name}", picture, epoch, dataformats="HWC")
        self.summary_writer.flush()
        if self.tracker is not None:
            self.tracker.client.log_image(self.tracker.cur_run.info.run_id, picture, key=name, step=epoch)


def with_run(
    handlers: Sequence[Any], folder: str, parameters: Mapping[str, Any], files: Sequence[str]
) -> Sequence[Any]:
    """The handlers of an engine, an MLFlowHandler among them replaced by its `TrackedRun`, and `CopyOut` last again.

    Args:
        handlers: as configured; without an MLFlowHandler they come back as they are.
        folder, parameters, files: as for `TrackedRun`.
    """
    complete = [TrackedRun(h, folder, parameters, files) if isinstance(h, MLFlowHandler) else h for h in handlers]
    return sorted(complete, key=lambda handler: isinstance(handler, CopyOut))


def with_pictures(handlers: Sequence[Any]) -> Sequence[Any]:
    """The handlers of a validator, where a `PictureLog` draws for the MLFlowHandler among them, if there is one."""
    for tracker in [handler for handler in handlers if isinstance(handler, MLFlowHandler)]:
        for handler in handlers:
            if isinstance(handler, PictureLog):
                handler.tracker = tracker
    return handlers
