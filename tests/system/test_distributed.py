"""Several processes on this machine, joined by gloo, as `torchrun` starts them."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import ROOT, save_subject
from processes import flags, run, succeeds, torchrun, torchrun_bundle, training

from scripts.results.tables import read_csv

TRAIN = "['configs/train.json','configs/multi_gpu_train.json']"
EVALUATE = "['configs/train.json','configs/evaluate.json','configs/multi_gpu_evaluate.json']"
INFERENCE = "['configs/inference.json','configs/multi_gpu_inference.json']"


SHARES = """
import itertools, os, sys
sys.path.insert(0, os.getcwd())
import ignite.distributed as idist
import torch
from scripts.distributed import gathered, join, leave, items_of_rank
join(sys.argv[1], torch.device("cpu"))
for count in (0, 1, 5):
    share = items_of_rank(list(range(count)))
    all_items = gathered(share)
    if idist.get_rank() == 0:
        print(count, list(dict.fromkeys(all_items)))
leave()
"""


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_item_is_in_a_share_and_comes_back_in_order(tmp_path, processes):
    (tmp_path / "shares.py").write_text(SHARES)
    # in a Slurm job too, where ignite looks for Slurm's own numbers
    result = run(torchrun(processes, str(tmp_path / "shares.py"), str(tmp_path)), SLURM_JOB_ID="7")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["0 []", "1 [0]", "5 [0, 1, 2, 3, 4]"]


# the bundle's own training, of a network whose norm takes each sample by itself and without dropout
STEPS = """
import json, os, sys
sys.path.insert(0, os.getcwd())
from monai.bundle import ConfigWorkflow
from torch import nn
from scripts.network import SkipDenseSeg

class WithoutBatchNorm(SkipDenseSeg):
    def __init__(self, **arguments):
        super().__init__(**arguments | {"dropout_prob": 0.0})
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm3d):
                    setattr(module, name, nn.InstanceNorm3d(child.num_features, affine=True))

workflow = ConfigWorkflow(
    ["configs/train.json", "configs/multi_gpu_train.json"], workflow_type="train", **json.loads(sys.argv[1])
)
workflow.initialize()
workflow.run()
workflow.finalize()
"""


@pytest.mark.slow
def test_two_processes_of_batch_two_take_the_steps_of_one_of_batch_four(dataset, tmp_path):
    (tmp_path / "steps.py").write_text(STEPS)
    networks = []
    for processes, batch_size in ((1, 4), (2, 2)):
        output = str(tmp_path / str(processes))
        settings = {
            "network_def#_target_": "__main__.WithoutBatchNorm",
            **{"patch_size": [32, 32, 32], "batch_size": batch_size, "crops_per_epoch": 8, "precision": "fp32"},
            "loss#batch": False,  # Dice of a batch isn't the mean of its parts'
            **{"epochs": 1, "val_interval": 1},
            **{"dataset_dir": str(dataset), "output_dir": output, "ckpt_dir": output},
            # the step of Adam hardly depends on the size of a gradient; that of SGD does
            "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 1e-3},
        }
        result = run(torchrun(processes, str(tmp_path / "steps.py"), json.dumps(settings)))
        assert result.returncode == 0, result.stderr
        networks.append(torch.load(tmp_path / str(processes) / "last.pt", weights_only=True)["model"])
    for name, values in networks[1].items():
        torch.testing.assert_close(values, networks[0][name], rtol=1e-4, atol=1e-6, msg=name)
    assert {path.name for path in (tmp_path / "2").glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}
    assert len(list((tmp_path / "2").glob("events.out.tfevents*"))) == 1  # TensorBoard follows but one
    for log in (tmp_path / "2").glob("rank-*.log"):
        assert re.search(r"Epoch\[1\] Metrics -- train_loss: [\d.]+", log.read_text())


@pytest.fixture(scope="module")
def five_subjects(tmp_path_factory, brains):
    directory = tmp_path_factory.mktemp("five")
    for number in range(1, 6):
        save_subject(directory, str(number), brains[number % 2])
    return directory


IDS = ["1", "2", "3", "4", "5"]


def reported(output: Path) -> list[str]:
    """The subjects in the report, each with its viewer."""
    report = (output / "report.html").read_text()
    subjects = re.findall(r"<h2>Subject (.*)</h2>", report)
    assert report.count('class="viewer"') == len(subjects)
    return subjects


@pytest.mark.slow
def test_evaluation_scores_every_subject_once(five_subjects, tmp_path):
    folders = {"dataset_dir": five_subjects, "output_dir": tmp_path}
    settings = flags(config_file=EVALUATE, **folders, val_subjects=[1, 2, 3, 4, 5], device="cpu")
    result = torchrun_bundle(3, "run", "evaluating", *settings)
    assert result.returncode == 0, result.stderr
    assert [row["subject"] for row in read_csv(tmp_path / "metrics.csv")] == IDS
    assert result.stdout.count("| mean |") == 1
    assert {path.name for path in tmp_path.glob("*.png")} == {f"subject-{n}-scored.png" for n in IDS}
    assert reported(tmp_path) == IDS


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "subjects"), [(2, IDS), (3, ["4", "2"])])
def test_inference_segments_every_subject_once(five_subjects, tmp_path, processes, subjects):
    folders = {"dataset_dir": five_subjects, "output_dir": tmp_path}
    result = torchrun_bundle(processes, "run", *flags(config_file=INFERENCE, **folders, subjects=subjects))
    assert result.returncode == 0, result.stderr
    assert [row["subject"] for row in read_csv(tmp_path / "volumes.csv")] == subjects
    assert {path.name for path in tmp_path.glob("*.nii.gz")} == {f"subject-{n}-label.nii.gz" for n in subjects}
    assert result.stdout.count(f"subjects segmented: {len(subjects)}") == 1
    assert reported(tmp_path) == subjects


def test_the_same_configs_in_one_process(dataset, tmp_path):
    succeeds(*training(dataset, tmp_path, "--config_file", TRAIN))
    assert (tmp_path / "model.pt").exists()
    assert not list(tmp_path.glob("rank-*.log"))


def kill_second_rank_after_an_epoch(launcher: subprocess.Popen, output) -> None:
    deadline = time.monotonic() + 120
    while not (output / "last.pt").exists():
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.1)
    ranks = [p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == "1"]
    assert len(ranks) == 1
    ranks[0].send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_killed_process_ends_the_job_or_it_goes_on(dataset, tmp_path, restarts):
    more = flags(config_file=TRAIN, epochs=6, resume=True)
    launcher = torchrun(2, "--max-restarts", str(restarts), "-m", "monai.bundle")
    command = [*launcher, *training(dataset, tmp_path, *more)]
    with (tmp_path / "log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        kill_second_rank_after_an_epoch(launcher, tmp_path)
        killed = time.monotonic()
        status = launcher.wait(timeout=200)
    told = (tmp_path / "log").read_text()
    epoch = torch.load(tmp_path / "last.pt", weights_only=True)["progress"]["epoch"]
    if restarts:
        assert status == 0, told
        assert "training resumes after epoch" in told
        assert epoch == 6
    else:
        assert status != 0
        assert time.monotonic() - killed < 60
        assert re.search(r"rank\s*: 1 .*\n.*exitcode\s*: -9", told), told
        assert epoch < 6
