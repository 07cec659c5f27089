"""A BIDS dataset segmented by the command."""

import json
import shutil

import fsspec
import nibabel as nib
import numpy as np
import pytest
from helpers import ROOT, bids_errors, bids_folder, configured, refused_run, save_bids
from processes import assert_one_line, bundle, s3_server, segmenting, server_environment

from scripts.results.tables import read_csv
from scripts.synthesis.contrast import nominal, six_month_subject
from scripts.synthesis.phantom_brains import label_map

STEMS = ("sub-01", "sub-02_ses-a_run-1", "sub-02_ses-a_run-2", "sub-02_ses-b_acq-mprage")


def test_the_config(tmp_path, monkeypatch, capsys):
    """As the output of a pipeline that masks nothing: a session with a mask, and one not asked for."""
    monkeypatch.chdir(ROOT)
    data, rng = tmp_path / "data", np.random.default_rng(1)
    scans = {kind: rng.integers(1, 1000, (20, 21, 22)).astype(np.int16) for kind in ("T1", "T2")}
    for stem in ("sub-01_ses-a_desc-preproc", "sub-02_ses-a_desc-preproc"):
        save_bids(data, stem, scans, DatasetType="derivative", GeneratedBy=[{"Name": "Preprocessing"}])
        for kind in ("T1w", "T2w"):
            (data / bids_folder(stem) / f"{stem}_{kind}.json").write_text('{"SkullStripped": false}')
    mask = np.zeros((20, 21, 22), np.uint8)
    mask[5:15, 5:15, 5:15] = 1
    affine = np.diag([-1.0, 1, 1, 1])
    nib.save(nib.Nifti1Image(mask, affine), data / "sub-01/ses-a/anat/sub-01_ses-a_desc-brain_mask.nii.gz")
    output = data / "derivatives" / "skipdenseseg"
    configured(data, output, subjects=["01"]).run()
    told = capsys.readouterr().out  # with the log
    assert "sub-02" not in told
    stem = "sub-01_ses-a_desc-skipdenseseg_dseg"
    label = np.asarray(nib.load(output / "sub-01/ses-a/anat" / f"{stem}.nii.gz").dataobj)
    assert (label[mask == 0] == 0).all()
    assert label.any()
    sidecar = json.loads((output / "sub-01/ses-a/anat" / f"{stem}.json").read_text())
    assert [source.rsplit("_")[-1] for source in sidecar["Sources"]] == ["T1w.nii.gz", "T2w.nii.gz", "mask.nii.gz"]
    assert (output / "sub-01/ses-a/figures" / f"{stem}.png").stat().st_size > 10_000
    report = (output / "report.html").read_text()
    assert "T1: sub-01_ses-a_desc-preproc_T1w.nii.gz" in report
    assert "mask: sub-01_ses-a_desc-brain_mask.nii.gz" in report
    assert bids_errors(output) == set()


def test_good_bad_and_incomplete_subjects(pieces, tmp_path, capsys):
    """A file of another subject and a damaged scan make the command fail in the end; a T2w that isn't there doesn't."""
    data, output = tmp_path / "data", tmp_path / "output"
    for subject in "1234":
        save_bids(data, f"sub-{subject}", pieces[0])
    (data / "sub-1/anat/sub-2_T1w.nii.gz").touch()
    (data / "sub-2/anat/sub-2_T1w.nii.gz").write_bytes(b"damaged")
    (data / "sub-3/anat/sub-3_T2w.nii.gz").unlink()
    assert refused_run(data, output) == "2 subjects are not segmented, see above; fix or remove them"
    told = capsys.readouterr().out
    for reason in (
        f"{data}/sub-1/anat/sub-2_T1w.nii.gz: its name",
        f"{data}/sub-2/anat/sub-2_T1w.nii.gz: can't",
        "sub-3 has",
    ):
        assert told.count(f"not segmented: {reason}") == 1
    assert [path.name for path in output.glob("**/*_dseg.nii.gz")] == ["sub-4_desc-skipdenseseg_dseg.nii.gz"]
    message = refused_run(data, tmp_path / "stopped", stop_at_bad_subject=True)
    assert "its name says sub-2, its folder sub-1" in message
    assert not (tmp_path / "stopped").exists()


