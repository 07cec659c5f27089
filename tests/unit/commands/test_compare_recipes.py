import json
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from monai.bundle import ConfigParser

from scripts.commands.compare_recipes import _summary, compare_recipes
from scripts.errors import InputError
from scripts.settings import unknown_setting

RECIPES = json.loads((ROOT / "configs" / "comparison.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_changes_what_is_there(name):
    recipe = dict(RECIPES[name])
    files = ["train.json", *recipe.pop("overlays", ())]
    config = ConfigParser(ConfigParser.load_config_files([str(ROOT / "configs" / file) for file in files]))
    assert not any(unknown_setting(setting, config) for setting in recipe)
    # what is the default's wouldn't be a comparison
    assert all(config.get(setting, None) != value for setting, value in recipe.items())


@pytest.mark.parametrize("name", RECIPES)
def test_network_of_a_recipe_takes_its_patches(name):
    recipe = dict(RECIPES[name])
    files = ["train.json", *recipe.pop("overlays", ())]
    config = ConfigParser(ConfigParser.load_config_files([str(ROOT / "configs" / file) for file in files]))
    config.update(recipe)
    network, sides = (config.get_parsed_content(setting) for setting in ("network_def", "patch_size"))
    # what normalises by instance or group is scored in windows of the size that it was trained on
    by_batch = all("BatchNorm" in type(part).__name__ for part in network.modules() if "Norm" in type(part).__name__)
    assert config["window_size"] == ("auto" if by_batch else sides)
    with torch.inference_mode():
        assert network.eval()(torch.zeros(1, 2, *sides)).shape == (1, 4, *sides)


def test_summary_is_the_mean_of_the_seeds_with_the_best_first():
    scores = [("a", 0, 80.0), ("a", 1, 82.0), ("b", 0, 90.0), ("b", 1, 91.0)]
    rows = [{"recipe": r, "seed": s, "steps": 7, **dict.fromkeys(("CSF", "GM", "WM", "mean"), m)} for r, s, m in scores]
    best, worst = _summary(rows)
    assert best == {
        **{"recipe": "b", "steps": 7, "mean of each seed": "90.00 91.00"},
        **dict.fromkeys(("CSF", "GM", "WM", "mean"), "90.50"),
    }
    assert (worst["recipe"], worst["mean"]) == ("a", "81.00")


def test_recipe_without_a_score_comes_last():
    scores = [("none", 0, float("nan")), ("low", 0, 10.0), ("high", 0, 90.0), ("high", 1, float("nan"))]
    rows = [{"recipe": r, "seed": s, "steps": 7, **dict.fromkeys(("CSF", "GM", "WM", "mean"), m)} for r, s, m in scores]
    assert [(row["recipe"], row["mean"]) for row in _summary(rows)] == [
        ("high", "90.00"),
        ("low", "10.00"),
        ("none", "nan"),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minutes": 0}, "--minutes 0: must be a number above 0"),
        ({"seeds": 0}, "--seeds 0"),
        ({"names": "U-Net"}, "comparison.json; did you mean UNet?"),
        ({"val_subjects": [77]}, "val_subjects names subject 77"),
        ({"dataset_dir": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_bad_options(dataset, tmp_path, settings, message):
    with pytest.raises(InputError) as caught:
        compare_recipes(
            **{"dataset_dir": str(dataset), "val_subjects": 9, "output_dir": str(tmp_path / "o")} | settings
        )
    assert message in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_misspelt_setting_of_a_recipe(dataset, tmp_path, monkeypatch):
    (tmp_path / "comparison.json").write_text(json.dumps({"mine": {"learning_rat": 1.0}}))
    monkeypatch.setattr("scripts.commands.compare_recipes.RECIPES", tmp_path / "comparison.json")
    with pytest.raises(InputError, match=r"comparison.json: mine has learning_rat, .* did you mean --learning_rate\?"):
        compare_recipes(str(dataset), 9, str(tmp_path / "o"))


def test_only_what_a_comparison_began_is_begun_anew(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.commands.compare_recipes._seconds_per_step", None)
    monkeypatch.setattr("scripts.commands.compare_recipes.ProcessPoolExecutor", TimedAtOnce)
    monkeypatch.setattr("subprocess.run", lambda command: SimpleNamespace(returncode=1))
    mine = tmp_path / "UNet" / "seed-0" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    for kept in (True, False):
        with pytest.raises(InputError, match="training ended with status 1"):
            compare_recipes(str(dataset), 9, str(tmp_path), names="UNet")
        assert mine.exists() is kept


def test_training_is_kept_where_only_scoring_was_stopped(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.commands.compare_recipes._seconds_per_step", None)
    monkeypatch.setattr("scripts.commands.compare_recipes.ProcessPoolExecutor", TimedAtOnce)
    ran = []
    last = tmp_path / "UNet" / "seed-0" / "last.pt"

    def trains_but_does_not_score(command):
        ran.append(command[4])
        if command[4] == "training":
            last.write_bytes(b"trained")
        return SimpleNamespace(returncode=command[4] != "training")

    monkeypatch.setattr("subprocess.run", trains_but_does_not_score)
    for _ in range(2):
        with pytest.raises(InputError, match="evaluating ended with status"):
            compare_recipes(str(dataset), 9, str(tmp_path), names="UNet")
    assert ran == ["training", "evaluating", "evaluating"]
    assert last.read_bytes() == b"trained"


class TimedAtOnce:
    """In place of a process that times a step."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> "TimedAtOnce":
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, *_: object) -> SimpleNamespace:
        return SimpleNamespace(result=lambda: (1.0, 4))
