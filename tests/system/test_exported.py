"""The example that segments without torch, and memory that runs out."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import onnx
import pytest
import torch
from helpers import ROOT, save_volume
from monai.bundle import ConfigWorkflow

EXAMPLE = ROOT / "docs" / "examples" / "segment_with_onnx.py"


def convolution(inputs=2, classes=4):
    torch.manual_seed(0)
    return torch.nn.Conv3d(inputs, classes, 3, padding=1).eval()


def save_onnx(path, inputs=2, classes=4, size=("x", "y", "z")):
    """That convolution as the smallest ONNX file."""
    weight, bias = (p.detach().numpy() for p in convolution(inputs, classes).parameters())
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["image", "weight", "bias"], ["pred"], pads=[1] * 6)],
        "convolution",
        [value("image", onnx.TensorProto.FLOAT, ["batch", inputs, *size])],
        [value("pred", onnx.TensorProto.FLOAT, ["batch", classes, *size])],
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(bias, "bias")],
    )
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


def save_torchscript(path, network):
    torch.jit.script(network).save(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory, network):
    """One network as a checkpoint and as TorchScript, and a convolution as ONNX."""
    directory = tmp_path_factory.mktemp("models")
    torch.save(network.state_dict(), directory / "model.pt")
    save_torchscript(directory / "model.ts", network)
    save_onnx(directory / "model.onnx")
    return directory


def segment_without_torch(model, t1, t2, output):
    """Run the example as its user does, where neither torch nor MONAI nor this project is."""
    code = (
        "import runpy, sys; sys.modules.update(torch=None, monai=None, scripts=None);"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", code, str(model), str(t1), str(t2), str(output)], capture_output=True, text=True
    )


def voxels(path):
    return np.squeeze(np.asarray(nib.load(path).dataobj))


def test_example_without_torch_gives_the_labels_of_inference_json(dataset, brains, files, tmp_path):
    workflow = ConfigWorkflow(
        str(ROOT / "configs" / "inference.json"), workflow_type="infer", bundle_root=str(ROOT),
        dataset_dir=str(dataset), output_dir=str(tmp_path), checkpoints=str(files / "model.onnx"),
    )  # fmt: skip
    workflow.initialize()
    workflow.run()
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
    command = [sys.executable, "-W", "ignore", "-c", LITTLE_MEMORY, str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split()[1:] == ["True"], result.stdout + result.stderr
    assert "InputError" not in result.stdout
