"""What becomes of the commands when they are killed, or when disk, memory, clock or threads fail them."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import processes
import pytest
import torch
from helpers import same, save_subject
from PIL import Image
from processes import Commands, assert_one_line, evaluating, forked_commands, last_line, run, segmenting, torchrun

from scripts.results.tables import read_csv
from scripts.workflow import exclusive_run


@pytest.fixture(scope="module")
def commands() -> Commands:
    return forked_commands()


@pytest.fixture(scope="module")
def scans(tmp_path_factory, pieces) -> Path:
    """Labelled 1, 2 and 9, unlabelled 11 to 16."""
    directory = tmp_path_factory.mktemp("scans")
    for number in (1, 2, 9, *range(11, 17)):
        save_subject(directory, str(number), pieces[number % 2], labeled=number < 10)
    return directory


def training(scans: Path, output: Path, *more: str) -> list[str]:
    """Three epochs that may be gone on with."""
    return processes.training(scans, output, "--epochs", "3", *more)


def resumable(scans: Path, output: Path) -> list[str]:
    return training(scans, output, "--resume", "True")


def undisturbed(commands: Commands, arguments: list[str], output: Path) -> SimpleNamespace:
    start = time.monotonic()
    result = commands.run(arguments)
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(output=output, seconds=time.monotonic() - start)


@pytest.fixture(scope="module")
def trained(commands, scans, tmp_path_factory) -> SimpleNamespace:
    output = tmp_path_factory.mktemp("trained")
    return undisturbed(commands, resumable(scans, output), output)


@pytest.fixture(scope="module")
def segmented(commands, scans, tmp_path_factory) -> SimpleNamespace:
    output = tmp_path_factory.mktemp("segmented")
    return undisturbed(commands, segmenting(scans, output), output)


def test_training_that_diverges_writes_no_network(commands, scans, tmp_path):
    result = commands.run(training(scans, tmp_path, "--learning_rate", "1e30", "--precision", "fp32"))
    assert_one_line(result, "epoch 1:", "diverged", "--learning_rate")
    assert not list(tmp_path.glob("*.pt"))


def names(output: Path) -> set[str]:
    """What a folder holds, hidden or not, but for logs that grow and copies of former checkpoints."""
    return {path.name for path in output.iterdir() if not re.match(r"events\.out|(model|last)-", path.name)}


def read_whole(path: Path) -> object:
    """The content of a file; it fails if that isn't whole."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.name.endswith(".nii.gz"):
        return torch.from_numpy(np.asarray(nib.load(path).dataobj).copy())
    if path.suffix == ".csv":
        rows = read_csv(path)
        assert rows
        assert not any(None in (*row, *row.values()) for row in rows)
        return rows
    if path.suffix == ".png":
        return Image.open(path).convert("RGB").tobytes()
    assert path.suffix in (".html", ".md", ".json"), path
    text = path.read_text()
    assert path.suffix != ".html" or text.rstrip().endswith("</html>")
    assert path.suffix != ".json" or json.loads(text)
    return None  # it holds the date


def assert_whole(output: Path) -> None:
    """Every file that has its name is whole; a log grows, and what is unfinished is hidden."""
    for path in output.iterdir() if output.exists() else ():
        if path.name[0] != "." and "tfevents" not in path.name:
            read_whole(path)


def assert_same_results(output: Path, expected: Path) -> None:
    assert names(output) == names(expected)
    for name in names(expected):
        assert same(read_whole(output / name), read_whole(expected / name)), name


def slow(*parameters):
    return pytest.param(*parameters, marks=pytest.mark.slow)


# moments, of which the first of inference is tried each time, and the others by the slow tests; KILLS makes them more
KILLS = int(os.environ.get("KILLS", "5"))
MOMENTS = [slow(command, number) for command in ("training", "inference") for number in range(KILLS)]
MOMENTS[KILLS] = ("inference", 0)


@pytest.mark.parametrize(("command", "number"), MOMENTS)
def test_command_killed_at_any_moment_ends_as_if_it_had_not_been(commands, scans, tmp_path, request, command, number):
    arguments = {"training": resumable, "inference": segmenting}[command](scans, tmp_path / "out")
    undisturbed = request.getfixturevalue({"training": "trained", "inference": "segmented"}[command])
    moment = np.random.default_rng([*command.encode(), number]).uniform(0, undisturbed.seconds)
    commands.run_and_kill(arguments, moment)
    assert_whole(tmp_path / "out")
    result = commands.run(arguments)
    assert result.returncode == 0, result.stderr
    assert_same_results(tmp_path / "out", undisturbed.output)


