"""Folds, what is run for each of them, and their scores put together."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, SCORES, assert_gathered
from monai.bundle import ConfigParser

from scripts.commands.cross_validate import assign_folds, cross_validate, gather_folds, score_report
from scripts.errors import InputError
from scripts.results.tables import write_csv
from scripts.settings import given_options


def scores(subject: str) -> dict:
    rng = np.random.default_rng(int(subject))
    return {"subject": subject} | dict(zip(SCORES, rng.random(len(SCORES)).tolist(), strict=True))


class Runs:
    """Takes the place of `subprocess.run`: keeps what would run, and evaluating writes scores."""

    def __init__(self):
        self.commands = []
        self.failing = None

    def __call__(self, command):
        options = given_options(command)
        self.commands.append((command[4], options))
        if command[4] == self.failing:
            return subprocess.CompletedProcess(command, 3)
        if command[4] == "evaluating":
            write_csv(Path(options["output_dir"]) / "metrics.csv", [scores(s) for s in options["val_subjects"]])
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def runs(monkeypatch):
    runs = Runs()
    monkeypatch.setattr("subprocess.run", runs)
    return runs


@pytest.mark.parametrize("folds", [2, 3, 4, 9, 10])
def test_each_subject_is_in_one_fold_and_folds_are_alike(folds):
    subjects = [str(number) for number in range(1, 11)]
    assigned = assign_folds(subjects, folds)
    assert list(assigned) == [str(number) for number in range(1, folds + 1)]
    assert sorted(itertools.chain(*assigned.values()), key=int) == subjects
    sizes = [len(fold) for fold in assigned.values()]
    assert max(sizes) - min(sizes) <= 1
    assert assign_folds(subjects, folds) == assigned


def test_subjects_are_assigned_in_their_order():
    assert assign_folds(["1", "2", "9", "10", "11"], 2) == {"1": ["1", "9", "11"], "2": ["2", "10"]}
    assert assign_folds(["1", "9"], "leave-one-out") == {"1": ["1"], "2": ["9"]}


@pytest.mark.parametrize("folds", [0, 1, 4, 2.5, True, "leave-two-out"])
def test_folds_that_can_not_be(folds):
    with pytest.raises(InputError, match=f"--folds {folds}: must be leave-one-out or a whole number from 2 to .*, 3$"):
        assign_folds(["1", "2", "9"], folds)


def test_what_runs_for_each_fold(dataset, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.json").write_text('{"batch_size": 2}')
    settings = {"epochs": 7, "patch_size": [32, 32, 32], "network_def#growth_rate": 8, "device": "cpu", "flips": True}
    of_training = {"validate#handlers#1#name": "val"}
    cross_validate(str(dataset), "cv", "leave-one-out", config_file="own.json", **settings, **of_training)
    assert [task for task, _ in runs.commands] == ["training", "evaluating"] * 3
    train, own, evaluate = (
        str(folder / name)
        for folder, name in (
            (ROOT / "configs", "train.json"),
            (tmp_path, "own.json"),
            (ROOT / "configs", "evaluate.json"),
        )
    )
    for fold, subject in ((1, "1"), (2, "2"), (3, "9")):
        both = {
            "bundle_root": str(ROOT),
            "dataset_dir": str(dataset),
            "val_subjects": [subject],
            "ckpt_dir": f"cv/fold-{fold}",
            "output_dir": f"cv/fold-{fold}",
        } | settings
        training, evaluating = (options for _, options in runs.commands[2 * fold - 2 : 2 * fold])
        del training["m"], evaluating["m"]
        assert evaluating == both | {"config_file": [train, own, evaluate]}
        del both["flips"]
        assert training == both | of_training | {"config_file": [train, own], "resume": True}


def test_one_fold_alone_and_then_the_others(dataset, runs, tmp_path, capsys):
    cross_validate(str(dataset), str(tmp_path), 3, fold=2)
    assert [options["val_subjects"] for _, options in runs.commands] == [["2"]] * 2
    assert "Not finished yet: folds 1, 3" in capsys.readouterr().out
    cross_validate(str(dataset), str(tmp_path), 3)
    assert [options["val_subjects"] for _, options in runs.commands[2:]] == [["1"]] * 2 + [["9"]] * 2
    told = capsys.readouterr().out
    assert "fold 2 of 3, subjects 2: already finished" in told
    assert "Not finished" not in told
    with pytest.raises(InputError, match="--fold 4: must be one of 1 to 3"):
        cross_validate(str(dataset), str(tmp_path), 3, fold=4)


def test_fold_of_which_a_subject_is_not_scored_yet_runs_again(dataset, runs, tmp_path):
    cross_validate(str(dataset), str(tmp_path), 2)
    before = len(runs.commands)
    write_csv(tmp_path / "fold-1" / "metrics.csv", [scores("1")])
    cross_validate(str(dataset), str(tmp_path), 2)
    assert [(task, o["val_subjects"]) for task, o in runs.commands[before:]] == [
        ("training", ["1", "9"]),
        ("evaluating", ["1", "9"]),
    ]


@pytest.mark.parametrize("task", ["training", "evaluating"])
def test_fold_that_fails_is_named(dataset, runs, tmp_path, task):
    runs.failing = task
    with pytest.raises(InputError, match=f"fold 1: {task} ended with status 3"):
        cross_validate(str(dataset), str(tmp_path), 3)
    assert runs.commands[-1][0] == task


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epocs": 1}, "--epocs: no such setting; did you mean --epochs?"),
        ({"fols": 3}, "--fols: no such setting; did you mean --folds?"),
        ({"network_def#growth_rte": 1}, "--network_def#growth_rte: no such setting; did you mean"),
        ({"val_subjects": [1]}, "--val_subjects: is set by cross_validate for each fold"),
        ({"resume": False}, "--resume: is set by cross_validate"),
        ({"config_file": "none.json"}, "none.json: no such file"),
    ],
)
def test_settings_that_are_refused_before_anything_starts(dataset, runs, tmp_path, settings, message):
    with pytest.raises(InputError) as error:
        cross_validate(str(dataset), str(tmp_path / "cv"), 3, **settings)
    assert message in str(error.value)
    assert not runs.commands
    assert not (tmp_path / "cv").exists()


@pytest.mark.parametrize("subject", ["$print", "@epochs", "%x.json"])
def test_id_that_settings_would_take_for_something_else(own_dataset, runs, tmp_path, subject):
    data = own_dataset(".nii.gz")
    for kind in ("T1", "T2", "label"):
        shutil.copy(data / f"subject-1-{kind}.nii.gz", data / f"subject-{subject}-{kind}.nii.gz")
    with pytest.raises(InputError, match=re.escape(f"subject-{subject}-T1.nii.gz: its id begins with '{subject[0]}'")):
        cross_validate(str(data), str(tmp_path / "cv"), 3)
    assert not runs.commands


def test_another_plan_in_the_same_folder(dataset, own_dataset, runs, tmp_path):
    output = str(tmp_path / "cv")
    cross_validate(str(dataset), output, 3, epochs=2)
    plan = (tmp_path / "cv" / "folds.json").read_text()
    assert json.loads(plan)["folds"] == {"1": ["1"], "2": ["2"], "3": ["9"]}
    before = len(runs.commands)
    for directory, folds, differing in (
        (dataset, 3, "settings"),
        (dataset, 2, "settings, folds"),
        (own_dataset(), 2, "dataset_dir, settings, folds"),
    ):
        with pytest.raises(InputError, match=rf"folds.json: was made with other {differing};"):
            cross_validate(str(directory), output, folds)
    assert len(runs.commands) == before
    assert (tmp_path / "cv" / "folds.json").read_text() == plan


def test_config_that_changed_since_the_first_fold(dataset, runs, tmp_path):
    overlay = tmp_path / "own.json"
    overlay.write_text('{"learning_rate": 0.1}')
    cross_validate(str(dataset), str(tmp_path / "cv"), 3, fold=1, config_file=str(overlay))
    noted = json.loads((tmp_path / "cv" / "folds.json").read_text())["configs"]
    files = [str(ROOT / "configs" / "train.json"), str(overlay), str(ROOT / "configs" / "evaluate.json")]
    assert noted["training"] == ConfigParser.load_config_files(files[:2])
    assert noted["evaluating"] == ConfigParser.load_config_files(files)
    overlay.write_text('{"learning_rate": 0.2}')
    with pytest.raises(InputError, match=r"folds.json: was made with other configs;"):
        cross_validate(str(dataset), str(tmp_path / "cv"), 3, config_file=str(overlay))
    assert len(runs.commands) == 2
    overlay.write_text('{"learning_rate": 0.1}')
    cross_validate(str(dataset), str(tmp_path / "cv"), 3, config_file=str(overlay))
    assert len(runs.commands) == 6


@pytest.mark.parametrize("there", ["metrics.csv", "fold-1/model.pt"])
def test_results_of_something_else_are_left_alone(dataset, runs, tmp_path, there):
    path = tmp_path / there
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(InputError, match="already exists and isn't from a cross-validation"):
        cross_validate(str(dataset), str(tmp_path), 3)
    assert not runs.commands
    assert path.read_text() == "mine"


def test_gathering_where_there_is_nothing(dataset, runs, tmp_path):
    with pytest.raises(InputError, match=r"folds.json: no such file"):
        gather_folds(str(tmp_path))
    runs.failing = "training"
    with pytest.raises(InputError):
        cross_validate(str(dataset), str(tmp_path), 3)
    with pytest.raises(InputError, match="no fold is finished yet"):
        gather_folds(str(tmp_path))
    assert not (tmp_path / "metrics.csv").exists()


def test_gathered_scores(dataset, runs, tmp_path, capsys):
    cross_validate(str(dataset), str(tmp_path), 2)
    assert_gathered(tmp_path, capsys.readouterr().out)


def test_one_subject_and_a_missing_tissue():
    rows = [scores("1"), scores("2") | {"hd95_wm": float("inf"), "asd_wm": float("nan")}]
    assert score_report(rows[:1]).count("± nan") == 12
    assert "inf ± nan" in score_report(rows)
    # ASD of the only subject whose label has WM
    assert "| 3.00 ± nan |" in score_report([scores("1") | {"asd_wm": 3.0}, rows[1]])
    assert "| nan ± nan |" in score_report(rows[1:])
