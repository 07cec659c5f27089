"""Progress of a training: a bar, and curves and pictures for TensorBoard."""

from pathlib import Path

import numpy as np
from ignite.engine import Engine, Events
from ignite.handlers.tqdm_logger import ProgressBar
from matplotlib.backends.backend_agg import FigureCanvasAgg
from monai.engines import Evaluator
from monai.handlers import TensorBoardStatsHandler, from_engine
from torch.utils.tensorboard import SummaryWriter

from scripts.distributed import own_rank
from scripts.results.pictures import segmentation_picture
from scripts.results.tracking import STEP_LOSS
from scripts.results.writers import segmented_subjects

PICTURE_DPI = 60


class Progress:
    """Handler of a trainer that shows a progress bar and logs training and validation for TensorBoard.

    Only the first of several processes does so. If MLflow records the run, it gets the pictures too.

    Args:
        output_dir: the folder of the log.
        validator: the evaluator that scores the network during training.
        picture_interval: epochs from one picture of the validation to the next; 0 for none.
    """

    def __init__(self, output_dir: str, validator: Evaluator, picture_interval: int = 1) -> None:
        self.output_dir = output_dir
        self.validator = validator
        self.picture_interval = picture_interval

    def attach(self, engine: Engine) -> None:
        if own_rank() > 0:
            return
        writer = SummaryWriter(log_dir=self.output_dir)
        ProgressBar(desc="training", mininterval=1.0).attach(engine)
        loss = from_engine(["loss"], first=True)
        TensorBoardStatsHandler(writer, tag_name=STEP_LOSS, output_transform=loss).attach(engine)
        TensorBoardStatsHandler(writer, iteration_log=False).attach(self.validator)
        if self.picture_interval:
            PictureLog(writer, self.picture_interval, engine).attach(self.validator)


class PictureLog:
    """Handler of a validator that draws its first subject by `segmentation_picture`, for TensorBoard and MLflow.

    It draws the first validation, and each one `interval` epochs or more after the last picture.

    Args:
        summary_writer: TensorBoard's log, where the picture is `validation/subject-<id>`.
        interval: epochs from one picture to the next.
        trainer: its MLflow run gets the pictures, if it is tracked.
    """

    def __init__(self, summary_writer: SummaryWriter, interval: int, trainer: Engine | None = None) -> None:
        self.summary_writer = summary_writer
        self.interval = interval
        self.trainer = trainer
        self.due = 0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self.draw)

    def draw(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch < self.due:
            return
        self.due = epoch + self.interval
        item = next(segmented_subjects(engine))
        t1 = item["t1"]
        if t1.shape != item["pred"].shape:  # a recipe validates only a part of the volume
            t1 = item["image"][:1] - item["image"][:1].min()
        # MONAI Label's subjects have no id
        name = f"subject-{item['subject']}" if "subject" in item else Path(item["t1"].meta["filename_or_obj"]).stem
        figure = segmentation_picture(t1, item["pred"], item["label"], f"{name}, epoch {epoch}")
        figure.set_dpi(PICTURE_DPI)
        canvas = FigureCanvasAgg(figure)  # not add_figure, which needs pyplot
        canvas.draw()
        picture = np.asarray(canvas.buffer_rgba())[..., :3]
        self.summary_writer.add_image(f"validation/{name}", picture, epoch, dataformats="HWC")
        self.summary_writer.flush()
        if self.trainer is not None and (tracker := getattr(self.trainer.state, "tracker", None)):
            tracker.client.log_image(tracker.cur_run.info.run_id, picture, key=name, step=epoch)
