import logging
import subprocess
import sys

import psutil
import pytest
import torch
from conftest import ROOT
from monai.inferers import SimpleInferer, SlidingWindowInferer

from scripts import inferers
from scripts.errors import InputError
from scripts.inferers import (
    LargestWindowInferer,
    MixedPrecisionInferer,
    available_memory,
    fitting_window,
    needs_loss_scaling,
    network_precision,
)
from scripts.network import SkipDenseSeg


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = SkipDenseSeg()
    network(torch.randn(2, 2, 32, 32, 32))  # statistics for batch norm
    return network.eval()


class Spy:
    """A network that remembers what it was given and under which precision."""

    def __init__(self):
        self.shapes, self.dtypes = [], []

    def __call__(self, patch):
        self.shapes.append(tuple(patch.shape[2:]))
        self.dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        assert patch.is_contiguous(memory_format=torch.channels_last_3d)
        return patch.to(self.dtypes[-1])


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_of_the_network_and_float32_logits(precision, dtype):
    spy = Spy()
    logits = MixedPrecisionInferer(SimpleInferer(), precision)(torch.randn(1, 2, 8, 8, 8), spy)
    assert spy.dtypes == [dtype]
    assert logits.dtype == torch.float32


def test_automatic_precision_follows_the_processor(monkeypatch):
    for capable, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capable=capable: {"avx512_bf16": capable})
        spy = Spy()
        MixedPrecisionInferer(SimpleInferer())(torch.randn(1, 2, 8, 8, 8), spy)
        assert spy.dtypes == [dtype]


def test_automatic_precision_follows_the_gpu(monkeypatch):
    gpu = torch.device("cuda")
    for capable, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, capable=capable: capable)
        assert network_precision(gpu, "auto") == dtype
        assert needs_loss_scaling("cuda", "auto") is not capable
    assert needs_loss_scaling(gpu, "fp16")
    assert not needs_loss_scaling("cpu", "auto")


@pytest.mark.parametrize("precision", ["fp16", "half", 16])
def test_precision_that_the_processor_does_not_do(precision):
    with pytest.raises(InputError, match=f"--precision {precision}: "):
        MixedPrecisionInferer(SimpleInferer(), precision)(torch.randn(1, 2, 8, 8, 8), Spy())


def test_float32_logits_are_those_of_the_bare_network(network):
    image = torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        logits = MixedPrecisionInferer(SimpleInferer(), "fp32")(image, network)
        torch.testing.assert_close(logits, network(image), rtol=1e-4, atol=1e-4)


def test_bf16_gives_almost_the_same_labels(network):
    image = torch.randn(1, 2, 48, 48, 48)
    with torch.no_grad():
        labels = [
            MixedPrecisionInferer(SimpleInferer(), precision)(image, network).argmax(1)
            for precision in ("fp32", "bf16")
        ]
    # an untrained network on noise is full of near ties, more than a trained one ever sees
    assert (labels[0] == labels[1]).float().mean() > 0.95


def test_small_volume_is_taken_whole_and_unpadded():
    spy = Spy()
    inferer = MixedPrecisionInferer(LargestWindowInferer([64, 64, 64], mode="gaussian"), "fp32")
    inferer(torch.randn(1, 2, 32, 48, 16), spy)
    assert spy.shapes == [(32, 48, 16)]


def test_large_volume_is_taken_in_windows_as_by_monai():
    spy = Spy()
    image = torch.randn(1, 2, 48, 32, 80)
    logits = MixedPrecisionInferer(LargestWindowInferer([32, 32, 32], overlap=0.5, mode="gaussian"), "fp32")(image, spy)
    assert set(spy.shapes) == {(32, 32, 32)}
    expected = SlidingWindowInferer([32, 32, 32], overlap=0.5, mode="gaussian")(image, torch.clone)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    ("megabytes", "precision", "shape"),
    [
        (10_000, "fp32", (96, 128, 112)),
        (1000, "fp32", (96, 96, 96)),
        (1000, "bf16", (96, 128, 112)),
        (100, "fp32", (64, 64, 64)),
    ],
)
def test_windows_are_as_large_as_memory_allows(monkeypatch, caplog, megabytes, precision, shape):
    monkeypatch.setattr(inferers, "available_memory", lambda device: megabytes * 1_000_000)
    spy = Spy()
    with caplog.at_level(logging.INFO):
        MixedPrecisionInferer(LargestWindowInferer(), precision)(torch.randn(1, 2, 96, 128, 112), spy)
    assert set(spy.shapes) == {shape}
    ways = "one pass over" if shape == (96, 128, 112) else f"windows of {' x '.join(map(str, shape))} over"
    assert caplog.messages == [f"{ways} 96 x 128 x 112 voxels ({megabytes / 1000:.1f} GB available)"]


def test_fitting_window():
    assert fitting_window([160, 192, 160], 1e9) == [160, 192, 160]
    assert fitting_window([160, 192, 160], 160**3) == [160, 160, 160]
    assert fitting_window([160, 192, 160], 0) == [64, 64, 64]
    assert fitting_window([16, 192, 32], 0) == [16, 64, 32]


def test_available_memory_heeds_the_limit_of_the_user():
    code = (
        "import resource, torch; from scripts.inferers import available_memory as a; cpu = torch.device('cpu');"
        "free = a(cpu); limit = 6 * 2**30; resource.setrlimit(resource.RLIMIT_AS, (limit, limit));"
        "assert 0 < a(cpu) < min(free + 1, limit), (free, a(cpu))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)
    assert available_memory(torch.device("cpu")) <= psutil.virtual_memory().total
