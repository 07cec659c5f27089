import nibabel as nib
import numpy as np
import pytest

from scripts.commands.robustness import CONDITIONS, _summary, robustness, synthetic_scan
from scripts.errors import InputError
from scripts.results.metrics import tissue_dice
from scripts.synthesis.contrast import histogram_overlap
from scripts.synthesis.label_maps import LabelMap


@pytest.fixture
def brain(brains) -> LabelMap:
    return LabelMap("A", brains[0]["label"][::-1].copy(), np.eye(4))


def images(brain: LabelMap, title: str) -> dict[str, np.ndarray]:
    scanned = synthetic_scan(brain, CONDITIONS[title], np.random.default_rng(0))
    return {kind: np.asarray(image.dataobj) for kind, image in scanned.items()}


@pytest.mark.parametrize("title", CONDITIONS)
def test_scan_has_a_brain_where_its_label_has_one(brain, title):
    scanned = images(brain, title)
    assert set(np.unique(scanned["label"])) == {0, 1, 2, 3}
    assert np.array_equal(scanned["T1"] > 0, scanned["label"] > 0)
    assert np.array_equal(scanned["T2"] > 0, scanned["label"] > 0)


def test_conditions_are_what_they_say(brain):
    usual = images(brain, "nominal")
    inside = usual["T1"] > 20
    np.testing.assert_allclose(images(brain, "gain x 2")["T1"][inside], 2 * usual["T1"][inside])
    noisy = images(brain, "noise x 2")
    gm, wm = (usual["label"] == tissue for tissue in (2, 3))
    assert noisy["T1"][gm].std() > 1.1 * usual["T1"][gm].std()
    assert histogram_overlap(noisy["T1"][gm], noisy["T1"][wm]) > histogram_overlap(usual["T1"][gm], usual["T1"][wm])
    # the same noise is drawn, so what differs is the field
    field = images(brain, "bias field x 2")["T1"][inside] / usual["T1"][inside]
    assert field.std() > 0.005
    volume = np.count_nonzero(inside)
    for side in (0.8, 1.5):
        image = synthetic_scan(brain, CONDITIONS[f"voxels of {side} mm"], np.random.default_rng(0))["label"]
        assert nib.affines.voxel_sizes(image.affine) == pytest.approx(side)
        assert np.count_nonzero(image.dataobj) * side**3 == pytest.approx(volume, rel=0.03)
    for title in ("nodding", "tilted", "turned"):
        label = images(brain, f"{title} by 15 degrees")["label"]
        assert np.count_nonzero(label) == pytest.approx(volume, rel=0.01)
        margin = [(a - b) // 2 for a, b in zip(label.shape, usual["label"].shape, strict=True)]
        box = tuple(slice(m, m + n) for m, n in zip(margin, usual["label"].shape, strict=True))
        assert 0.3 < tissue_dice(label[box], usual["label"])["mean"] < 0.95


def test_mean_and_worst_of_two_brains():
    rows = [{"condition": "c", "brain": b, "csf": m, "gm": m, "wm": m, "mean": m} for b, m in (("A", 0.9), ("B", 0.5))]
    assert _summary(rows) == [
        {"condition": "c", "CSF": "70.0", "GM": "70.0", "WM": "70.0", "mean": "70.0", "worst": "50.0"}
    ]


def test_name_without_label_map(brain, tmp_path):
    nib.save(nib.Nifti1Image(brain.label, brain.affine), tmp_path / "A.nii.gz")
    for names in ("B", ["A", "B"]):
        with pytest.raises(InputError, match=r"--names B: no such label map in .*; it has A"):
            robustness(str(tmp_path), str(tmp_path / "out"), names=names)
    assert not (tmp_path / "out").exists()
