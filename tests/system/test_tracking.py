"""MLflow as `pip install` brings it, in an environment of its own.

Importing it, as MONAI does wherever it is there, takes more than a second.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.parse
import urllib.request
import venv
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, blocks, is_picture
from PIL import Image
from processes import EVALUATE, KILLED, QUICK, Commands
from torch.utils.tensorboard import SummaryWriter

PAGE = "docs/experiment_tracking.md"
TRAIN = ("run", "training", "--config_file", "configs/train.json", *QUICK, "--epochs", "3")
TRAIN += ("--picture_interval", "1")
# notes who is called, and lets nobody but the own machine be reached
NETWORK = """
import os, socket
resolve, connect = socket.getaddrinfo, socket.socket.connect

def note(what):
    with open(os.environ["CALLED"], "a") as file:
        print(what, file=file)

def noting_resolve(host, *args, **kwargs):
    note(host)
    raise socket.gaierror("no network in this test")

def noting_connect(self, address):
    if self.family != socket.AF_UNIX:
        note(address)
        raise OSError("no network in this test")
    return connect(self, address)

socket.getaddrinfo, socket.socket.connect = noting_resolve, noting_connect
"""
READ = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient("sqlite:///" + sys.argv[1])
(experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
print(json.dumps([{
    "name": run.info.run_name, "status": run.info.status, "parameters": run.data.params,
    "artifacts": run.info.artifact_uri.removeprefix("file://"),
    "files": [file.path for file in client.list_artifacts(run.info.run_id)],
    "metrics": {name: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics},
} for run in runs]))
"""


class Tracked:
    """Another environment's Python, with MLflow, cut off from the network."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.called = folder / "called"
        (folder / "hook").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(NETWORK)
        # MLflow would be silent where it finds a test
        self.quiet = {"CI", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"}
        self.environment = {name: value for name, value in os.environ.items() if name not in self.quiet}
        self.environment["PYTHONWARNINGS"] = "ignore"
        self.hook = {"PYTHONPATH": str(folder / "hook"), "CALLED": str(self.called)}

    def python(self, *arguments: str, network: bool = False) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(self.bin / "python"), *arguments],
            cwd=ROOT, env=self.environment | ({} if network else self.hook),
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    @cached_property
    def forked(self) -> Commands:
        return Commands(python=str(self.bin / "python"), without=self.quiet, PYTHONWARNINGS="ignore", **self.hook)

    def bundle(self, *arguments: str, fresh: bool = False) -> subprocess.CompletedProcess:
        """A tracked command; in a fresh process MLflow does all that it does at its start."""
        arguments = (*arguments, "--tracking", "mlflow")
        result = self.python("-m", "monai.bundle", *arguments) if fresh else self.forked.run(arguments)
        assert result.returncode == 0, result.stderr
        return result

    def runs(self, folder: Path) -> list[dict]:
        result = self.forked.run([str(folder / "mlruns.db")], first=READ, module="")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Tracked:
    """MLflow installed as the page says, over the packages that are here."""
    folder = tmp_path_factory.mktemp("mlflow")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    environment = Tracked(folder)
    (install,) = re.findall(r"^pip install mlflow.*", (ROOT / PAGE).read_text(), re.MULTILINE)
    result = environment.python("-m", *shlex.split(install), network=True)
    assert result.returncode == 0, result.stderr
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert not [name for name in pinned if list(site.glob(f"{name.replace('-', '_')}-*"))]
    return environment


def folders(dataset: Path, output: Path | str) -> tuple[str, ...]:
    return ("--dataset_dir", str(dataset), "--output_dir", str(output), "--ckpt_dir", str(output))


@pytest.fixture(scope="module")
def killed(tracked, dataset, tmp_path_factory) -> Path:
    """The results of a training that was killed in its third epoch."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = (*TRAIN, *folders(dataset, folder / "eval"), "--tracking", "mlflow")
    result = tracked.forked.run(("computing", *arguments), first=KILLED, module="")
    assert result.returncode == -signal.SIGKILL, result.stderr
    return folder / "eval"


@pytest.mark.slow
def test_new_training_does_not_go_on_in_the_run_of_a_killed_one(tracked, killed, dataset, tmp_path):
    output = tmp_path / "eval"
    shutil.copytree(killed, output)
    tracked.bundle(*TRAIN, *folders(dataset, output), "--epochs", "1")
    first, second = tracked.runs(output)
    assert (first["status"], second["status"]) == ("RUNNING", "FINISHED")
    assert [epoch for epoch, _ in first["metrics"]["val_mean_dice"]] == [1, 2]
    assert [epoch for epoch, _ in second["metrics"]["train_loss"]] == [1]


