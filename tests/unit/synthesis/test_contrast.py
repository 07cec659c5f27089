import numpy as np
import pytest
import torch
from scipy.ndimage import center_of_mass

from scripts.data.transforms import NormalizeByT1Maskd
from scripts.errors import InputError
from scripts.synthesis.contrast import (
    APPEARANCES,
    RandSixMonthImaged,
    nominal,
    normalized_patch,
    patchwork,
    six_month_subject,
    varied,
)
from scripts.tissues import Tissue


@pytest.fixture
def label(brains) -> np.ndarray:
    """A small phantom brain, axes to the right, the front and the top."""
    return brains[0]["label"][::-1].copy()


def contrast(image: np.ndarray, label: np.ndarray, where: np.ndarray) -> float:
    """How much brighter WM is than GM in a part of the brain."""
    return float(image[where & (label == Tissue.WM)].mean() - image[where & (label == Tissue.GM)].mean())


def test_centre_is_more_myelinated_than_the_poles(label):
    rng = np.random.default_rng(1)
    look = nominal(label, rng)
    white = label == Tissue.WM
    assert look.myelination[white].mean() == pytest.approx(1, abs=0.01)
    y = np.indices(label.shape)[1] - center_of_mass(label > 0)[1]
    centre, front = (look.myelination[white & place].mean() for place in (np.abs(y + 3) < 3, y > 20))
    assert centre > front + 0.3


def test_varied_contrasts_differ_in_strength_place_and_sign(label):
    means, spreads = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        look = varied(label, rng)
        strength = look.myelination[label == Tissue.WM] * look.t1.wm_sign
        means.append(strength.mean())
        spreads.append(strength.std())
    assert min(means) < 0 < max(means)
    assert np.std(spreads) > 0.03
    assert max(spreads) > 0.3


def test_patchwork_reverses_the_contrast_of_a_part_and_not_of_all(label):
    rng = np.random.default_rng(2)
    look = patchwork(label, rng)
    image = six_month_subject(label, look, rng)["T1"]
    assert contrast(image, label, look.myelination > 0.5) > 0 > contrast(image, label, look.myelination < -0.5)
    assert 0.1 < np.mean(look.myelination[label == Tissue.WM] < 0) < 0.6


@pytest.mark.parametrize("name", APPEARANCES)
def test_same_seed_same_images_and_other_seed_others(label, name):
    def draw(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return six_month_subject(label, APPEARANCES[name](label, rng), rng)["T2"]

    first = draw(3)
    assert np.array_equal(first, draw(3))
    assert np.mean(first != draw(4)) > 0.1


def test_a_patch_is_normalised_about_as_a_whole_brain_would_be(label):
    patches = [normalized_patch(label[4:36, 8:40, 12:44], np.random.default_rng(seed)) for seed in range(8)]
    inside = label[4:36, 8:40, 12:44] > 0
    values = np.concatenate([patch[:, inside] for patch in patches], axis=1)
    assert abs(values.mean()) < 0.5
    assert 0.6 < values.std() < 1.5
    # outside the brain it is as dark as there in a scan
    whole = six_month_subject(label, nominal(label, rng := np.random.default_rng(0)), rng)
    image = torch.from_numpy(np.stack([whole["T1"], whole["T2"]]).astype(np.float32))
    darkest = NormalizeByT1Maskd("image")({"image": image})["image"].amin(dim=(1, 2, 3)).numpy()
    outside = np.stack([patch[:, ~inside][:, 0] for patch in patches])
    assert (outside.min(0) < darkest).all()
    assert (darkest < outside.max(0)).all()


def test_patch_without_brain_is_background(label):
    patch = normalized_patch(np.zeros((16, 16, 16), dtype=np.uint8), np.random.default_rng(0))
    assert np.isfinite(patch).all()
    assert all(len(np.unique(channel)) == 1 for channel in patch)


def test_transform_replaces_as_many_patches_as_it_was_told_and_never_the_label(label):
    item = {
        "image": torch.zeros(2, 16, 16, 16),
        "label": torch.from_numpy(label[20:36, 20:36, 20:36])[None],
    }
    transform = RandSixMonthImaged("image", prob=0.5).set_random_state(0)
    results = [transform(item) for _ in range(60)]
    replaced = [result["image"] for result in results if result["image"].any()]
    assert 15 < len(replaced) < 45
    assert replaced[0].shape == (2, 16, 16, 16)
    assert replaced[0].dtype == torch.float32
    assert not torch.equal(replaced[0], replaced[1])
    assert not item["image"].any()
    assert all(torch.equal(result["label"], item["label"]) for result in results)
    assert not any(RandSixMonthImaged("image", prob=0.0)(item)["image"].any() for _ in range(5))


@pytest.mark.parametrize("share", [1.5, -0.1, "half", True])
def test_share_that_can_not_be(share):
    with pytest.raises(InputError, match=f"--synthetic_share {share}: must be a number from 0 to 1"):
        RandSixMonthImaged("image", prob=share)
