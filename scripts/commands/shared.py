"""What several commands share: runs of the bundle's configs, checks of recorded options, cells of tables."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.errors import InputError
from scripts.files import ROOT
from scripts.results.metrics import mean_and_deviation

CONFIGS = ROOT / "configs"
TITLES = ("CSF", "GM", "WM", "mean")


def config_files(overlays: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the config files of the tasks `training` and `evaluating`.

    Args:
        overlays: configs to lay over train.json; relative paths start at configs/.

    Raises:
        InputError: an overlay doesn't exist.
    """
    train = [str(CONFIGS / name) for name in ("train.json", *overlays)]
    for path in train:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; name the configs to lay over train.json by --config_file")
    return {"training": train, "evaluating": [*train, str(CONFIGS / "evaluate.json")]}


def bundle_command(files: Sequence[str], settings: Mapping[str, Any], *task: str) -> list[str]:
    """Return the command line that runs configs with settings, which `fire` reads as Python literals."""
    options = {"config_file": list(files), "bundle_root": str(ROOT), **settings}
    command = [sys.executable, "-m", "monai.bundle", "run", *task]
    return command + [f"--{name}={value!r}" for name, value in options.items()]


def run_task(task: str, files: Sequence[str], settings: Mapping[str, Any], title: str) -> None:
    """Run `training` or `evaluating` in a process of its own.

    Args:
        task: the task.
        files: its config files.
        settings: laid over them.
        title: what is run, for the message.

    Raises:
        InputError: the process fails.
    """
    if status := subprocess.run(bundle_command(files, settings, task)).returncode:
        raise InputError(
            f"{title}: {task} ended with status {status}, for the reason shown above; "
            f"correct it and repeat the command: finished parts are kept"
        )


def require_same_options(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue what was begun with other options.

    Args:
        path: the JSON file that records the options, for the message.
        before: options from that file.
        now: options of this run.

    Raises:
        InputError: some differ, with their names.
    """
    now = json.loads(json.dumps(now))  # JSON turns tuples into lists and numbers as keys into text
    names = dict.fromkeys([*now, *before])
    if differing := [name for name in names if name not in before or name not in now or before[name] != now[name]]:
        raise InputError(
            f"{path}: was made with other {', '.join(differing)}; "
            f"repeat the command with the same options and configs, or choose another --output_dir"
        )


def mean_cells(rows: Sequence[Mapping[str, float]], columns: Sequence[str], digits: int) -> dict[str, str]:
    """Return table cells by TITLES: the mean over the rows of the columns with Dice of CSF, GM, WM and their mean."""
    means, _ = mean_and_deviation([[row[column] for column in columns] for row in rows])
    return {title: f"{mean:.{digits}f}" for title, mean in zip(TITLES, means, strict=True)}
