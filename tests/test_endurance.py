"""Memory and open files stay as they are over many subjects and steps; SUBJECTS and STEPS make the runs longer."""

import os
import shutil

import numpy as np
import psutil
import pytest
from conftest import ROOT, save_subject
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow

from scripts.writers import read_csv

SUBJECTS = int(os.environ.get("SUBJECTS", "60"))
STEPS = int(os.environ.get("STEPS", "200"))


@pytest.fixture(scope="module")
def piece(brains) -> dict[str, np.ndarray]:
    """Of a brain, of which the network makes short work."""
    return {kind: values[14:46, 20:52, 16:48] for kind, values in brains[0].items()}


def measured(engine: Engine, every: int) -> list[tuple[float, int]]:
    """Memory in MB and open files of this process, each so many iterations; filled while the engine runs."""
    found: list[tuple[float, int]] = []
    process = psutil.Process()

    @engine.on(Events.ITERATION_COMPLETED(every=every))
    def measure() -> None:
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


def prepared(config: str, **settings) -> ConfigWorkflow:
    workflow_type = "train" if config == "train.json" else "inference"
    workflow = ConfigWorkflow(
        str(ROOT / "configs" / config), workflow_type=workflow_type, bundle_root=str(ROOT), **settings
    )
    workflow.initialize()
    return workflow


@pytest.mark.slow
def test_many_subjects(piece, tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "output"
    save_subject(data, "1", piece, labeled=False, suffix=".nii.gz")
    for number in range(2, SUBJECTS + 1):
        for kind in ("T1", "T2"):
            shutil.copy(data / f"subject-1-{kind}.nii.gz", data / f"subject-{number}-{kind}.nii.gz")
    workflow = prepared("inference.json", dataset_dir=str(data), output_dir=str(output))
    found = measured(workflow.evaluator, every=SUBJECTS // 12)
    workflow.run()
    assert len(read_csv(output / "volumes.csv")) == SUBJECTS
    # the report has the pictures of 50 subjects, and figures of the others
    assert_flat(found, megabytes=100, capsys=capsys)


@pytest.mark.slow
def test_many_steps(piece, tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "output"
    for subject in ("1", "2", "9"):
        save_subject(data, subject, piece)
    epochs = 4
    workflow = prepared(
        "train.json", dataset_dir=str(data), output_dir=str(output), ckpt_dir=str(output), epochs=epochs,
        val_interval=1, crops_per_epoch=STEPS // epochs, batch_size=1, patch_size=[16, 16, 16], synthetic_share=0.25,
    )  # fmt: skip
    found = measured(workflow.trainer, every=STEPS // 12)
    workflow.run()
    assert workflow.trainer.state.iteration == STEPS
    assert_flat(found, megabytes=100, capsys=capsys)
