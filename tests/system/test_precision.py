"""The precisions that are chosen label and train as plain float32 does."""

import numpy as np
import pytest
import torch
from helpers import ROOT
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.metrics import compute_dice
from monai.networks import one_hot

from scripts.inference.precision import MixedPrecisionInferer, fuse_batch_norms, network_precision
from scripts.inference.windows import LargestWindowInferer
from scripts.network import SkipDenseSeg
from scripts.synthesis.contrast import T1_CONTRAST, T2_CONTRAST, nominal, six_month_image, six_month_subject
from scripts.synthesis.label_maps import read_label_map
from scripts.synthesis.phantom_brains import label_map
from scripts.weights import load_weights

LABEL_MAPS = ROOT.parent / "shared" / "data" / "anatomies"
# elsewhere bfloat16 is computed by slow emulation, which nobody is given unasked
BF16_IN_HARDWARE = pytest.mark.skipif(
    network_precision(torch.device("cpu"), "auto") != torch.bfloat16, reason="no bfloat16 in this processor"
)


def in_its_box(image, label):
    """Normalised image (1, 2, X, Y, Z) and label (X, Y, Z) of a brain's box, whose sides are multiples of 16."""
    brain = image[0] > 0
    mean, deviation = (
        statistic[:, None, None, None] for statistic in (image[:, brain].mean(1), image[:, brain].std(1))
    )
    start = [int(axis.min()) // 16 * 16 for axis in np.nonzero(label)]
    stop = [-(-int(axis.max() + 1) // 16) * 16 for axis in np.nonzero(label)]
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    image = torch.from_numpy(((image - mean) / deviation)[(slice(None), *box)]).float()
    return image[None], torch.from_numpy(label[box])


@pytest.fixture(scope="module")
def phantom_brain():
    rng = np.random.default_rng([3, 1])
    label = label_map(rng)
    return in_its_box(
        np.stack([six_month_image(label, contrast, rng) for contrast in (T1_CONTRAST, T2_CONTRAST)]), label
    )


@pytest.fixture(scope="module", params=[13, 14])
def synthetic_brain(request):
    """A scan as the weights included were trained on, of a brain that they weren't."""
    path = LABEL_MAPS / f"anatomy-{request.param}.nii.gz"
    if not path.exists():
        pytest.skip("the label maps of real brains aren't here")
    label, rng = read_label_map(path).label, np.random.default_rng(request.param)
    volumes = six_month_subject(label, nominal(label, rng), rng)
    return in_its_box(np.stack([volumes["T1"], volumes["T2"]]).astype(np.float32), label)


@pytest.fixture(scope="module")
def trained_network():
    network = SkipDenseSeg()
    load_weights(network, str(ROOT / "models" / "model.pt"))
    return network.eval()


PRECISIONS_HERE = ["fp32", pytest.param("bf16", marks=BF16_IN_HARDWARE)]


def mean_dice(labels, truth):
    pair = [one_hot(x[None, None].long(), 4) for x in (labels, truth)]
    return float(compute_dice(*pair, include_background=False).mean())


def require_labels_of_plain_float32(image, truth, network, precision, least):
    with torch.inference_mode():
        probabilities = network(image).softmax(1)[0]
        ours = MixedPrecisionInferer(LargestWindowInferer(), precision)(image, network).argmax(1)[0]
    brain, plain = truth > 0, probabilities.argmax(0)
    first, second = probabilities.topk(2, dim=0).values
    same, sure = plain == ours, brain & (first - second > 0.05)
    assert same[brain].float().mean() >= least
    # near ties alone may be decided otherwise
    assert sure.sum() > 0.98 * brain.sum()
    assert same[sure].float().mean() >= 0.9999
    assert mean_dice(ours, truth) == pytest.approx(mean_dice(plain, truth), abs=0.002)
    assert mean_dice(plain, truth) > 0.8


@pytest.mark.parametrize(
    # trained on other brains, the network is less sure of a phantom, so there are more near ties
    ("precision", "least"), [("fp32", 0.9999), pytest.param("bf16", 0.9984, marks=BF16_IN_HARDWARE)],
)  # fmt: skip
def test_trained_network_labels_a_phantom_as_in_plain_float32(phantom_brain, trained_network, precision, least):
    require_labels_of_plain_float32(*phantom_brain, trained_network, precision, least)


@BF16_IN_HARDWARE
def test_trained_network_labels_a_brain_as_in_plain_float32(synthetic_brain, trained_network):
    require_labels_of_plain_float32(*synthetic_brain, trained_network, "bf16", 0.9991)


@pytest.mark.slow
def test_one_pass_is_as_good_as_overlapping_windows(synthetic_brain, trained_network):
    image, truth = synthetic_brain
    with torch.inference_mode():
        ours, windows = (
            MixedPrecisionInferer(inferer)(image, trained_network).argmax(1)[0]
            for inferer in (LargestWindowInferer(), SlidingWindowInferer([64, 64, 64], overlap=0.5, mode="gaussian"))
        )
    assert mean_dice(ours, truth) == pytest.approx(mean_dice(windows, truth), abs=0.002)
    assert mean_dice(ours, truth) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS_HERE)
def test_training_loss_as_in_plain_float32(phantom_brain, precision):
    image, truth = phantom_brain

    def losses(inferer):
        torch.manual_seed(0)
        network = SkipDenseSeg(dropout_prob=0.0).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        rng, found = np.random.default_rng(0), []
        for _ in range(30):
            at = tuple(slice(start, start + 32) for start in (rng.integers(0, n - 31) for n in truth.shape))
            loss = torch.nn.functional.cross_entropy(inferer(image[(..., *at)], network), truth[at][None].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    plain, ours = losses(SimpleInferer()), losses(MixedPrecisionInferer(SimpleInferer(), precision))
    assert np.mean(plain[-10:]) < 0.8 * np.mean(plain[:5])
    assert np.mean(ours[-10:]) == pytest.approx(np.mean(plain[-10:]), rel=0.05)


def test_bfloat16_holds_the_biases_of_fused_batch_norms(trained_network):
    convolutions = [
        m for m in fuse_batch_norms(trained_network).modules() if isinstance(m, torch.nn.Conv3d) and m.bias is not None
    ]
    assert len(convolutions) == 11
    for convolution in convolutions:
        assert torch.equal(convolution.bias.bfloat16().float(), convolution.bias)
    image = torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            fuse_batch_norms(trained_network)(image), trained_network(image), rtol=1e-4, atol=1e-4
        )
