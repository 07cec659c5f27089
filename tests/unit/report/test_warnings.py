"""Warnings: each appears beyond its threshold, not at it."""

import numpy as np
import pytest
from helpers import ROOT

from scripts.data.checks import exchanged
from scripts.report import warnings as report_warnings
from scripts.report.page import MOST_VIEWERS
from scripts.report.warnings import (
    LARGEST_DIFFERENCE_OF_VOXEL,
    LARGEST_USUAL_BRAIN,
    SIX_MONTHS,
    SMALLEST_BRAIN,
    brain_left_unlabelled,
    few_foreground_voxels,
    find_warnings,
    left_right_asymmetry,
    not_skull_stripped,
    other_voxel_size,
    t2_missing,
    usual_range,
    volume_out_of_range,
)
from scripts.tissues import Tissue


@pytest.mark.parametrize("tissue", list(Tissue))
def test_warning_of_a_volume_beyond_three_deviations(tissue):
    usual = {f"{each.name.lower()}_ml": mean for each, (mean, _) in SIX_MONTHS.items()}
    assert volume_out_of_range(usual) is None
    for edge, beyond in zip(usual_range(tissue), (-1, 1), strict=True):
        assert volume_out_of_range(usual | {f"{tissue.name.lower()}_ml": edge}) is None
        message = volume_out_of_range(usual | {f"{tissue.name.lower()}_ml": edge + beyond})
        assert message.startswith(f"{tissue.name} {edge + beyond:.0f} ml, usual at 6 months ")


def test_the_ranges_are_those_of_iseg():
    assert [tuple(map(round, usual_range(tissue))) for tissue in Tissue] == [(128, 212), (260, 500), (129, 363)]


def test_warning_of_few_foreground_voxels():
    t1 = np.zeros((10, 10, 10))
    t1.flat[:100] = 5
    assert few_foreground_voxels(t1, SMALLEST_BRAIN / 100) is None
    assert few_foreground_voxels(t1, SMALLEST_BRAIN / 101) == "T1 is above 0 in only 394 ml"


def test_warning_of_a_brain_left_unlabelled():
    t1 = np.zeros((10, 10, 20))
    t1[..., :10] = 1
    prediction = np.where(t1 > 0, 2, 0)
    prediction[:5, 0, :10] = 0
    assert brain_left_unlabelled(t1, prediction) is None
    prediction[5, 0, 0] = 0
    assert brain_left_unlabelled(t1, prediction) == "5% of the brain is labelled background"


def test_warning_of_a_skull():
    t1 = np.zeros((20, 20, 20))
    t1[1:-1, 1:-1, 1:-1] = 1
    voxels = 18**3
    assert not_skull_stripped(t1, LARGEST_USUAL_BRAIN / voxels) is None
    assert "a brain at 6 months has up to 1075" in not_skull_stripped(t1, LARGEST_USUAL_BRAIN / voxels + 1e-3)
    t1[1:16, 1:17, 0] = 1  # as a neck that is cut off: 240 of 2400 voxels of the faces
    assert not_skull_stripped(t1, 0.001) is None
    t1[16, 1, 0] = 1
    assert not_skull_stripped(t1, 0.001) == "T1 is above 0 on 10% of the faces of its volume"


def test_warning_of_missing_t2():
    t1 = np.zeros((10, 10, 20))
    t1[..., :10] = 1
    t2 = t1 * 7
    t2[0, :10, 0] = 0
    assert t2_missing(t1, t2) is None
    t2[1, 0, 0] = 0
    assert t2_missing(t1, t2) == "T2 shows nothing in 1% of the brain"


def test_warning_of_exchanged_scans(brains):
    t1, t2 = (brains[1][kind].astype(np.float32) for kind in ("T1", "T2"))
    assert exchanged(t1, t2) is None
    assert exchanged(t2, t1).startswith("the intensities of T1 look like those of a T2")
    assert exchanged(np.ones((30, 30, 30)), np.ones((30, 30, 30))) is None  # refused elsewhere
    assert exchanged(1e30 * t1, 1e30 * t2) is None


def test_warnings_of_the_scans_themselves_are_in_the_report(brains):
    brain = {kind: brains[1][kind].astype(np.float32) for kind in ("T1", "T2", "label")}
    volumes = {f"{name}_ml": 1.0 for name in ("csf", "gm", "wm")}

    def kinds(t1: np.ndarray, t2: np.ndarray) -> set[str]:
        found = find_warnings({"T1": t1, "T2": t2}, brain["label"], volumes, np.ones(3))
        return found.keys() & {"T1 and T2 exchanged", "extreme voxels"}

    assert kinds(brain["T1"], brain["T2"]) == set()
    assert kinds(brain["T2"], brain["T1"]) == {"T1 and T2 exchanged"}
    brain["T2"][tuple(np.argwhere(brain["label"] == 2)[:20].T)] = 9000
    assert "extreme voxels" in kinds(brain["T1"], brain["T2"])


@pytest.mark.parametrize("width", [40, 41])
def test_warning_of_asymmetry(width):
    prediction = np.zeros((60, 10, 10), np.uint8)
    prediction[5 : 5 + width] = 2
    prediction[5 : 5 + width, 4:6] = 3
    assert left_right_asymmetry(prediction) is None
    prediction[5:10, 4:6] = 1  # X runs to the right; a quarter less of WM on one side is still even enough
    assert left_right_asymmetry(prediction) == "100% of CSF is on the left"
    prediction[5:15, 4:6] = 1
    assert left_right_asymmetry(prediction) == "100% of CSF is on the left; 67% of WM is on the right"
    assert left_right_asymmetry(prediction[::-1]) == "100% of CSF is on the right; 67% of WM is on the left"
    assert left_right_asymmetry(np.zeros((4, 4, 4), np.uint8)) is None


def test_warning_of_voxels_unlike_those_of_the_training():
    for usual in (0.85, 1.0, 1.15):
        assert other_voxel_size(np.array([1, usual, 1])) is None
    assert other_voxel_size(np.array([1, 0.8, 1])) == "voxels of 1 x 0.8 x 1 mm: labels are less accurate than at 1 mm"
    assert other_voxel_size(np.array([1.5, 1, 1])) is not None


def test_the_page_on_warnings_states_the_thresholds():
    page = " ".join((ROOT / "docs" / "reading_the_report.md").read_text(encoding="utf-8").split())
    for stated in (
        f"more than {report_warnings.DEVIATIONS} standard deviations",
        f"less than {SMALLEST_BRAIN:.0f} ml",
        f"more than {report_warnings.LARGEST_BACKGROUND:.0%} of where".replace("%", " %"),
        f"more than {LARGEST_USUAL_BRAIN:,.0f} ml",
        "more than a tenth of the faces",
        f"more than {report_warnings.LARGEST_WITHOUT_T2:.0%} of where".replace("%", " %"),
        f"more than {50 * (1 + report_warnings.LARGEST_ASYMMETRY):g} % of a tissue",
        f"at most {MOST_VIEWERS} subjects",
        "under {:g} or over {:g} mm".format(*(1 + side * LARGEST_DIFFERENCE_OF_VOXEL for side in (-1, 1))),
        ", ".join(f"{t.name} {mean} ± {deviation}" for t, (mean, deviation) in SIX_MONTHS.items()) + " ml",
    ):
        assert stated in page, stated
    assert report_warnings.LARGEST_SHARE_OF_FACES == 0.1