@pytest.mark.parametrize("busy", ["training's checkpoints", slow("training"), slow("evaluating"), "segmenting"])
def test_second_run_on_a_folder_is_refused(commands, scans, tmp_path, busy):
    output = tmp_path / "out"
    of_results = {"evaluating": evaluating(scans, output), "segmenting": segmenting(scans, output)}
    kind = "results" if busy in of_results else "training"
    busy_folder = tmp_path / "weights" if busy == "training's checkpoints" else output
    with exclusive_run(kind, [str(busy_folder)]):
        result = commands.run(of_results.get(busy, training(scans, output, "--ckpt_dir", str(tmp_path / "weights"))))
        assert names(busy_folder) == {f".{kind}.lock"}
    assert_one_line(result, f"{busy_folder}: another run ({kind}) is writing here", "choose another folder")
    assert not any(output.iterdir())


RANKS = """
import os, sys
sys.path.insert(0, os.getcwd())
import ignite.distributed as idist
import torch
from scripts.distributed import join, leave
from scripts.files import whole_files
from scripts.workflow import exclusive_run

join(sys.argv[1], torch.device("cpu"))
with exclusive_run("results", [sys.argv[1]]), whole_files(sys.argv[1]) as temporary:
    (temporary / f"{idist.get_rank()}.txt").touch()
leave()
"""


