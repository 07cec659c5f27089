import json

import pytest
from conftest import ROOT, bundle
from monai.bundle import ConfigParser

from scripts.compare_recipes import _summary, compare_recipes
from scripts.errors import InputError
from scripts.workflow import unknown_setting
from scripts.writers import read_csv

RECIPES = json.loads((ROOT / "configs" / "comparison.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_changes_what_is_there(name):
    recipe = dict(RECIPES[name])
    files = ["train.json", *recipe.pop("overlays", ())]
    config = ConfigParser(ConfigParser.load_config_files([str(ROOT / "configs" / file) for file in files]))
    new = {"lr_scheduler#cycle_momentum"}
    assert [setting for setting in recipe if unknown_setting(setting, config)] == sorted(new & set(recipe))
    # a number that is the default's wouldn't be a comparison
    assert all(config[setting] != value for setting, value in recipe.items() if setting not in new)


def test_places_of_transforms_that_recipes_change():
    transforms = json.loads((ROOT / "configs" / "train.json").read_text())["train"]["random_transforms"]
    kinds = [transform["_target_"] for transform in transforms]
    assert kinds[2] == "RandCropByPosNegLabeld"
    assert kinds[4:7] == ["RandFlipd", "RandScaleIntensityd", "RandShiftIntensityd"]


def test_summary_is_the_mean_of_the_seeds_with_the_best_first():
    scores = [("a", 0, 80.0), ("b", 0, 90.0), ("a", 1, 82.0), ("b", 1, 91.0)]
    rows = [{"recipe": r, "seed": s, "steps": 7, **dict.fromkeys(("CSF", "GM", "WM", "mean"), m)} for r, s, m in scores]
    best, worst = _summary(rows)
    assert best == {
        **{"recipe": "b", "steps": 7, "mean of each seed": "90.00 91.00"},
        **dict.fromkeys(("CSF", "GM", "WM", "mean"), "90.50"),
    }
    assert (worst["recipe"], worst["mean"]) == ("a", "81.00")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minutes": 0}, "--minutes 0: must be a number above 0"),
        ({"seeds": 0}, "--seeds 0"),
        ({"names": "U-Net"}, "--names U-Net: no such recipe in comparison.json; did you mean UNet?"),
    ],
)
def test_bad_settings(dataset, tmp_path, settings, message):
    with pytest.raises(InputError) as caught:
        compare_recipes(str(dataset), [9], output_dir=str(tmp_path / "o"), **settings)
    assert message in str(caught.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_recipes_train_for_the_time_and_are_scored_by_their_last_network(dataset, tmp_path):
    quick = ["--minutes", "0.03", "--seeds", "1", "--patch_size", "[32,32,32]", "--batch_size", "1"]
    names = ["bundle", "mindspore", "UNet"]
    arguments = ["--dataset_dir", str(dataset), "--val_subjects", "[9]", "--output_dir", str(tmp_path), *quick]
    result = bundle("compare_recipes", *arguments, "--names", repr(names), module="scripts")
    assert result.returncode == 0, result.stderr
    rows = read_csv(tmp_path / "comparison.csv")
    assert [row["recipe"] for row in rows] == names
    assert (tmp_path / "comparison.md").read_text() in result.stdout
    for row in rows:
        folder = tmp_path / row["recipe"].replace(" ", "-") / "seed-0"
        assert float(row["seconds a step"]) * int(row["steps"]) == pytest.approx(1.8, rel=0.5)
        scores = read_csv(folder / "metrics.csv")
        assert [score["subject"] for score in scores] == ["9"]
        assert float(row["mean"]) == pytest.approx(100 * float(scores[0]["dice_mean"]), abs=0.01)
    again = bundle("compare_recipes", *arguments, "--names", repr(names), module="scripts")
    assert again.returncode == 0, again.stderr
    assert "timing a step" not in again.stdout
    assert read_csv(tmp_path / "comparison.csv") == rows
    with pytest.raises(InputError, match=r"steps.json: is of a comparison with other settings"):
        compare_recipes(str(dataset), [9], output_dir=str(tmp_path), minutes=1)
