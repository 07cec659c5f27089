import sys

import pytest
from helpers import ROOT
from processes import bundle, last_line

from scripts.errors import InputError
from scripts.network import SkipDenseSeg
from scripts.workflow import require_training_settings, start

TRAIN = str(ROOT / "configs" / "train.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "--epochs 0: must be a whole number"),
        ({"batch_size": "two"}, "--batch_size two: must be a whole number"),
        ({"patch_size": [50, 64, 64]}, r"--patch_size \[50, 64, 64\]: must be multiples of 4"),
        ({"patch_size": 0}, "--patch_size 0"),
        ({"patch_size": []}, r"--patch_size \[\]: must be multiples"),
        ({"patch_size": [64, 64]}, r"--patch_size \[64, 64\]: must be multiples"),
        ({"learning_rate": -1e-3}, "--learning_rate -0.001: must be a number above 0"),
        ({"learning_rate": float("nan")}, "--learning_rate nan: must be a number"),
        ({"learning_rate": "abc"}, "--learning_rate abc: must be a number"),
        ({"val_subjects": []}, r"--val_subjects \[\]: names none"),
        ({"start_from": "model.ts"}, "start_from model.ts: isn't a checkpoint that can be trained"),
        ({"start_from": "absent.pt"}, "start_from absent.pt: no such file"),
        ({"start_from": "a" * 300}, "start_from a*: no such file"),
        ({"start_from": ["a.pt", "b.pt"]}, "start_from .*: isn't a checkpoint that can be trained"),
    ],
)
def test_settings_that_can_not_train(settings, message):
    fine = {"network": SkipDenseSeg(), "patch_size": 64, "val_subjects": 9, "learning_rate": 1, "epochs": 1}
    require_training_settings(**fine)
    with pytest.raises(InputError, match=message):
        require_training_settings(**(fine | settings))


def test_commands_of_our_own_refuse_urls(tmp_path):
    result = bundle("cross_validate", "--dataset_dir", "d", "--output_dir", "s3://b/cv", cwd=ROOT, module="scripts")
    assert (
        last_line(result) == "error: --output_dir s3://b/cv: cross_validate takes paths, not URLs; copy the files first"
    )
    assert not (ROOT / "s3:").exists()


def test_another_program_keeps_its_arguments_and_its_way_with_errors(monkeypatch):
    hook = sys.excepthook
    monkeypatch.setattr("sys.argv", ["own_program.py", "--config_file", TRAIN, "--epocs", "1"])
    start(seed=0, device="cpu")
    assert sys.excepthook is hook