@pytest.mark.slow
def test_processes_of_one_run_count_as_one(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    output = tmp_path / "out"
    (output / ".unfinished-results-a").mkdir(parents=True)
    result = run(torchrun(2, str(tmp_path / "ranks.py"), str(output)))
    assert result.returncode == 0, result.stderr
    assert names(output) == {"0.txt", "1.txt", "rank-0.log", "rank-1.log"}


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of its own, given mount options, and hands out its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if result is None or result.returncode:
            pytest.skip(f"no file system can be mounted here: {result.stderr.strip() if result else 'no mount'}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


COMMANDS = {"training": training, "evaluating": evaluating, "segmenting": segmenting}


@pytest.mark.parametrize(
    ("command", "kilobytes"),
    [slow("training", 60), ("training", 3000), slow("training", 6000), slow("evaluating", 60), ("segmenting", 30)],
)
def test_full_disk(commands, scans, disk, command, kilobytes):
    output = disk(f"size={kilobytes}k")
    (output / "notes.md").write_text("what was there")
    result = commands.run(COMMANDS[command](scans, output))
    assert_one_line(result, f"{output}: can't be written", "make room")
    assert (output / "notes.md").read_text() == "what was there"
    assert_whole(output)
    assert not [name for name in names(output) if name[0] == "."]


@pytest.mark.parametrize("command", ["training", slow("evaluating"), slow("segmenting")])
def test_folder_that_can_only_be_read(commands, scans, disk, command):
    output = disk("size=1m")
    (output / "notes.md").write_text("what was there")
    disk("remount,ro")
    result = commands.run(COMMANDS[command](scans, output))
    assert_one_line(result, f"{output}: can't be written", "Read-only file system")
    assert names(output) == {"notes.md"}


def memory(megabytes: int) -> str:
    """Code that leaves a process so much memory beside what it has."""
    return f"""
import psutil, resource
limit = psutil.Process().memory_info().vms + {megabytes} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""


def test_training_that_needs_more_memory_than_there_is(commands, dataset, tmp_path):
    large = ["--patch_size", "[64,64,64]", "--batch_size", "4", "--precision", "fp32"]
    result = commands.run(training(dataset, tmp_path, *large), first=memory(1500))
    assert_one_line(result, "memory ran out", "--batch_size", "--patch_size")
    assert_whole(tmp_path)


def test_window_that_needs_more_memory_than_there_is(commands, dataset, tmp_path):
    large = ["--window_size", "[96,96,96]", "--precision", "fp32"]
    result = commands.run(segmenting(dataset, tmp_path, *large), first=memory(150))
    assert_one_line(result, "memory ran out: a window of", "GB were free", "--window_size")
    assert not [name for name in names(tmp_path) if name.endswith(".nii.gz")]


# where the signal comes: what is called then, how often before, and what in its place
INTERRUPTED = """
import os, pathlib, signal, time
import {module} as module
calls, true = [], module.{name}

def interrupted(*arguments, **named):
    calls.append(1)
    if len(calls) == {call}:
        pathlib.Path({moment!r}).write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep({seconds})
    return true(*arguments, **named)

module.{name} = interrupted
"""


@pytest.mark.parametrize(
    ("command", "module", "name", "call", "seconds"),
    [
        slow("training", "scripts.training.optimizer", "MuonAdamW.step", 4, 30),
        ("training", "scripts.inference.windows", "LargestWindowInferer.__call__", 2, 30),
        slow("segmenting", "scripts.inference.windows", "LargestWindowInferer.__call__", 3, 30),
        ("segmenting", "scripts.data.transforms", "LoadSubjectd.__call__", 3, 1),  # in the thread that reads
    ],
)
def test_ctrl_c(commands, scans, tmp_path, segmented, command, module, name, call, seconds):
    moment, output = tmp_path / "moment", tmp_path / "out"
    first = INTERRUPTED.format(module=module, name=name, call=call, seconds=seconds, moment=str(moment))
    arguments = training(scans, output) if command == "training" else segmenting(scans, output)
    result = commands.run(arguments, first)
    # 5 seconds, and some for a machine that tests other things meanwhile
    assert time.monotonic() - float(moment.read_text()) < 8
    assert result.returncode == -signal.SIGINT  # a shell calls it 130
    assert "Traceback" not in result.stdout + result.stderr, result.stdout + result.stderr
    assert last_line(result).startswith("stopped from the keyboard; ")
    assert_whole(output)
    assert not [name for name in names(output) if name[0] == "."]
    if command == "training":
        assert read_whole(output / "last.pt")["progress"]["epoch"] == 1
    else:
        labels = sorted(output.glob("*.nii.gz"))
        assert labels or module == "scripts.data.transforms"
        assert [path.name for path in labels] == ["subject-11-label.nii.gz", "subject-12-label.nii.gz"][: len(labels)]
        assert all(same(read_whole(path), read_whole(segmented.output / path.name)) for path in labels)


RAISING = """
import os
import {module} as module
calls, true = [], module.{name}

def raising(*arguments, **named):
    calls.append(1)
    if len(calls) == {call}:
        {deed}
    return true(*arguments, **named)

module.{name} = raising
"""
BROKEN = "raise OSError(5, 'Input/output error')"


@pytest.mark.parametrize(
    ("command", "module", "name", "call", "deed", "told"),
    [
        slow("training", "monai.transforms", "RandFlipd.__call__", 4, BROKEN, "OSError: [Errno 5] Input/output error"),
        ("segmenting", "scripts.data.transforms", "LoadSubjectd.__call__", 3, BROKEN, "OSError: [Errno 5] Input/"),
        slow("training with a worker", "monai.transforms", "RandFlipd.__call__", 2, "os._exit(3)", "DataLoader worker"),
    ],
)
def test_reading_that_fails_ends_the_command(commands, scans, tmp_path, command, module, name, call, deed, told):
    first = RAISING.format(module=module, name=name, call=call, deed=deed)
    more = ["--train#dataloader#num_workers", "1"] if command.endswith("worker") else []
    arguments = segmenting(scans, tmp_path) if command == "segmenting" else training(scans, tmp_path, *more)
    start = time.monotonic()
    result = commands.run(arguments, first)
    assert time.monotonic() - start < 60
    assert result.returncode == 1
    assert told in result.stderr
    assert_whole(tmp_path)
    assert not [name for name in names(tmp_path) if name[0] == "."]


# the clock of day goes back by a day after some of the network's convolutions, in its second pass or step
CLOCK = """
import time, torch, tqdm.std
true, calls, step = time.time, [], torch.nn.Conv3d.forward

def back():
    return true() - 86400 * (len(calls) > 30)

def forward(*arguments):
    calls.append(1)
    return step(*arguments)

time.time = tqdm.std.time = back
torch.nn.Conv3d.forward = forward
"""


@pytest.mark.parametrize("command", [slow("training"), "segmenting"])
def test_clock_that_is_set_back(commands, scans, tmp_path, trained, segmented, command):
    is_training = command == "training"
    arguments = resumable(scans, tmp_path) if is_training else segmenting(scans, tmp_path)
    result = commands.run(arguments, CLOCK)
    assert result.returncode == 0, result.stderr
    assert_same_results(tmp_path, (trained if is_training else segmented).output)
    assert not re.search(r"(?<![\w.-])-\d.*", result.stdout + result.stderr)
