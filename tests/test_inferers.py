import pytest
import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer

from scripts.errors import InputError
from scripts.inferers import LargestWindowInferer, MixedPrecisionInferer
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


def test_unknown_precision():
    with pytest.raises(InputError, match="precision must be 'auto', 'fp32' or 'bf16', got 'fp16'"):
        MixedPrecisionInferer(SimpleInferer(), "fp16")


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
