"""Every command in the pages is run, in a copy of the bundle, on small subjects."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import torch.distributed.run
import yaml
from helpers import ALL, PAGES, PAPER, ROOT, SETUP, blocks, copy_bundle, save_subject, save_volume, shell_lines
from processes import QUICK, Commands, s3_server, server_environment

from scripts.network import SkipDenseSeg
from scripts.settings import refuse_unknown_overrides


def is_quick(page: str, line: str) -> bool:
    """Whether `make test` runs it: README.md's commands, but for those that give one of them more settings."""
    configured = line.split(" --dataset_dir")[0]
    return page == "README.md" and next(each for each in shell_lines(page) if each.startswith(configured)) == line


# what each page says is run from its top to its bottom; these repeat some of README.md's commands
REPEATING = ("docs/README.md", "docs/data_layout.md", "docs/training.md")
RUN = [
    pytest.param(page, line, marks=() if is_quick(page, line) else pytest.mark.slow)
    for page, line in ALL
    if line.startswith(("python -m ", "torchrun ")) and (page not in REPEATING or ("README.md", line) not in ALL)
]
MAKE = sorted({line for _, line in ALL if line.startswith("make ")})


class Home:
    """A copy of the bundle with the data that the pages speak of, made anew for each page."""

    def __init__(self, directory: Path, brains: list[dict[str, np.ndarray]]) -> None:
        self.directory, self.page = copy_bundle(directory), ""
        self.brains = [{kind: np.pad(values, 4) for kind, values in brain.items()} for brain in brains]
        self.commands = Commands(directory)

    def of(self, page: str) -> Path:
        """The copy as it is before the first command of a page."""
        if page != self.page:
            self.page = page
            for name in ("data", "eval", "models"):
                shutil.rmtree(self.directory / name, ignore_errors=True)
            shutil.copytree(ROOT / "models", self.directory / "models")
            self.add_data("MindSpore" in (ROOT / page).read_text())
        return self.directory

    def add_data(self, all_of_the_test: bool) -> None:
        training, testing = (self.directory / "data" / f"iSeg-2017-{name}" for name in ("Training", "Testing"))
        for subject in (1, 2, 8, 9, 10):
            save_subject(training, str(subject), self.brains[subject % 2])
        for subject in range(11, 24) if all_of_the_test else (11, 12):
            save_subject(testing, str(subject), self.brains[subject % 2], labeled=False)
        for name, brain in zip("AB", self.brains, strict=True):
            save_volume(self.directory / "data" / "label-maps" / f"{name}.nii.gz", brain["label"])
            save_volume(self.directory / "data" / "heads" / f"{name}.nii.gz", brain["label"])
        for kind, file in (("T1", "T1"), ("T2", "T2"), ("label", "Seg")):
            save_volume(self.directory / "data" / "atlas" / f"month-03-{file}.nii.gz", self.brains[0][kind])
        save_subject(self.directory / "data" / "raw", "2", self.brains[0], labeled=False)
        for subject in ("01", "02"):
            stem = f"sub-{subject}/ses-1mo/anat/sub-{subject}_ses-1mo_space-INFANTMNIacpc"
            structures = np.array([0, 24, 3, 2], np.int16)[self.brains[1]["label"]]
            for kind, values in (
                ("T1w", self.brains[1]["T1"]),
                ("T2w", self.brains[1]["T2"]),
                ("desc-aseg_dseg", structures),
            ):
                save_volume(self.directory / "data" / "bobs" / f"{stem}_{kind}.nii.gz", values)
        for name in ("sub-01/anat/sub-01", "sub-02/ses-1/anat/sub-02_ses-1"):
            for kind in ("T1", "T2"):
                save_volume(self.directory / "data" / "bids" / f"{name}_{kind}w.nii.gz", self.brains[0][kind])
        torch.save(SkipDenseSeg(**PAPER).state_dict(), self.directory / "3D-SkipDenseSeg.pth")


@pytest.fixture(scope="module")
def home(tmp_path_factory, pieces) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("bundle"), pieces)
    yield home
    home.commands.close()


