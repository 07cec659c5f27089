import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.metrics.utils import get_edge_surface_distance

from scripts.errors import InputError
from scripts.results.metrics import ScoreTable, VolumeTable, dice_table, tissue_scores, tissue_volumes
from scripts.results.tables import read_csv
from scripts.synthesis.phantom_brains import label_map

NAMES = [f"dice_{name}" for name in ("csf", "gm", "wm", "mean")]


def labels(**voxels: list[int]) -> torch.Tensor:
    """A row of 16 voxels, (1, 16, 3, 3), with these positions (in the middle of the other axes) set to a tissue."""
    volume = torch.zeros(1, 16, 3, 3, dtype=torch.uint8)
    for value, tissue in enumerate(("csf", "gm", "wm"), start=1):
        for x in voxels[tissue]:
            volume[0, x, 1, 1] = value
    return volume


def test_perfect_prediction():
    label = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (1, 12, 13, 14)))
    scores = tissue_scores(label, label, (1, 1, 1))
    for name, value in scores.items():
        assert value == (1 if name.startswith("dice") else 0), name


def test_known_wrong_prediction_by_hand():
    label = labels(csf=[0, 10], gm=[2], wm=[13])
    prediction = labels(csf=[0], gm=[5], wm=[13])
    scores = tissue_scores(prediction, label, spacing=(2.0, 1.0, 1.0))
    expected = {
        # CSF: one of two voxels found; distances 0 | 0, 20 mm
        "dice_csf": 2 / 3,
        "hd_max_csf": 20,
        "hd95_csf": 19,  # the 95th percentile of (0, 20)
        "asd_csf": 20 / 3,  # the mean of (0, 0, 20)
        # GM: three voxels of 2 mm beside it
        "dice_gm": 0,
        "hd_max_gm": 6,
        "hd95_gm": 6,
        "asd_gm": 6,
        "dice_wm": 1,
        "hd_max_wm": 0,
        "hd95_wm": 0,
        "asd_wm": 0,
        "dice_mean": 5 / 9,
        "hd_max_mean": 26 / 3,
        "hd95_mean": 25 / 3,
        "asd_mean": 38 / 9,
    }
    assert scores == pytest.approx(expected, abs=1e-5)


def test_tissue_that_is_missing():
    scores = tissue_scores(labels(csf=[1], gm=[], wm=[9]), labels(csf=[1], gm=[4], wm=[]), (1, 1, 1))
    assert scores["dice_gm"] == 0
    assert scores["hd_max_gm"] == scores["hd95_gm"] == scores["asd_gm"] == math.inf
    assert math.isnan(scores["dice_wm"])
    assert all(math.isnan(scores[f"{name}_wm"]) for name in ("hd95", "hd_max", "asd"))
    # of those that the label has
    assert scores["dice_mean"] == 0.5
    assert scores["asd_mean"] == math.inf
    nothing = tissue_scores(labels(csf=[], gm=[], wm=[]), labels(csf=[], gm=[], wm=[]), (1, 1, 1))
    assert all(map(math.isnan, nothing.values()))


def test_each_distance_is_measured_once(monkeypatch):
    measured = []
    monkeypatch.setattr(
        "scripts.results.metrics.get_edge_surface_distance",
        lambda *args, **kwargs: measured.append(args) or get_edge_surface_distance(*args, **kwargs),
    )
    tissue_scores(labels(csf=[1], gm=[4], wm=[9]), labels(csf=[1], gm=[5], wm=[9]), (1, 1, 1))
    assert len(measured) == 3


def test_volumes_in_millilitres():
    label = MetaTensor(labels(csf=[1, 2], gm=[3, 4, 5], wm=[6]), affine=torch.diag(torch.tensor([-10.0, 10, 5, 1])))
    assert tissue_volumes(label) == {"csf_ml": 1.0, "gm_ml": 1.5, "wm_ml": 0.5, "brain_ml": 3.0}


def segmented(subject: str) -> Engine:
    """An engine that ends with one subject segmented."""
    pred = MetaTensor(labels(csf=[1], gm=[2], wm=[3]), affine=torch.eye(4))
    engine = Engine(lambda engine, batch: None)

    @engine.on(Events.ITERATION_COMPLETED)
    def segment():
        engine.state.batch, engine.state.output = [{"subject": subject}], [{"pred": pred}]

    return engine


def test_volumes_of_earlier_runs_stay_in_the_table(tmp_path, capsys):
    for subject in ("7", "9", "7"):
        engine = segmented(subject)
        VolumeTable(str(tmp_path / "volumes.csv")).attach(engine)
        engine.run([0])
    assert [row["subject"] for row in read_csv(tmp_path / "volumes.csv")] == ["9", "7"]
    assert "subjects segmented: 1" in capsys.readouterr().out


def test_a_table_of_somebody_else_is_not_overwritten(tmp_path):
    (tmp_path / "volumes.csv").write_text("subject,mine\n1,2\n")
    engine = segmented("7")
    VolumeTable(str(tmp_path / "volumes.csv")).attach(engine)
    with pytest.raises(InputError, match="isn't a table of volumes"):
        engine.run([0])
    assert (tmp_path / "volumes.csv").read_text() == "subject,mine\n1,2\n"


