"""The bundle's commands and servers as processes."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT

# a training of seconds on the small dataset, without pictures
QUICK = ["--epochs", "1", "--val_interval", "1", "--crops_per_epoch", "2", "--batch_size", "1"]
QUICK += ["--picture_interval", "0"]
# Starts command lines in processes that are forked from one that has imported what they import, so that each is spared
# the longest part of its start, and hands out their exit status. `first` arranges what is to fail in one.
FORKING = """
import json, os, runpy, signal, sys
import monai.bundle, torch.utils.tensorboard
import scripts.__main__, scripts.results.bids_derivative, scripts.report.page, scripts.results.probabilities
import scripts.training.resume, scripts.training.progress

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
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = [order["module"], *order["arguments"]]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    exec(order["first"], {})
    if order["module"]:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    sys.exit()
"""


class Commands:
    """Commands in the root of the bundle or a copy of it, as processes of their own, see FORKING; one at a time."""

    def __init__(
        self, root: Path = ROOT, python: str = sys.executable, without: Collection[str] = (), **environment: str
    ) -> None:
        """`without`: variables of the environment that it hasn't."""
        self.without, self.environment = without, {"PYTHONPATH": ""} | environment
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [f"{self.folder.name}/{name}" for name in ("stdout", "stderr")]
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-c", FORKING],
            cwd=root, env=self.variables(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(self.close)

    def variables(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name not in self.without} | self.environment

    def close(self) -> None:
        self.process.communicate(timeout=60)
        self.folder.cleanup()

    def ask(self, **order: Any) -> int:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, arguments: Sequence[str], first: str = "", module: str = "monai.bundle") -> int:
        """Start one and return its process id; the former must have been waited for."""
        order = {"module": module, "first": first, "environment": self.variables(), "streams": self.streams}
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


def forked(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own that is forked from one which has imported the bundle."""
    return forked_commands().run(arguments, first=code, module="")


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


def last_line(result: subprocess.CompletedProcess) -> str:
    return result.stderr.strip().splitlines()[-1]


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


EVALUATE = "['configs/train.json','configs/evaluate.json']"


def flags(**settings: object) -> list[str]:
    """Settings as a command line has them."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def training(dataset: Path, output: Path, *more: str) -> list[str]:
    """The arguments of a training of seconds, to a folder of its own; likewise those of the other commands."""
    folders = flags(dataset_dir=dataset, output_dir=output, ckpt_dir=output)
    return ["run", "training", "--config_file", "configs/train.json", *folders, *QUICK, *more]


def evaluating(dataset: Path, output: Path, *more: str) -> list[str]:
    return ["run", "evaluating", "--config_file", EVALUATE, *flags(dataset_dir=dataset, output_dir=output), *more]


def segmenting(dataset: Path, output: Path, *more: str) -> list[str]:
    folders = flags(dataset_dir=dataset, output_dir=output)
    return ["run", "--config_file", "configs/inference.json", *folders, *more]


def nothing_written(output: Path) -> bool:
    return not output.exists() or not any(output.iterdir())


def assert_one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    """The command failed, with one line that has these words."""
    assert result.returncode != 0
    assert "Traceback" not in result.stdout + result.stderr, result.stdout + result.stderr
    assert last_line(result).startswith("error: "), result.stderr
    for word in words:
        assert word in last_line(result)


def assert_refused(result: subprocess.CompletedProcess, output: Path, *words: str) -> None:
    assert_one_line(result, *words)
    assert nothing_written(output)


def succeeds(*arguments: str, **how: Any) -> subprocess.CompletedProcess:
    """The result of a command that must not fail; arguments as of `bundle`."""
    result = bundle(*arguments, **how)
    assert result.returncode == 0, result.stderr
    return result


def torchrun(processes: int, *arguments: str) -> list[str]:
    """The command that starts so many processes."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(processes), *arguments]


def run(command: list[str], cwd=ROOT, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | variables
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def torchrun_bundle(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    return run(torchrun(processes, "-m", "monai.bundle", *arguments))


# runs the bundle's command line, but ends the process without warning: while the state after epoch 2 is written, or
# in the midst of epoch 3
KILLED = """
import os, runpy, signal, sys, torch
sys.path.insert(0, os.getcwd())
from scripts.training.optimizer import MuonAdamW
moment, save, step = sys.argv.pop(1), torch.save, MuonAdamW.step
steps = []

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def save_half(state, path):
    save(state, path)
    if moment == "writing" and state.get("progress", {}).get("epoch") == 2:
        os.truncate(path, path.stat().st_size // 2)
        kill()

def step_or_die(self, *args, **kwargs):
    steps.append(step(self, *args, **kwargs))
    if moment == "computing" and len(steps) == 5:
        kill()

torch.save, MuonAdamW.step = save_half, step_or_die
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""