@pytest.fixture(scope="module")
def bucket(home) -> Iterator[None]:
    """An S3 server that has the data of the pages and a network in `s3://bucket`."""
    with s3_server() as port, pytest.MonkeyPatch.context() as patch:
        for name, value in server_environment(port).items():
            patch.setenv(name, value)
        fs = fsspec.filesystem("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        fs.mkdir("bucket")
        fs.put(f"{home.of('docs/cloud_storage.md')}/data/", "bucket", recursive=True)
        yield


def test_no_kind_of_command_is_left_out():
    assert len(RUN) >= 20
    assert MAKE == ["make bench", "make brain", "make demo", "make package", "make test", "make weights"]
    assert SETUP == [
        ". .venv/bin/activate",
        "pip install -r requirements.txt",
        "pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0",
        "pip install s3fs==2026.9.0",
        "pip install torch==2.13.0",
        "python3 -m venv .venv",
    ]
    assert "s3fs==2026.9.0" in (ROOT / "requirements/dev.txt").read_text().split()
    assert {"onnx==1.23.2", "onnxscript==0.7.2"} <= set((ROOT / "requirements/dev.txt").read_text().split())


@pytest.mark.parametrize(("page", "command"), RUN)
def test_command_of_the_pages(home, page, command, request):
    if "s3://" in command:
        request.getfixturevalue("bucket")
    program, *arguments = shlex.split(command)
    if program == "torchrun":
        module = "torch.distributed.run"
        arguments[arguments.index("--nproc_per_node") + 1] = "2"
    else:
        _, module, *arguments = arguments
    if "training" in arguments:
        arguments += QUICK
    if "cross_validate" in arguments:
        arguments[arguments.index("--folds") + 1] = "2"
        arguments += QUICK
    if "compare_recipes" in arguments:
        arguments += ["--minutes", "0.01", "--seeds", "1", "--names", "['bundle']"]
    if "brain_masks" in arguments:
        arguments += ["--draws", "1"]
    if "phantom" in arguments:
        arguments[arguments.index("--subjects") + 1] = "1"
        arguments[arguments.index("--unlabeled") + 1] = "0"
    home.of(page)
    result = home.commands.run(arguments, module=module)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    """In the zip too, where README.md isn't this one and pages lie beside each other."""
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?://)([^)]*)\)", text):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / (name or Path(page).name)
        assert path.is_file(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not page.startswith("docs/") or not name.startswith("../"), target


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_the_target(command):
    result = subprocess.run(["make", "--dry-run", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_two_machines_on_this_one(home):
    directory = home.of("docs/several_devices.md")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for block in blocks("docs/several_devices.md", "shell"):
        command = block.replace("node0", "127.0.0.1").replace("29500", str(port)).replace("_node 8", "_node 1")
        arguments = [*shlex.split(command)[1:], *QUICK]
        launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *arguments]
        nodes.append(subprocess.Popen(launcher, cwd=directory, stderr=subprocess.PIPE, text=True))
    assert len(nodes) == 2
    for node in nodes:
        _, told = node.communicate(timeout=300)
        assert node.returncode == 0, told
    assert {path.name for path in (directory / "eval").glob("rank-*.log")} >= {"rank-0.log", "rank-1.log"}


def given_to_torchrun(arguments: list[str]) -> None:
    """Refuse what our command line or `torchrun` itself would."""
    known, rest = torch.distributed.run.get_args_parser().parse_known_args(arguments)
    assert rest == []
    assert (known.module, known.training_script, known.training_script_args[0]) == (True, "monai.bundle", "run")
    refuse_unknown_overrides(known.training_script_args)


def test_slurm_script_starts_what_it_should(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (script,) = blocks("docs/several_devices.md", "slurm")
    programs = {
        "srun": '#!/bin/bash\nshift\nexec "$@"',  # its own option
        "scontrol": "#!/bin/bash\necho node7",
        "torchrun": '#!/bin/bash\nprintf "%s\\0" "$@"',
    }
    for name, program in programs.items():
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1"}
    environment["SLURM_CPUS_PER_TASK"] = "32"
    result = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=environment | {"SLURM_JOB_NODELIST": "node[7-8]"},
    )  # fmt: skip
    arguments = result.stdout.split("\0")[:-1]
    assert {"--node_rank", "1", "--master_addr", "node7"} <= set(arguments)
    given_to_torchrun(arguments)


def test_kubernetes_job_starts_what_it_should(monkeypatch):
    monkeypatch.chdir(ROOT)
    (text,) = blocks("docs/several_devices.md", "yaml")
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    for replicas in job["spec"]["pytorchReplicaSpecs"].values():
        pod = replicas["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        given_to_torchrun(container["command"][1:])


def test_model_card_states_the_settings_that_are_used():
    card = (ROOT / "docs" / "README.md").read_text()
    train = json.loads((ROOT / "configs" / "train.json").read_text())
    patches = f"epochs of {train['crops_per_epoch']} patches"
    assert f"{train['epochs']} {patches}, highest learning rate {train['learning_rate']}" in card
    pattern = r"--crops_per_epoch (\d+) --epochs (\d+) .*?--learning_rate ([\d.]+)"
    trainings = re.findall(pattern, (ROOT / "Makefile").read_text(), re.DOTALL)
    assert len(trainings) == 2
    for patches, epochs, rate in trainings:
        assert f"{epochs} epochs of {patches} patches, highest learning rate {rate}" in card
    assert " \u00d7 ".join(map(str, train["patch_size"])) + " voxels" in card


def test_scores_of_the_weights_are_the_same_wherever_they_stand():
    scores = json.loads((ROOT / "configs" / "metadata.json").read_text())["eval_metrics"]
    card, readme = ((ROOT / page).read_text() for page in ("docs/README.md", "README.md"))
    for name, row in (("nominal_contrast", "nominal"), ("contrast_kept_out_of_training", "patchwork contrast, kept")):
        (cells,) = re.findall(rf"^\| {row}[^|]*\| (.*) \| [\d.]+ \|$", card, re.MULTILINE)
        assert float(cells.split(" | ")[3]) == pytest.approx(100 * scores[f"mean_dice_unseen_brains_{name}"])
        assert f"| {cells} | here" in readme


def test_settings_in_the_table_exist_with_those_defaults():
    train, inference = (json.loads((ROOT / "configs" / f"{name}.json").read_text()) for name in ("train", "inference"))
    rows = re.findall(r"^\| (`.*?`) \|.*\| (.*) \|$", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE)
    shown = {}
    for names, default in rows:
        if "/" not in names and "`" in default and not default.startswith("see"):
            names, defaults = (re.findall(r"`([^`]*)`", cell) for cell in (names, default))
            shown |= dict(zip(names, defaults, strict=names != ["checkpoints"]))
    assert {"dataset_dir", "val_subjects", "window_size", "checkpoints_kept", "resume"} <= set(shown)
    assert inference["checkpoints"] == "$@folders.checkpoints + '/" + shown.pop("checkpoints") + "'"
    for name, default in shown.items():
        value = str({**train, **inference}[name]).removeprefix("$@bundle_root + '/").rstrip("'")
        assert value == default, name
