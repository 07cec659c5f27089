from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tensorboard_log
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.handlers import TensorBoardStatsHandler
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from scripts.training.progress import PictureLog, Progress

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


@pytest.mark.parametrize(("rank", "interval", "drawn", "logged"), [(0, 0, 0, 2), (0, 5, 1, 2), (1, 5, 0, 0)])
def test_first_process_logs_and_draws(tmp_path, monkeypatch, rank, interval, drawn, logged):
    attached = []
    for kind in (PictureLog, TensorBoardStatsHandler):
        monkeypatch.setattr(kind, "attach", lambda self, engine: attached.append(type(self)))
    monkeypatch.setenv("RANK", str(rank))
    trainer, validator = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)
    Progress(str(tmp_path), validator, interval).attach(trainer)
    assert (attached.count(PictureLog), attached.count(TensorBoardStatsHandler)) == (drawn, logged)
    assert bool(list(tmp_path.iterdir())) == (rank == 0)
