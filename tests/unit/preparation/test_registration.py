"""Registration of a T2 that was turned and moved, on any grid."""

import nibabel as nib
import numpy as np
import pytest
from helpers import displaced
from scipy.spatial.transform import Rotation

from scripts.errors import InputError
from scripts.preparation.registration import register
from scripts.preparation.transforms import STEPS, steps_of
from scripts.synthesis.contrast import nominal, six_month_subject
from scripts.synthesis.phantom_brains import label_map

LAS = np.diag([-1.0, 1.0, 1.0, 1.0])


@pytest.fixture(scope="module")
def brain() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    label = label_map(rng)[20:124, 40:140, 70:170]
    return six_month_subject(label, nominal(label, rng), rng) | {"label": label}


@pytest.mark.parametrize(
    ("angles", "shift", "sizes"),
    [
        ((10, 0, 0), (15, 0, 0), (1, 1, 1)),
        pytest.param((0, 10, 5), (5, 10, 0), (1, 1, 1), marks=pytest.mark.slow),
        pytest.param((-12, 20, 15), (-20, 30, 10), (0.9, 0.9, 1.2), marks=pytest.mark.slow),
        pytest.param((0, 0, 0), (0, 0, 0), (1, 1, 3), marks=pytest.mark.slow),
    ],
)
def test_t2_comes_back_to_its_place(brain, angles, shift, sizes):
    t2, affine, matrix = displaced(brain["T2"], LAS, angles, shift, sizes)
    result = register(t2, affine, brain["T1"].astype(np.float32), LAS, brain["T1"] > 0)
    assert result.covered > 0.98
    assert result.image.shape == brain["T1"].shape
    voxels = nib.affines.apply_affine(LAS, np.argwhere(brain["T1"] > 0)[::500])
    errors = np.linalg.norm(
        nib.affines.apply_affine(result.matrix, voxels) - nib.affines.apply_affine(matrix, voxels), axis=1
    )
    assert np.median(errors) < 0.3
    assert errors.max() < 1
    turn = np.degrees(Rotation.from_euler("xyz", angles, degrees=True).magnitude())
    assert result.turn == pytest.approx(turn, abs=0.5)
    middle = voxels.mean(0)
    moved = np.linalg.norm(nib.affines.apply_affine(matrix, middle) - middle)
    assert result.shift == pytest.approx(moved, abs=0.5)
    inside = brain["label"] > 0
    assert np.corrcoef(result.image[inside], brain["T2"][inside])[0, 1] > (0.95 if sizes == (1, 1, 1) else 0.7)


def test_scans_of_a_few_voxels():
    few = np.ones((3, 3, 3), np.float32)
    assert register(few, LAS, few, LAS, few > 0) is None


def test_names_of_steps():
    assert steps_of("auto") == STEPS
    assert steps_of(["registration"]) == steps_of("registration") == ("registration",)
    assert steps_of([]) == ()
    for value in (True, 5, None, {"registration": 1}):
        with pytest.raises(InputError, match=r"^--prepare .*: must be auto, or a list of brain_mask, registration"):
            steps_of(value)
    with pytest.raises(
        InputError, match=r"^--prepare bias: must be auto, or a list of brain_mask, registration, or \[\]"
    ):
        steps_of(["bias"])
