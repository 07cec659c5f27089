"""Subjects that have a T1 or a T2 alone: found, segmented, scored and reported."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import bids_errors, configured, read_subject, refused_run, save_bids, save_subject, voxels

from scripts.data.subjects import SubjectFolder
from scripts.data.transforms import NormalizeByT1Maskd
from scripts.errors import InputError
from scripts.results.tables import read_csv
from scripts.segment import Segmenter
from scripts.synthesis.transforms import RandDropContrastd


@pytest.fixture
def scans(tmp_path, pieces) -> Path:
    """Subject 1 with a T1, 2 with a T2, 3 with both, 9 with both and a label."""
    folder = tmp_path / "scans"
    for subject in ("1", "2", "3", "9"):
        save_subject(folder, subject, pieces[0], labeled=subject == "9", suffix=".nii.gz")
    (folder / "subject-1-T2.nii.gz").unlink()
    (folder / "subject-2-T1.nii.gz").unlink()
    return folder


def names(subjects: list[dict]) -> list[list[str | None]]:
    return [[path and Path(path).name for path in subject["image"]] for subject in subjects]


@pytest.mark.parametrize(
    ("contrasts", "images", "bad"),
    [
        ("both", {"3": [True, True], "9": [True, True]}, {"1": "no T2; put", "2": "no T1; put"}),
        ("any", {"1": [True, False], "2": [False, True], "3": [True, True], "9": [True, True]}, {}),
        (
            "T1",
            {"1": [True, False], "3": [True, False], "9": [True, False]},
            {"2": "no T1; put subject-2-T1 beside it"},
        ),
        (
            "T2",
            {"2": [False, True], "3": [False, True], "9": [False, True]},
            {"1": "no T2; put subject-1-T2 beside it"},
        ),
    ],
)
def test_scans_that_each_choice_takes(scans, contrasts, images, bad):
    folder = SubjectFolder(str(scans), contrasts)
    assert {s["subject"]: [path is not None for path in s["image"]] for s in folder.subjects} == images
    assert folder.bad.keys() == bad.keys()
    for subject, message in bad.items():
        assert message in str(folder.bad[subject])
        assert ("--contrasts any" in str(folder.bad[subject])) == (contrasts == "both")


def test_choice_that_does_not_exist(scans):
    with pytest.raises(InputError, match=r"^--contrasts t1: must be one of both, any, T1, T2$"):
        SubjectFolder(str(scans), "t1")


def test_bids_sessions_of_one_contrast(tmp_path, pieces):
    dataset = tmp_path / "bids"
    for session in ("ses-a", "ses-b", "ses-c"):
        save_bids(dataset, f"sub-1_{session}", pieces[0])
    (dataset / "sub-1/ses-a/anat/sub-1_ses-a_T2w.nii.gz").unlink()
    (dataset / "sub-1/ses-b/anat/sub-1_ses-b_T1w.nii.gz").unlink()
    assert names(SubjectFolder(str(dataset)).subjects) == [["sub-1_ses-c_T1w.nii.gz", "sub-1_ses-c_T2w.nii.gz"]]
    assert names(SubjectFolder(str(dataset), "any").subjects) == [
        ["sub-1_ses-a_T1w.nii.gz", None],
        [None, "sub-1_ses-b_T2w.nii.gz"],
        ["sub-1_ses-c_T1w.nii.gz", "sub-1_ses-c_T2w.nii.gz"],
    ]
    assert names(SubjectFolder(str(dataset), "T1").subjects) == [
        ["sub-1_ses-a_T1w.nii.gz", None],
        ["sub-1_ses-c_T1w.nii.gz", None],
    ]
    assert SubjectFolder(str(dataset), "T1").left_out == {"sub-1_ses-b": "has no T1w"}
    assert SubjectFolder(str(dataset), "T2").left_out == {"sub-1_ses-a": "has no T2w"}
    output = tmp_path / "derivatives"
    configured(dataset, output, contrasts="any").run()
    assert sorted(path.name for path in output.rglob("*_dseg.nii.gz")) == [
        f"sub-1_ses-{session}_desc-skipdenseseg_dseg.nii.gz" for session in "abc"
    ]
    assert not bids_errors(output)
    sidecar = (output / "sub-1/ses-b/anat/sub-1_ses-b_desc-skipdenseseg_dseg.json").read_text()
    assert "sub-1_ses-b_T2w.nii.gz" in sidecar
    assert "T1w" not in sidecar


def test_missing_channel_is_what_training_makes_of_it(scans):
    both = NormalizeByT1Maskd("image")(read_subject(SubjectFolder(str(scans), "any").subjects[3]))["image"]
    for subject, channel in zip(SubjectFolder(str(scans), "any").subjects[:2], (0, 1), strict=True):
        loaded = NormalizeByT1Maskd("image")(read_subject(subject))
        assert "t2" not in loaded
        assert not loaded["image"][1 - channel].any()
        assert loaded["image"][channel].std() > 0
    dropped = RandDropContrastd(prob=1.0)
    dropped.set_random_state(0)
    kept = {tuple(channel.any().item() for channel in dropped({"image": both})["image"]) for _ in range(20)}
    assert kept == {(True, False), (False, True)}
    assert torch.equal(RandDropContrastd(prob=0.0)({"image": both})["image"], both)


def test_segmented_and_scored_by_one_contrast(scans, pieces, tmp_path):
    output = tmp_path / "out"
    configured(scans, output, contrasts="any", subjects=["1", "2", "3"]).run()
    segmenter = Segmenter()
    for subject, kinds in (("1", ("T1", None)), ("2", (None, "T2")), ("3", ("T1", "T2"))):
        sources = [kind and scans / f"subject-{subject}-{kind}.nii.gz" for kind in kinds]
        label = segmenter(*sources).label
        np.testing.assert_array_equal(label, voxels(output / f"subject-{subject}-label.nii.gz"))
        assert len(np.unique(label)) == 4
    page = (output / "report.html").read_text()
    assert "segmented from T1 alone" in page
    assert "segmented from T2 alone" in page
    assert page.count("one contrast") >= 2
    sections = page.split('class="viewer"')[1:]
    assert [[f'data-scan="{scan}"' in section for scan in ("t1", "t2")] for section in sections] == [
        [True, False],
        [False, True],
        [True, True],
    ]
    labelled = tmp_path / "labelled"
    save_subject(labelled, "9", pieces[0])
    for contrast in ("T1", "T2"):
        scores = tmp_path / contrast
        configured(labelled, scores, "train.json", "evaluate.json", contrasts=contrast, val_subjects=["9"]).run()
        (row,) = read_csv(scores / "metrics.csv")
        assert float(row["dice_mean"]) > 0.3


def test_bad_scans_of_one_contrast_are_named_as_what_they_are(scans, tmp_path):
    image = nib.load(scans / "subject-2-T2.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.int16), image.affine), scans / "subject-2-T2.nii.gz")
    message = refused_run(scans, tmp_path / "out", contrasts="any", subjects=["2"], stop_at_bad_subject=True)
    assert message.endswith("subject-2-T2.nii.gz: T2 is nowhere above 0, so it has no brain; give a skull-stripped T2")
    with pytest.raises(InputError, match=r"^T1 and T2 are None; give at least one of them$"):
        Segmenter()(None, None)
