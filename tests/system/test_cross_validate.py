"""Cross-validation by real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from processes import QUICK, bundle, last_line

from scripts.results.tables import read_csv
from scripts.tissues import TISSUES

NAMES = [f"{score}_{name}" for score in ("dice", "hd95", "hd_max", "asd") for name in (*TISSUES, "mean")]


def assert_gathered(output: Path, printed: str) -> None:
    """The tables are what NumPy makes of the folds' own files."""
    folds = json.loads((output / "folds.json").read_text())["folds"]
    of_folds = {row["subject"]: row for fold in folds for row in read_csv(output / f"fold-{fold}" / "metrics.csv")}
    rows = read_csv(output / "metrics.csv")
    assert list(rows[0]) == ["subject", "fold", *NAMES]
    for row in rows:
        assert row["subject"] in folds[row.pop("fold")]
        assert row == of_folds[row["subject"]]
    assert [row["subject"] for row in rows] == sorted(of_folds, key=int)
    table = (output / "metrics.md").read_text()
    assert table in printed
    for row in rows:
        percent = [f"{100 * float(row[f'dice_{name}']):.2f}" for name in (*TISSUES, "mean")]
        assert f"| {' | '.join([row['subject'], *percent])} |" in table.splitlines()
    for score, scale, title in (("dice", 100, "mean ± std"), ("hd95", 1, "HD95"), ("asd", 1, "ASD")):
        values = [[scale * float(row[f"{score}_{name}"]) for row in rows] for name in (*TISSUES, "mean")]
        with np.errstate(invalid="ignore"):
            cells = [f"{np.mean(v):.2f} ± {np.std(v, ddof=1):.2f}" for v in values]
        assert f"| {' | '.join([title, *cells])} |" in table.splitlines()


@pytest.mark.slow
def test_one_fold_in_real_processes(dataset, tmp_path):
    arguments = ["--dataset_dir", str(dataset), "--output_dir", str(tmp_path), "--folds", "3", "--fold", "2"]
    result = bundle("cross_validate", *arguments, *QUICK, "--flips", "True", module="scripts")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "fold-2" / "model.pt").exists()
    assert [(row["subject"], row["fold"]) for row in read_csv(tmp_path / "metrics.csv")] == [("2", "2")]
    assert "Not finished yet: folds 1, 3" in result.stdout
    # of one subject: one pass of validation in training, eight of evaluation
    assert result.stdout.count("one pass over") == 9


@pytest.mark.slow
def test_killed_and_run_again(dataset, tmp_path):
    """Real processes: the fold that is finished stays as it is, the other is trained and scored."""
    output = tmp_path / "cv"
    arguments = ["cross_validate", "--dataset_dir", str(dataset), "--output_dir", "cv", "--folds", "2", *QUICK]
    arguments += ["--precision", "fp32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "scripts", *arguments]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        while process.poll() is None and not (output / "fold-2" / "last.pt").exists():
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (output / "fold-2" / "metrics.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in (output / "fold-1").iterdir()}
    assert {"model.pt", "metrics.csv"} <= {path.name for path in before}
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (output / "fold-1").iterdir()} == before
    assert again.stdout.index("fold 1 of 2, subjects 1, 9: finished already") < again.stdout.index("fold 2 of 2")
    assert "> resume: True" in again.stdout
    assert_gathered(output, again.stdout)


def test_misspelt_setting_on_the_command_line(dataset, tmp_path):
    arguments = ["--dataset_dir", str(dataset), "--output_dir", str(tmp_path / "cv"), "--epocs", "3"]
    result = bundle("cross_validate", *arguments, module="scripts")
    assert result.returncode != 0
    assert last_line(result) == "error: --epocs: no such setting; did you mean --epochs?"
    assert not (tmp_path / "cv").exists()
