import copy
import inspect
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, save_volume
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from scipy.stats import rankdata
from torch import nn

from scripts.errors import InputError
from scripts.inference.averaging import AveragingInferer, with_dropout
from scripts.inference.precision import MixedPrecisionInferer
from scripts.network import SkipDenseSeg
from scripts.results.probabilities import PredictiveEntropyd, Probabilitiesd
from scripts.segment import segment
from scripts.synthesis.contrast import T1_CONTRAST, T2_CONTRAST, six_month_image
from scripts.synthesis.phantom_brains import label_map

FP32 = MixedPrecisionInferer(SimpleInferer(), "fp32")
LAS = np.diag([-1.0, 1.0, 1.0, 1.0])


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


@pytest.mark.parametrize(
    "without",
    [nn.Conv3d(2, 4, 1), SkipDenseSeg(dropout_prob=0), lambda image: image],
    ids=["layer", "rate 0", "function"],
)
def test_network_without_dropout(without, image):
    with pytest.raises(InputError, match="--uncertainty dropout: this network has no dropout; use flips"):
        AveragingInferer(FP32, "given.pt", uncertainty="dropout")(image, without)


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


def run(data, output, **settings) -> ConfigWorkflow:
    workflow = ConfigWorkflow(
        str(ROOT / "configs" / "inference.json"), workflow_type="infer", logging_file=False, bundle_root=str(ROOT),
        dataset_dir=str(data), output_dir=str(output), patch_size=[32, 32, 32], **settings,
    )  # fmt: skip
    workflow.initialize()
    workflow.run()
    return workflow


@pytest.fixture
def scan(brains, tmp_path):
    """A part of a brain, its axes turned, in voxels of 1 x 1 x 0.5 mm, with a fourth axis of length 1."""
    affine = np.array([[0, 1.0, 0, 0], [0, 0, -1.0, 0], [0.5, 0, 0, 0], [0, 0, 0, 1]])
    for kind in ("T1", "T2"):
        stored = np.repeat(brains[0][kind][14:46, :40, 16:48], 2, axis=2).transpose(2, 0, 1)
        save_volume(tmp_path / "data" / f"subject-3-{kind}.nii.gz", stored[..., None], affine)
    return tmp_path / "data"


def test_files_on_the_grid_of_the_t1(scan, tmp_path, capsys):
    """Windows, an average of checkpoints, and a grid that isn't the network's, all at once."""
    checkpoints = [str(ROOT / "models" / "model.pt")] * 2
    output = tmp_path / "out"
    run(
        scan, output, probabilities=True, uncertainty="dropout", dropout_samples=2, window_size=[32, 32, 32],
        checkpoints=checkpoints,
    )  # fmt: skip
    told = capsys.readouterr().out
    assert f"probabilities: {output}\n" in told
    assert f"uncertainty: {output}\n" in told
    t1 = nib.load(scan / "subject-3-T1.nii.gz")
    brain = np.asarray(t1.dataobj) > 0
    names = [*(f"probability-{tissue}" for tissue in ("csf", "gm", "wm")), "uncertainty"]
    *probabilities, uncertainty = (_written(output / f"subject-3-{name}.nii.gz", t1) for name in names)
    label = np.asarray(nib.load(output / "subject-3-label.nii.gz").dataobj)
    for values in (*probabilities, uncertainty):
        assert values.min() >= 0
        assert values.max() <= 1
        assert not values[~brain].any()
    all_four = np.stack([1 - np.sum(probabilities, axis=0), *probabilities])
    assert all_four.min() >= -1e-6
    np.testing.assert_array_equal(all_four.argmax(0), label)
    entropy = -np.sum(all_four * np.log(np.maximum(all_four, 1e-30)), axis=0) / np.log(4)
    np.testing.assert_allclose(uncertainty, entropy, atol=1e-4)


