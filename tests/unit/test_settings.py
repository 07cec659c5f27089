import json
import re

import pytest
from helpers import ROOT

from scripts.errors import InputError
from scripts.settings import (
    refuse_rewritten_values,
    refuse_unknown_overrides,
    require_tracking_package,
)

TRAIN = str(ROOT / "configs" / "train.json")
EVALUATE = str(ROOT / "configs" / "evaluate.json")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "training", "--config_file", TRAIN, "--epochs", "3"],
        ["run", "training", "--config_file", TRAIN, "--epochs=3", "--val_subjects=[1]", "--seed", "-1"],
        ["run", "evaluating", "--config_file", f"['{TRAIN}','{EVALUATE}']", "--dataset-dir", "x"],
        ["run", "--config_file", f"{TRAIN},{EVALUATE}", "--run_id", "training", "--logging_file", "x"],
        ["run", "--config_file", TRAIN, "--tracking", "mlflow", "--train#trainer#max_epochs", "3"],
        ["run", "--config_file", TRAIN, "--train::dataset::in_memory", "False", "--loss#_target_", "x"],
        ["run", "--config_file", TRAIN, "--train#handlers#0#print_lr", "True", "-epochs", "3"],
        ["--unrelated", "program"],
    ],
)
def test_known_overrides(arguments):
    refuse_unknown_overrides(arguments)


@pytest.mark.parametrize("typo", [["--epocs", "1"], ["--epocs=1"], ["-epocs", "1"]])
def test_unknown_override_gets_the_near_name(typo):
    with pytest.raises(InputError, match=r"--epocs: no such setting; did you mean --epochs\?"):
        refuse_unknown_overrides(["run", "training", "--config_file", TRAIN, *typo])


@pytest.mark.parametrize(
    ("typo", "near"),
    [
        ("train#trainer#max_epoch", "train::trainer::max_epochs"),
        ("train#hanlders", "train::handlers"),
        ("train::handlers::99", "known are"),
        ("network_def#growth_rte", "network_def::growth_rate"),
        ("trian#trainer#max_epochs", "--train"),
        ("epochs#more", "known are"),
    ],
)
def test_unknown_nested_override(typo, near):
    with pytest.raises(InputError, match=f"--{typo}: no such setting; .*{near}"):
        refuse_unknown_overrides(["run", "training", "--config_file", TRAIN, f"--{typo}", "1"])


def test_unknown_override_without_a_near_name_gets_all():
    with pytest.raises(InputError, match="--config_fle: no such setting; did you mean --config_file"):
        refuse_unknown_overrides(["run", "--config_file", TRAIN, "--config_fle", "1"])
    with pytest.raises(InputError, match=r"--xyzzy: no such setting; known are .*learning_rate"):
        refuse_unknown_overrides(["run", "--config_file", TRAIN, "--xyzzy", "1"])


def test_unknown_override_in_an_args_file(tmp_path):
    args_file = tmp_path / "args.json"
    args_file.write_text(json.dumps({"config_file": [TRAIN, EVALUATE], "batch_sise": 2}))
    with pytest.raises(InputError, match="--batch_sise: no such setting; did you mean --batch_size"):
        refuse_unknown_overrides(["run", "--args_file", str(args_file)])


@pytest.mark.parametrize("option", ["args_file", "config_file"])
@pytest.mark.parametrize("content", [b"", b'{"epochs": 3', b'{"epochs": "\xff"}', b"[1, 2]", b"3"])
def test_file_of_settings_that_can_not_be_read(option, content, tmp_path):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^--{option} {path}: (can't be read \(.*\); correct it|has no settings)"):
        refuse_unknown_overrides(["run", "--config_file", TRAIN, f"--{option}", str(path)])


# for which Python's parser has no room
BRACKETS = "(" * 95 + ")" + "(" * 106 + "," + "(" * 97


@pytest.mark.parametrize(("value", "reason"), [("{[9]: 1}", "unhashable type.*"), (BRACKETS, "too many brackets")])
def test_value_that_can_not_be_read(value, reason):
    with pytest.raises(
        InputError, match=rf"^--val_subjects {re.escape(value)}: can't be read \(({reason})\); correct it"
    ):
        refuse_unknown_overrides(["run", "training", "--config_file", TRAIN, "--val_subjects", value])


def test_override_of_a_component_that_is_not_there(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"loss": {"_target_": "DiceLos", "sigmoid": True}}))
    refuse_unknown_overrides(["run", "--config_file", str(path), "--loss#sigmoid", "False"])
    with pytest.raises(InputError, match="--loss#sigmod: no such setting; did you mean --loss::sigmoid"):
        refuse_unknown_overrides(["run", "--config_file", str(path), "--loss#sigmod", "False"])


