"""Results tell how they were made, the same run makes the same results, and nothing of a patient goes along."""

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, configured, save_subject
from test_resume import same, train

from scripts.provenance import made_by
from scripts.weights import read_checkpoint

VERSION = json.loads((ROOT / "configs" / "metadata.json").read_text())["version"]
WEIGHTS = ROOT / "models" / "model.pt"
SHA256 = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
QUICK = {"epochs": 1, "crops_per_epoch": 2, "batch_size": 1}
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
    assert made_by(paths).endswith(hashlib.sha256(b"ab").hexdigest()[:16])
    assert made_by(paths[::-1]).endswith(hashlib.sha256(b"ba").hexdigest()[:16])
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


def test_same_seed_gives_the_same_network_to_the_last_bit_by_any_number_of_workers(dataset, tmp_path):
    runs = {"first": {}, "again": {}, "other seed": {"seed": 1}}
    for workers in (0, 3):
        runs[f"{workers} workers"] = {"train#dataset#num_workers": workers, "validate#dataset#num_workers": workers}
    runs["2 loading workers"] = {"train#dataloader#num_workers": 2}
    runs["2 loading workers, from disk"] = {"train#dataloader#num_workers": 2, "train#dataset#in_memory": False}
    for name, settings in runs.items():
        train(dataset, tmp_path / name, epochs=1, **settings)
    first, *others = (read_checkpoint(str(tmp_path / name / "last.pt"))["model"] for name in runs)
    assert [same(first, other) for other in others] == [name != "other seed" for name in list(runs)[1:]]


def save_telling_subject(directory: Path, brain: dict[str, np.ndarray], suffix: str) -> None:
    """A subject in whose headers a patient's name, number and birthday stand wherever there is room."""
    save_subject(directory, "1", brain, suffix=suffix)
    name, number, birthday = (text.encode() for text in OF_A_PATIENT)
    for path in directory.glob(f"*{suffix}"):
        image = nib.load(path, mmap=False)
        values, header = np.asarray(image.dataobj), image.header
        header["descrip"], header["db_name"], header["aux_file"] = name, number, birthday
        if suffix == ".hdr":
            header["patient_id"], header["exp_date"], header["scannum"] = number, birthday, name[:9]
        else:
            header["intent_name"] = number
            header.extensions.append(nib.nifti1.Nifti1Extension("comment", b" ".join((name, number, birthday))))
        nib.save(type(image)(values, image.affine if suffix != ".hdr" else None, header), path)


def content(path: Path) -> bytes:
    """What a file holds, unpacked."""
    with nib.openers.Opener(str(path)) as file:
        return file.read()


@pytest.mark.parametrize("suffix", [".hdr", ".nii.gz"])
def test_nothing_of_a_patient_goes_from_headers_into_results(brains, tmp_path, suffix):
    data, output = tmp_path / "data", tmp_path / "output"
    save_telling_subject(data, brains[0], suffix)
    assert [path for path in data.iterdir() if b"MRN4711" in content(path)]
    for label_suffix in (".hdr", ".nii"):
        settings = {"label_suffix": label_suffix, "probabilities": True, "uncertainty": "network"}
        configured(data, output, "inference.json", subjects=[1], **settings).run()
    configured(data, output, "train.json", "evaluate.json", run_id="evaluating", val_subjects=[1]).run()
    written = [path for path in output.rglob("*") if path.is_file()]
    assert {".hdr", ".nii", ".gz", ".png", ".csv", ".json", ".html"} <= {path.suffix for path in written}
    for path in written:
        assert not [text for text in OF_A_PATIENT if text.encode() in content(path)], path
