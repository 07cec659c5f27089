"""A T2 that lies where T1 does is told from one that doesn't, whatever the tissues look like."""

import numpy as np
import pytest

from scripts.data.alignment import FEWEST_VOXELS, has_values, not_registered
from scripts.synthesis.contrast import nominal, patchwork, six_month_subject, varied
from scripts.synthesis.phantom_brains import label_map

WARNING = "T2 fits T1 as well, or nearly, when it is moved by 3 mm; register it to T1"
MILLIMETRE = np.ones(3)


@pytest.fixture(scope="module")
def label() -> np.ndarray:
    return label_map(np.random.default_rng(5))[20:124, 40:140, 70:170]


@pytest.fixture(scope="module", params=[nominal, varied, patchwork])
def scans(request, label) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(6)
    subject = six_month_subject(label, request.param(label, rng), rng)
    return subject["T1"].astype(np.float32), subject["T2"].astype(np.float32)


def with_head(t2: np.ndarray) -> np.ndarray:
    """As it is before it is stripped."""
    return np.where(t2 > 0, t2, np.random.default_rng(7).normal(t2[t2 > 0].mean(), 50, t2.shape))


def at(t2: np.ndarray, *millimetres: int) -> np.ndarray:
    return np.roll(t2, millimetres, (0, 1, 2))


@pytest.mark.parametrize("change", [lambda t2: t2, with_head, lambda t2: 7 - t2 / 100])
@pytest.mark.parametrize("bias", [0, 0.5])
def test_t2_in_its_place_and_out_of_it(scans, change, bias):
    """Bias is that of T1 and T2 at the far ends of the volume."""
    t1, t2 = scans
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in t1.shape), indexing="ij")
    field = 1 + bias * (x + y**2 - z) / 1.5
    t1, t2 = t1 * field, change(t2 * field)
    assert not_registered(t1, t2, MILLIMETRE) is None
    for moved in (at(t2, 2, 0, 0), at(t2, 0, 0, -4), at(t2, 0, 3, 3)):
        assert not_registered(t1, moved, MILLIMETRE) == WARNING


def test_t2_that_tells_nothing(scans):
    t1 = scans[0]
    t2 = np.where(t1 > 0, 5.0, 0)
    t2[tuple(np.array(t1.shape) // 2)] = 9
    assert not_registered(t1, t2, MILLIMETRE) == WARNING


def test_voxels_of_another_size(scans):
    t1, t2 = scans
    t1, t2 = np.repeat(t1, 2, axis=1), np.repeat(t2, 2, axis=1)
    sizes = np.array([1, 0.5, 1])
    assert not_registered(t1, t2, sizes) is None
    assert not_registered(t1, at(t2, 0, 8, 0), sizes)


def test_too_little_to_tell(scans):
    t1, t2 = scans
    side = round(FEWEST_VOXELS ** (1 / 3))
    part = (slice(40, 40 + side),) * 3  # of which every eighth voxel is looked at
    assert not_registered(t1[part], at(t2, 4, 4, 4)[part], MILLIMETRE) is None
    assert not_registered(t1[:, :, :9], t2[:, :, :9], MILLIMETRE) is None


def test_where_t2_shows_something():
    t1 = np.zeros((20, 20, 20))
    t1[5:15, 5:15, 5:15] = 1
    t2 = np.where(t1, -7.5, 3)
    t2[5] = 3
    shown = has_values(t1, t2).reshape(10, 10, 10)
    assert shown.sum() == 900
    assert not shown[0].any()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("ringing", [0, 1e-5])
def test_t2_that_is_cut_off(scans, head, ringing):
    t1, t2 = scans
    rng = np.random.default_rng(8)
    t2 = (with_head(t2) if head else t2) + rng.normal(0, 1, t2.shape) * ringing
    brain = t1 > 0
    assert has_values(t1, t2).mean() > 0.999
    t2[..., :40] = rng.normal(0, 1, t2[..., :40].shape) * ringing
    cut = np.count_nonzero(brain[..., :40]) / np.count_nonzero(brain)
    assert cut > 0.2
    assert 1 - has_values(t1, t2).mean() == pytest.approx(cut, abs=0.001)
