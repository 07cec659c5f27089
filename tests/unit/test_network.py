import warnings

import pytest
import torch
from helpers import PAPER, ROOT
from torch import nn

from scripts.network import SkipDenseSeg, Upsampling


@pytest.mark.parametrize(("arguments", "parameters"), [({}, 466_320), (PAPER, 1_552_256)])
def test_published_number_of_parameters(arguments, parameters):
    assert sum(p.numel() for p in SkipDenseSeg(**arguments).parameters()) == parameters


def test_paper_variant_has_the_names_and_shapes_of_the_published_checkpoint():
    lines = (ROOT / "tests/data/checkpoint_keys.tsv").read_text().splitlines()
    published = dict(line.split("\t") for line in lines)
    state = {name: str(tuple(tensor.shape)) for name, tensor in SkipDenseSeg(**PAPER).state_dict().items()}
    assert state == published


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({}, (1, 2, 64, 64, 64)),
        ({}, (3, 2, 4, 20, 36)),
        (PAPER, (2, 2, 16, 32, 48)),
        ({"in_channels": 1, "out_channels": 2, "block_config": (2,)}, (1, 1, 6, 2, 10)),
    ],
)
def test_logits_for_each_voxel(arguments, shape):
    network = SkipDenseSeg(**arguments).eval()
    with torch.no_grad():
        logits = network(torch.randn(shape))
    assert logits.shape == (shape[0], arguments.get("out_channels", 4), *shape[2:])


@pytest.mark.parametrize(("arguments", "stride"), [({}, 4), (PAPER, 16)])
def test_other_sizes_are_refused_with_those_it_takes(arguments, stride):
    network = SkipDenseSeg(**arguments)
    assert network.stride == stride
    with pytest.raises(ValueError, match=f"multiples of {stride}, got 32 x {16 + stride // 2} x 32"):
        network(torch.zeros(1, 2, 32, 16 + stride // 2, 32))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("scale", [2, 4, 8, 16])
def test_upsampling_and_its_gradients_are_those_of_the_transposed_convolution(scale, groups):
    torch.manual_seed(scale)
    upsampling = Upsampling(12, 4, scale, groups).double()
    found = []
    for call in (upsampling.forward, lambda image: nn.ConvTranspose3d.forward(upsampling, image)):
        upsampling.zero_grad()
        torch.manual_seed(0)
        image = torch.randn(2, 12, 3, 1, 5, dtype=torch.double, requires_grad=True)
        result = call(image)
        (result * torch.randn(result.shape, dtype=torch.double)).sum().backward()
        found.append((result, image.grad, upsampling.weight.grad))
    assert found[0][0].shape == (2, 4, 3 * scale, scale, 5 * scale)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("arguments", [{}, PAPER])
def test_scripted_network_gives_the_same_logits(arguments):
    network = SkipDenseSeg(**arguments).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch deprecates TorchScript as a whole
        scripted = torch.jit.script(network)
    image = torch.randn(1, 2, 32, 16, 48)
    with torch.no_grad():
        torch.testing.assert_close(scripted(image), network(image))


def test_initialisation():
    network = SkipDenseSeg()
    assert torch.equal(network.bn_class.weight, torch.ones(40))
    assert torch.equal(network.bn_class.bias, torch.zeros(40))
    # Kaiming normal: variance 2 / (input channels x kernel volume)
    assert network.features.conv1.weight.std().item() == pytest.approx((2 / (32 * 27)) ** 0.5, rel=0.05)


def test_each_part_of_the_figure_reaches_the_logits():
    network = SkipDenseSeg(**PAPER)
    network(torch.randn(1, 2, 32, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
