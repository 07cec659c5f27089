"""What docs/exporting.md says: export as it is told there, and run where nothing of this project is."""

import json
import re
import shlex
import subprocess
import sys

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT, blocks, copy_bundle
from monai.data import load_net_with_metadata
from processes import bundle, last_line

from scripts.commands.phantom import phantom
from scripts.network import SkipDenseSeg
from scripts.weights import load_weights

PAGE = "docs/exporting.md"
EXAMPLE = ROOT / "docs" / "examples" / "segment_with_onnx.py"
PAPER = {"block_config": [4, 4, 4, 4], "grouped_upsampling": True, "bias": True}
# each runs `image` through the network in its first argument where only what is named can be imported
WITHOUT_TORCH = """
import sys
sys.modules.update(torch=None, monai=None, scripts=None, onnx=None)
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for path in sys.argv[2:]:
    numpy.save(path, session.run(["pred"], {"image": numpy.load(path)})[0])
"""
WITHOUT_OUR_SCRIPTS = """
import sys
sys.modules.update(monai=None, scripts=None)
import numpy, torch
network = torch.jit.load(sys.argv[1])
for path in sys.argv[2:]:
    with torch.no_grad():
        numpy.save(path, network(torch.from_numpy(numpy.load(path))).numpy())
"""


def test_metadata_and_config_in_the_torchscript_file(tmp_path):
    monai.bundle.ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(ROOT / "models" / "model.pt"),
        meta_file=str(ROOT / "configs" / "metadata.json"),
        config_file=str(ROOT / "configs" / "inference.json"),
    )
    _, metadata, others = load_net_with_metadata(str(tmp_path / "model.ts"), more_extra_files=["inference.json"])
    assert metadata == json.loads((ROOT / "configs" / "metadata.json").read_text())
    assert json.loads(others["inference.json"]) == json.loads((ROOT / "configs" / "inference.json").read_text())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with model.ts and model.onnx of the weights included, and paper.ts and paper.onnx of others."""
    directory = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    paper = SkipDenseSeg(**PAPER)
    paper(torch.randn(2, 2, 32, 32, 32))  # statistics for batch norm
    torch.save(paper.state_dict(), directory / "paper.pt")
    settings = [word for name, value in PAPER.items() for word in (f"--network_def#{name}", str(value))]
    for name, checkpoint, network in (
        ("model", ROOT / "models" / "model.pt", []),
        ("paper", directory / "paper.pt", settings),
    ):
        for command in (
            ["ckpt_export", "--config_file", "configs/inference.json", "--filepath", f"{directory}/{name}.ts"],
            ["onnx_export", "--args_file", "configs/onnx_export.json", "--filepath", f"{directory}/{name}.onnx"],
        ):
            result = bundle(*command, "--ckpt_file", str(checkpoint), *network)
            assert result.returncode == 0, result.stderr
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "paper"])
@pytest.mark.parametrize(("kind", "program"), [("onnx", WITHOUT_TORCH), ("ts", WITHOUT_OUR_SCRIPTS)])
def test_same_labels_in_a_process_without_this_project(exported, tmp_path, name, kind, program):
    network = SkipDenseSeg(**(PAPER if name == "paper" else {})).eval()
    load_weights(network, str(exported / "paper.pt" if name == "paper" else ROOT / "models" / "model.pt"))
    shapes = [(1, 1, 1, 1), (3, 2, 3, 1), (1, 5, 2, 4), (5, 2, 2, 2), (2, 3, 4, 6)]
    images = [torch.randn(batch, 2, *(network.stride * side for side in size)) for batch, *size in shapes]
    paths = [tmp_path / f"{number}.npy" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        np.save(path, image.numpy())
    code = [sys.executable, "-I", "-W", "ignore", "-c", program, str(exported / f"{name}.{kind}"), *map(str, paths)]
    result = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    for path, image in zip(paths, images, strict=True):
        with torch.no_grad():
            expected = network(image)
        logits = torch.from_numpy(np.load(path))
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
        assert (logits.argmax(1) == expected.argmax(1)).float().mean() >= 0.9999


def voxels(path):
    return np.squeeze(np.asarray(nib.load(path).dataobj))


@pytest.mark.slow
def test_subject_of_usual_size_gets_the_same_labels_by_each_and_where_only_onnxruntime_is(exported, tmp_path):
    phantom(str(tmp_path / "data"), subjects=1, unlabeled=0, seed=5)
    labels = {}
    for checkpoint in (ROOT / "models" / "model.pt", exported / "model.ts", exported / "model.onnx"):
        output = tmp_path / checkpoint.name
        result = bundle(
            *("run", "--config_file", "configs/inference.json", "--dataset_dir", str(tmp_path / "data")),
            *("--subjects", "1", "--output_dir", str(output), "--checkpoints", str(checkpoint), "--precision", "fp32"),
        )
        assert result.returncode == 0, result.stderr
        labels[checkpoint.suffix] = voxels(output / "subject-1-label.nii.gz")
    # as the page says it to somebody who has neither torch nor this project
    (block,) = [block for block in blocks(PAGE, "shell") if "pip install onnxruntime" in block]
    install, command = block.splitlines()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", *shlex.split(install), "--quiet"], cwd=tmp_path, check=True)
    scans = [str(tmp_path / "data" / f"subject-1-{kind}.hdr") for kind in ("T1", "T2")]
    arguments = [EXAMPLE, exported / "model.onnx", *scans, "label.nii.gz"]
    assert len(arguments) + 1 == len(shlex.split(command))
    subprocess.run([python, *arguments], cwd=tmp_path, check=True)
    labels["example"] = voxels(tmp_path / "label.nii.gz")
    brain = voxels(scans[0]) > 0
    same = {name: np.mean(label[brain] == labels[".pt"][brain]) for name, label in labels.items()}
    print("labels as those of model.pt:", same)
    assert min(same[".ts"], same[".onnx"]) >= 0.9999
    assert same["example"] >= 0.999
    modules = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"^(torch|monai) ", modules, re.MULTILINE)


@pytest.mark.slow
def test_python_of_the_page(tmp_path):
    home = copy_bundle(tmp_path)
    (code,) = blocks(PAGE, "python")
    environment = {"PYTHONPATH": str(home)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=home, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    image = np.random.default_rng(0).standard_normal((3, 2, 8, 20, 12), dtype=np.float32)
    np.save(tmp_path / "image.npy", image)
    program = [
        sys.executable,
        "-I",
        "-c",
        WITHOUT_TORCH,
        str(home / "models" / "model.onnx"),
        str(tmp_path / "image.npy"),
    ]
    subprocess.run(program, check=True)
    network = SkipDenseSeg().eval()
    load_weights(network, str(ROOT / "models" / "model.pt"))
    with torch.no_grad():
        expected = network(torch.from_numpy(image))
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "image.npy")), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_damaged_file_ends_in_one_line(dataset, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    result = bundle(
        *("run", "--config_file", "configs/inference.json", "--dataset_dir", str(dataset)),
        *("--output_dir", str(tmp_path / "out"), "--checkpoints", str(tmp_path / "model.onnx")),
    )
    assert result.returncode != 0
    assert last_line(result).startswith(f"error: {tmp_path}/model.onnx: can't be read as ONNX")
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it would run")
def test_tensorrt_command_is_understood_up_to_the_missing_gpu():
    (block,) = [block for block in blocks(PAGE, "shell") if "trt_export" in block]
    result = bundle(*shlex.split(block)[3:])
    assert "Cannot find any GPU devices" in last_line(result)
