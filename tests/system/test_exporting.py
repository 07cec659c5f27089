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
from exports import convolution, save_all, save_onnx, save_torchscript
from helpers import ROOT, blocks, configured, copy_bundle, save_volume, voxels
from monai.data import load_net_with_metadata
from processes import bundle, flags, forked, last_line, segmenting, succeeds

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


@pytest.fixture(scope="module")
def files(tmp_path_factory, network):
    return save_all(tmp_path_factory.mktemp("models"), network)


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
            succeeds(*command, "--ckpt_file", str(checkpoint), *network)
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


@pytest.mark.slow
def test_subject_of_usual_size_gets_the_same_labels_by_each_and_where_only_onnxruntime_is(exported, tmp_path):
    phantom(str(tmp_path / "data"), subjects=1, unlabeled=0, seed=5)
    labels = {}
    for checkpoint in (ROOT / "models" / "model.pt", exported / "model.ts", exported / "model.onnx"):
        output = tmp_path / checkpoint.name
        settings = flags(subjects=1, checkpoints=checkpoint, precision="fp32")
        succeeds(*segmenting(tmp_path / "data", output, *settings))
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
    paths = [str(home / "models" / "model.onnx"), str(tmp_path / "image.npy")]
    subprocess.run([sys.executable, "-I", "-c", WITHOUT_TORCH, *paths], check=True)
    network = SkipDenseSeg().eval()
    load_weights(network, str(ROOT / "models" / "model.pt"))
    with torch.no_grad():
        expected = network(torch.from_numpy(image))
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "image.npy")), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it would run")
def test_tensorrt_command_is_understood_up_to_the_missing_gpu():
    (block,) = [block for block in blocks(PAGE, "shell") if "trt_export" in block]
    result = bundle(*shlex.split(block)[3:])
    assert "Cannot find any GPU devices" in last_line(result)


def segment_without_torch(model, t1, t2, output):
    """Run the example as its user does, where neither torch nor MONAI nor this project is."""
    code = (
        "import runpy, sys; sys.modules.update(torch=None, monai=None, scripts=None);"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", code, str(model), str(t1), str(t2), str(output)], capture_output=True, text=True
    )


def test_example_without_torch_gives_the_labels_of_inference_json(dataset, brains, files, tmp_path):
    configured(dataset, tmp_path, checkpoints=str(files / "model.onnx")).run()
    ours = voxels(tmp_path / "subject-11-label.nii.gz")
    scans = [dataset / f"subject-11-{kind}.hdr" for kind in ("T1", "T2")]
    result = segment_without_torch(files / "model.onnx", *scans, tmp_path / "label.nii.gz")
    assert (result.returncode, result.stderr) == (0, "")
    label = nib.load(tmp_path / "label.nii.gz")
    assert label.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(label.affine, nib.load(scans[0]).affine)
    brain = brains[1]["T1"] > 0
    assert np.mean(voxels(tmp_path / "label.nii.gz")[brain] == ours[brain]) >= 0.999
    assert not voxels(tmp_path / "label.nii.gz")[~brain].any()

    # the same scans stored with other axes, as other programs do
    size = brains[1]["T1"].shape[0]
    affine = np.array([[0, 0, 1, 1 - size], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    for kind in ("T1", "T2"):
        save_volume(tmp_path / f"{kind}.nii.gz", brains[1][kind][::-1].transpose(2, 1, 0), affine)
    turned = [tmp_path / f"{name}.nii.gz" for name in ("T1", "T2", "turned")]
    assert segment_without_torch(files / "model.onnx", *turned).returncode == 0
    np.testing.assert_array_equal(nib.load(turned[2]).affine, affine)
    np.testing.assert_array_equal(voxels(turned[2]).transpose(2, 1, 0)[::-1], voxels(tmp_path / "label.nii.gz"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t1, t2: ((t1, np.diag([-2.0, 1, 1, 1])), (t2, np.diag([-2.0, 1, 1, 1]))), "voxels aren't 1 mm"),
        (lambda t1, t2: ((t1, None), (t2, np.diag([-1.0, -1, 1, 1]))), "isn't one volume on the grid of"),
        (lambda t1, t2: ((t1, None), (t1 // t1.clip(1), None)), "not two skull-stripped scans"),
    ],
)
def test_example_refuses_what_it_can_not_do(files, brains, tmp_path, change, message):
    scans = change(brains[0]["T1"], brains[0]["T2"])
    for kind, (values, affine) in zip(("T1", "T2"), scans, strict=True):
        save_volume(tmp_path / f"{kind}.nii.gz", values, affine)
    paths = [tmp_path / f"{name}.nii.gz" for name in ("T1", "T2", "label")]
    result = segment_without_torch(files / "model.onnx", *paths)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not paths[2].exists()


LITTLE_MEMORY = """
import resource, sys, psutil, torch
from scripts.inference.exported import ExportedNetwork
network = ExportedNetwork(sys.argv[1], torch.device("cpu"))
patch = torch.zeros(1, 2, 200, 200, 200)
allowed = psutil.Process().memory_info().vms + 60_000_000
resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
try:
    network(patch)
except Exception as error:
    from scripts.errors import ran_out_of_memory
    print(type(error).__name__, ran_out_of_memory(error))
"""


@pytest.mark.parametrize("suffix", [".ts", ".onnx"])
def test_lack_of_memory_is_no_fault_of_the_network(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    save_onnx(path) if suffix == ".onnx" else save_torchscript(path, convolution())
    result = forked(LITTLE_MEMORY, str(path))
    assert result.stdout.split()[1:] == ["True"], result.stdout + result.stderr
    assert "InputError" not in result.stdout
