import json
import platform
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, bundle, last_line

from scripts import errors
from scripts.errors import InputError, require_whole_numbers
from scripts.machine import keep_freed_memory
from scripts.network import SkipDenseSeg
from scripts.settings import refuse_unknown_overrides
from scripts.workflow import require_training_settings, start

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
        ["run", "--config_file", TRAIN, "--train#handlers#1#print_lr", "True", "-epochs", "3"],
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
    with pytest.raises(InputError, match=rf"^--{option} {path}: (can't be read \(.*\); correct|holds no settings)"):
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


def test_input_error_is_one_line_whatever_it_quotes():
    with pytest.raises(InputError) as error:
        require_whole_numbers(1, epochs="two\nlines\x1b[1m and 赤ちゃん")
    assert str(error.value) == "--epochs two\\nlines\\x1b[1m and 赤ちゃん: must be a whole number of at least 1"


def test_input_error_is_shown_in_one_line_and_others_in_full(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    errors.show_input_errors_in_one_line()
    for wrapped, shown in ((InputError("a.hdr: broken"), "error: a.hdr: broken\n"), (KeyError("bug"), "Traceback")):
        try:
            try:
                raise wrapped
            except ValueError as cause:
                raise RuntimeError("applying transform") from cause
        except (RuntimeError, KeyError) as error:
            sys.excepthook(type(error), error, error.__traceback__)
        printed = capsys.readouterr().err
        assert printed == shown if shown.startswith("error") else printed.startswith(shown)


def test_options_of_our_own_commands_are_checked_before_they_run(tmp_path):
    result = bundle("phantom", "--output_dir", str(tmp_path), "--seeds", "3", module="scripts")
    assert result.returncode != 0
    assert last_line(result) == "error: --seeds: no such option of phantom; did you mean --seed?"
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("value", [-1, 2.5, "many", True])
def test_numbers_that_may_be_nought(value):
    require_whole_numbers(0, profile_steps=0)
    with pytest.raises(InputError, match=f"--profile_steps {value}: must be a whole number of at least 0"):
        require_whole_numbers(0, profile_steps=value)


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


def test_memory_setting_tells_glibc(monkeypatch):
    told = {}
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mallopt=told.__setitem__))
    keep_freed_memory()
    # M_MMAP_MAX: no block is mapped on its own; M_TRIM_THRESHOLD: none goes back
    assert told == {-4: 0, -1: -1}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.slow
def test_more_than_two_gigabytes_are_kept():
    code = (
        "import psutil, torch; from scripts.workflow import keep_freed_memory; keep_freed_memory();"
        "ones = [torch.ones(2**29) for _ in range(2)]; del ones;"
        "kept = psutil.Process().memory_info().rss; assert kept >= 4 * 2**30, kept"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)


def test_memory_setting_is_harmless_elsewhere(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("there is no glibc to tell"))
    keep_freed_memory()
