"""Probabilities and uncertainty that the command writes."""

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT, configured, refused_run, save_volume
from scipy.stats import rankdata

from scripts.segment import segment
from scripts.synthesis.contrast import T1_CONTRAST, T2_CONTRAST, six_month_image
from scripts.synthesis.phantom_brains import label_map

LAS = np.diag([-1.0, 1.0, 1.0, 1.0])


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
    settings = {"probabilities": True, "uncertainty": "dropout", "dropout_samples": 2, "window_size": [32, 32, 32]}
    configured(scan, output, checkpoints=checkpoints, **settings).run()
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
    plain, asked = (
        configured(scan, tmp_path / name, **settings)
        for name, settings in (("plain", {}), ("asked", {"probabilities": True, "uncertainty": "network"}))
    )
    plain.run()
    assert set(plain.evaluator.state.output[0]) == {"image", "label", "pred"}
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    of_a_run = {"volumes.csv", "report.html", "inference-provenance.json"}
    assert names == {"subject-3-label.nii.gz", "subject-3-label.png", *of_a_run}
    asked.run()
    assert torch.equal(asked.evaluator.state.output[0]["pred"], plain.evaluator.state.output[0]["pred"])
    added = {path.name for path in (tmp_path / "asked").iterdir()} - names
    assert added == {
        f"subject-3-{name}.nii.gz" for name in ("probability-csf", "probability-gm", "probability-wm", "uncertainty")
    }


def test_probabilities_that_are_neither_true_nor_false(scan, tmp_path):
    assert "--probabilities false: must be True or False" in refused_run(scan, tmp_path / "out", probabilities="false")
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
@pytest.mark.parametrize(("uncertainty", "ratio", "area"), [("flips", 1.6, 0.7), ("dropout", 1.3, 0.65)])
def test_uncertainty_is_higher_where_the_label_of_a_phantom_is_wrong(uncertainty, ratio, area):
    """The weights included were trained without dropout, so that tells less."""
    rng = np.random.default_rng([0, 1])
    label = label_map(rng)
    t1, t2 = (six_month_image(label, contrast, rng) for contrast in (T1_CONTRAST, T2_CONTRAST))
    result = segment(t1, t2, LAS, uncertainty=uncertainty, dropout_samples=4)
    assert_higher_where_wrong(result.uncertainty, result.label, label, ratio, area)
