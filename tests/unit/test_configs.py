"""What the configs say: one truth for each thing, and what MONAI and its model zoo ask of a bundle."""

import json
import re
import shutil
import warnings
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from helpers import ROOT
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from monai.engines import SupervisedEvaluator, SupervisedTrainer

from scripts.network import SkipDenseSeg

CONFIGS = ROOT / "configs"
SCHEMA = ROOT.parent / "shared" / "meta_schema_20240725.json"
SCHEMA_MD5 = "06954cad2cc5d3784e72077ac76f0fc8"


def load(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def test_what_stands_in_train_and_inference_is_the_same():
    train, inference, evaluate = load("train"), load("inference"), load("evaluate")
    # less around the brain takes less time to segment, with labels as right; trainings were compared with 16
    assert (train["foreground_margin"], inference["foreground_margin"], evaluate["foreground_margin"]) == (16, 2, 2)
    for name in set(train) & set(inference) - {"run", "network", "foreground_margin"}:
        assert inference[name] == train[name], name
    # what is shorter than a training patch is padded for it
    steps = [step for step in train["train"]["deterministic_transforms"] if step["_target_"] != "SpatialPadd"]
    assert steps[0].pop("label_numbers") == "@label_numbers"  # there are no labels to segment
    assert inference["preprocessing"]["transforms"] == steps
    assert len(train["train"]["deterministic_transforms"]) == len(steps) + 1
    # validation in training scores the network that is trained; evaluate.json averages around its inferer
    averaging = evaluate["validate#evaluator"]["inferer"]
    assert averaging.pop("inferer") == "@validate#inferer"
    for name in ("uncertainty", "dropout_samples", "seed"):  # evaluation asks for no uncertainty
        assert inference["inferer"].pop(name) == f"@{name}"
    assert inference["inferer"] == averaging | {"inferer": train["validate"]["inferer"]}
    for name in ("checkpoints", "flips"):
        assert inference[name] == evaluate[name]
    changed = {"inferer", "val_handlers"}
    ours, theirs = ({k: v for k, v in e.items() if k not in changed} for e in (
        evaluate["validate#evaluator"], train["validate"]["evaluator"]
    ))  # fmt: skip
    assert ours == theirs
    ours, theirs = (c["postprocessing"]["transforms"] for c in (inference, train["validate"]))
    assert ours[0].pop("transform") == "@preprocessing"
    assert theirs[0].pop("transform") == "@validate#preprocessing"
    # what inference.json adds on demand
    assert [t for t in ours if not t["_target_"].startswith("scripts.results.probabilities.")] == theirs


def test_what_the_overlays_for_several_devices_repeat_is_the_same():
    train, inference = load("train"), load("inference")
    overlays = {kind: load(f"multi_gpu_{kind}") for kind in ("train", "evaluate", "inference")}
    for name in ("finalize", "+initialize"):
        assert overlays["train"][name] == overlays["evaluate"][name] == overlays["inference"][name]
    assert overlays["evaluate"]["validate#dataset#data"]["items"] == train["validate"]["dataset"]["data"]
    assert overlays["inference"]["dataset#data"]["items"] == inference["dataset"]["data"]


@pytest.mark.parametrize(
    ("name", "ids", "size"), [("train", 42, 13_312), ("inference", 38, 8_192), ("evaluate", 7, 2_304)]
)
def test_configs_stay_small(name, ids, size):
    assert len(load(name)) <= ids
    assert (CONFIGS / f"{name}.json").stat().st_size <= size


def test_network_def_is_the_default_network():
    arguments = load("train")["network_def"]
    arguments.pop("_target_")
    network, default = SkipDenseSeg(**arguments), SkipDenseSeg()
    shapes = [{name: t.shape for name, t in n.state_dict().items()} for n in (network, default)]
    assert shapes[0] == shapes[1]


def test_versions_are_those_that_are_pinned():
    metadata = load("metadata")
    listed = (ROOT / "requirements.txt").read_text()
    pinned = dict(re.findall(r'^([\w.-]+)==([\w.]+)(?: ; python_version >= "3.11")?$', listed, re.MULTILINE))
    stated = metadata["required_packages_version"] | {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    assert stated == pinned
    assert metadata["version"] in metadata["changelog"]


def test_top_level_metadata_is_a_link():
    assert (ROOT / "metadata.json").is_symlink()
    assert (ROOT / "metadata.json").resolve() == (CONFIGS / "metadata.json").resolve()


@pytest.mark.parametrize(("config", "kind"), [("train", "train"), ("inference", "infer")])
def test_properties_that_monai_requires(config, kind, dataset, tmp_path):
    folders = {"dataset_dir": str(dataset), "output_dir": str(tmp_path), "bundle_root": str(ROOT)}
    workflow = ConfigWorkflow(str(CONFIGS / f"{config}.json"), workflow_type=kind, **folders)
    workflow.initialize()
    assert workflow.check_properties() == []


def test_metadata_follows_the_official_schema(tmp_path):
    if SCHEMA.exists():
        shutil.copy(SCHEMA, tmp_path / "schema.json")
    try:
        verify_metadata(str(CONFIGS / "metadata.json"), filepath=tmp_path / "schema.json", hash_val=SCHEMA_MD5)
    except URLError as error:
        pytest.skip(f"the schema isn't at hand and MONAI can't fetch it: {error}")


def test_network_takes_and_gives_what_metadata_says():
    for n in (4, 8):
        verify_net_in_out(
            "network_def",
            meta_file=str(CONFIGS / "metadata.json"),
            config_file=str(CONFIGS / "inference.json"),
            device="cpu",
            n=n,
        )


def test_torchscript_export_gives_the_logits_of_the_weights(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript as a whole
        ckpt_export(
            "network_def",
            filepath=str(tmp_path / "model.ts"),
            ckpt_file=str(ROOT / "models" / "model.pt"),
            meta_file=str(CONFIGS / "metadata.json"),
            config_file=str(CONFIGS / "inference.json"),
        )
        exported = torch.jit.load(tmp_path / "model.ts")
    network = SkipDenseSeg().eval()
    network.load_state_dict(torch.load(ROOT / "models" / "model.pt", weights_only=True))
    image = torch.randn(1, 2, 32, 24, 40)
    with torch.no_grad():
        torch.testing.assert_close(exported.eval()(image), network(image))


def test_every_expression_parses_with_no_dataset_present(tmp_path):
    """MONAI Label evaluates all of train.json before it brings its own data."""
    parser = ConfigParser()
    parser.read_config(CONFIGS / "train.json")
    parser["bundle_root"] = str(tmp_path)
    parser.parse()
    assert parser.get_parsed_content("train#dataset#data") == []
    assert parser.get_parsed_content("validate#dataset#data") == []
    assert isinstance(parser.get_parsed_content("train#trainer"), SupervisedTrainer)
    assert isinstance(parser.get_parsed_content("validate#evaluator"), SupervisedEvaluator)


def test_schedule_is_that_of_the_epochs_that_are_trained(dataset):
    """MONAI Label sets those of the trainer, and not `epochs`."""
    parser = ConfigParser()
    parser.read_config(CONFIGS / "train.json")
    parser.update({"dataset_dir": str(dataset), "bundle_root": str(ROOT), "train#trainer#max_epochs": 3})
    train = load("train")
    steps = 3 * train["crops_per_epoch"] / train["batch_size"]
    assert parser.get_parsed_content("lr_scheduler").total_steps == steps


def test_inferer_takes_the_network_it_is_given_where_no_checkpoint_is(tmp_path):
    """As MONAI Label does, which loads weights by itself."""
    parser = ConfigParser()
    parser.read_config(CONFIGS / "inference.json")
    parser.update({"ckpt_dir": str(tmp_path), "precision": "fp32"})
    network, image = SkipDenseSeg().eval(), torch.randn(1, 2, 16, 16, 16)
    with torch.no_grad():
        logits = parser.get_parsed_content("inferer")(image, network)
        torch.testing.assert_close(logits, network(image), rtol=1e-4, atol=1e-4)


def test_no_path_of_this_machine_in_the_configs():
    for path in CONFIGS.rglob("*.*"):
        assert str(Path.home()) not in path.read_text()
        assert "cuda" not in path.read_text()
