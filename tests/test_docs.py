"""Every command in the pages is run, in a copy of the bundle, on small subjects."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import QUICK, ROOT, bundle, save_subject

PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]


def commands(page: str) -> list[str]:
    """The lines of the page's shell blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


ALL = sorted({line for page in PAGES for line in commands(page)})
PYTHON = [line for line in ALL if line.startswith("python -m ")]
MAKE = [line for line in ALL if line.startswith("make ")]
SETUP = [line for line in ALL if line not in (*PYTHON, *MAKE)]


def copy_bundle(directory: Path) -> Path:
    for name in ("configs", "scripts", "models"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, directory)
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory, brains) -> Path:
    """A copy of the bundle with the data that the pages speak of."""
    home = copy_bundle(tmp_path_factory.mktemp("bundle"))
    for subject, brain in (("1", 0), ("2", 1), ("3", 0), ("9", 1)):
        save_subject(home / "data" / "iSeg-2017-Training", subject, brains[brain])
    save_subject(home / "data" / "iSeg-2017-Testing", "11", brains[0], labeled=False)
    return home


def test_no_kind_of_command_is_left_out():
    assert len(PYTHON) >= 8
    assert MAKE == ["make bench", "make demo", "make test", "make weights"]
    assert SETUP == [
        ". .venv/bin/activate",
        "pip install -r requirements.txt",
        "pip install torch==2.13.0",
        "python3.11 -m venv .venv",
    ]


@pytest.mark.parametrize("command", PYTHON)
def test_command_of_the_pages(home, command):
    _, _, module, *arguments = shlex.split(command)
    if "training" in arguments:
        arguments += QUICK
    if "phantom" in arguments:
        arguments[arguments.index("--subjects") + 1] = "1"
        arguments[arguments.index("--unlabeled") + 1] = "0"
    result = bundle(*arguments, cwd=home, module=module)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_the_target(command):
    result = subprocess.run(["make", "--dry-run", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_model_card_states_the_settings_that_are_used():
    card = (ROOT / "docs" / "README.md").read_text()
    train, demo = (json.loads((ROOT / "configs" / f"{name}.json").read_text()) for name in ("train", "demo"))
    makefile = (ROOT / "Makefile").read_text()
    weights_epochs = re.search(r"--epochs (\d+) --output_dir eval/weights", makefile)[1]
    stated = [
        (train["epochs"], train["crops_per_epoch"], train["learning_rate"]),
        (weights_epochs, demo["crops_per_epoch"], demo["learning_rate"]),
    ]
    for epochs, crops, learning_rate in stated:
        assert f"{epochs} epochs of {crops} patches, highest learning rate {learning_rate}" in card


def test_settings_in_the_table_exist_with_those_defaults():
    train, inference = (json.loads((ROOT / "configs" / f"{name}.json").read_text()) for name in ("train", "inference"))
    rows = re.findall(r"^\| (`.*?`) \|.*\| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    settings = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names) if "/" not in names}
    assert {"dataset_dir", "val_subjects", "subjects", "window_size"} <= set(settings)
    for name, default in settings.items():
        value = {**train, **inference}[name]
        shown = re.search(r"`(.*)`", default)
        if shown and name not in ("precision",) and not default.startswith("see"):
            assert str(value).replace("$@bundle_root + '/", "").rstrip("'") == shown[1], name


@pytest.mark.slow
def test_demo_from_nothing_and_once_more(tmp_path):
    home = copy_bundle(tmp_path)
    first = subprocess.run(["make", "demo"], cwd=home, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    average = re.search(r"^\| 6 \| .* \| ([\d.]+) \|$", first.stdout, re.MULTILINE)
    assert float(average[1]) >= 85
    for result in re.findall(r"demo/[\w./-]+", first.stdout[first.stdout.rindex("network:") :]):
        assert (home / result).exists(), result
    before = {path: path.stat().st_mtime_ns for path in (home / "demo").rglob("*")}
    again = subprocess.run(["make", "demo"], cwd=home, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (home / "demo").rglob("*")} == before


@pytest.mark.slow
def test_setup_without_make(tmp_path):
    home = copy_bundle(tmp_path)
    setup = commands("README.md")
    setup = "\n".join(line for line in setup if line in SETUP)
    check = "python -m monai.bundle verify_net_in_out network_def --meta_file configs/metadata.json"
    check += " --config_file configs/inference.json --n 4"
    result = subprocess.run(["bash", "-ec", f"{setup}\n{check}"], cwd=home, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
