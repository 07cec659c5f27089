from pathlib import Path
from types import SimpleNamespace

import pytest
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from scripts.results.provenance import NAME
from scripts.results.tracking import TrackedRun

UNNAMED = DEFAULT_MLFLOW_SETTINGS["configs"]["experiment_name"]


def run(name: str, folder: Path) -> SimpleNamespace:
    return SimpleNamespace(info=SimpleNamespace(run_name=name), data=SimpleNamespace(tags={"folder": str(folder)}))


def handler(runs: list[SimpleNamespace], run_name: str | None = None, experiment: str = UNNAMED) -> SimpleNamespace:
    """MONAI's handler, as far as its run is named by it."""
    client = SimpleNamespace(
        get_experiment_by_name=lambda name: SimpleNamespace(experiment_id=0), search_runs=lambda *arguments: runs
    )
    return SimpleNamespace(client=client, run_name=run_name, experiment_name=experiment)


@pytest.mark.parametrize(
    ("kind", "resume", "given", "expected"),
    [
        ("training", True, None, "training-1"),
        ("training", False, None, "training-20"),
        ("inference", True, None, "inference-20"),
        ("training", True, "mine", "mine"),
    ],
)
def test_resumed_run_is_of_its_kind_and_folder(tmp_path, kind, resume, given, expected):
    runs = [run("evaluation-2", tmp_path), run("training-2", tmp_path / "other"), run("training-1", tmp_path)]
    trackers = [handler(runs, given), handler(runs, given)]
    TrackedRun(trackers, kind, str(tmp_path), {}, [], resume)
    assert all(tracker.run_name.startswith(expected) for tracker in trackers)
    assert trackers[0].run_name == trackers[1].run_name


def test_experiment_has_the_name_of_the_bundle_unless_it_is_named(tmp_path):
    for given, expected in ((UNNAMED, NAME), ("mine", "mine")):
        tracker = handler([], experiment=given)
        TrackedRun([tracker], "training", str(tmp_path), {}, [])
        assert tracker.experiment_name == expected