@pytest.mark.slow
def test_killed_training_goes_on_in_its_run(tracked, killed, dataset):
    output = killed
    (run,) = tracked.runs(output)
    assert run["status"] == "RUNNING"
    assert [step for step, _ in run["metrics"]["train_step_loss"]] == [1, 2, 3, 4]
    assert [epoch for epoch, _ in run["metrics"]["val_mean_dice"]] == [1, 2]

    resumed = tracked.bundle(*TRAIN, *folders(dataset, output), "--resume", "True", fresh=True)
    assert f"MLflow run {run['name']}: sqlite:///{output}/mlruns.db" in resumed.stdout
    (whole,) = tracked.runs(output)
    assert (whole["name"], whole["status"]) == (run["name"], "FINISHED")
    metrics = whole["metrics"]
    for name in ("train_loss", "val_mean_dice", "val_mean_dice_csf", "val_mean_dice_gm", "val_mean_dice_wm"):
        assert [epoch for epoch, _ in metrics[name]] == [1, 2, 3], name
    for name in ("train_step_loss", "lr_group_0"):
        assert [step for step, _ in metrics[name]] == [1, 2, 3, 4, 5, 6], name
    means = np.reshape([loss for _, loss in metrics["train_step_loss"]], (3, 2)).mean(axis=1)
    np.testing.assert_allclose([loss for _, loss in metrics["train_loss"]], means, rtol=1e-5)
    config = json.loads((ROOT / "configs/train.json").read_text())
    given = {"epochs": "3", "crops_per_epoch": "2"}
    given |= {name: str(config[name]) for name in ("patch_size", "learning_rate")}
    assert given.items() <= whole["parameters"].items()
    assert whole["files"] == ["images", "model.pt"]
    artifacts = Path(whole["artifacts"])
    assert artifacts.is_relative_to(output)
    assert (artifacts / "model.pt").read_bytes() == (output / "model.pt").read_bytes()
    pictures = sorted((artifacts / "images").glob("*.png"))
    assert [re.match(r"subject-9.step.(\d)", path.name)[1] for path in pictures] == ["1", "2", "3"]
    assert all(is_picture(np.asarray(Image.open(path).convert("RGB"))) for path in pictures)
    assert not tracked.called.exists(), tracked.called.read_text()


@pytest.mark.slow
def test_evaluation_and_inference_have_runs_of_their_own(tracked, dataset, tmp_path):
    settings = ("--dataset_dir", str(dataset), "--output_dir", str(tmp_path / "results"))
    tracked.bundle("run", "evaluating", "--config_file", EVALUATE, *settings, fresh=True)
    tracked.bundle("run", "--config_file", "configs/inference.json", *settings)
    evaluation, inference = tracked.runs(tmp_path / "results")
    assert (evaluation["status"], inference["status"]) == ("FINISHED", "FINISHED")
    assert (evaluation["name"].split("-")[0], inference["name"].split("-")[0]) == ("evaluation", "inference")
    table = (tmp_path / "results" / "metrics.md").read_text()
    scores = [evaluation["metrics"][f"dice_{name}"][0][1] for name in ("csf", "gm", "wm", "mean")]
    assert " | ".join(f"{100 * score:.2f}" for score in scores) in table
    assert {"hd95_csf", "asd_mean"} <= set(evaluation["metrics"])
    assert (evaluation["files"], inference["files"]) == (["metrics.csv", "metrics.md"], ["volumes.csv"])
    assert evaluation["parameters"]["val_subjects"] == "[9]"
    assert not tracked.called.exists(), tracked.called.read_text()


@pytest.mark.slow
def test_of_several_processes_the_first_records(tracked, dataset, tmp_path):
    result = tracked.python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "monai.bundle"),
        *("run", "training", "--config_file", "['configs/train.json','configs/multi_gpu_train.json']", *QUICK),
        *("--picture_interval", "1"),
        *(*folders(dataset, tmp_path), "--tracking", "mlflow"),
        network=True,  # by which the processes talk
    )
    assert result.returncode == 0, result.stderr
    (run,) = tracked.runs(tmp_path)
    assert run["status"] == "FINISHED"
    assert [epoch for epoch, _ in run["metrics"]["train_loss"]] == [1]
    assert len(list(Path(run["artifacts"]).glob("images/*.png"))) == 1


@pytest.mark.slow
def test_store_by_url_is_whole_there_and_is_gone_on_with(tracked, dataset, tmp_path):
    there = tmp_path / "there"
    for cache in ("cache", "another"):
        settings = (*folders(dataset, there.as_uri()), "--cache_dir", str(tmp_path / cache), "--epochs", "1")
        tracked.bundle(*TRAIN, *settings)
    runs = tracked.runs(there)
    assert [run["status"] for run in runs] == ["FINISHED", "FINISHED"]


@pytest.mark.slow
def test_mlflow_shows_the_runs(tracked, killed):
    (command,) = [line for block in blocks(PAGE, "shell") for line in block.splitlines() if "mlflow ui" in line]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    setting, program, *arguments = shlex.split(command)
    assert setting == "MLFLOW_DISABLE_TELEMETRY=true"
    server = subprocess.Popen(
        [str(tracked.bin / program), *arguments, "--port", str(port)],
        cwd=killed.parent, env=tracked.environment | {"MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                page = urllib.request.urlopen(address, timeout=5).read().decode()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)
        assert "<title>MLflow</title>" in page
        query = json.dumps({"experiment_ids": ["1"]}).encode()
        request = urllib.request.Request(
            f"{address}/api/2.0/mlflow/runs/search", query, {"Content-Type": "application/json"}
        )
        (run,) = json.load(urllib.request.urlopen(request, timeout=30))["runs"]
        assert run["info"]["run_name"].startswith("training-")
        (picture,) = Path(run["info"]["artifact_uri"].removeprefix("file://")).glob("images/subject-9?step?1?*.png")
        artifact = (
            f"{address}/get-artifact?path=images/{urllib.parse.quote(picture.name)}&run_uuid={run['info']['run_id']}"
        )
        assert urllib.request.urlopen(artifact, timeout=30).read() == picture.read_bytes()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.slow
def test_tensorboard_reads_what_the_page_shows_it(dataset, tmp_path):
    (command,) = [line for block in blocks(PAGE, "shell") for line in block.splitlines() if "tensorboard" in line]
    program, *arguments = shlex.split(command)
    with SummaryWriter(str(tmp_path / "eval")) as writer:
        writer.add_scalar("train_loss", 0.5, 1)
    inspected = subprocess.run(
        [str(Path(sys.executable).parent / program), *arguments, "--inspect"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert "train_loss" in inspected.stdout, inspected.stderr
