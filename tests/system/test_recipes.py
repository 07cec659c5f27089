"""Each recipe trains and is scored."""

import pytest
from helpers import configured
from ignite.engine import Events


@pytest.mark.parametrize("recipe", ["mindspore", pytest.param("original", marks=pytest.mark.slow)])
def test_recipe_trains_validates_on_the_centre_and_is_scored_on_the_whole(dataset, tmp_path, recipe):
    quick = {"epochs": 1, "patch_size": [32, 32, 32]}
    overlays = ("train.json", f"recipes/{recipe}.json")
    training = configured(dataset, tmp_path, *overlays, **quick)
    shapes = []
    training.evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: shapes.append(tuple(engine.state.output[0]["pred"].shape))
    )
    training.run()
    assert shapes == [(1, 32, 32, 32)]
    assert (tmp_path / "model.pt").exists()
    scoring = configured(dataset, tmp_path, *overlays, "evaluate.json", ckpt_dir=str(tmp_path), **quick)
    scoring.parser.get_parsed_content("evaluating")
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1].startswith("9,")
    pictured = scoring.parser.get_parsed_content("validate#evaluator").state.output[0]["pred"]
    assert pictured.shape == (1, 60, 72, 64)
