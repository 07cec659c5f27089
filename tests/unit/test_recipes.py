"""The two published recipes, each as an overlay of train.json."""

import json

import pytest
import torch
from helpers import ROOT
from ignite.engine import Engine
from monai.bundle import ConfigWorkflow

from scripts.data.datasets import PatchDraw
from scripts.errors import InputError, input_error_in
from scripts.inference.precision import float16_or_auto, needs_loss_scaling
from scripts.training.loss_scale import FixedLossScale

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


@pytest.mark.parametrize(
    ("recipe", "parameters", "batch_size", "optimizer", "groups"),
    [
        ("mindspore", 466_320, 1, torch.optim.SGD, {"momentum": 0, "weight_decay": 0}),
        ("original", 1_552_256, 4, torch.optim.Adam, {"betas": (0.97, 0.999), "weight_decay": 6e-4}),
    ],
)
def test_settings_are_the_published_ones(dataset, tmp_path, recipe, parameters, batch_size, optimizer, groups):
    config = workflow(dataset, tmp_path, recipe).parser
    network = config.get_parsed_content("network")
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert network.dense_blocks[0].denselayer1.dropout.p == 0.2
    ours = config.get_parsed_content("optimizer")
    assert type(ours) is optimizer
    assert {name: ours.param_groups[0][name] for name in ("lr", *groups)} == {"lr": 2e-4, **groups}
    assert isinstance(config.get_parsed_content("loss"), torch.nn.CrossEntropyLoss)
    loader = config.get_parsed_content("train#dataloader")
    # of the two training subjects each four times, in patches of 64^3
    assert sorted(loader.sampler) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {batch["image"].shape for batch in loader} == {(batch_size, 2, 64, 64, 64)}
    assert config.get_parsed_content("foreground_margin") == 32
    assert config.get_parsed_content("epochs") == 20000
    assert config.get_parsed_content("val_interval") == 1


def test_learning_rate_of_the_original_falls_after_5000_epochs_and_that_of_mindspore_never(dataset, tmp_path):
    for recipe, lowered in (("original", 2e-5), ("mindspore", 2e-4)):
        config = workflow(dataset, tmp_path, recipe).parser
        scheduler, optimizer = (config.get_parsed_content(name) for name in ("lr_scheduler", "optimizer"))
        steps = 5000 * len(config.get_parsed_content("train#dataloader"))
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert set(rates) == {2e-4}
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lowered)


def test_checkpoints_come_as_often_and_stay_as_many_as_published(dataset, tmp_path):
    config = workflow(dataset, tmp_path, "mindspore").parser
    assert [config.get_parsed_content(f"checkpoint{name}") for name in ("_interval", "s_kept")] == [5000, 16]
    config = workflow(dataset, tmp_path, "original").parser
    # 1,000 epochs of two batches, all of 20,000 epochs
    assert [config.get_parsed_content(f"checkpoint{name}") for name in ("_interval", "s_kept")] == [2000, 20]


def test_recipe_over_evaluate_is_refused(dataset, tmp_path):
    scoring = ConfigWorkflow(
        [str(CONFIGS / name) for name in ("train.json", "evaluate.json", "recipes/mindspore.json")],
        run_id="evaluating", workflow_type="train", bundle_root=str(ROOT), dataset_dir=str(dataset),
        output_dir=str(tmp_path), patch_size=[32, 32, 32],
    )  # fmt: skip
    scoring.initialize()
    with pytest.raises((InputError, RuntimeError)) as caught:
        scoring.run()
    error = caught.value
    while not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    assert "name configs/evaluate.json after it" in str(error)
    assert not (tmp_path / "metrics.csv").exists()


def test_both_recipes_validate_alike():
    recipes = [json.loads((CONFIGS / "recipes" / f"{name}.json").read_text()) for name in RECIPES]
    alike = ("crops_per_epoch", "epochs", "learning_rate", "foreground_margin", "val_interval", "patch_size", "loss")
    for name in (*alike, "train#sampling", "train#augmentation", "train#to_network"):
        assert recipes[0][name] == recipes[1][name], name
    names = [{name for name in recipe if name.startswith("validate")} for recipe in recipes]
    assert names[0] == names[1]
    assert all(recipes[0][name] == recipes[1][name] for name in names[0])


def test_loss_scale_of_256_holds_where_float16_is_computed():
    assert float16_or_auto("cpu") == "auto"
    assert needs_loss_scaling(torch.device("cuda"), float16_or_auto(torch.device("cuda")))
    engine = Engine(lambda engine, batch: None)
    engine.state.device = torch.device("cpu")
    for scaler, scale, expected in ((torch.amp.GradScaler("cpu"), 256.0, 256.0), (None, 256.0, None)):
        engine.scaler = scaler
        FixedLossScale(scale).replace(engine)
        assert (engine.scaler.get_scale() if engine.scaler else None) == expected
    engine.scaler = torch.amp.GradScaler("cpu")
    FixedLossScale(None).replace(engine)
    assert engine.scaler.get_scale() == 2**16


@pytest.mark.parametrize(("patch_size", "shape"), [(32, (32, 32, 32)), ([16, 48, 64], (16, 48, 64))])
def test_robust_recipe_cuts_what_it_turns_from_larger_patches(dataset, tmp_path, patch_size, shape):
    config = workflow(dataset, tmp_path, "robust", patch_size=patch_size).parser
    patches = [config.get_parsed_content("train#dataset")[PatchDraw(n % 2, n)] for n in range(8)]
    for patch in (patch[0] if isinstance(patch, list) else patch for patch in patches):
        assert (patch["image"].shape, patch["label"].shape) == ((2, *shape), (1, *shape))
        assert patch["image"].isfinite().all()
        assert {*patch["label"].unique().tolist()} <= {0, 1, 2, 3}


def test_robust_recipe_begins_as_the_default():
    default = json.loads((CONFIGS / "train.json").read_text())["train"]["augmentation"]
    robust = json.loads((CONFIGS / "recipes" / "robust.json").read_text())["train#augmentation"]
    assert default[0] == robust[0]


def test_loss_scale_is_set_before_a_resumed_one_is_loaded():
    train = json.loads((CONFIGS / "train.json").read_text())["train"]
    handlers = [each["_target_"].rpartition(".")[2] for each in train["handlers"]]
    assert handlers.index("FixedLossScale") < handlers.index("Checkpoints")


def test_bad_settings_are_refused_before_subjects_are_loaded(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.data.datasets.cached_dataset", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises((InputError, RuntimeError)) as caught:
        workflow(dataset, tmp_path, "original", learning_rate=-1).run()
    assert "--learning_rate -1" in str(input_error_in(caught.value))


def test_infant_recipe_replaces_a_share_of_the_patches(dataset, heads_dir, tmp_path):
    settings = {"heads_dir": str(heads_dir), "heads": ["A"], "patch_size": [16, 16, 16], "synthetic_share": 0.0}

    def images(share: float) -> torch.Tensor:
        config = workflow(dataset, tmp_path, "infant", infant_share=share, crops_per_epoch=8, **settings).parser
        batches = list(config.get_parsed_content("train#dataloader"))
        assert {batch["image"].shape for batch in batches} == {(4, 2, 16, 16, 16)}
        assert all(set(batch["label"].unique().tolist()) <= {0, 1, 2, 3} for batch in batches)
        return torch.cat([batch["image"] for batch in batches])

    kept, replaced = images(0.0), images(1.0)
    assert kept.isfinite().all()
    assert replaced.isfinite().all()
    assert not any(torch.equal(first, second) for first, second in zip(kept, replaced, strict=True))