def _written(path, t1) -> np.ndarray:
    image = nib.load(path)
    assert image.shape == t1.shape
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(image.affine, t1.affine)
    return np.asarray(image.dataobj)


def test_nothing_is_made_unasked_and_the_label_stays(scan, tmp_path):
    plain = run(scan, tmp_path / "plain")
    assert set(plain.evaluator.state.output[0]) == {"image", "label", "pred"}
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert names == {
        "subject-3-label.nii.gz",
        "subject-3-label.png",
        "volumes.csv",
        "report.html",
        "inference-provenance.json",
    }
    asked = run(scan, tmp_path / "asked", probabilities=True, uncertainty="network")
    assert torch.equal(asked.evaluator.state.output[0]["pred"], plain.evaluator.state.output[0]["pred"])
    added = {path.name for path in (tmp_path / "asked").iterdir()} - names
    assert added == {
        f"subject-3-{name}.nii.gz" for name in ("probability-csf", "probability-gm", "probability-wm", "uncertainty")
    }


def test_probabilities_that_are_neither_true_nor_false(scan, tmp_path):
    with pytest.raises(RuntimeError) as caught:  # MONAI wraps what its components raise
        run(scan, tmp_path / "out", probabilities="false")
    assert "--probabilities false: must be True or False" in str(caught.value.__cause__)
    assert not (tmp_path / "out").exists()


def area_under_curve(uncertainty: np.ndarray, wrong: np.ndarray) -> float:
    """The chance that a voxel labelled wrongly has a higher uncertainty than one labelled rightly."""
    ranks, number = rankdata(uncertainty), np.count_nonzero(wrong)
    return (ranks[wrong].sum() - number * (number + 1) / 2) / (number * (wrong.size - number))


def assert_higher_where_wrong(
    uncertainty: np.ndarray, label: np.ndarray, truth: np.ndarray, ratio: float, area: float
) -> None:
    brain = truth > 0
    uncertainty, wrong = uncertainty[brain], (label != truth)[brain]
    assert 0.01 < wrong.mean() < 0.3
    assert uncertainty[wrong].mean() > ratio * uncertainty[~wrong].mean()
    found = area_under_curve(uncertainty, wrong)
    print(f"area under the curve: {found:.3f}")
    assert found > area


def test_area_under_curve():
    assert area_under_curve(np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])) == 1
    assert area_under_curve(np.array([0.1, 0.9, 0.5, 0.5]), np.array([True, True, False, False])) == 0.5


def test_uncertainty_is_higher_where_the_label_is_wrong(brains):
    """Shrunk brains are labelled worse than those that the weights were trained on."""
    result = segment(brains[0]["T1"], brains[0]["T2"], LAS, uncertainty="network")
    assert_higher_where_wrong(result.uncertainty, result.label, brains[0]["label"], ratio=1.2, area=0.6)


@pytest.mark.slow
@pytest.mark.parametrize(("uncertainty", "ratio", "area"), [("flips", 2, 0.8), ("dropout", 1.7, 0.75)])
def test_uncertainty_is_higher_where_the_label_of_a_phantom_is_wrong(uncertainty, ratio, area):
    """The weights included were trained without dropout, so that tells less."""
    rng = np.random.default_rng([0, 1])
    label = label_map(rng)
    t1, t2 = (six_month_image(label, contrast, rng) for contrast in (T1_CONTRAST, T2_CONTRAST))
    result = segment(t1, t2, LAS, uncertainty=uncertainty, dropout_samples=4)
    assert_higher_where_wrong(result.uncertainty, result.label, label, ratio, area)


def test_page_states_the_number_of_dropout_samples_that_is_used():
    samples = ConfigParser.load_config_file(ROOT / "configs" / "inference.json")["dropout_samples"]
    assert f"`dropout_samples` ({samples})" in (ROOT / "docs" / "probabilities_and_uncertainty.md").read_text()
    assert inspect.signature(AveragingInferer).parameters["dropout_samples"].default == samples
