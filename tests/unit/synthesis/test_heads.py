"""Heads of any contrast, from label maps."""

import numpy as np
import pytest
import torch
from helpers import head_of, save_volume, small_brain

from scripts.data.structures import OUTER_LABELS, STRUCTURES
from scripts.errors import InputError
from scripts.synthesis.heads import BONE, CLASSES, FIRST_OUTER, SPINAL, draw_head, read_head_map
from scripts.synthesis.transforms import RandHeadd

SIZE = (32, 40, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    head = head_of(small_brain(1)["label"])
    head[2:4, 2:4, 2:4] = 24  # CSF far from the brain's tissue
    save_volume(folder / "A.nii.gz", head, np.eye(4))
    return folder


def test_classes_of_a_head(folder):
    head = read_head_map(folder / "A.nii.gz")
    found = set(np.unique(head.classes))
    bone = FIRST_OUTER + OUTER_LABELS.index(BONE[0])
    assert {0, 1, bone, SPINAL} <= found
    assert max(found) < CLASSES
    assert np.count_nonzero(head.classes == SPINAL) == 8
    assert ((head.classes[tuple(head.brain.T)] > 0) & (head.classes[tuple(head.brain.T)] <= len(STRUCTURES))).all()


def test_images_and_masks(folder):
    head = read_head_map(folder / "A.nii.gz")
    first, again, *others = (draw_head(head, np.random.default_rng(seed), SIZE) for seed in (0, 0, *range(1, 12)))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    brightness, shares = [], []
    for image, mask in (first, *others):
        assert image.shape == mask.shape == (1, *SIZE)
        assert (image.dtype, mask.dtype) == (torch.float32, torch.uint8)
        assert image.isfinite().all()
        assert image.min() >= 0
        assert set(mask.unique().tolist()) <= {0, 1}
        brightness.append(image.quantile(0.99).item())
        shares.append(mask.float().mean().item())
    assert 0.5 < np.median(brightness) < 2
    assert max(shares) > 2 * np.median(shares)  # sizes and places differ


def test_transform(folder):
    transform = RandHeadd(str(folder), SIZE).set_random_state(3)
    items = [transform({"subject": "1"}) for _ in range(2)]
    assert not torch.equal(items[0]["image"], items[1]["image"])
    assert set(items[0]) == {"subject", "image", "label"}
    same = RandHeadd(str(folder), SIZE).set_random_state(3)({})
    assert torch.equal(same["image"], items[0]["image"])
    with pytest.raises(InputError, match=r"--heads"):
        RandHeadd(str(folder), SIZE, names=["B"])
