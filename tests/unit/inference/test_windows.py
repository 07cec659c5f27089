import logging

import numpy as np
import pytest
import torch
from helpers import SpyNetwork
from monai.inferers import SlidingWindowInferer

from scripts.errors import InputError
from scripts.inference import windows
from scripts.inference.precision import MixedPrecisionInferer
from scripts.inference.windows import LargestWindowInferer, fitting_window


def test_small_volume_is_taken_whole_and_unpadded():
    spy = SpyNetwork()
    inferer = MixedPrecisionInferer(LargestWindowInferer([64, 64, 64], mode="gaussian"), "fp32")
    inferer(torch.randn(1, 2, 32, 48, 16), spy)
    assert spy.shapes == [(32, 48, 16)]


def test_large_volume_is_taken_in_windows_as_by_monai():
    spy = SpyNetwork()
    image = torch.randn(1, 2, 48, 32, 80)
    logits = MixedPrecisionInferer(LargestWindowInferer([32, 32, 32], overlap=0.5, mode="gaussian"), "fp32")(image, spy)
    assert set(spy.shapes) == {(32, 32, 32)}
    expected = SlidingWindowInferer([32, 32, 32], overlap=0.5, mode="gaussian")(image, torch.clone)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    ("megabytes", "precision", "shape"),
    [
        (10_000, "fp32", (96, 128, 112)),
        (1500, "fp32", (96, 96, 96)),
        (1500, "bf16", (96, 128, 112)),
        (100, "fp32", (64, 64, 64)),
    ],
)
def test_windows_are_as_large_as_memory_allows(monkeypatch, caplog, megabytes, precision, shape):
    monkeypatch.setattr(windows, "available_memory", lambda device: megabytes * 1_000_000)
    spy = SpyNetwork()
    with caplog.at_level(logging.INFO):
        MixedPrecisionInferer(LargestWindowInferer(), precision)(torch.randn(1, 2, 96, 128, 112), spy)
    assert set(spy.shapes) == {shape}
    ways = "one pass over" if shape == (96, 128, 112) else f"windows of {' x '.join(map(str, shape))} over"
    assert caplog.messages == [f"{ways} 96 x 128 x 112 voxels ({megabytes / 1000:.1f} GB available)"]


@pytest.mark.parametrize("size", ["large", [64, 64], [64] * 4, [0, 0, 0], -16, True, None, [64.0] * 3])
def test_window_that_can_not_be(size):
    with pytest.raises(InputError, match=r"^--window_size .*: must be auto or three whole numbers, like"):
        LargestWindowInferer(size)


def test_window_that_the_network_does_not_take(network):
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=r"--window_size \(50, 50, 50\): doesn't suit .* of 4"),
    ):
        LargestWindowInferer([50, 50, 50])(torch.zeros(1, 2, 64, 64, 64), network)


def test_window_of_one_number():
    assert LargestWindowInferer(64).roi_size == LargestWindowInferer(np.int64([64, 64, 64])).roi_size == (64, 64, 64)


def test_fitting_window():
    assert fitting_window([160, 192, 160], 1e9) == [160, 192, 160]
    assert fitting_window([160, 192, 160], 160**3) == [160, 160, 160]
    assert fitting_window([160, 192, 160], 0) == [64, 64, 64]
    assert fitting_window([16, 192, 32], 0) == [16, 64, 32]
