import math

import numpy as np
import pytest
import torch
from helpers import surface
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.metrics.utils import get_edge_surface_distance

from scripts.errors import InputError
from scripts.results.metrics import ScoreTable, VolumeTable, dice_table, tissue_scores, tissue_volumes
from scripts.results.tables import read_csv

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


def test_whole_volumes_against_brute_force():
    rng = np.random.default_rng(3)
    label, prediction = (rng.integers(0, 4, (1, 9, 8, 7)) for _ in range(2))
    spacing = (1.0, 1.5, 0.8)
    scores = tissue_scores(torch.from_numpy(prediction), torch.from_numpy(label), spacing)
    for value, tissue in enumerate(("csf", "gm", "wm"), start=1):
        first, second = (prediction[0] == value, label[0] == value)
        a, b = (surface(mask) * spacing for mask in (first, second))
        distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
        forth, back = distances.min(1), distances.min(0)
        assert scores[f"dice_{tissue}"] == pytest.approx(2 * (first & second).sum() / (first.sum() + second.sum()))
        assert scores[f"hd_max_{tissue}"] == pytest.approx(max(forth.max(), back.max()), rel=1e-5)
        assert scores[f"hd95_{tissue}"] == pytest.approx(max(np.percentile(d, 95) for d in (forth, back)), rel=1e-5)
        assert scores[f"asd_{tissue}"] == pytest.approx(np.concatenate([forth, back]).mean(), rel=1e-5)


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
