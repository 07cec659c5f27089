"""Memory and open files stay as they are over many subjects and steps; SUBJECTS and STEPS make the runs longer."""

import ctypes
import gc
import os
import platform
import shutil

import numpy as np
import psutil
import pytest
from helpers import configured, save_subject
from ignite.engine import Engine, Events

from scripts.results.tables import read_csv

SUBJECTS = int(os.environ.get("SUBJECTS", "60"))
STEPS = int(os.environ.get("STEPS", "200"))


def measured(engine: Engine, every: int) -> list[tuple[float, int]]:
    """Memory in MB and open files of this process, each so many iterations; filled while the engine runs."""
    found: list[tuple[float, int]] = []
    process = psutil.Process()

    @engine.on(Events.ITERATION_COMPLETED(every=every))
    def measure() -> None:
        # what is freed but not given back to the system says how memory was split up, and not what is kept
        gc.collect()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        found.append((process.memory_info().rss / 2**20, process.num_fds()))

    return found


def assert_flat(found: list[tuple[float, int]], megabytes: float, capsys: pytest.CaptureFixture) -> None:
    """Nothing grows from the first third, in which caches fill, to the end."""
    memory, files = np.array(found).T
    with capsys.disabled():
        print(f"\nmemory in MB: {memory.round().astype(int).tolist()}\nopen files: {files.astype(int).tolist()}")
    settled = len(found) // 3
    assert memory[-1] - memory[settled] < megabytes
    assert files[-1] <= files[settled]


@pytest.mark.slow
def test_many_subjects(pieces, tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "output"
    save_subject(data, "1", pieces[0], labeled=False, suffix=".nii.gz")
    for number in range(2, SUBJECTS + 1):
        for kind in ("T1", "T2"):
            shutil.copy(data / f"subject-1-{kind}.nii.gz", data / f"subject-{number}-{kind}.nii.gz")
    workflow = configured(data, output, "inference.json")
    found = measured(workflow.evaluator, every=SUBJECTS // 12)
    workflow.run()
    assert len(read_csv(output / "volumes.csv")) == SUBJECTS
    # the report has the pictures of 50 subjects, and figures of the others
    assert_flat(found, megabytes=50, capsys=capsys)


@pytest.mark.slow
def test_many_steps(pieces, tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "output"
    for subject in ("1", "2", "9"):
        save_subject(data, subject, pieces[0])
    epochs = 4
    quick = {"val_interval": 1, "batch_size": 1, "patch_size": [16, 16, 16], "synthetic_share": 0.25}
    steps = {"epochs": epochs, "crops_per_epoch": STEPS // epochs}
    workflow = configured(data, output, "train.json", ckpt_dir=str(output), **quick, **steps)
    found = measured(workflow.trainer, every=STEPS // 12)
    workflow.run()
    assert workflow.trainer.state.iteration == STEPS
    assert_flat(found, megabytes=50, capsys=capsys)
