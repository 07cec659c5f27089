import copy
import inspect
import re

import numpy as np
import pytest
import torch
from helpers import ROOT
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from torch import nn

from scripts.errors import InputError
from scripts.inference.averaging import AveragingInferer, with_dropout
from scripts.inference.precision import MixedPrecisionInferer
from scripts.network import SkipDenseSeg
from scripts.results.probabilities import PredictiveEntropyd, Probabilitiesd

FP32 = MixedPrecisionInferer(SimpleInferer(), "fp32")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    network = SkipDenseSeg()
    network(torch.randn(2, 2, 16, 16, 16))  # statistics for batch norm
    return network.eval()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(1, 2, 8, 12, 16, generator=torch.Generator().manual_seed(1))


def test_probabilities_and_entropy_by_hand():
    logits = torch.tensor([[0.0, 0, 0, -99, 5], [0, 0, 0, 99, 5], [0, -99, 0, -99, 5], [0, -99, -99, -99, 9]])
    data = {
        "pred": MetaTensor(logits[:, None, None], affine=torch.diag(torch.tensor([2.0, 1, 1, 1]))),
        "t1": MetaTensor(torch.tensor([7.0, 7, 7, 7, 0])[None, None, None]),
    }
    data = PredictiveEntropyd()(Probabilitiesd()(data))
    assert torch.equal(data["pred"][:, 0, 0].as_tensor(), logits)
    expected = torch.tensor([[1 / 4, 1 / 2, 1 / 3, 0, 1], [1 / 4, 1 / 2, 1 / 3, 1, 0], [1 / 4, 0, 1 / 3, 0, 0]])
    torch.testing.assert_close(data["probabilities"][:3, 0, 0].as_tensor(), expected)
    torch.testing.assert_close(data["probabilities"].as_tensor().sum(0), torch.ones(1, 1, 5))
    entropy = torch.tensor([[[[1, 0.5, np.log(3) / np.log(4), 0, 0]]]], dtype=torch.float32)
    torch.testing.assert_close(data["uncertainty"].as_tensor(), entropy)
    for name in ("probabilities", "uncertainty"):
        assert torch.equal(data[name].affine, data["pred"].affine)


def test_only_dropout_is_as_in_training(network):
    changed = with_dropout(network)
    assert not network.training
    assert not any(module.training for module in network.modules())
    training = [module for module in changed.modules() if module.training]
    assert len(training) == 8  # of as many dense layers
    assert all(isinstance(module, nn.Dropout) for module in training)


@pytest.mark.parametrize("without", [nn.Conv3d(2, 4, 1), lambda image: image], ids=["layer", "function"])
def test_network_without_dropout(without, image):
    with pytest.raises(InputError, match="--uncertainty dropout: this network has no dropout; use flips"):
        AveragingInferer(FP32, "given.pt", uncertainty="dropout")(image, without)


@pytest.mark.parametrize(("trained_with", "sampled_with"), [(0.0, 0.2), (0.1, 0.1)])
def test_network_trained_without_dropout_gets_that_of_the_paper(trained_with, sampled_with):
    network = with_dropout(SkipDenseSeg(dropout_prob=trained_with))
    assert {module.p for module in network.modules() if isinstance(module, nn.Dropout)} == {sampled_with}


@pytest.mark.parametrize("members", [1, 2])
def test_mean_over_dropout_samples(network, image, tmp_path, members):
    networks, state = [network], torch.get_rng_state()
    if members == 2:
        networks = [copy.deepcopy(network), SkipDenseSeg().eval()]
        for number, member in enumerate(networks):
            torch.save(member.state_dict(), tmp_path / f"{number}.pt")
    inferer = AveragingInferer(FP32, str(tmp_path / "[01].pt") if members == 2 else "given.pt", False, "dropout", 3, 5)
    with torch.no_grad():
        before = torch.get_rng_state()
        logits = inferer(image, network)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(5)
        samples = [FP32(image, n).softmax(1) for _ in range(3) for n in map(with_dropout, networks)]
        without_dropout = sum(FP32(image, n).softmax(1) for n in networks) / members
    assert (samples[0] - samples[members]).abs().max() > 0.01
    torch.testing.assert_close(logits.softmax(1), sum(samples) / len(samples), rtol=1e-4, atol=1e-6)
    assert (logits.softmax(1) - without_dropout).abs().max() > 0.01
    torch.set_rng_state(state)


def test_same_seed_same_logits(network, image):
    def logits(seed: int) -> torch.Tensor:
        with torch.no_grad():
            return AveragingInferer(FP32, "given.pt", False, "dropout", 1, seed)(image, network)

    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))


def test_flips_or_the_network_alone(network, image):
    with torch.no_grad():
        flipped = AveragingInferer(FP32, "given.pt", flips=True)(image, network)
        assert torch.equal(AveragingInferer(FP32, "given.pt", uncertainty="flips")(image, network), flipped)
        assert torch.equal(
            AveragingInferer(FP32, "given.pt", uncertainty="network")(image, network), FP32(image, network)
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"uncertainty": "mutual"}, "--uncertainty mutual: must be None, network, flips, dropout"),
        ({"uncertainty": True}, "--uncertainty True: must be"),
        ({"dropout_samples": 0}, "--dropout_samples 0: must be a whole number of at least 1"),
        ({"dropout_samples": True}, "--dropout_samples True: must be"),
    ],
)
def test_settings_that_can_not_be(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        AveragingInferer(FP32, "given.pt", **settings)


def test_page_states_the_number_of_dropout_samples_that_is_used():
    samples = ConfigParser.load_config_file(ROOT / "configs" / "inference.json")["dropout_samples"]
    assert f"`dropout_samples` ({samples})" in (ROOT / "docs" / "probabilities_and_uncertainty.md").read_text()
    assert inspect.signature(AveragingInferer).parameters["dropout_samples"].default == samples
