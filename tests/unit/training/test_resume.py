import functools
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose
from torch.nn.functional import cross_entropy

from scripts.errors import InputError
from scripts.training.resume import ResumableTraining, describe, first_difference


def test_settings_of_a_loss_that_is_a_function():
    partials = [functools.partial(cross_entropy, label_smoothing=smoothing) for smoothing in (0.1, 0.4)]
    first, second = map(describe, partials)
    assert first_difference("loss", first, second) == ("loss label_smoothing", 0.1, 0.4)
    weighted = [torch.nn.CrossEntropyLoss(torch.tensor([1.0, weight])) for weight in (1, 2)]
    assert describe(weighted[0]) != describe(weighted[1])


def test_what_an_object_was_made_with_is_the_same_before_and_after_it_is_used():
    config = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "train.json"))
    steps = config.get_parsed_content("train#deterministic_transforms")
    before = describe(steps)
    affine = torch.diag(torch.tensor([-1.0, 1.3, 1, 1]))
    values = torch.rand(2, 40, 41, 42)
    Compose(steps[4:])({"image": MetaTensor(values, affine), "label": MetaTensor(values[:1].round(), affine)})
    assert describe(steps) == before


def test_object_that_leads_back_to_itself_is_told():
    outer, inner = SimpleNamespace(side=3), SimpleNamespace(kept=torch.float32)
    outer.inner, inner.outer = inner, outer
    expected = {"kind": "SimpleNamespace", "kept": "torch.float32", "outer": {"kind": "SimpleNamespace"}}
    assert describe([outer, len]) == [{"kind": "SimpleNamespace", "side": 3, "inner": expected}, "len"]


def test_processes_that_would_resume_from_different_epochs_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("scripts.training.resume.gathered", lambda items: [*items, 3])
    engine = Engine(lambda engine, batch: None)
    training = ResumableTraining(
        str(tmp_path / "last.pt"), True, 0, {}, str(tmp_path / "model.pt"), engine, torch.nn.Linear(1, 1)
    )
    with pytest.raises(InputError, match=r"last.pt: isn't the same for all processes, .* after epochs \[0, 3\]"):
        training.resume_training(engine)