@pytest.mark.slow
def test_errors_end_in_one_line(pieces, tmp_path):
    save_bids(tmp_path / "data", "sub-01", pieces[0])
    for output, arguments, message in (
        (tmp_path / "data" / "x", [], "lies in the dataset"),
        (tmp_path / "out", ["--subjects", "02"], "names subject 02, which isn't there; choose from sub-01"),
        (tmp_path / "out", ["--label_suffix", ".hdr"], "for a BIDS dataset"),
        (tmp_path / "data2" / "derivatives" / "x", [], "is that of another dataset"),
    ):
        (tmp_path / "data2" / "derivatives" / "x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data2" / "derivatives" / "x" / "dataset_description.json").write_text("{}")
        assert_one_line(bundle(*segmenting(tmp_path / "data", output, *arguments)), message)
        assert not list(output.rglob("*.nii.gz"))


@pytest.mark.slow
def test_several_devices_and_a_server(pieces, tmp_path, monkeypatch):
    """Two processes share out a dataset in a bucket, and write into its `derivatives`."""
    data = tmp_path / "data"
    for stem in STEMS[:3]:
        save_bids(data, stem, pieces[0])
    (data / "sub-01" / "func").mkdir()
    (data / "sub-01" / "func" / "sub-01_task-rest_bold.nii.gz").write_bytes(bytes(1000))
    with s3_server() as port:
        for name, value in server_environment(port).items():
            monkeypatch.setenv(name, value)
        s3 = fsspec.filesystem(
            "s3", endpoint_url=server_environment(port)["AWS_ENDPOINT_URL"], use_listings_cache=False
        )
        s3.mkdir("bucket")
        s3.put(f"{data}/", "bucket/data", recursive=True)
        configs = "['configs/inference.json','configs/multi_gpu_inference.json']"
        output = "s3://bucket/data/derivatives/skipdenseseg"
        places = ("--dataset_dir", "s3://bucket/data", "--output_dir", output, "--cache_dir", str(tmp_path / "cache"))
        launcher = ("--standalone", "--nproc_per_node", "2", "-m", "monai.bundle", "run", "--config_file", configs)
        for _ in range(2):  # the second time on another machine
            result = bundle(*launcher, *places, module="torch.distributed.run")
            assert result.returncode == 0, result.stderr
            assert list((tmp_path / "cache").glob("dataset-*/sub-*/anat/*"))
            assert not list((tmp_path / "cache").glob("dataset-*/sub-*/func"))
            shutil.rmtree(tmp_path / "cache")
        s3.get("bucket/data/derivatives/skipdenseseg/", str(tmp_path / "copy"), recursive=True)
    copy = tmp_path / "copy"
    assert [row["subject"] for row in read_csv(copy / "volumes.tsv")] == list(STEMS[:3])
    assert {path.name for path in copy.iterdir()} >= {".bidsignore", "dataset_description.json", "sub-01", "sub-02"}
    assert len(list(copy.rglob("*_dseg.json"))) == len(list(copy.rglob("*_dseg.nii.gz"))) == 3
    assert json.loads((copy / "dataset_description.json").read_text())["DatasetLinks"] == {"source": "../.."}
    assert bids_errors(copy) == set()


def test_what_was_prepared(tmp_path):
    """T2 was out of place: mask, registered T2 and transform are part of a valid dataset."""
    data, output = tmp_path / "data", tmp_path / "out"
    rng = np.random.default_rng(5)
    label = label_map(rng)[20:124, 40:140, 70:170]
    brain = six_month_subject(label, nominal(label, rng), rng)
    brain["T2"] = np.roll(brain["T2"], 4, axis=2)
    save_bids(data, "sub-01_ses-a", brain)
    configured(data, output, save_prepared=True).run()
    anat = output / "sub-01/ses-a/anat"
    names = {path.name for path in anat.iterdir()}
    stem = "sub-01_ses-a"
    for result, description in (("desc-brain_mask", "Brain"), ("space-T1w_desc-skipdenseseg_T2w", "T2w, registered")):
        assert f"{stem}_{result}.nii.gz" in names
        sidecar = json.loads((anat / f"{stem}_{result}.json").read_text())
        assert sidecar["Description"].startswith(description)
        assert sidecar["SpatialReference"] == f"bids:source:sub-01/ses-a/anat/{stem}_T1w.nii.gz"
    assert f"{stem}_from-T2w_to-T1w_mode-image_desc-skipdenseseg_xfm.txt" in names
    mask = np.asarray(nib.load(anat / f"{stem}_desc-brain_mask.nii.gz").dataobj)
    np.testing.assert_array_equal(mask, brain["T1"] > 0)
    assert bids_errors(output) == set()
