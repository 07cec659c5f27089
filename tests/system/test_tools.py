"""The scripts that `make` calls: which Python it takes, and what a step of the demo prints."""

import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

TOOLS = ROOT / "tools"


def pretend(folder: Path, name: str, version: str, has_venv: bool = True) -> Path:
    """A program that answers as a Python of this version."""
    program = folder / name
    answer = f'case "$2" in *version_info*) echo {version};; *) exit {0 if has_venv else 1};; esac'
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    return program


def find(folder: Path, *only: str) -> subprocess.CompletedProcess:
    """`find_python.sh` where `folder` holds all Pythons that there are."""
    command = ["/bin/sh", TOOLS / "find_python.sh", *only]
    return subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3": "3.13"}, "python3"),
        ({"python3": "3.14", "python3.10": "3.10"}, "python3.10"),
        ({"python3": "3.12", "python3.12": "3.12", "python3.11": "3.11"}, "python3.11"),
    ],
)
def test_first_python_that_fits_is_taken(tmp_path, pythons, taken):
    for name, version in pythons.items():
        pretend(tmp_path, name, version)
    assert find(tmp_path).stdout == f"{taken}\n"


def test_python_that_is_named_is_the_only_one_tried(tmp_path):
    pretend(tmp_path, "python3.11", "3.11")
    other = pretend(tmp_path, "other", "3.12")
    assert find(tmp_path, str(other)).stdout == f"{other}\n"
    assert "no such Python" in find(tmp_path, "python3.13").stderr


def test_python_without_venv_gives_way_to_one_with(tmp_path):
    pretend(tmp_path, "python3.11", "3.11", has_venv=False)
    assert "apt install python3.11-venv" in find(tmp_path).stderr
    pretend(tmp_path, "python3.13", "3.13")
    assert find(tmp_path).stdout == "python3.13\n"


@pytest.mark.parametrize(("version", "message"), [("3.9", "python3 is Python 3.9"), (None, "no Python found")])
def test_one_line_says_what_is_missing(tmp_path, version, message):
    if version:
        pretend(tmp_path, "python3", version)
    result = find(tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def step(folder: Path, program: str) -> subprocess.CompletedProcess:
    command = ["sh", TOOLS / "step.sh", "1/4 try", "log/try.txt", "sh", "-c", program]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_step_keeps_what_a_command_prints_in_the_log(tmp_path):
    result = step(tmp_path, "echo printed; echo warned >&2")
    assert result.returncode == 0
    assert "1/4 try" in result.stdout
    assert "printed" not in result.stdout + result.stderr
    assert (tmp_path / "log" / "try.txt").read_text() == "printed\nwarned\n"


def test_step_that_fails_shows_its_last_line_and_the_log(tmp_path):
    result = step(tmp_path, "echo started; echo 'error: no space left'; echo; exit 3")
    assert result.returncode == 3
    error, where = result.stderr.splitlines()
    assert error == "error: no space left"
    assert "log/try.txt" in where
