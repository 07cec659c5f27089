import itertools

import pytest
import torch
from monai.inferers import SimpleInferer

from scripts.errors import InputError
from scripts.inference import averaging
from scripts.inference.averaging import AveragingInferer
from scripts.inference.precision import MixedPrecisionInferer
from scripts.network import SkipDenseSeg

FP32 = MixedPrecisionInferer(SimpleInferer(), "fp32")


@pytest.fixture
def checkpoints(tmp_path):
    """Two checkpoints, and their networks."""
    networks = []
    for fold in (1, 2):
        torch.manual_seed(fold)
        network = SkipDenseSeg()
        network(torch.randn(2, 2, 16, 16, 16))
        (tmp_path / f"fold-{fold}").mkdir()
        torch.save(network.state_dict(), tmp_path / f"fold-{fold}" / "model.pt")
        networks.append(network.eval())
    return str(tmp_path / "fold-*" / "model.pt"), networks


@pytest.mark.parametrize("flips", [False, True])
def test_average_of_networks_and_mirror_images(network, checkpoints, flips):
    pattern, members = checkpoints
    image = torch.randn(1, 2, 8, 12, 16)
    mirrors = [axes for n in range(4) for axes in itertools.combinations((2, 3, 4), n)] if flips else [()]
    with torch.no_grad():
        each = [m(image.flip(axes)).flip(axes).softmax(1) for m in members for axes in mirrors]
        logits = AveragingInferer(FP32, pattern, flips)(image, network)
    assert len(each) == (16 if flips else 2)
    assert logits.dtype == torch.float32
    mean = torch.stack(each).mean(0)
    torch.testing.assert_close(logits.softmax(1), mean, rtol=1e-3, atol=1e-5)
    # the network that is given only says the architecture, and no one of them is the average
    for other in (network, *members):
        assert (other(image).softmax(1) - mean).abs().max() > 0.01


@pytest.mark.parametrize("axes", [(2,), (3, 4), (2, 3, 4)])
def test_mirrored_image_gives_the_mirrored_logits(network, axes):
    image = torch.randn(1, 2, 8, 12, 16)
    inferer = AveragingInferer(FP32, "given.pt", flips=True)
    with torch.no_grad():
        assert torch.equal(inferer(image.flip(axes), network).flip(axes), inferer(image, network))
        assert not torch.equal(FP32(image.flip(axes), network).flip(axes), FP32(image, network))


def test_one_checkpoint_without_flips_changes_nothing(network, tmp_path):
    image = torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        logits = AveragingInferer(FP32, str(tmp_path / "missing.pt"))(image, network)
        assert torch.equal(logits, FP32(image, network))


def test_checkpoints_are_loaded_once(network, checkpoints, monkeypatch):
    inferer = AveragingInferer(FP32, checkpoints[0])
    image = torch.randn(1, 2, 16, 16, 16)
    with torch.no_grad():
        first = inferer(image, network)
        monkeypatch.setattr(averaging, "load_weights", lambda *_: pytest.fail("loaded twice"))
        assert torch.equal(inferer(image, network), first)


def test_averaged_logits_are_finite():
    sure = AveragingInferer(SimpleInferer(), "given.pt", flips=True)(torch.randn(1, 4, 4, 4, 4), lambda x: x * 1e4)
    assert sure.isfinite().all()


def test_second_checkpoint_that_can_not_be_used(network, checkpoints, tmp_path):
    first, image = str(tmp_path / "fold-1" / "model.pt"), torch.randn(1, 2, 16, 16, 16)
    with pytest.raises(InputError, match=r"fold-3/model.pt: no such checkpoint"):
        AveragingInferer(FP32, [first, str(tmp_path / "fold-3" / "model.pt")])(image, network)
    torch.save(SkipDenseSeg(growth_rate=8).state_dict(), tmp_path / "fold-2" / "model.pt")
    with pytest.raises(InputError, match=r"fold-2/model.pt: a checkpoint of another network"):
        AveragingInferer(FP32, checkpoints[0])(image, network)


def test_flips_that_are_neither_true_nor_false():
    with pytest.raises(InputError, match="--flips false: must be True or False"):
        AveragingInferer(FP32, "given.pt", flips="false")
