import errno
import sys

import pytest
from helpers import ROOT

from scripts.data.storage import Folders
from scripts.data.subjects import SubjectFolder
from scripts.errors import InputError
from scripts.files import whole_files
from scripts.network import SkipDenseSeg
from scripts.workflow import MOST_UNUSED, check, exclusive_run, require_settings, start

TRAIN = str(ROOT / "configs" / "train.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "--epochs 0: must be a whole number"),
        ({"foreground_margin": -1}, "--foreground_margin -1: must be a whole number"),
        ({"batch_size": "two"}, "--batch_size two: must be a whole number"),
        ({"patch_size": [50, 64, 64]}, r"--patch_size \[50, 64, 64\]: must be multiples of 4"),
        ({"patch_size": 0}, "--patch_size 0"),
        ({"patch_size": []}, r"--patch_size \[\]: must be multiples"),
        ({"patch_size": [64, 64]}, r"--patch_size \[64, 64\]: must be multiples"),
        ({"learning_rate": -1e-3}, "--learning_rate -0.001: must be a number above 0"),
        ({"learning_rate": float("nan")}, "--learning_rate nan: must be a number"),
        ({"learning_rate": "abc"}, "--learning_rate abc: must be a number"),
        ({"val_subjects": []}, r"--val_subjects \[\]: is empty"),
        ({"start_from": "model.ts"}, "start_from model.ts: isn't a checkpoint that can be trained"),
        ({"start_from": "absent.pt"}, "start_from absent.pt: no such file"),
        ({"start_from": "a" * 300}, "start_from a*: no such file"),
        ({"start_from": ["a.pt", "b.pt"]}, "start_from .*: isn't a checkpoint that can be trained"),
    ],
)
def test_settings_that_can_not_train(settings, message):
    fine = {"network_def": SkipDenseSeg(), "patch_size": 64, "val_subjects": 9, "learning_rate": 1, "epochs": 1}
    fine |= {"batch_size": 1, "start_from": None, "foreground_margin": 0}
    require_settings("train", fine)
    with pytest.raises(InputError, match=message):
        require_settings("train", fine | settings)


def test_another_program_keeps_its_arguments_and_its_way_with_errors(monkeypatch):
    hook = sys.excepthook
    monkeypatch.setattr("sys.argv", ["own_program.py", "--config_file", TRAIN, "--epocs", "1"])
    start(seed=0, device="cpu")
    assert sys.excepthook is hook


def test_what_killed_runs_left_unfinished_is_removed_by_the_next_of_their_kind(tmp_path):
    here, below = ".unfinished-results-a", "sub-1/anat/.unfinished-results-b"
    other, unknown, nested = ".unfinished-training-c", ".unfinished-d", "inner/.unfinished-results-e"
    for folder in (here, below, other, unknown, nested):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "half.nii.gz").touch()
    with exclusive_run("results", [str(tmp_path)]), whole_files(tmp_path) as temporary:
        assert temporary.name.startswith(".unfinished-results-")
    assert not any((tmp_path / folder).exists() for folder in (here, below))
    assert all((tmp_path / folder).exists() for folder in (other, unknown, nested))


def test_training_and_scoring_share_a_folder_which_is_free_when_they_end(tmp_path):
    with (
        exclusive_run("training", [str(tmp_path), str(tmp_path / ".." / tmp_path.name)]),
        exclusive_run("results", [str(tmp_path)]),
    ):
        assert {path.name for path in tmp_path.iterdir()} == {".training.lock", ".results.lock"}
    with pytest.raises(KeyError), exclusive_run("training", [str(tmp_path)]):
        raise KeyError
    assert not any(tmp_path.iterdir())
    with exclusive_run("training", [str(tmp_path)]):
        pass


def test_images_that_are_not_used_are_logged_before_the_run(tmp_path, caplog):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("subject-1-T1", "subject-1-T2", *(f"subject_{number}_T1" for number in range(2, 15))):
        (data / f"{name}.nii").touch()
    folders = Folders(str(data), str(tmp_path / "out"), str(tmp_path / "out"), str(tmp_path / "cache"))
    folder = SubjectFolder(str(data))
    settings = {"dataset_dir": str(data), "output_dir": str(tmp_path / "out")}
    check("segment", folder, folder.to_segment(), settings, folders)
    assert (
        f"{data}/subject_2_T1.nii: isn't used, since its name isn't that of a subject's file; rename it to"
        in caplog.text
    )
    assert f"{data}: 3 more files like these aren't used" in caplog.text
    assert len(caplog.messages) == MOST_UNUSED + 1


def test_file_system_without_locks(monkeypatch, tmp_path):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / ".unfinished-training-a").mkdir()
    monkeypatch.setattr("fcntl.flock", refuse)
    with exclusive_run("training", [str(tmp_path)]), whole_files(tmp_path) as temporary:
        (temporary / "model.pt").touch()
    assert {"model.pt", ".unfinished-training-a"} <= {path.name for path in tmp_path.iterdir()}
