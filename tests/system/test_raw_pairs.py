"""Pairs of which T2 isn't registered to T1, from files to labels."""

from pathlib import Path

import numpy as np
import pytest
from helpers import displaced, read_subject, refusal, refused_run, save_volume, voxels

from scripts.results.tables import read_csv
from scripts.synthesis.contrast import nominal, six_month_subject
from scripts.synthesis.phantom_brains import label_map
from scripts.tissues import Tissue

LAS = np.diag([-1.0, 1.0, 1.0, 1.0])


@pytest.fixture(scope="module")
def brain() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    label = label_map(rng)
    label = np.pad(label[tuple(slice(places.min(), places.max() + 1) for places in np.nonzero(label))], 8)
    return six_month_subject(label, nominal(label, rng), rng) | {"label": label}


def save_pair(folder: Path, subject: str, t1: np.ndarray, t2: np.ndarray, affine: np.ndarray = LAS) -> None:
    folder.mkdir(exist_ok=True)
    save_volume(folder / f"subject-{subject}-T1.nii.gz", t1, LAS)
    save_volume(folder / f"subject-{subject}-T2.nii.gz", t2, affine)


def mean_dice(label: np.ndarray, truth: np.ndarray) -> float:
    pairs = [(label == tissue, truth == tissue) for tissue in Tissue]
    return float(np.mean([2 * np.sum(one & other) / (np.sum(one) + np.sum(other)) for one, other in pairs]))


def test_t2_is_registered_where_it_has_to_be(brain, tmp_path):
    data, output = tmp_path / "data", tmp_path / "out"
    save_pair(data, "prepared", brain["T1"], brain["T2"])
    moved, affine, _ = displaced(brain["T2"], LAS, (10, 0, 0), (15, 0, 0), (1, 1, 1))
    save_pair(data, "raw", brain["T1"], moved, affine)
    save_pair(data, "same-grid", brain["T1"], np.roll(brain["T2"], 4, axis=2))
    noise = np.random.default_rng(0).integers(1, 300, (90, 90, 90)).astype(np.int16)
    save_pair(data, "another", brain["T1"], noise, affine)
    message = refused_run(data, output)
    assert "subject-another-T2.nii.gz: couldn't be registered to" in message
    labels = {name: voxels(output / f"subject-{name}-label.nii.gz") for name in ("prepared", "raw", "same-grid")}
    for name in ("raw", "same-grid"):
        assert mean_dice(labels[name], brain["label"]) > mean_dice(labels["prepared"], brain["label"]) - 0.02, name
    page = (output / "report.html").read_text()
    assert page.count("T2 was registered to T1: turned by") == 2
    assert "T2 was registered to T1: turned by 10." in page or "T2 was registered to T1: turned by 9.9" in page

    strict = tmp_path / "strict"
    message = refused_run(data, strict, prepare=[])
    assert message == "2 subjects are not segmented, see above; fix or remove them"
    np.testing.assert_array_equal(voxels(strict / "subject-prepared-label.nii.gz"), labels["prepared"])
    assert {row["subject"] for row in read_csv(strict / "volumes.csv")} == {"prepared", "same-grid"}


def test_step_that_does_not_exist(tmp_path, brain):
    save_pair(tmp_path / "data", "1", brain["T1"], brain["T2"])
    message = refused_run(tmp_path / "data", tmp_path / "out", prepare="registred")
    assert message == "--prepare registred: must be auto, or a list of brain_mask, registration, or [] for nothing"


def test_t2_that_can_not_be_judged_or_shows_nothing(tmp_path, brain):
    rng = np.random.default_rng(0)
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    coarse = {kind: brain[kind][::2, ::2, ::2] for kind in ("T1", "T2")}
    cases = {
        "unlike, 2 mm": (coarse["T1"], rng.integers(1, 300, (70, 70, 70)).astype(np.int16), affine, "differs from"),
        "constant": (brain["T1"], np.full((80, 80, 80), 7, np.int16), LAS, "the T2 of this subject is constant"),
        "air": (brain["T1"], np.zeros((80, 80, 80), np.int16), LAS, "the T2 of this subject is constant"),
    }
    for name, (t1, t2, grid, message) in cases.items():
        for kind, values in (("T1", t1), ("T2", t2)):
            save_volume(tmp_path / f"subject-{name}-{kind}.nii.gz", values, grid)
        image = [str(tmp_path / f"subject-{name}-{kind}.nii.gz") for kind in ("T1", "T2")]
        assert message in refusal(read_subject, {"image": image}), name
