"""Recipes compared by trainings of seconds."""

import json

import pytest
from helpers import ROOT, save_subject, tensorboard_log

from scripts.commands.compare_recipes import compare_recipes
from scripts.errors import InputError
from scripts.results.tables import read_csv

RECIPES = json.loads((ROOT / "configs" / "comparison.json").read_text())


@pytest.mark.slow
def test_recipes_train_for_the_steps_that_fit_and_are_scored_by_their_last_network(pieces, tmp_path, monkeypatch):
    for subject, piece in zip(("1", "9"), pieces, strict=True):
        save_subject(tmp_path / "data", subject, piece)
    small = {"patch_size": [16, 16, 16], "batch_size": 1}
    recipes = {
        "bundle": small,
        "UNet": RECIPES["UNet"] | {"batch_size": 1},
        "mindspore": RECIPES["mindspore"] | small,
    }
    (tmp_path / "comparison.json").write_text(json.dumps(recipes))
    monkeypatch.setattr("scripts.commands.compare_recipes.RECIPES", tmp_path / "comparison.json")
    options = {"dataset_dir": str(tmp_path / "data"), "val_subjects": [9], "output_dir": str(tmp_path), "seeds": 1}
    compare_recipes(**options, minutes=0.02, names=["bundle", "UNet"])
    compare_recipes(**options, minutes=0.02, names="mindspore")
    rows = read_csv(tmp_path / "comparison.csv")
    assert [row["recipe"] for row in rows] == list(recipes)
    assert all(row["recipe"] in (tmp_path / "comparison.md").read_text() for row in rows)
    for row in rows:
        folder = tmp_path / row["recipe"] / "seed-0"
        assert len(tensorboard_log(folder).Scalars("train_step_loss")) == int(row["steps"])
        scores = read_csv(folder / "metrics.csv")
        assert [score["subject"] for score in scores] == ["9"]
        assert float(row["mean"]) == pytest.approx(100 * float(scores[0]["dice_mean"]), abs=0.01)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    compare_recipes(**options, minutes=0.02)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == finished
    assert read_csv(tmp_path / "comparison.csv") == rows
    with pytest.raises(InputError, match=r"steps.json: was made with other minutes;"):
        compare_recipes(**options, minutes=1)
    (tmp_path / "comparison.json").write_text(json.dumps({"bundle": small | {"learning_rate": 0.1}}))
    with pytest.raises(InputError, match=r"steps.json: was made with other learning_rate;"):
        compare_recipes(**options, minutes=0.02)
