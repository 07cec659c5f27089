"""A small dataset in iSeg's layout, and the bundle's commands as a person runs them."""

import atexit
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from scipy.ndimage import zoom

from scripts.network import SkipDenseSeg
from scripts.phantom import label_map
from scripts.synthesis import T1_CONTRAST, T2_CONTRAST, six_month_image
from scripts.transforms import ISEG_VALUES
from scripts.writers import write_analyze

matplotlib.use("Agg")

ROOT = Path(__file__).parents[1]
# a training of seconds on the small dataset
QUICK = ["--epochs", "1", "--val_interval", "1", "--crops_per_epoch", "2", "--batch_size", "1"]


# Starts command lines in processes that are forked from one that has imported what they import, so that each is spared
# the longest part of its start, and hands out their exit status. `first` arranges what is to fail in one.
FORKING = """
import json, os, runpy, signal, sys
import monai.bundle, torch.utils.tensorboard
import scripts.__main__, scripts.bids_derivative, scripts.html_report, scripts.probabilities, scripts.resume
import scripts.tracking

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    if pid := os.fork():
        print(pid, flush=True)
        continue
    for stream, path in enumerate([os.devnull, *order["streams"]]):
        os.dup2(os.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if stream else 0)), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(300)  # what hangs is ended
    os.environ.clear()
    os.environ.update(order["environment"])
    exec(order["first"], {})
    sys.argv = [order["module"], *order["arguments"]]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    sys.exit()
"""


class Commands:
    """Commands in the root of the repository, as processes of their own, see FORKING; one at a time."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [f"{self.folder.name}/{name}" for name in ("stdout", "stderr")]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", FORKING],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": ""}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(self.close)

    def close(self) -> None:
        self.process.communicate(timeout=60)
        self.folder.cleanup()

    def ask(self, **order: Any) -> int:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, arguments: Sequence[str], first: str = "", module: str = "monai.bundle") -> int:
        """Start one and return its process id; the former must have been waited for."""
        environment = os.environ | {"PYTHONPATH": ""}
        order = {"module": module, "first": first, "environment": environment, "streams": self.streams}
        return self.ask(arguments=arguments, **order)

    def wait(self, pid: int) -> subprocess.CompletedProcess:
        status = self.ask(wait=pid)
        return subprocess.CompletedProcess((), status, *(Path(path).read_text() for path in self.streams))

    def run(
        self, arguments: Sequence[str], first: str = "", module: str = "monai.bundle"
    ) -> subprocess.CompletedProcess:
        return self.wait(self.start(arguments, first, module))

    def run_and_kill(self, arguments: Sequence[str], seconds: float) -> subprocess.CompletedProcess:
        pid = self.start(arguments)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)


@cache
def forked_commands() -> Commands:
    return Commands()


def bundle(
    *arguments: str, cwd: Path = ROOT, module: str = "monai.bundle", fresh: bool = False
) -> subprocess.CompletedProcess:
    """Run `python -m monai.bundle ARGUMENTS` (or another module) as a person would, from any folder.

    In the root of the repository the process is forked from one that has imported it all, unless it must be `fresh`.
    """
    if cwd == ROOT and not fresh:
        return forked_commands().run(arguments, module=module)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def configured(dataset: Path, output: Path, *configs: str, **settings: Any) -> ConfigWorkflow:
    """A command in this process, ready to run."""
    workflow = ConfigWorkflow(
        [str(ROOT / "configs" / name) for name in configs],
        workflow_type="train" if "train.json" in configs else "inference",
        bundle_root=str(ROOT),
        dataset_dir=str(dataset),
        output_dir=str(output),
        **settings,
    )
    workflow.initialize()
    return workflow


def copy_bundle(directory: Path) -> Path:
    for name in ("configs", "docs", "models", "requirements", "scripts", "tools"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, directory)
    return directory


def last_line(result: subprocess.CompletedProcess) -> str:
    return result.stderr.strip().splitlines()[-1]


def save_volume(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write int16 or uint8 values in the format that the suffix names; Analyze as iSeg has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".hdr":
        write_analyze(path, values)
    else:
        nib.save(nib.Nifti1Image(values, np.diag([-1.0, 1, 1, 1]) if affine is None else affine), path)


def small_brain(number: int) -> dict[str, np.ndarray]:
    """Label (0 to 3), T1 and T2 of a phantom shrunk to 0.4: 60 x 72 x 64 voxels."""
    rng = np.random.default_rng([7, number])
    # the middle of the volume, where the brain lies
    label = zoom(label_map(rng)[:, 8:-8, 60:-60], 0.4, order=0)
    label = np.pad(label, [(0, max(0, size - n)) for size, n in zip((60, 72, 64), label.shape, strict=True)])
    return {
        "label": label,
        "T1": six_month_image(label, T1_CONTRAST, rng),
        "T2": six_month_image(label, T2_CONTRAST, rng),
    }


def save_subject(
    directory: Path, subject: str, brain: dict[str, np.ndarray], labeled: bool = True, suffix: str = ".hdr"
) -> None:
    """Write a subject as iSeg names it."""
    for kind in ("T1", "T2"):
        save_volume(directory / f"subject-{subject}-{kind}{suffix}", brain[kind])
    if labeled:
        label = np.array(ISEG_VALUES, dtype=np.uint8)[brain["label"]]
        save_volume(directory / f"subject-{subject}-label{suffix}", label)


def touch(directory: Path, *names: str) -> Path:
    """Make empty files."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return directory


