"""Results tell how they were made, the same run makes the same results, and nothing of a patient goes along."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT, configured, same, save_subject, train_in_process
from processes import two_threads

from scripts.results.provenance import made_by
from scripts.weights import read_checkpoint

VERSION = json.loads((ROOT / "configs" / "metadata.json").read_text())["version"]
WEIGHTS = ROOT / "models" / "model.pt"
SHA256 = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
QUICK = {"epochs": 1, "crops_per_epoch": 2, "batch_size": 1, "picture_interval": 0}
# what a scanner or a converter may leave in a header
OF_A_PATIENT = ("JANE^DOE", "MRN4711", "1999-12-31")


def told(output: Path, kind: str) -> dict[str, str]:
    return json.loads((output / f"{kind}-provenance.json").read_text())


def test_segmentation_tells_with_what_it_was_made(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python", "-m", "monai.bundle", "--val_subjects", "['a']"])
    configured(dataset, tmp_path, "inference.json", subjects=[11], precision="fp32").run()
    found = told(tmp_path, "inference")
    assert found["bundle"].endswith(f"version {VERSION}")
    assert found[f"checkpoint {WEIGHTS}"] == f"SHA-256 {SHA256}"
    metadata = json.loads((ROOT / "configs" / "metadata.json").read_text())
    versions = {"torch": metadata["pytorch_version"], "monai": metadata["monai_version"]}
    for package, version in (versions | metadata["required_packages_version"]).items():
        assert f"{package} {version}" in found["software"]
    assert found["command"] == "python -m monai.bundle --val_subjects \"['a']\""
    assert found["setting subjects"] == "[11]"
    assert found["precision"] == "float32"
    description = nib.load(tmp_path / "subject-11-label.nii.gz").header["descrip"].item().decode()
    assert description == f"infant_brain_mri_skipdenseseg {VERSION}, weights {SHA256[:16]}"


def test_several_checkpoints_are_told_by_all_of_them_in_their_order(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.pt").write_bytes(name.encode())
    paths = [str(tmp_path / f"{name}.pt") for name in "ab"]
    digests = [hashlib.sha256(name).hexdigest() for name in (b"a", b"b")]
    for order in (1, -1):
        together = hashlib.sha256("".join(digests[::order]).encode()).hexdigest()
        assert made_by(paths[::order]).endswith(f", weights {together[:16]}")
    assert len(made_by(paths)) <= 79
    assert made_by([*paths, str(tmp_path / "missing.pt")]) == f"infant_brain_mri_skipdenseseg {VERSION}"


def test_training_and_evaluation_tell_with_what_they_were_made(dataset, tmp_path):
    settings = QUICK | {"ckpt_dir": str(tmp_path), "start_from": str(WEIGHTS)}
    configured(dataset, tmp_path, "train.json", "recipes/robust.json", **settings).run()
    training = told(tmp_path, "training")
    assert training[f"checkpoint {WEIGHTS}"] == f"SHA-256 {SHA256}"
    made = tmp_path / "model.pt"
    assert training[f"weights {made}"] == f"SHA-256 {hashlib.sha256(made.read_bytes()).hexdigest()}"
    assert training["setting synthetic_share"] == "0.25"
    configured(dataset, tmp_path, "train.json", "evaluate.json", run_id="evaluating", ckpt_dir=str(tmp_path)).run()
    assert told(tmp_path, "evaluation")[f"checkpoint {made}"] == training[f"weights {made}"]
    assert told(tmp_path, "training") == training
    configured(dataset, tmp_path, "train.json", "recipes/robust.json", **settings, resume=True).run()
    resumed = told(tmp_path, "training")
    assert resumed.items() >= training.items()
    assert [name.split()[0] for name in resumed.keys() - training.keys()] == ["resumed"]


def test_training_that_found_nothing_to_go_on_with_tells_of_itself_alone(dataset, tmp_path):
    (tmp_path / "training-provenance.json").write_text(json.dumps({"date": "2001-01-01", "setting seed": "77"}))
    configured(dataset, tmp_path, "train.json", **QUICK, resume=True).run()
    found = told(tmp_path, "training")
    assert found["setting seed"] == "0"
    assert found["date"] > "2001-01-02"
    assert not [name for name in found if name.startswith("resumed")]


@pytest.fixture(scope="module")
def first(dataset, tmp_path_factory) -> Iterator[dict[str, torch.Tensor]]:
    """The network of a training on two threads, as those that are compared with it."""
    with two_threads():
        yield trained(dataset, tmp_path_factory.mktemp("first"))


def trained(dataset: Path, output: Path, **settings: object) -> dict[str, torch.Tensor]:
    train_in_process(dataset, output, epochs=1, **settings)
    return read_checkpoint(str(output / "last.pt"))["model"]


def preparing(workers: int) -> dict[str, int]:
    return {"train#dataset#num_workers": workers, "validate#dataset#num_workers": workers}


LOADING = {"train#dataloader#num_workers": 2}
WAYS = {
    "one process prepares": pytest.param(preparing(0), marks=pytest.mark.slow),
    "three threads prepare": pytest.param(preparing(3), marks=pytest.mark.slow),
    "two workers load": pytest.param(LOADING, marks=pytest.mark.slow),
    "two workers load from disk": LOADING | {"train#dataset#in_memory": False},
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_same_seed_gives_the_same_network_to_the_last_bit(dataset, first, tmp_path, settings):
    assert same(first, trained(dataset, tmp_path, **settings))


@pytest.mark.slow
def test_another_seed_gives_another_network(dataset, first, tmp_path):
    assert not same(first, trained(dataset, tmp_path, seed=1))


def save_telling_subject(directory: Path, brain: dict[str, np.ndarray], suffix: str) -> None:
    """Labelled subjects 1 and 2 in whose headers a patient's name, number or birthday stand wherever there is room."""
    for subject in ("1", "2"):
        save_subject(directory, subject, brain, suffix=suffix)
    for path in directory.glob(f"*{suffix}"):
        image = nib.load(path, mmap=False)
        values, header = np.asarray(image.dataobj), image.header
        texts = itertools.cycle(OF_A_PATIENT)
        for field in header:
            if header[field].dtype.kind == "S" and header[field].dtype.itemsize >= max(map(len, OF_A_PATIENT)):
                header[field] = next(texts).encode()
        if suffix != ".hdr":
            header.extensions.append(nib.nifti1.Nifti1Extension("comment", " ".join(OF_A_PATIENT).encode()))
        nib.save(type(image)(values, image.affine if suffix != ".hdr" else None, header), path)


