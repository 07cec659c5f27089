"""Each recipe trains and is scored."""

import pytest
from helpers import ROOT
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

CONFIGS = ROOT / "configs"
RECIPES = ("mindspore", "original")


def workflow(dataset, output, recipe, *overlays, **settings) -> ConfigWorkflow:
    configs = ["train.json", f"recipes/{recipe}.json", *overlays]
    prepared = ConfigWorkflow(
        [str(CONFIGS / name) for name in configs],
        workflow_type="train",
        bundle_root=str(ROOT),
        dataset_dir=str(dataset),
        output_dir=str(output),
        ckpt_dir=str(output),
        **settings,
    )
    prepared.initialize()
    return prepared


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_validates_on_the_centre_and_is_scored_on_the_whole(dataset, tmp_path, recipe):
    quick = {"epochs": 1, "patch_size": [32, 32, 32]}
    training = workflow(dataset, tmp_path, recipe, **quick)
    shapes = []
    training.evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: shapes.append(tuple(engine.state.output[0]["pred"].shape))
    )
    training.run()
    assert shapes == [(1, 32, 32, 32)]
    assert (tmp_path / "model.pt").exists()
    scoring = workflow(dataset, tmp_path, recipe, "evaluate.json", **quick)
    scoring.parser.get_parsed_content("evaluating")
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1].startswith("9,")
    pictured = scoring.parser.get_parsed_content("validate#evaluator").state.output[0]["pred"]
    assert pictured.shape == (1, 60, 72, 64)
