"""Training and scoring on HDF5 files."""

import pytest
from helpers import configured
from processes import succeeds, training

from scripts.data.subjects import SubjectFolder
from scripts.results.tables import read_csv


@pytest.mark.slow
def test_training_on_hdf5_files(hdf5_prepared, tmp_path):
    succeeds(*training(hdf5_prepared, tmp_path))
    assert (tmp_path / "model.pt").exists()
    assert [s["subject"] for s in SubjectFolder(str(hdf5_prepared)).training([9])] == ["1", "2"]


def test_scores_are_those_of_the_images(hdf5_scans, hdf5_prepared, tmp_path):
    settings = {"run_id": "evaluating", "val_subjects": [1, 9], "precision": "fp32"}
    for folder, name in ((hdf5_prepared, "hdf5"), (hdf5_scans, "images")):
        configured(folder, tmp_path / name, "train.json", "evaluate.json", **settings).run()
    of_hdf5, of_images = (read_csv(tmp_path / folder / "metrics.csv") for folder in ("hdf5", "images"))
    assert [row.pop("subject") for row in of_hdf5] == [row.pop("subject") for row in of_images] == ["1", "9"]
    for ours, expected in zip(of_hdf5, of_images, strict=True):
        assert {k: float(v) for k, v in ours.items()} == pytest.approx(
            {k: float(v) for k, v in expected.items()}, abs=1e-6
        )
        assert 0.5 < float(ours["dice_mean"]) < 1