def test_table_in_percent():
    rows = [
        {"subject": "1", "dice_csf": 0.93664, "dice_gm": 0.908, "dice_wm": 0.9064, "dice_mean": 0.91705},
        {"subject": "2", "dice_csf": 0.5, "dice_gm": 1.0, "dice_wm": 0.1, "dice_mean": 0.6},
    ]
    assert dice_table(rows[:1]).splitlines()[-1] == "| 1 | 93.66 | 90.80 | 90.64 | 91.70 |"
    assert dice_table(rows).splitlines()[0] == "| Subject | CSF | GM | WM | Average |"
    assert dice_table(rows).splitlines()[-1] == "| mean | 71.83 | 95.40 | 50.32 | 75.85 |"


def test_table_of_subjects_that_lack_a_tissue_or_are_named_oddly():
    row = {"dice_csf": 0.5, "dice_gm": math.nan, "dice_wm": 0.25, "dice_mean": 0.375}
    rows = [{"subject": "mean"} | row, {"subject": "a|b"} | row | {"dice_gm": 0.75, "dice_mean": 0.5}]
    assert dice_table(rows).splitlines()[2:] == [
        "| mean | 50.00 | nan | 25.00 | 37.50 |",
        "| a\\|b | 50.00 | 75.00 | 25.00 | 50.00 |",
        "| mean | 50.00 | 75.00 | 25.00 | 43.75 |",
    ]


def test_mean_scores_of_a_run_leave_out_what_a_label_lacks(tmp_path):
    table = ScoreTable(str(tmp_path / "metrics.csv"))
    table.rows = [{"subject": str(i), **dict.fromkeys(NAMES, value)} for i, value in enumerate((0.5, math.nan, 0.7))]
    engine = Engine(lambda engine, batch: None)
    table.finish(engine)
    assert engine.state.metrics == pytest.approx(dict.fromkeys(NAMES, 0.6))


steady = settings(deadline=None, derandomize=True, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(*[st.integers(1, 9)] * 3)
spacings = st.tuples(*[st.floats(0.7, 1.5)] * 3)


def surface(mask: np.ndarray) -> np.ndarray:
    """Positions of the voxels of which a face touches the outside."""
    padded = np.pad(mask, 1)
    inside = np.logical_and.reduce([np.roll(padded, s, axis) for axis in range(3) for s in (-1, 1)])
    return np.argwhere(padded & ~inside) - 1


def by_definition(prediction: np.ndarray, label: np.ndarray, spacing: tuple[float, ...]) -> dict[str, float]:
    """Scores of one tissue from its two masks, each distance taken."""
    if not label.any():
        return dict.fromkeys(("dice", "hd_max", "hd95", "asd"), math.nan)
    if not prediction.any():
        return {"dice": 0.0} | dict.fromkeys(("hd_max", "hd95", "asd"), math.inf)
    a, b = (surface(mask) * spacing for mask in (prediction, label))
    distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
    ways = (distances.min(1), distances.min(0))
    return {
        "dice": 2 * (prediction & label).sum() / (prediction.sum() + label.sum()),
        "hd_max": max(way.max() for way in ways),
        "hd95": max(np.percentile(way, 95) for way in ways),
        "asd": np.concatenate(ways).mean(),
    }


@pytest.mark.filterwarnings("ignore:.*ground truth of class:UserWarning", "ignore:.*prediction of class:UserWarning")
@settings(steady, max_examples=50)
@given(shape=shapes, spacing=spacings, density=st.sampled_from([0.02, 0.2, 0.7, 1.0]), seed=seeds)
def test_scores_are_by_definition(shape, spacing, density, seed):
    """Also of flat volumes, single voxels, tissues that are missing in one or both, and volumes without background."""
    rng = np.random.default_rng(seed)
    prediction, label = ((rng.integers(1, 4, shape) * (rng.random(shape) < density)) for _ in range(2))
    scores = tissue_scores(torch.from_numpy(prediction)[None], torch.from_numpy(label)[None], spacing)
    for value, tissue in enumerate(("csf", "gm", "wm"), start=1):
        for name, expected in by_definition(prediction == value, label == value, spacing).items():
            assert scores[f"{name}_{tissue}"] == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True), name


def test_dice_and_greatest_distance_are_those_of_itk():
    """On a whole phantom of 2 mm.

    ITK takes the Hausdorff distance of all voxels of two objects, ours is of their surfaces; so ITK is given the
    surfaces. It has no 95th percentile, and its average is another: the greater of the two directions' means.
    """
    label = label_map(np.random.default_rng(4))[::2, ::2, ::2]
    prediction = np.roll(label, (2, -1, 3), (0, 1, 2))
    spacing = (1.8, 2.0, 2.6)
    scores = tissue_scores(torch.from_numpy(prediction)[None], torch.from_numpy(label)[None], spacing)
    images = [sitk.GetImageFromArray(values.transpose(2, 1, 0)) for values in (prediction, label)]
    for image in images:
        image.SetSpacing(spacing)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    for value, tissue in enumerate(("csf", "gm", "wm"), start=1):
        assert scores[f"dice_{tissue}"] == pytest.approx(overlap.GetDiceCoefficient(value), rel=1e-6)
        distance = sitk.HausdorffDistanceImageFilter()
        distance.Execute(*(sitk.BinaryContour(image == value, fullyConnected=False) for image in images))
        assert scores[f"hd_max_{tissue}"] == pytest.approx(distance.GetHausdorffDistance(), rel=1e-5)