def test_missing_package_is_named_with_its_version(monkeypatch):
    monkeypatch.setattr("scripts.settings.find_spec", lambda name: None)
    require_tracking_package(["run", "training", "--config_file", "configs/train.json"])
    with pytest.raises(InputError, match="--tracking mlflow: a package is missing; pip install mlflow==") as caught:
        require_tracking_package(["run", "training", "--config_file", "configs/train.json", "--tracking", "mlflow"])
    assert str(caught.value).split("; ")[1] in (ROOT / "docs" / "experiment_tracking.md").read_text().splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subjects", "12_1"], "--subjects 12_1: is read as 121; put ids in quotes"),
        (["--val_subjects=[3,1_0]"], r"--val_subjects \[3,1_0\]: is read as \[3, 10\]; put ids in quotes"),
        (["--subjects", "[1_2_3]"], "is read as"),
        (
            ["--output_dir", "study#3"],
            "--output_dir study#3: # would be changed or cut off; choose a path without it",
        ),
        (["--dataset-dir=a/#b"], "--dataset_dir a/#b: # would be changed"),
        (["--start_from", "nets#1.pt"], "--start_from nets#1.pt: # would be"),
        (["--ckpt_dir=~/nets"], "--ckpt_dir ~/nets: ~ isn't your home folder here; write the path in full"),
        (["--subjects", "12.10"], "--subjects 12.10: is read as 12.1"),
        (["--subjects", "[0x10,'a']"], "is read as"),
        (["--checkpoints", "['a.pt','~/b.pt']"], "~ isn't your home folder here"),
        (["--checkpoints", "~/a.pt"], "--checkpoints ~/a.pt: ~ isn't your home folder here"),
    ],
)
def test_id_or_path_that_would_arrive_as_another(arguments, message):
    with pytest.raises(InputError, match=message):
        refuse_rewritten_values(["run", "--config_file", TRAIN, *arguments])


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("--val_subjects a 10", "--val_subjects a 10: has more than one value; write several as \"['a','10']\""),
        ("--epochs=3 4", r"--epochs 3 4: has more than one value"),
        ("--output_dir my results --seed 1", r"--output_dir my results: has more than one value"),
    ],
)
def test_values_without_a_name(given, remedy):
    with pytest.raises(InputError, match=re.escape(remedy)):
        refuse_unknown_overrides(["run", "training", "--config_file", TRAIN, *given.split()])
    refuse_unknown_overrides(["run", "training", "--config_file", TRAIN, "--learning_rate", "-1", "--seed=3"])
    refuse_unknown_overrides(["run", "--config_file", TRAIN, "--seed", "3", "training"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--subjects", "['12_1','3']", "--output_dir", "a_1/2_3"],
        ["--subjects", "01", "--val_subjects", "[9,10]"],
        ["--subjects", "sub-12_1", "--val_subjects", "['a 12_1 b',7]", "--ckpt_dir", "@folders#output"],
        ["--subjects", "sub-12_ses-1", "--dataset_dir", "s3://bucket/~a"],
        ["--train#trainer#max_epochs", "1_0", "--epochs", "1_000"],
    ],
)
def test_id_or_path_that_arrives_as_typed(arguments):
    refuse_rewritten_values(["run", "--config_file", TRAIN, *arguments])
