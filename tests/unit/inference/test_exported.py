"""Exported networks in the place of a checkpoint. How they are exported: test_exporting.py."""

import itertools
import logging
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from exports import convolution, save_all, save_onnx, save_torchscript
from helpers import ROOT
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer

from scripts.errors import InputError
from scripts.inference import windows
from scripts.inference.averaging import AveragingInferer, CheckpointLoader
from scripts.inference.exported import ONNXRUNTIME, ExportedNetwork
from scripts.inference.precision import MixedPrecisionInferer
from scripts.inference.windows import LargestWindowInferer
from scripts.network import SkipDenseSeg

CPU = torch.device("cpu")
FP32 = MixedPrecisionInferer(SimpleInferer(), "fp32")


@pytest.fixture(scope="module")
def files(tmp_path_factory, network):
    return save_all(tmp_path_factory.mktemp("models"), network)


@pytest.mark.parametrize("kind", ["ts", "onnx"])
@pytest.mark.parametrize("shape", [(1, 8, 12, 16), (3, 20, 16, 4)])
def test_logits_are_those_of_the_network_in_the_file(files, network, kind, shape):
    image = torch.randn(shape[0], 2, *shape[1:])
    with torch.no_grad():
        logits = AveragingInferer(FP32, str(files / f"model.{kind}"))(image, SkipDenseSeg(block_config=(1,)))
        expected = (network if kind == "ts" else convolution())(image)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_onnx_takes_what_monai_hands_on(files):
    image = torch.randn(1, 2, 8, 8, 8)
    logits = ExportedNetwork(str(files / "model.onnx"), CPU)(MetaTensor(image))
    torch.testing.assert_close(logits, convolution()(image).detach())


@pytest.mark.parametrize("flips", [False, True])
def test_average_over_kinds_of_files_and_mirror_images(files, network, flips):
    paths = [str(files / f"model.{kind}") for kind in ("pt", "onnx", "ts")]
    image = torch.randn(1, 2, 8, 12, 16)
    mirrors = [axes for n in range(4) for axes in itertools.combinations((2, 3, 4), n)] if flips else [()]
    with torch.no_grad():
        members = (network, convolution(), network)
        each = [m(image.flip(axes)).flip(axes).softmax(1) for m in members for axes in mirrors]
        logits = AveragingInferer(FP32, paths, flips)(image, SkipDenseSeg().eval())
    torch.testing.assert_close(logits.softmax(1), torch.stack(each).mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["ts", "onnx"])
def test_sliding_windows(files, network, kind):
    windows = {"overlap": 0.5, "mode": "gaussian"}
    image = torch.randn(1, 2, 16, 16, 40)
    inferer = MixedPrecisionInferer(LargestWindowInferer([16, 16, 16], **windows), "fp32")
    with torch.no_grad():
        logits = AveragingInferer(inferer, str(files / f"model.{kind}"))(image, network)
        plain = network if kind == "ts" else convolution()
        expected = SlidingWindowInferer([16, 16, 16], **windows)(image, plain)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_files_are_loaded_once(files, network, monkeypatch):
    inferer = AveragingInferer(FP32, str(files / "model.ts"))
    image = torch.randn(1, 2, 8, 8, 8)
    with torch.no_grad():
        first = inferer(image, network)
        monkeypatch.setattr(AveragingInferer, "load", lambda *_: pytest.fail("loaded twice"))
        torch.testing.assert_close(inferer(image, network), first)


def test_torchscript_computes_in_the_precision_that_is_asked_for(files, network):
    image = torch.randn(1, 2, 16, 16, 16)
    inferer = MixedPrecisionInferer(SimpleInferer(), "bf16")
    with torch.no_grad():
        logits = inferer(image, ExportedNetwork(str(files / "model.ts"), CPU))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = network(image).float()
        torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.1)
        assert torch.equal(logits, logits.bfloat16().float())
        assert not torch.equal(logits, network(image))


def test_onnx_computes_in_float32_with_windows_that_fit_it(files, monkeypatch, caplog):
    """In half precision this memory would do for one pass over the volume."""
    monkeypatch.setattr(windows, "available_memory", lambda device: 1_500_000_000)
    inferer = MixedPrecisionInferer(LargestWindowInferer(sw_batch_size=1), "bf16")
    image = torch.randn(1, 2, 96, 128, 112)
    with torch.no_grad(), caplog.at_level(logging.INFO):
        network = ExportedNetwork(str(files / "model.onnx"), CPU)
        inferer(image, network)
        small = image[..., :16, :16, :16]
        torch.testing.assert_close(inferer(small, network), convolution()(small))
    assert "in float32 by ONNX Runtime (CPUExecutionProvider)" in caplog.text
    assert "windows of 96 x 96 x 96 over 96 x 128 x 112" in caplog.text


