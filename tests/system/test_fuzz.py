"""That the program which damages files at random runs for each kind, and sees what it is there to see."""

import os
import signal

import pytest

from scripts.data import transforms
from scripts.errors import InputError
from tools.fuzz.__main__ import fuzz, judge
from tools.fuzz.cases import CASES

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", CASES)
def test_some_cases_of_each_kind(kind, tmp_path):
    verdicts = []
    for number in range(25):
        folder = tmp_path / str(number)
        folder.mkdir()
        verdict, name, text = judge(kind, 1, number, folder)
        assert verdict != "finding", f"{name}\n{text}"
        verdicts.append(verdict)
    assert set(verdicts) == {"accepted", "refused"}


def test_a_case_comes_again_by_its_number(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        judge("nii", 1, 3, tmp_path / name)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("first", "second"))
    assert first == second


def raise_value_error(path: str) -> None:
    raise ValueError("planted")


def refuse(path: str) -> None:
    raise InputError("a file can't be read; copy it again")


def end_the_process(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "name", "text"),
    [
        (raise_value_error, "nii-RuntimeError-transform.py", "ValueError: planted"),
        (end_the_process, "nii-ended--9-0", "--seed 0 --case 0"),
    ],
)
def test_planted_fault_is_found(fault, name, text, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(transforms, "read_scans", fault)
    assert fuzz("nii", 1, 0, tmp_path, most=2) == {"finding": 2}
    found = next(path for path in sorted(tmp_path.iterdir()) if path.name.startswith(name))
    assert text in (found / "finding.txt").read_text()
    assert len(list(found.glob("subject-1-*"))) == 3
    assert "2 cases, 0 refused, 0 accepted, 2 findings" in capsys.readouterr().out


def test_refusal_that_does_not_name_the_file_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(transforms, "read_scans", refuse)
    assert judge("nii", 0, 0, tmp_path)[0] == "finding"
