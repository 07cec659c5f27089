"""Cross-validation by real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, assert_gathered
from processes import QUICK, flags, succeeds

from scripts.results.tables import read_csv


@pytest.mark.slow
def test_one_fold_in_real_processes(dataset, tmp_path):
    settings = flags(dataset_dir=dataset, output_dir=tmp_path, folds=3, fold=2, flips=True)
    result = succeeds("cross_validate", *settings, *QUICK, module="scripts")
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
    assert again.stdout.index("fold 1 of 2, subjects 1, 9: already finished") < again.stdout.index("fold 2 of 2")
    assert "> resume: True" in again.stdout
    assert_gathered(output, again.stdout)