@contextmanager
def two_threads() -> Iterator[None]:
    """Computing on two threads, in this process and in commands, whatever others are kept to."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def server(arguments: str, cwd: Path = ROOT, **environment: str) -> Iterator[int]:
    """A real process `python -m ARGUMENTS` that serves on a port of this machine, for which PORT stands in them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *arguments.replace("PORT", str(port)).split()],
        cwd=cwd, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def s3_server(**environment: str) -> Iterator[int]:
    """A server that speaks S3."""
    with server("moto.server -H 127.0.0.1 -p PORT", **environment) as port:
        yield port


def server_environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "not-a-real-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@pytest.fixture(scope="module")
def network() -> SkipDenseSeg:
    """Untrained, in evaluation mode, with statistics for its batch norms."""
    torch.manual_seed(0)
    network = SkipDenseSeg()
    network(torch.randn(2, 2, 32, 32, 32))
    return network.eval()


@pytest.fixture(scope="session")
def brains() -> list[dict[str, np.ndarray]]:
    return [small_brain(number) for number in range(2)]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder where anybody may read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def as_nobody() -> Callable[[], AbstractContextManager[None]]:
    """A block as a user who may do what everybody may; the superuser may do everything."""

    @contextmanager
    def become() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return become


@pytest.fixture(autouse=True)
def no_handler_left() -> Iterator[None]:
    """Commands in this process add one that writes to where output went then."""
    before = list(logging.getLogger().handlers)
    yield
    for handler in list(logging.getLogger().handlers):
        if type(handler) is logging.StreamHandler and handler not in before:
            logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="session")
def pieces(brains: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """32 x 32 x 32 voxels of each brain, of which the network makes short work."""
    return [{kind: values[14:46, 20:52, 16:48] for kind, values in brain.items()} for brain in brains]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, brains: list[dict[str, np.ndarray]]) -> Path:
    """Labelled subjects 1, 2 and 9, unlabelled 11. To be read only."""
    directory = tmp_path_factory.mktemp("dataset")
    for subject, brain, labeled in (("1", 0, True), ("2", 1, True), ("9", 0, True), ("11", 1, False)):
        save_subject(directory, subject, brains[brain], labeled)
    return directory


@pytest.fixture
def own_dataset(tmp_path: Path, brains: list[dict[str, np.ndarray]]) -> Callable[..., Path]:
    """A dataset of the test's own, to be damaged: labelled 1 and 9, unlabelled 11."""

    def make(suffix: str = ".hdr") -> Path:
        directory = tmp_path / "dataset"
        for subject, labeled in (("1", True), ("9", True), ("11", False)):
            save_subject(directory, subject, brains[0], labeled, suffix)
        return directory

    return make
