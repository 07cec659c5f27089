"""Pictures of the validation, and MLflow as `pip install` brings it, in an environment of its own: to import it, as
MONAI does wherever it is there, takes more than a second."""

import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, tensorboard_log
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from scripts.errors import InputError
from scripts.settings import require_tracking_package
from scripts.training.tracking import PictureLog, run_name, with_run

PAGE = "docs/experiment_tracking.md"


def brain(shape=(20, 24, 22)) -> MetaTensor:
    values = torch.zeros(1, *shape)
    values[:, 2:-2, 2:-2, 2:-2] = torch.arange(1, 1 + shape[0] - 4)[:, None, None] * 10.0
    return MetaTensor(values, affine=torch.eye(4))


def validate(log: PictureLog, epoch: int, item: dict) -> None:
    state = SimpleNamespace(epoch=epoch, batch=[item], output=[{"pred": item["label"], "label": item["label"]}])
    log.draw(SimpleNamespace(state=state))


def test_pictures_come_no_closer_than_the_interval(tmp_path):
    item = {"subject": "9", "t1": brain(), "label": (brain() > 0) * 2}
    with SummaryWriter(str(tmp_path)) as writer:
        log = PictureLog(writer, interval=10)
        for epoch in (3, 6, 9, 12, 13, 25):
            validate(log, epoch, item)
    pictures = tensorboard_log(tmp_path).Images("validation/subject-9")
    assert [picture.step for picture in pictures] == [3, 13, 25]
    assert np.asarray(Image.open(BytesIO(pictures[0].encoded_image_string))).std() > 10


def test_picture_of_a_subject_without_id(tmp_path):
    """As MONAI Label trains."""
    t1 = brain()
    t1.meta["filename_or_obj"] = "scans/upload.nii"
    with SummaryWriter(str(tmp_path)) as writer:
        validate(PictureLog(writer, interval=1), 1, {"t1": t1, "label": (t1 > 0) * 2})
    assert len(tensorboard_log(tmp_path).Images("validation/upload")) == 1


def test_picture_of_a_validation_on_a_part_of_the_volume(tmp_path):
    part = brain()[:, 2:18, 2:18, 2:18]
    item = {"subject": "9", "t1": brain(), "image": torch.cat([part, part]) - 50, "label": (part > 0) * 3}
    with SummaryWriter(str(tmp_path)) as writer:
        validate(PictureLog(writer, interval=1), 1, item)
    (picture,) = tensorboard_log(tmp_path).Images("validation/subject-9")
    assert np.asarray(Image.open(BytesIO(picture.encoded_image_string))).std() > 10


@pytest.mark.parametrize(("interval", "drawn"), [(0, False), (5, True)])
def test_pictures_can_be_left_out(tmp_path, interval, drawn):
    parser = ConfigParser(json.loads((ROOT / "configs" / "train.json").read_text()))
    parser.update({"picture_interval": interval, "output_dir": str(tmp_path), "dataset_dir": str(tmp_path)})
    handlers = parser.get_parsed_content("validate#handlers")
    assert any(isinstance(handler, PictureLog) for handler in handlers) == drawn


def test_missing_package_is_named_with_its_version(monkeypatch):
    monkeypatch.setattr("scripts.settings.find_spec", lambda name: None)
    require_tracking_package(["run", "training", "--config_file", "configs/train.json"])
    with pytest.raises(InputError, match="--tracking mlflow: a package is missing; pip install mlflow==") as caught:
        require_tracking_package(["run", "training", "--config_file", "configs/train.json", "--tracking", "mlflow"])
    assert str(caught.value).split("; ")[1] in (ROOT / PAGE).read_text().splitlines()


def test_run_to_go_on_with_is_of_its_kind_and_folder(monkeypatch, tmp_path):
    def run(name: str, folder: Path) -> SimpleNamespace:
        data = SimpleNamespace(tags={"folder": str(folder)})
        return SimpleNamespace(info=SimpleNamespace(run_name=name), data=data)

    runs = [run("evaluation-2", tmp_path), run("training-2", tmp_path / "other"), run("training-1", tmp_path)]
    client = SimpleNamespace(
        get_experiment_by_name=lambda name: SimpleNamespace(experiment_id=0), search_runs=lambda *arguments: runs
    )
    monkeypatch.setattr("scripts.training.tracking.mlflow", SimpleNamespace(MlflowClient=lambda uri: client))
    arguments = {"folder": str(tmp_path), "tracking_uri": "sqlite:///x.db", "experiment_name": "x", "resume": True}
    assert run_name("training", **arguments) == "training-1"
    assert run_name("inference", **arguments).startswith("inference-20")
    monkeypatch.setenv("RANK", "1")
    assert run_name("training", **arguments).startswith("training-20")


def test_untracked_handlers_stay_as_they_are():
    handlers = [object(), object()]
    assert with_run(handlers, "eval", {}, []) == handlers