@pytest.mark.parametrize(
    ("device", "there", "chosen"),
    [
        ("cuda:1", ["CUDAExecutionProvider", "CPUExecutionProvider"], ("CUDAExecutionProvider", {"device_id": 1})),
        ("cuda:1", ["CPUExecutionProvider"], "CPUExecutionProvider"),
        ("cpu", ["CUDAExecutionProvider", "CPUExecutionProvider"], "CPUExecutionProvider"),
    ],
)
def test_onnx_is_computed_where_the_image_lies_if_onnxruntime_can(files, monkeypatch, device, there, chosen):
    asked, real = [], onnxruntime.InferenceSession

    def session(path, options, providers):
        asked.extend(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    ExportedNetwork(str(files / "model.onnx"), torch.device(device))
    assert asked[0] == chosen
    assert asked[-1] == "CPUExecutionProvider"


def test_only_a_checkpoint_is_loaded_into_the_network(files, network):
    for name, loaded in (("model.onnx", False), (["model.ts", "model.pt"], False), (["model.pt", "model.ts"], True)):
        own = SkipDenseSeg()
        engine = Engine(lambda engine, batch: None)
        CheckpointLoader([str(files / n) for n in np.atleast_1d(name)], own).attach(engine)
        engine.run([0])
        assert torch.equal(own.conv_class.weight, network.conv_class.weight) == loaded


def test_inferer_takes_a_torchscript_network_as_monai_label_loads_it(files, network, tmp_path):
    """It loads `model.ts` by itself where there is no `model.pt`."""
    parser = ConfigParser()
    parser.read_config(ROOT / "configs" / "inference.json")
    parser.update({"ckpt_dir": str(tmp_path), "precision": "fp32"})
    inferer, image = parser.get_parsed_content("inferer"), torch.randn(1, 2, 16, 16, 16)
    exported = torch.jit.load(files / "model.ts").eval()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(inferer(image, exported), network(image), rtol=1e-4, atol=1e-4)


def segment(path, image=None):
    return AveragingInferer(FP32, str(path))(torch.randn(1, 2, 16, 16, 16) if image is None else image, SkipDenseSeg())


@pytest.mark.parametrize("kind", ["ts", "onnx"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "a checkpoint", "text", "missing"])
def test_file_that_is_no_exported_network(files, tmp_path, kind, damage):
    path = tmp_path / f"model.{kind}"
    content = {
        "empty": b"",
        "truncated": (files / path.name).read_bytes()[:-500],
        "a checkpoint": (files / "model.pt").read_bytes(),
        "text": b"not a network",
    }
    if damage in content:
        path.write_bytes(content[damage])
    named = {"ts": "TorchScript", "onnx": "ONNX"}[kind]
    message = "no such file; export" if damage == "missing" else f"can't be read as {named} .*copy or export it again"
    with pytest.raises(InputError, match=rf"model\.{kind}: {message}") as caught:
        segment(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600  # ONNX Runtime for Python 3.10 names a C++ function, too


class TakesOneSize(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat((image, image), 1).view(1, 4, 64, 64, 64)


class GivesTwo(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image, image


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [
        ("onnx", {"inputs": 1}, r"doesn't take 1 of 2 channels and 16 x 16 x 16 voxels \(.*Got: 2 Expected: 1.*\)"),
        ("onnx", {"classes": 3}, r"returns \(1, 3, 16, 16, 16\) for .*, not \(1, 4, 16, 16, 16\)"),
        ("onnx", {"size": (64, 64, 64)}, r"doesn't take .*Got: 16 Expected: 64.*set --window_size"),
        (
            "ts",
            lambda: convolution(inputs=1),
            r"doesn't take .*expected input\[1, 2, 16, 16, 16\] to have 1 channels",
        ),
        ("ts", lambda: convolution(classes=3), r"returns \(1, 3, 16, 16, 16\) for .*, not \(1, 4, 16, 16, 16\)"),
        ("ts", TakesOneSize, r"doesn't take .*shape '\[1, 4, 64, 64, 64\]' is invalid"),
        ("ts", GivesTwo, "returns tuple for"),
    ],
)
def test_file_of_another_network(tmp_path, kind, make, message):
    path = tmp_path / f"other.{kind}"
    if kind == "onnx":
        save_onnx(path, **make)
    else:
        save_torchscript(path, make())
    with torch.no_grad(), pytest.raises(InputError, match=rf"other\.{kind}: {message}") as caught:
        segment(path)
    assert "\n" not in str(caught.value)


def test_onnx_of_one_size_runs_in_windows_of_that_size(tmp_path):
    save_onnx(tmp_path / "model.onnx", size=(16, 16, 16))
    image = torch.randn(1, 2, 32, 16, 48)
    inferer = MixedPrecisionInferer(LargestWindowInferer([16, 16, 16], overlap=0.5), "fp32")
    logits = AveragingInferer(inferer, str(tmp_path / "model.onnx"))(image, SkipDenseSeg())
    assert logits.shape == (1, 4, 32, 16, 48)


def test_onnxruntime_that_is_not_installed(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"model.onnx: needs ONNX Runtime; pip install onnxruntime==\d"):
        segment(files / "model.onnx")


def test_version_in_the_message_is_the_one_that_is_tested():
    assert ONNXRUNTIME in (ROOT / "requirements/dev.txt").read_text().split()