def content(path: Path) -> bytes:
    """What a file holds, unpacked."""
    with nib.openers.Opener(str(path)) as file:
        return file.read()


@pytest.mark.parametrize("suffix", [".hdr", pytest.param(".nii.gz", marks=pytest.mark.slow)])
def test_nothing_of_a_patient_goes_from_headers_into_results(pieces, tmp_path, suffix):
    data, output = tmp_path / "data", tmp_path / "output"
    save_telling_subject(data, pieces[0], suffix)
    assert [path for path in data.iterdir() if b"MRN4711" in content(path)]
    for label_suffix in (".hdr", ".nii"):
        settings = {"label_suffix": label_suffix, "probabilities": True, "uncertainty": "network"}
        configured(data, output, "inference.json", subjects=[1], **settings).run()
    configured(data, output, "train.json", val_subjects=[1], **QUICK | {"picture_interval": 1}).run()
    configured(data, output, "train.json", "evaluate.json", run_id="evaluating", val_subjects=[1]).run()
    written = [path for path in output.rglob("*") if path.is_file()]
    assert {".hdr", ".nii", ".gz", ".png", ".csv", ".json", ".html", ".pt"} <= {path.suffix for path in written}
    for path in written:
        assert not [text for text in OF_A_PATIENT if text.encode() in content(path)], path
