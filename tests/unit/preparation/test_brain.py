"""Which scans the network is asked about."""

from typing import Any

import numpy as np
import pytest

from scripts.data.volumes import Scan
from scripts.errors import InputError
from scripts.preparation import brain
from scripts.preparation.brain import brain_of, may_show_a_head
from scripts.preparation.transforms import FindBraind

AFFINE = np.diag([-2.0, 2.0, 2.0, 1.0])


def ball(radius: float, shape: tuple[int, int, int] = (100, 100, 100)) -> np.ndarray:
    """Values from 0 to 1000 in a ball, with voxels of 2 mm."""
    places = np.indices(shape) - (np.array(shape) - 1)[:, None, None, None] / 2
    inside = np.sqrt((places**2).sum(0)) * 2 < radius
    return np.where(inside, np.random.default_rng(0).uniform(1, 1000, shape), 0).astype(np.float32)


def test_what_may_be_a_head():
    assert not may_show_a_head(ball(61), AFFINE)  # 950 ml
    assert may_show_a_head(ball(64), AFFINE)  # 1,098 ml
    assert may_show_a_head(ball(61)[:, :, :70], AFFINE)  # it reaches a face
    assert not may_show_a_head(ball(35)[:, :, :50], AFFINE)  # too small for a brain
    assert not may_show_a_head(np.zeros((9, 9, 9)), AFFINE)


@pytest.fixture
def found(monkeypatch):
    """What the network finds, to be filled in."""
    answer: dict[str, Any] = {"sure": 0.95}
    monkeypatch.setattr(brain, "_brain_probability", lambda scan, affine: np.where(answer["mask"], answer["sure"], 0))
    return answer


def test_the_largest_piece_without_holes(found):
    head, inner = ball(90), ball(60) > 0
    found["mask"] = inner.copy()
    found["mask"][50, 50, 50] = False
    found["mask"][5:15, 5:15, 5:15] = True
    result = brain_of(head, AFFINE, "T1")
    np.testing.assert_array_equal(result.mask, inner)
    assert result.volume == pytest.approx(0.008 * inner.sum())
    assert result.at_edge == 0
    found["mask"] = inner[50:]
    cut = brain_of(head[50:], AFFINE, "T1")
    assert cut.at_edge == pytest.approx(4 * inner[50].sum())


@pytest.mark.parametrize(
    "make",
    [
        lambda: ball(90) > 2000,  # nothing
        lambda: ball(25) > 0,  # 65 ml
        lambda: ball(90) > 0,  # all that is shown, 3,054 ml
        lambda: (ball(60) > 0) & (np.indices((100, 100, 100))[0] % 12 > 5),  # slices
    ],
)
def test_what_is_no_brain(found, make):
    found["mask"] = make()
    with pytest.raises(InputError, match=r"^T1: no brain is found in it \(.* ml look like brain\); check the"):
        brain_of(ball(90), AFFINE, "T1")


def test_a_brain_of_which_the_network_is_not_sure(found):
    found |= {"mask": ball(60) > 0, "sure": 0.8}
    with pytest.raises(InputError, match=r"^T1: no brain is found in it"):
        brain_of(ball(90), AFFINE, "T1")


def test_a_stripped_scan_stays_as_it_is(found):
    scan = ball(65)
    found["mask"] = ball(63) > 0
    assert brain_of(scan, AFFINE, "T1") is None
    data = {"scans": [Scan(scan, AFFINE, "T1")], "brain": None}
    assert FindBraind()(data) == data


def test_a_mask_that_is_given_is_used(found):
    data = {"scans": [Scan(ball(90), AFFINE, "T1")], "brain": ball(50) > 0}
    assert FindBraind()(data) == data
    data = data | {"brain": None}
    assert FindBraind(["registration"])(data) == data
    found["mask"] = ball(60) > 0
    result = FindBraind("brain_mask")(data)
    np.testing.assert_array_equal(result["brain"], found["mask"])
    assert (result["scans"][0].values[found["mask"]] > 0).all()
    np.testing.assert_array_equal(result["head"][0], data["scans"][0].values)
