"""Results of BIDS datasets, judged by the official validator."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, bids_errors, bids_folder, read_subject, save_bids
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from scripts.data.subjects import SubjectFolder
from scripts.errors import InputError
from scripts.files import whole_files
from scripts.results.bids_derivative import LABELS, BidsDerivative, source_link, volume_table
from scripts.results.label_images import LabelSaver
from scripts.results.metrics import VolumeTable
from scripts.results.paths import result_path
from scripts.results.probabilities import ProbabilitySaver, UncertaintySaver
from scripts.results.sidecars import DESCRIPTIONS
from scripts.results.tables import read_csv
from scripts.results.writers import BackgroundWriter
from scripts.tissues import Tissue

STEMS = ("sub-01", "sub-02_ses-a_run-1", "sub-02_ses-a_run-2", "sub-02_ses-b_acq-mprage")
NAME = json.loads((ROOT / "configs" / "metadata.json").read_text())["name"]


class PictureStub(BackgroundWriter):
    """Writes a file where PictureSaver puts its picture, in less time."""

    def write(self, item: dict[str, Any]) -> None:
        path = result_path(self.output_dir, item, "label", ".png")
        with whole_files(path.parent) as temporary:
            (temporary / path.name).write_bytes(b"a picture")


def segment(dataset: Path, output: Path, subjects: Any = None, suffix: str = ".nii.gz", source: str = "") -> None:
    """What inference does with the subjects of a dataset, the network aside."""
    found = SubjectFolder(str(dataset))
    chosen = found.to_segment(subjects)
    engine = Engine(lambda engine, batch: None)

    @engine.on(Events.ITERATION_COMPLETED)
    def label() -> None:
        subject = read_subject(chosen[engine.state.iteration - 1])
        values = torch.arange(subject["t1"].numel()).remainder(4).reshape(subject["t1"].shape).to(torch.uint8)
        engine.state.batch = [subject]
        maps = {"probabilities": torch.full((4, 6, 7, 8), 0.25), "uncertainty": torch.ones(1, 6, 7, 8)}
        engine.state.output = [{"pred": MetaTensor(values, affine=subject["t1"].affine)} | maps]

    handlers = [
        BidsDerivative(
            str(output),
            str(dataset),
            source or source_link(str(dataset), str(output)),
            chosen,
            found.reasons_left_out(subjects),
            suffix,
        ),
        volume_table(str(output), chosen),
        LabelSaver(str(output), suffix),
        ProbabilitySaver(str(output)),
        UncertaintySaver(str(output)),
        PictureStub(str(output)),
    ]
    for handler in handlers:
        handler.attach(engine)
    engine.run(range(len(chosen)))


@pytest.fixture
def tiny() -> dict[str, np.ndarray]:
    values = np.arange(336, dtype=np.int16).reshape(6, 7, 8)
    return {"T1": values, "T2": values[::-1]}


@pytest.fixture
def data(tmp_path, tiny) -> Path:
    for stem in STEMS:
        save_bids(tmp_path / "data", stem, tiny, DatasetDOI="doi:10.0000/small.brains")
    return tmp_path / "data"


def test_scans_and_results_are_valid(data, capsys):
    output = data / "derivatives" / "skipdenseseg"
    (data / "sub-03" / "anat").mkdir(parents=True)
    shutil.copy(data / "sub-01" / "anat" / "sub-01_T1w.nii.gz", data / "sub-03" / "anat" / "sub-03_T1w.nii.gz")
    segment(data, output)
    assert bids_errors(data) == bids_errors(output) == set()
    assert "not segmented: sub-03 has no T2w" in capsys.readouterr().out
    for stem in STEMS:
        names = [f"{stem}_{ending}" for ending in (
            "desc-skipdenseseg_dseg", "label-CSF_desc-skipdenseseg_probseg", "label-GM_desc-skipdenseseg_probseg",
            "label-WM_desc-skipdenseseg_probseg", "desc-skipdenseseg_uncertainty",
        )]  # fmt: skip
        written = {path.name for path in (output / bids_folder(stem)).iterdir() if path.name.startswith(f"{stem}_")}
        assert written == {f"{name}{suffix}" for name in names for suffix in (".nii.gz", ".json")}
    sidecar = json.loads((output / bids_folder(STEMS[1]) / f"{STEMS[1]}_desc-skipdenseseg_dseg.json").read_text())
    sources = [f"bids:source:sub-02/ses-a/anat/{STEMS[1]}_{kind}.nii.gz" for kind in ("T1w", "T2w")]
    assert (sidecar["Sources"], sidecar["SpatialReference"], sidecar["Manual"]) == (sources, sources[0], False)
    description = json.loads((output / "dataset_description.json").read_text())
    assert description["DatasetLinks"] == {"source": "../.."}
    assert (output / "../..").resolve() == data.resolve()
    assert description["SourceDatasets"] == [{"DOI": "doi:10.0000/small.brains"}]
    generator = description["GeneratedBy"][0]
    metadata = json.loads((ROOT / "configs" / "metadata.json").read_text())
    assert (generator["Name"], generator["Version"]) == (metadata["name"], metadata["version"])


def test_the_validator_complains(data):
    """Otherwise it would say nothing of what it found valid."""
    output = data.parent / "output"
    segment(data, output, ["sub-01"])
    (data / "sub-01" / "anat" / "sub-01_T1w.nii.gz").rename(data / "sub-01" / "anat" / "sub-01_scan.nii.gz")
    assert {place for _, place in bids_errors(data)} == {"/sub-01/anat/sub-01_scan.nii.gz"}
    (output / ".bidsignore").unlink()
    shutil.move(output / "desc-skipdenseseg_dseg.tsv", output / "labels.tsv")
    places = {place for _, place in bids_errors(output)}
    assert {"/labels.tsv", "/volumes.tsv", "/sub-01/figures/"} <= places


def test_tables(data, tmp_path):
    output = tmp_path / "output"
    segment(data, output)
    rows = read_csv(output / "volumes.tsv")
    assert [(row["subject"], row["participant_id"], row["session_id"]) for row in rows] == [
        (STEMS[0], "sub-01", "n/a"),
        (STEMS[1], "sub-02", "ses-a"),
        (STEMS[2], "sub-02", "ses-a"),
        (STEMS[3], "sub-02", "ses-b"),
    ]
    assert {row["csf_ml"] for row in rows} == {str(6 * 7 * 8 / 4 / 1000)}
    assert set(json.loads((output / "volumes.json").read_text())) == set(rows[0])
    assert b"\r" not in (output / "volumes.tsv").read_bytes()
    labels = read_csv(output / "desc-skipdenseseg_dseg.tsv")
    assert {row["abbreviation"]: int(row["index"]) for row in labels} == {"BG": 0} | {t.name: t.value for t in Tissue}
    # BIDS's own list has GM, WM, CSF in this order
    assert [label["mapping"] for label in LABELS] == [0, 3, 1, 2]


def test_every_kind_of_result_is_described():
    assert {f"probability-{tissue.name.lower()}" for tissue in Tissue} | {
        *("label", "uncertainty", "brain-mask", "T2-registered")
    } == set(DESCRIPTIONS)


def test_again_and_for_more_subjects(data, tmp_path):
    output = tmp_path / "output"
    segment(data, output, "01")
    for name in (".bidsignore", "volumes.json", "desc-skipdenseseg_dseg.tsv"):
        (output / name).write_text("mine")
    description = json.loads((output / "dataset_description.json").read_text())
    (output / "dataset_description.json").write_text(json.dumps(description | {"Authors": ["A", "B"]}))
    segment(data, output, ["sub-02_ses-b", "01"])
    assert [row["subject"] for row in read_csv(output / "volumes.tsv")] == [STEMS[3], STEMS[0]]
    for name in (".bidsignore", "volumes.json", "desc-skipdenseseg_dseg.tsv"):
        assert (output / name).read_text() == "mine"
    assert json.loads((output / "dataset_description.json").read_text())["Authors"] == ["A", "B"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"Name": "fMRIPrep", "GeneratedBy": [{"Name": "fMRIPrep"}]}', "is that of another dataset; choose another"),
        ('{"Name": "raw"}', "is that of another dataset"),
        ("no JSON", "is that of another dataset"),
        ("[]", "is that of another dataset"),
        ("[" * 100_000, "is that of another dataset"),
        (json.dumps({"GeneratedBy": [{"Name": NAME}], "DatasetLinks": {"source": {}}}), "is that of another dataset"),
        (
            json.dumps({"GeneratedBy": [{"Name": NAME}], "DatasetLinks": {"source": "x" * 10_000}}),
            "says that the scans lie in x{200}, not in",
        ),
        (
            json.dumps({"GeneratedBy": [{"Name": NAME}], "DatasetLinks": {"source": "file:///elsewhere"}}),
            "says that the scans lie in file:///elsewhere, not in file:///.*/data; .* correct source in its",
        ),
    ],
)  # fmt: skip
def test_another_dataset_is_left_as_it_is(data, tmp_path, text, message):
    output = tmp_path / "output"
    output.mkdir()
    (output / "dataset_description.json").write_text(text)
    with pytest.raises(InputError, match=f"dataset_description.json: {message}"):
        segment(data, output)
    assert {path.name: path.read_text() for path in output.iterdir()} == {"dataset_description.json": text}


def test_folder_in_the_place_of_a_description(data, tmp_path):
    (tmp_path / "output" / "dataset_description.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"dataset_description.json: is that of another dataset; choose another"):
        segment(data, tmp_path / "output")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"DatasetDOI": {"$ref": 1}}', f'{{"DatasetDOI": "{"x" * 10_000}"}}', None]
)
def test_odd_description_of_the_scans_is_passed_over(data, tmp_path, text):
    path = data / "dataset_description.json"
    path.unlink()
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    segment(data, tmp_path / "output", "01")
    description = json.loads((tmp_path / "output" / path.name).read_text())
    assert description["SourceDatasets"] == [{"URL": data.as_uri()}]
    assert bids_errors(tmp_path / "output") == set()


def test_suffixes(data, tmp_path):
    with pytest.raises(InputError, match=r"label_suffix must be '.nii.gz' or '.nii' for a BIDS dataset, got '.hdr'"):
        segment(data, tmp_path / "output", suffix=".hdr")
    segment(data, tmp_path / "output", "01", suffix=".nii")
    assert (tmp_path / "output" / "sub-01" / "anat" / "sub-01_desc-skipdenseseg_dseg.nii").exists()
    assert (tmp_path / "output" / "sub-01" / "anat" / "sub-01_desc-skipdenseseg_dseg.json").exists()
    assert bids_errors(tmp_path / "output") == set()


def test_subjects_of_the_other_layout_get_no_bids_files(tmp_path):
    subjects = [{"subject": "sub-01", "image": ["a", "b"]}]
    assert type(volume_table(str(tmp_path), subjects)) is VolumeTable
    assert volume_table(str(tmp_path), subjects).path.name == "volumes.csv"
    engine = Engine(lambda engine, batch: None)
    BidsDerivative(str(tmp_path), "", "", subjects, {}, ".hdr").attach(engine)
    engine.run([0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dataset", "output", "expected"),
    [
        ("/data", "/data/derivatives/x", "../.."),
        ("/data", "/results", "file:///data"),
        ("/my data", "/results", "file:///my%20data"),
        ("s3://bucket/data", "s3://bucket/data/derivatives/x", "../.."),
        ("s3://bucket/data", "/results", "s3://bucket/data"),
        ("/data", "s3://bucket/results", "file:///data"),
    ],
)
def test_where_the_scans_lie(dataset, output, expected):
    assert source_link(dataset, output) == expected
