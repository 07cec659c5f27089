"""Training and scoring on HDF5 files."""

from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, configured, save_subject, save_volume
from processes import QUICK, bundle

from scripts.data.subjects import training_subjects
from scripts.results.tables import read_csv

TRAIN = str(ROOT / "configs" / "train.json")
# more on some sides than the margin of 32, less on others
SURROUNDINGS = ((40, 0), (3, 50), (33, 20))


@pytest.fixture(scope="module")
def scans(tmp_path_factory, brains) -> Path:
    """Labelled 1, 9 and, turned and with finer voxels, 2; unlabelled 11. To be read only."""
    directory = tmp_path_factory.mktemp("scans")
    wide = {kind: np.pad(values, SURROUNDINGS) for kind, values in brains[0].items()}
    save_subject(directory, "1", wide)
    save_subject(directory, "9", brains[1])
    save_subject(directory, "11", brains[1], labeled=False)
    turned_affine = np.array([[0, 0, 1, 0], [0, -1, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 1.0]])
    for kind, values in wide.items():
        save_volume(
            directory / f"subject-2-{kind}.nii.gz", np.repeat(values, 2, axis=2).transpose(2, 1, 0), turned_affine
        )
    return directory


@pytest.fixture(scope="module")
def prepared(scans, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("prepared")
    result = bundle("prepare_hdf5", "--dataset_dir", str(scans), "--output_dir", str(output), module="scripts")
    assert result.returncode == 0, result.stderr
    assert f"HDF5 files: 2 for training in {output}/data_train_no_cut, 1 for validation in" in result.stdout
    assert "1 subjects without a label left out" in result.stdout
    return output


@pytest.mark.slow
def test_training_on_hdf5_files(prepared, tmp_path):
    result = bundle(
        *("run", "training", "--config_file", TRAIN, "--dataset_dir", str(prepared)),
        *("--output_dir", str(tmp_path), "--ckpt_dir", str(tmp_path), *QUICK),
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "model.pt").exists()
    assert [s["subject"] for s in training_subjects(str(prepared), [9])] == ["1", "2"]


def test_scores_are_those_of_the_images(scans, prepared, tmp_path):
    settings = {"run_id": "evaluating", "val_subjects": [1, 9], "precision": "fp32"}
    for folder, name in ((prepared, "hdf5"), (scans, "images")):
        configured(folder, tmp_path / name, "train.json", "evaluate.json", **settings).run()
    of_hdf5, of_images = (read_csv(tmp_path / folder / "metrics.csv") for folder in ("hdf5", "images"))
    assert [row.pop("subject") for row in of_hdf5] == [row.pop("subject") for row in of_images] == ["1", "9"]
    for ours, expected in zip(of_hdf5, of_images, strict=True):
        assert {k: float(v) for k, v in ours.items()} == pytest.approx(
            {k: float(v) for k, v in expected.items()}, abs=1e-6
        )
        assert 0.5 < float(ours["dice_mean"]) < 1
