"""MONAI's federated client drives the bundle as docs/federated_learning.md says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, blocks, copy_bundle, same, save_subject, small_brain
from ignite.engine import Engine
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, ModelType
from monai.fl.utils.exchange_object import ExchangeObject

from scripts.network import SkipDenseSeg
from scripts.training.checkpoints import EarlierWeightsKeeper, StepWeightsSaver

PAGE = "docs/federated_learning.md"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The bundle with subjects of two sites and of a third place."""
    home = copy_bundle(tmp_path_factory.mktemp("bundle"))
    for number, (site, subject) in enumerate(
        [("site-1", "1"), ("site-1", "5"), ("site-2", "6"), ("site-2", "9"), ("site-3", "1")]
    ):
        save_subject(home / "data" / site, subject, small_brain(number))
    return home


def run_python(program: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=cwd, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def scorer(dataset: Path, subject: str, output: Path) -> MonaiAlgo:
    """A client that only evaluates, with the weights that the bundle includes on disk."""
    settings = {"bundle_root": str(ROOT), "dataset_dir": str(dataset), "val_subjects": [subject]}
    client = MonaiAlgo(str(ROOT), config_train_filename=None, eval_kwargs=settings | {"output_dir": str(output)})
    client.initialize()
    return client


@pytest.mark.filterwarnings("ignore:executing the bundle config:UserWarning")  # MONAI says that configs are code
def test_weights_that_are_sent_are_scored_and_not_those_on_disk(dataset, tmp_path):
    torch.manual_seed(0)
    random = SkipDenseSeg().state_dict()
    included = torch.load(ROOT / "models" / "model.pt", weights_only=True)
    client = scorer(dataset, "9", tmp_path)
    poor, good = (client.evaluate(ExchangeObject(weights=sent)).metrics.copy() for sent in (random, included))
    assert poor["val_mean_dice"] < 0.4 < 0.6 < good["val_mean_dice"]
    assert good["dice_mean"] == pytest.approx(good["val_mean_dice"])


def test_each_round_goes_on_with_what_is_its_own(tmp_path):
    """A trainer that is started again, as for a round, finds the files that it wrote itself."""
    (tmp_path / "model.pt").write_bytes(b"the former network")
    network = torch.nn.Linear(1, 1)
    engine = Engine(lambda engine, batch: torch.save(network.state_dict(), tmp_path / "model.pt"))
    EarlierWeightsKeeper(str(tmp_path / "model.pt")).attach(engine)
    StepWeightsSaver(str(tmp_path), network, interval=1, keep=9, resume=False).attach(engine)
    for rounds in (1, 2, 3):
        engine.run([0], max_epochs=rounds)
    assert {path.name for path in tmp_path.glob("step-*.pt")} == {"step-1.pt", "step-2.pt", "step-3.pt"}
    assert [path.read_bytes() for path in tmp_path.glob("model-*.pt")] == [b"the former network"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:executing the bundle config:UserWarning")
def test_weights_that_are_sent_are_trained_and_not_those_to_start_from(home, tmp_path):
    settings = {"bundle_root": str(home), "dataset_dir": str(home / "data" / "site-1"), "val_subjects": [5]}
    settings |= {
        "output_dir": str(tmp_path),
        "ckpt_dir": str(tmp_path),
        "start_from": str(home / "models" / "model.pt"),
    }
    settings |= {"epochs": 2, "crops_per_epoch": 1, "patch_size": [32, 32, 32], "learning_rate": 1e-9}
    settings |= {"lr_scheduler#total_steps": "$@epochs * len(@train#dataloader)"}
    client = MonaiAlgo(str(home), local_epochs=1, send_weight_diff=False, train_kwargs=settings, eval_kwargs=settings)
    client.initialize({ExtraItems.CLIENT_NAME: "site-1"})
    included = torch.load(home / "models" / "model.pt", weights_only=True)
    assert same(client.get_weights().weights, included)
    for seed in (1, 2):
        torch.manual_seed(seed)
        sent = SkipDenseSeg().state_dict()
        client.train(ExchangeObject(weights=sent))
        after = client.get_weights().weights
        for name in dict(SkipDenseSeg().named_parameters()):
            torch.testing.assert_close(after[name], sent[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:executing the bundle config:UserWarning")
def test_average_of_two_sites_is_better_than_the_start(home, tmp_path):
    """On a phantom that neither site has."""
    small = '"crops_per_epoch": 40, "batch_size": 2, "patch_size": [32, 32, 32], "learning_rate": 0.003,'
    program, _ = blocks(PAGE, "python")
    for text, replaced in (
        ("rounds, local_epochs = 20, 10", "rounds, local_epochs = 2, 1"),
        ('"epochs": rounds', f'{small} "epochs": rounds'),
        ("for number in", 'torch.save(weights, "eval/start.pt")\nfor number in'),
    ):
        assert program.count(text) == 1
        program = program.replace(text, replaced)
    former = (home / "models" / "model.pt").read_bytes()
    for site in ("site-1", "site-2"):
        (home / "eval" / site).mkdir(parents=True)
        (home / "eval" / site / "model.pt").write_bytes(former)
    told = run_python(program, home)
    assert "round 2: the average has Dice" in told

    client = scorer(home / "data" / "site-3", "1", tmp_path)
    sent = [torch.load(home / "eval" / f"{name}.pt", weights_only=True) for name in ("start", "averaged")]
    start, average = (client.evaluate(ExchangeObject(weights=w)).metrics["val_mean_dice"] for w in sent)
    assert average > start + 0.2, (start, average)
    for site in ("site-1", "site-2"):
        folder = home / "eval" / site
        assert [path.read_bytes() for path in folder.glob("model-*.pt")] == [former]
        own = torch.load(folder / "last.pt", weights_only=True)
        assert own["progress"]["epoch"] == 2
        assert own["lr_scheduler"]["last_epoch"] == 40  # the cycle spans both rounds
        asked = MonaiAlgo(
            str(home), best_model_filepath=f"eval/{site}/model.pt", final_model_filepath=f"eval/{site}/last.pt"
        )
        best, last = (
            asked.get_weights({ExtraItems.MODEL_TYPE: kind}).weights
            for kind in (ModelType.BEST_MODEL, ModelType.FINAL_MODEL)
        )
        assert same(best, torch.load(folder / "model.pt", weights_only=True))
        assert same(last, own["model"])
        (log,) = folder.glob("events.out.tfevents*")
        assert log.stat().st_size > 1000


@pytest.mark.slow
def test_statistics_of_a_site(home):
    _, program = blocks(PAGE, "python")
    told = run_python(program, home)
    assert "data_count: 1, fail_count: 0" in told.replace("<FlStatistics.", "").replace("'", "")
    by_case = yaml.safe_load((home / "train_data_stats_by_case.yaml").read_text())
    (case,) = by_case["stats_by_cases"]
    label = small_brain(0)["label"]
    shares = [tissue["foreground_percentage"] for tissue in case["label_stats"]["label"]]
    assert shares == pytest.approx([float((label == tissue).mean()) for tissue in range(4)], abs=1e-6)
