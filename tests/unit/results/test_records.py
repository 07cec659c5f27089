from monai.handlers import MLFlowHandler

from scripts.data.storage import Folders
from scripts.results.copy_out import CopyOut
from scripts.results.provenance import ProvenanceSaver
from scripts.results.records import with_records
from scripts.results.tracking import TrackedRun


def kinds(handlers: list) -> list[type]:
    return [type(handler) for handler in handlers]


def test_records_stand_last_and_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("monai.handlers.MLFlowHandler.__init__", lambda self: None)
    folders = Folders(str(tmp_path), str(tmp_path), str(tmp_path), str(tmp_path / "cache"))
    own = [object(), object()]
    assert with_records(own, "inference", folders, {})[:2] == own
    assert kinds(with_records(own, "inference", folders, {})[2:]) == [ProvenanceSaver, CopyOut]
    tracker = MLFlowHandler()
    tracker.experiment_name, tracker.run_name = "mine", "run"
    with_run = with_records([own[0], tracker, own[1]], "training", folders, {})
    assert with_run[:2] == own
    assert kinds(with_run[2:]) == [ProvenanceSaver, TrackedRun, CopyOut]
