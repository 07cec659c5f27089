"""MLflow with `--tracking mlflow`: records what MONAI's handler doesn't."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from monai.handlers import MLFlowHandler

from scripts.results.provenance import NAME, summary_of

FOLDER_TAG = "folder"  # of a run: the folder of its results
STEP_LOSS = "train_step_loss"  # MONAI's train_loss is also the name of an epoch's mean


class TrackedRun:
    """Handler around MONAI's MLFlowHandler that names its run, adds settings and files, and ends it.

    The run is named `<kind>-<date>-<time>` unless the setting `run_name` names it.

    Args:
        trackers: MONAI's handler, and further ones that record to the same run.
        kind: 'training' and the like.
        folder: the folder of the results.
        settings: recorded as parameters; those of a resumed run stay unchanged.
        files: added to the run when it ends, if they exist.
        resume: whether to continue the newest unfinished run of this kind and folder, if there is one.
    """

    def __init__(
        self,
        trackers: Sequence[MLFlowHandler],
        kind: str,
        folder: str,
        settings: Mapping[str, Any],
        files: Sequence[Path],
        resume: bool = False,
    ) -> None:
        self.tracker = trackers[0]
        self.folder = Path(folder).resolve()
        self.settings = settings
        self.files = files
        for each in trackers:
            if each.experiment_name == DEFAULT_MLFLOW_SETTINGS["configs"]["experiment_name"]:
                each.experiment_name = NAME
        name = self.tracker.run_name or (self._unfinished(kind) if resume else None)
        for each in trackers:
            each.run_name = name or f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"

    def _unfinished(self, kind: str) -> str | None:
        """Name of the newest unfinished run of this kind and folder, or None."""
        client = self.tracker.client
        experiment = client.get_experiment_by_name(self.tracker.experiment_name)
        runs = client.search_runs([experiment.experiment_id], "attributes.status != 'FINISHED'") if experiment else ()
        of_folder = (run for run in runs if run.data.tags.get(FOLDER_TAG) == str(self.folder))
        return next((run.info.run_name for run in of_folder if run.info.run_name.startswith(f"{kind}-")), None)

    def attach(self, engine: Engine) -> None:
        self.tracker.close_on_complete = False
        self.tracker.tag_name = STEP_LOSS
        self.tracker.attach(engine)
        engine.add_event_handler(Events.STARTED, self.begin)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def begin(self, engine: Engine) -> None:
        engine.state.tracker = self.tracker
        client, run_id = self.tracker.client, self.tracker.cur_run.info.run_id
        client.set_tag(run_id, FOLDER_TAG, str(self.folder))
        known = client.get_run(run_id).data.params
        for name, value in self.settings.items():
            if name not in known:
                client.log_param(run_id, name, summary_of(value))

    def finish(self) -> None:
        for file in self.files:
            if file.is_file():
                self.tracker.client.log_artifact(self.tracker.cur_run.info.run_id, str(file))
        self.tracker.close()
        print(f"MLflow run {self.tracker.run_name}: {self.tracker.client.tracking_uri}")
