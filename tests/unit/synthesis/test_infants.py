"""Images drawn from structures: within their ranges, like a whole brain's, new each time."""

import numpy as np
import pytest
import torch

from scripts.data.structures import IN_HINDBRAIN
from scripts.data.transforms import NormalizeByT1Maskd
from scripts.errors import InputError
from scripts.synthesis.infants import CSF_SHARE, VOLUME, draw_scan, draw_shape, infant_subject
from scripts.synthesis.structures import StructureMap, read_structure_map
from scripts.synthesis.transforms import RandInfantPatchd
from scripts.tissues import Tissue


@pytest.fixture(scope="module")
def source(heads_dir) -> StructureMap:
    return read_structure_map(heads_dir / "A.nii.gz")


@pytest.fixture
def small(monkeypatch):
    """Brains as small as the map, for speed."""
    monkeypatch.setattr("scripts.synthesis.infants.VOLUME", (70, 90))


@pytest.fixture(scope="module")
def patches(source):
    shapes = [draw_shape(source, np.random.default_rng(seed), (24, 24, 24)) for seed in range(30)]
    return [(shape, draw_scan(shape, np.random.default_rng(seed))) for seed, shape in enumerate(shapes)]


def test_voxels_have_shares_of_tissues_and_the_largest_is_the_label(patches):
    partial = 0
    for shape, _ in patches:
        assert shape.shares.sum(0).numpy() == pytest.approx(1)
        assert shape.shares.min() >= 0
        inside = shape.outside < 0
        assert torch.equal(shape.label[inside], (shape.shares.argmax(0) + 1).to(torch.uint8)[inside])
        assert not shape.label[~inside].any()
        partial += int(((shape.shares.amax(0) < 0.9) & inside).sum())
    assert partial > 1000


def test_scan_is_above_0_inside_its_mask_and_the_label_has_no_voxel_outside(patches):
    for _, scan in patches:
        mask = scan.image[0] > 0
        assert torch.equal(mask, scan.image[1] > 0)
        assert not scan.label[~mask].any()
        assert scan.image.isfinite().all()
    # some masks are too wide and some too tight
    wide = [bool((scan.image[0] > 0)[shape.outside > 1].any()) for shape, scan in patches]
    tight = [bool((scan.image[0] == 0)[shape.outside < -1].any()) for shape, scan in patches]
    assert 0 < sum(wide) < len(patches)
    assert 0 < sum(tight) < len(patches)


def test_contrast_has_either_sign_and_differs_between_t1_and_t2(patches):
    signs = []
    for _, scan in patches:
        gm, wm = (scan.label == tissue for tissue in (Tissue.GM, Tissue.WM))
        if gm.sum() > 100 and wm.sum() > 100:
            signs.append([bool(channel[wm].mean() > channel[gm].mean()) for channel in scan.image])
    assert {tuple(sign) for sign in signs} == {(False, False), (False, True), (True, False), (True, True)}


def test_whole_brains_have_the_shares_and_sizes_of_infants(source, monkeypatch):
    monkeypatch.setattr("scripts.synthesis.infants.VOLUME", (70, 90))
    shares, volumes = [], []
    for seed in range(8):
        label = draw_shape(source, np.random.default_rng(seed)).label
        volumes.append(int((label > 0).sum()) / 1000)
        shares.append(float((label == Tissue.CSF).sum() / (label > 0).sum()))
    assert min(volumes) < 75  # without hindbrain
    assert max(volumes) < 110
    assert CSF_SHARE[0] - 0.08 < np.mean(shares) < CSF_SHARE[1] + 0.08
    assert np.ptp(shares) > 0.05
    assert VOLUME[0] > 400


def test_half_of_the_brains_have_no_hindbrain(source, small):
    without = [draw_shape(source, np.random.default_rng(seed)).sizes[IN_HINDBRAIN].sum() == 0 for seed in range(12)]
    assert 2 < sum(without) < 10


def test_patch_is_normalised_about_as_a_whole_brain(source, small):
    spreads, means = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        scan = draw_scan(draw_shape(source, rng), rng)
        inside = scan.image[0] > 0
        image = scan.normalized()
        means.append(image[:, inside].mean(1).numpy())
        spreads.append(image[:, inside].std(1).numpy())
    assert np.abs(np.mean(means)) < 0.4
    assert 0.7 < np.mean(spreads) < 1.4


def test_same_seed_same_subject_and_other_seed_another(source, small):
    first, again, other = (infant_subject(source, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(first[kind], again[kind]) for kind in first)
    assert first["T1"].shape != other["T1"].shape or not np.array_equal(first["T1"], other["T1"])
    assert np.array_equal(first["T1"] > 0, first["T2"] > 0)
    image = torch.from_numpy(np.stack([first["T1"], first["T2"]]).astype(np.float32))
    assert NormalizeByT1Maskd("image")({"image": image})["image"].isfinite().all()
    assert set(np.unique(first["label"])) == {0, *Tissue}


def test_transform_replaces_image_and_label_as_often_as_it_was_told(heads_dir):
    item = {"image": torch.zeros(2, 16, 16, 16), "label": torch.zeros(1, 16, 16, 16, dtype=torch.uint8), "other": 1}
    transform = RandInfantPatchd(str(heads_dir), prob=0.5).set_random_state(0)
    results = [transform(item) for _ in range(40)]
    replaced = [result for result in results if result["image"].any()]
    assert 8 < len(replaced) < 32
    for result in replaced:
        assert result["image"].shape == (2, 16, 16, 16)
        assert result["image"].dtype == torch.float32
        assert result["label"].shape == (1, 16, 16, 16)
        assert result["label"].dtype == torch.uint8
        assert result["other"] == 1
    assert any(result["label"].any() for result in replaced)
    assert not item["image"].any()
    assert not torch.equal(replaced[0]["image"], replaced[1]["image"])


def test_transform_takes_the_maps_that_are_named(heads_dir):
    assert len(RandInfantPatchd(str(heads_dir), names=["A", "C"])._maps) == 2
    with pytest.raises(InputError, match=r"--heads D: no such label map in .*; it has A, B, C"):
        RandInfantPatchd(str(heads_dir), names=["D"])


@pytest.mark.parametrize("share", [1.5, -0.1, "half", True])
def test_share_that_can_not_be(heads_dir, share):
    with pytest.raises(InputError, match=f"--infant_share {share}: must be a number from 0 to 1"):
        RandInfantPatchd(str(heads_dir), prob=share)
