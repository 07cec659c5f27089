"""Hostile files run nothing: checkpoints with code in them, and data whose names and texts look like a config's."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT, configured, refused_run, save_subject, save_volume

from scripts.results.tables import read_csv

WEIGHTS = ROOT / "models" / "model.pt"
QUICK = {"epochs": 1, "crops_per_epoch": 2, "batch_size": 1, "picture_interval": 0}


class RunsWhenLoaded:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("name", ["--checkpoints", "--start_from", "--resume"])
def test_checkpoint_with_code_is_refused_and_not_run(dataset, tmp_path, name):
    touched, output = tmp_path / "touched", tmp_path / "output"
    output.mkdir()
    path = output / "last.pt"
    torch.save({"model": torch.load(WEIGHTS, weights_only=True), "x": RunsWhenLoaded(touched)}, path)
    before = path.read_bytes()
    if name == "--checkpoints":
        message = refused_run(dataset, output, checkpoints=str(path))
    else:
        settings = QUICK | ({"start_from": str(path)} if name == "--start_from" else {"resume": True})
        message = refused_run(dataset, output, "train.json", "recipes/robust.json", **settings)
    assert message.startswith(f"{path}: refers to exec, so loading could run code; it wasn't loaded")
    assert path.read_bytes() == before
    assert not touched.exists()
    torch.load(path, weights_only=False)  # the file isn't harmless
    assert touched.exists()


def test_pickle_in_the_place_of_a_scan_is_not_run(tmp_path, pieces):
    touched, data = tmp_path / "touched", tmp_path / "data"
    save_subject(data, "1", pieces[0], labeled=False, suffix=".nii.gz")
    (data / "subject-1-T2.nii.gz").write_bytes(pickle.dumps(RunsWhenLoaded(touched)))
    assert refused_run(data, tmp_path / "output").startswith(f"{data}/subject-1-T2.nii.gz: can't be read")
    assert not touched.exists()


# as a config has them: an expression, a reference, a macro
LIKE_A_CONFIG = ("$open('touched','w')", "@bundle_root", "%configs", "$import os", "{'_target_': 'os.abort'}")


def test_names_of_files_are_no_config(tmp_path, pieces, monkeypatch):
    data, output = tmp_path / "data", tmp_path / "output"
    for subject in LIKE_A_CONFIG:
        save_subject(data, subject, pieces[0], labeled=False, suffix=".nii.gz")
    save_subject(data, "9", pieces[0], suffix=".nii.gz")
    monkeypatch.chdir(tmp_path)
    configured(data, output).run()
    assert sorted(row["subject"] for row in read_csv(output / "volumes.csv")) == sorted(LIKE_A_CONFIG)
    for subject in LIKE_A_CONFIG:
        save_subject(data, subject, pieces[0], suffix=".nii.gz")
    configured(data, output, "train.json", "recipes/robust.json", **QUICK).run()
    assert (output / "model.pt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "output"}


def test_texts_of_a_bids_dataset_are_no_config(tmp_path, pieces, monkeypatch):
    data, output = tmp_path / "data", tmp_path / "output"
    for kind in ("T1", "T2"):
        save_volume(data / "sub-01" / "anat" / f"sub-01_{kind}w.nii.gz", pieces[0][kind])
        (data / "sub-01" / "anat" / f"sub-01_{kind}w.json").write_text(json.dumps({"Manufacturer": LIKE_A_CONFIG[0]}))
    description = {"Name": LIKE_A_CONFIG[0], "BIDSVersion": "1.11.1", "DatasetDOI": LIKE_A_CONFIG[0]}
    (data / "dataset_description.json").write_text(json.dumps(description))
    (data / "participants.tsv").write_text(f"participant_id\tage\nsub-01\t{LIKE_A_CONFIG[0]}\n")
    monkeypatch.chdir(tmp_path)
    configured(data, output).run()
    assert (output / "sub-01" / "anat").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "output"}
