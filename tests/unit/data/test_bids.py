import os
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import read_subject, touch

from scripts.data.bids import LARGEST_JSON, find_bids_subjects, needed_files, read_json
from scripts.data.subjects import SubjectFolder, require_apart
from scripts.data.transforms import LoadSubjectd
from scripts.errors import InputError
from scripts.results.paths import derivative_path


def pair(stem: str, t2: str | None = None) -> list[str]:
    """Paths of a T1w and a T2w, given without the suffix; the folder follows from the name."""
    return [scan(f"{stem}_T1w.nii.gz"), scan(f"{t2 or stem}_T2w.nii.gz")]


def scan(name: str) -> str:
    folders = [part for part in name.split("_") if part.startswith(("sub-", "ses-"))]
    return "/".join([*folders, "anat", name])


def names(subjects) -> dict[str, list[str]]:
    return {s["subject"]: [Path(path).name for path in (*s["image"], *filter(None, [s.get("mask")]))] for s in subjects}


def found(directory: Path) -> dict[str, list[str]]:
    return names(SubjectFolder(str(directory)).require_good())


def test_each_session_and_run_is_a_subject_of_its_own(tmp_path):
    touch(tmp_path, *pair("sub-10"), *pair("sub-9_ses-a"), *pair("sub-9_ses-b_run-1"), *pair("sub-9_ses-b_run-2"))
    touch(tmp_path, *(name.removesuffix(".gz") for name in pair("sub-9_ses-c")))
    subjects = SubjectFolder(str(tmp_path)).require_good()
    assert [(s["subject"], s["anat"]) for s in subjects] == [
        ("sub-9_ses-a", "sub-9/ses-a/anat"),
        ("sub-9_ses-b_run-1", "sub-9/ses-b/anat"),
        ("sub-9_ses-b_run-2", "sub-9/ses-b/anat"),
        ("sub-9_ses-c", "sub-9/ses-c/anat"),
        ("sub-10", "sub-10/anat"),
    ]
    assert subjects[2]["image"] == [str(tmp_path / path) for path in pair("sub-9_ses-b_run-2")]
    assert subjects[3]["image"][0].endswith("_T1w.nii")


def test_what_lies_about_is_passed_over(tmp_path):
    touch(tmp_path, *pair("sub-1"), "dataset_description.json", "README", "notes.txt")
    for folder in ("derivatives/fmriprep", "sourcedata", "code", ".git/annex", "__MACOSX"):
        touch(tmp_path / folder, *pair("sub-2"), "subject-3-T1.nii" if folder in ("sourcedata", "code") else "x")
    touch(tmp_path / "sub-1" / "anat", "._sub-1_T1w.nii.gz", "sub-1_T1w_old.nii.gz", "sub-1_T1w copy.nii.gz")
    touch(tmp_path / "sub-1" / "anat", "sub-1_FLAIR.nii.gz", "sub-1_T1w.nii.gz.part", "sub-1_dseg.nii.gz")
    touch(tmp_path / "sub-1" / "func", "sub-1_task-rest_bold.nii.gz")
    touch(tmp_path / "sub-4" / "dwi", "sub-4_dwi.nii.gz")
    assert found(tmp_path) == {"sub-1": ["sub-1_T1w.nii.gz", "sub-1_T2w.nii.gz"]}
    assert SubjectFolder(str(tmp_path)).reasons_left_out(None) == {}


@pytest.mark.parametrize(
    ("t1s", "t2s", "partners"),
    [
        (["acq-a", "acq-b"], ["acq-a", "acq-b"], {"acq-a": "acq-a", "acq-b": "acq-b"}),
        (["acq-mprage"], ["acq-space"], {"acq-mprage": "acq-space"}),
        (["acq-a_run-1", "run-2"], ["acq-b_run-2", "run-1"], {"acq-a_run-1": "run-1", "run-2": "acq-b_run-2"}),
        (["run-1"], [""], {"run-1": ""}),
        (["run-1", "run-2"], [""], {}),
        ([""], ["run-1", "run-2"], {}),
        (["", "ce-gadolinium"], [""], {"": ""}),
        (["rec-a", "rec-b"], ["rec-b"], {"rec-b": "rec-b"}),
        (["part-mag", "part-phase"], [""], {"part-mag": ""}),
    ],
)  # fmt: skip
def test_t1w_and_t2w_that_belong_together(tmp_path, t1s, t2s, partners):
    def stem(entities: str) -> str:
        return f"sub-1_{entities}" if entities else "sub-1"

    touch(tmp_path, *(scan(f"{stem(t1)}_T1w.nii.gz") for t1 in t1s), *(scan(f"{stem(t2)}_T2w.nii.gz") for t2 in t2s))
    subjects, left_out = find_bids_subjects(str(tmp_path))
    assert names(subjects) == {
        stem(t1): [f"{stem(t1)}_T1w.nii.gz", f"{stem(t2)}_T2w.nii.gz"] for t1, t2 in partners.items()
    }
    assert set(left_out) == {stem(t1) for t1 in t1s if t1 not in partners and t1 != "part-phase"}
    assert all("name the two alike" in reason for reason in left_out.values())


@pytest.mark.parametrize(
    ("t1s", "t2s", "taken"),
    [
        (["run-01"], ["run-1"], ("run-01", "run-1")),
        (["run-1", "run-2"], ["run-002", "run-001"], ("run-1", "run-001")),
        ([""], ["", "space-T1w"], ("", "space-T1w")),
        (["", "space-MNIacpc"], ["space-MNIacpc", ""], ("", "")),
        (["space-MNIacpc"], ["", "space-MNIacpc"], ("space-MNIacpc", "space-MNIacpc")),
        (["", "space-MNIacpc_desc-brain"], ["", "space-MNIacpc"], ("space-MNIacpc_desc-brain", "space-MNIacpc")),
        (["space-UNCInfant"], ["space-UNCInfant"], ("space-UNCInfant", "space-UNCInfant")),
        (["space-A", "space-B"], ["space-B"], ("space-B", "space-B")),
        (["", "space-UNCInfant"], ["", "space-UNCInfant"], ("", "")),
    ],
)
def test_runs_and_spaces_of_one_scan(tmp_path, t1s, t2s, taken):
    def name(entities: str, suffix: str) -> str:
        return "_".join(filter(None, ["sub-1", entities, f"{suffix}.nii.gz"]))

    touch(tmp_path, *(scan(name(each, "T1w")) for each in t1s), *(scan(name(each, "T2w")) for each in t2s))
    first = find_bids_subjects(str(tmp_path))[0][0]
    assert [Path(path).name for path in first["image"]] == [name(taken[0], "T1w"), name(taken[1], "T2w")]


def test_several_spaces_of_templates_are_told(tmp_path):
    touch(tmp_path, *pair("sub-1"), *pair("sub-2_ses-a_space-A"), *pair("sub-2_ses-a_space-B"))
    folder = SubjectFolder(str(tmp_path))
    assert folder.left_out == {"sub-2_ses-a": "has scans in space-A and space-B alone; keep one of them"}
    assert [subject["subject"] for subject in folder.require_good()] == ["sub-1"]


def test_names_that_bids_does_not_allow_are_told(tmp_path):
    touch(tmp_path, *pair("sub-1"), "sub-1/anat/sub-1_T1w_old.nii.gz", "sub-1/anat/sub-1_acq-a-b_T2w.nii.gz")
    bad = ["sub-S-02/anat/sub-S-02_T1w.nii.gz", "sub-3/ses-1/anat/sub-3_T2w.nii.GZ", "sub-4/anat/sub-4_T1.nii"]
    touch(tmp_path, *bad, "sub-5/anat/sub-5_FLAIR.nii.gz", "sub-6/anat/sub-6_T1w.json", "sub-7/anat/sub-7_T1_mask.nii")
    unused = SubjectFolder(str(tmp_path)).unused
    assert set(unused) == {str(tmp_path / name) for name in bad}
    assert "such as sub-01_T2w.nii.gz in sub-01/anat" in unused[str(tmp_path / bad[1])]


def test_incomplete_sessions_are_left_out_and_named(tmp_path, caplog):
    touch(tmp_path, *pair("sub-1_ses-a"), scan("sub-1_ses-b_T1w.nii.gz"), scan("sub-2_T2w.nii.gz"))
    assert list(names(SubjectFolder(str(tmp_path)).to_segment(None))) == ["sub-1_ses-a"]
    assert "sub-1_ses-b: skipped (has no T2w; --contrasts any segments its T1w alone)" in caplog.text
    assert "sub-2: skipped (has no T1w; --contrasts any segments its T2w alone)" in caplog.text
    caplog.clear()
    assert list(names(SubjectFolder(str(tmp_path)).to_segment("1"))) == ["sub-1_ses-a"]
    assert "sub-1_ses-b" in caplog.text
    assert "sub-2" not in caplog.text
    with pytest.raises(InputError, match="subjects names sub-1_ses-b, but sub-1_ses-b has no T2w"):
        SubjectFolder(str(tmp_path)).to_segment(["sub-1_ses-b"])


@pytest.mark.parametrize("stripped", ["T1w", "T2w"])
def test_half_stripped_session(tmp_path, stripped):
    touch(tmp_path, *pair("sub-1"), scan(f"sub-1_desc-brain_{stripped}.nii.gz"))
    (subject,), left_out = find_bids_subjects(str(tmp_path))
    assert ["desc-brain" in path for path in subject["image"]] == [stripped == "T1w", stripped == "T2w"]
    assert left_out == {}


def test_nothing_but_incomplete_sessions(tmp_path):
    touch(tmp_path, scan("sub-1_T1w.nii.gz"))
    assert SubjectFolder(str(tmp_path)).to_segment(None) == []
    with pytest.raises(InputError, match="no subject of this BIDS dataset is complete; sub-1 has no T2w"):
        SubjectFolder(str(tmp_path)).require([], "segment")


def test_a_participant_or_one_session_is_chosen(tmp_path):
    stems = ["sub-01_ses-a", "sub-01_ses-b_run-1", "sub-01_ses-b_run-2", "sub-011_ses-a", "sub-02_ses-a"]
    for stem in stems:
        touch(tmp_path, *pair(stem))

    def chosen(subjects) -> list[str]:
        return list(names(SubjectFolder(str(tmp_path)).to_segment(subjects)))

    assert chosen(None) == [*stems[:3], stems[4], stems[3]]  # participant 2 before 11
    assert chosen(["01"]) == chosen("sub-01") == stems[:3]
    assert chosen(["sub-01_ses-b"]) == stems[1:3]
    assert chosen(["01_ses-a", "sub-01_ses-b_run-2", "02", "02"]) == [stems[0], stems[2], stems[4]]
    with pytest.raises(InputError, match="subjects names subject 1, which isn't there; choose from sub-01_ses-a, "):
        chosen([1])
    with pytest.raises(InputError, match="subjects names subject ses-a,"):
        chosen(["ses-a"])


def test_an_id_that_looks_like_bids_in_the_iseg_layout(tmp_path):
    touch(tmp_path, "subject-sub-01-T1.nii", "subject-sub-01-T2.nii", "subject-sub-01_ses-a-T1.nii")
    touch(tmp_path, "subject-sub-01_ses-a-T2.nii")
    assert [s.keys() for s in SubjectFolder(str(tmp_path)).require_good()] == [{"subject", "image"}] * 2
    assert list(names(SubjectFolder(str(tmp_path)).to_segment("sub-01"))) == ["sub-01"]
    with pytest.raises(InputError, match="names subject 01, which isn't there"):
        SubjectFolder(str(tmp_path)).to_segment("01")


def test_derivatives_of_other_tools(tmp_path):
    """Of versions the brain alone is taken, then what is preprocessed; what lies in a template's space isn't."""
    touch(tmp_path, *pair("sub-1_desc-brain"), *pair("sub-1_desc-preproc"))
    touch(tmp_path, *pair("sub-2_space-T1w_desc-preproc"), scan("sub-2_space-T1w_desc-brain_mask.nii.gz"))
    touch(tmp_path, *pair("sub-3_run-1_desc-preproc", "sub-3_run-1_space-T1w_desc-preproc"))
    touch(tmp_path, *pair("sub-3_run-1_space-MNI152NLin2009cAsym_desc-preproc"))
    touch(
        tmp_path, scan("sub-3_run-1_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz"), scan("sub-3_desc-roi_mask.nii")
    )
    touch(tmp_path, *pair("sub-4_desc-one"), *pair("sub-4_desc-two"))
    assert found(tmp_path) == {
        "sub-1": ["sub-1_desc-brain_T1w.nii.gz", "sub-1_desc-brain_T2w.nii.gz"],
        "sub-2_space-T1w": [
            f"sub-2_space-T1w_desc-{name}.nii.gz" for name in ("preproc_T1w", "preproc_T2w", "brain_mask")
        ],
        "sub-3_run-1": ["sub-3_run-1_desc-preproc_T1w.nii.gz", "sub-3_run-1_space-T1w_desc-preproc_T2w.nii.gz"],
    }
    assert list(SubjectFolder(str(tmp_path)).reasons_left_out(None)) == ["sub-4"]


@pytest.mark.parametrize(
    ("make", "is_read"),
    [
        (lambda path: path.write_text('\ufeff{"Name": "a"}'), True),
        (lambda path: path.write_text('{"Name": "a"}' + " " * LARGEST_JSON), False),
        (lambda path: path.write_text("[" * 100_000), False),
        (Path.mkdir, False),
        (os.mkfifo, False),
        (lambda path: path.symlink_to(path), False),
        (lambda path: path.symlink_to("/dev/zero"), False),
    ],
    ids=["byte-order-mark", "huge", "nested", "folder", "pipe", "link-to-itself", "endless"],
)
def test_odd_json_files(tmp_path, make: Callable[[Path], None], is_read):
    make(tmp_path / "sidecar.json")
    assert read_json(tmp_path / "sidecar.json") == ({"Name": "a"} if is_read else None)


def test_files_where_they_can_not_belong(tmp_path):
    touch(tmp_path / "a", "sub-1/anat/sub-2_T1w.nii.gz")
    touch(tmp_path / "b", "sub-1/ses-a/anat/sub-1_T1w.nii.gz")
    touch(tmp_path / "c", *pair("sub-1"), scan("sub-1_T2w.nii"))
    touch(tmp_path / "d", *pair("sub-1"), "more/subject-1-T1.nii", "more/subject-1-T2.nii")
    for folder, message in (
        ("a", "sub-2_T1w.nii.gz: its name says sub-2, its folder sub-1"),
        ("b", "its name says sub-1, its folder sub-1_ses-a"),
        ("c", r"sub-1_T2w.nii.gz: .*sub-1_T2w.nii exists as well"),
    ):
        touch(tmp_path / folder, *pair("sub-2_ses-a"), *pair("sub-3"))
        subjects, left_out = find_bids_subjects(str(tmp_path / folder))
        assert list(names(subjects)) == ["sub-2_ses-a", "sub-3"]  # which need no mending
        (reason,) = left_out.values()
        assert isinstance(reason, InputError)
        assert re.search(message, str(reason))
        with pytest.raises(InputError, match=message):
            SubjectFolder(str(tmp_path / folder)).require_good()
    with pytest.raises(InputError, match=r"subject-1-T1.nii: has no BIDS name, but lies in a BIDS dataset"):
        SubjectFolder(str(tmp_path / "d")).require_good()


def test_bad_session_among_good_ones(tmp_path, caplog):
    touch(
        tmp_path, *pair("sub-1_ses-a"), *pair("sub-1_ses-b"), *pair("sub-2"), scan("sub-3_T1w.nii.gz"), *pair("sub-4")
    )
    touch(tmp_path, "sub-1/ses-b/anat/sub-1_ses-a_T1w.nii.gz", scan("sub-2_T1w.nii"))

    def chosen(subjects) -> list[str]:
        return list(names(SubjectFolder(str(tmp_path)).to_segment(subjects, stop_at_bad_subject=False)))

    misplaced, twice = SubjectFolder(str(tmp_path)).reasons_bad(None)
    assert "its name says sub-1_ses-a, its folder sub-1_ses-b" in misplaced
    assert "exists as well" in twice
    assert chosen(None) == ["sub-1_ses-a", "sub-4"]
    assert list(SubjectFolder(str(tmp_path)).reasons_left_out(None)) == ["sub-3"]
    assert (chosen("1"), chosen(["1", "sub-2"]), chosen(["2", 4])) == (["sub-1_ses-a"], ["sub-1_ses-a"], ["sub-4"])
    assert SubjectFolder(str(tmp_path)).reasons_bad(["1", "sub-4"]) == [misplaced]
    assert "sub-2" not in caplog.text
    with pytest.raises(InputError, match="its name says sub-1_ses-a"):
        SubjectFolder(str(tmp_path)).to_segment(None)


@pytest.mark.parametrize("closed", ["sub-1", "sub-1/ses-a", "sub-1/ses-a/anat"])
def test_folder_that_can_not_be_read(open_folder, as_nobody, closed):
    touch(open_folder, *pair("sub-1_ses-a"), *pair("sub-2"))
    (open_folder / closed).chmod(0)
    with as_nobody():
        subjects, left_out = find_bids_subjects(str(open_folder))
    assert list(names(subjects)) == ["sub-2"]
    (reason,) = left_out.values()
    assert re.search(rf"^{open_folder}/{closed}: can't be read.*; allow it, or remove the", str(reason))


def test_labels_for_training_and_scoring(tmp_path):
    """Those of a person or in FreeSurfer's style; neither ours nor another tool's, and each in the space of its T1w."""
    touch(tmp_path, *pair("sub-1_ses-1mo_space-INFANTMNIacpc"))
    touch(tmp_path, *(scan(f"sub-1_ses-1mo_space-INFANTMNIacpc_desc-{kind}_dseg.nii.gz") for kind in ("aseg", "wm")))
    touch(tmp_path, *pair("sub-2"), scan("sub-2_dseg.nii.gz"), scan("sub-2_desc-skipdenseseg_dseg.nii.gz"))
    touch(tmp_path, *pair("sub-3"), scan("sub-3_desc-skipdenseseg_dseg.nii.gz"), scan("sub-3_space-orig_dseg.nii.gz"))
    folder = SubjectFolder(str(tmp_path))
    labels = {subject["subject"]: Path(subject.get("label", "")).name for subject in folder.subjects}
    first = "sub-1_ses-1mo_space-INFANTMNIacpc"
    assert labels == {first: f"{first}_desc-aseg_dseg.nii.gz", "sub-2": "sub-2_dseg.nii.gz", "sub-3": ""}
    assert list(names(folder.training("1"))) == ["sub-2"]
    assert list(names(folder.training("sub-1_ses-1mo"))) == ["sub-2"]
    assert list(names(folder.validation(["1", "sub-2"]))) == [first, "sub-2"]
    with pytest.raises(InputError, match=r"val_subjects names subject sub-3, which has no label"):
        folder.validation("sub-3")
    assert all("label" not in subject for subject in folder.to_segment())
    assert len(folder.to_segment()) == 3


def test_what_the_numbers_of_a_label_mean(tmp_path):
    rng, affine = np.random.default_rng(1), np.eye(4)
    t1, t2 = rng.uniform(1, 2, (2, 5, 6, 7)).astype(np.float32)
    t1[0] = 0
    label = rng.integers(1, 4, t1.shape).astype(np.int16) * (t1 > 0)
    structures = np.array([0, 24, 3, 2], np.int16)[label]
    in_bids = np.array([0, 3, 1, 2], np.int16)[label]
    for name, values in {"T1w": t1, "T2w": t2, "dseg": label}.items():
        path = tmp_path / scan(f"sub-1_{name}.nii.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, affine), path)
    (subject,) = SubjectFolder(str(tmp_path)).subjects
    with pytest.raises(InputError, match=r"sub-1_dseg.nii.gz: is of a BIDS dataset, .* --label_numbers tissues, fre"):
        LoadSubjectd()(subject)
    for numbers, values in (("tissues", label), ("freesurfer", structures), ("bids", in_bids)):
        nib.save(nib.Nifti1Image(values, affine), path)
        np.testing.assert_array_equal(LoadSubjectd(numbers)(subject)["label"][0], label)
    nib.save(nib.Nifti1Image(structures, affine), path)
    for numbers in ("tissues", "bids"):
        with pytest.raises(InputError, match=r"dseg.nii.gz: label value 24 isn't known"):
            LoadSubjectd(numbers)(subject)
    nib.save(nib.Nifti1Image(np.where(label == 3, 999, structures), affine), path)
    with pytest.raises(
        InputError, match=r"dseg.nii.gz: label value 999 isn't known; give a map like FreeSurfer's aseg"
    ):
        LoadSubjectd("freesurfer")(subject)
    nib.save(nib.Nifti1Image(np.array([0, 10, 150, 250], np.int16)[label], affine), path)
    with pytest.raises(InputError, match=r"dseg.nii.gz: has iSeg's label values, not those of BIDS"):
        LoadSubjectd("bids")(subject)
    with pytest.raises(InputError, match=r"--label_numbers fsl: must be one of tissues, freesurfer, bids"):
        LoadSubjectd("fsl")


def test_results_may_go_to_the_derivatives_of_a_dataset():
    for dataset in ("data", "s3://bucket/data", "s3://bucket"):
        require_apart(dataset, f"{dataset}/derivatives/skipdenseseg")
        for inside in ("derivatives", "derivatives/", "sub-01/derivatives/x", "derivatives/../x", "Derivatives/x"):
            with pytest.raises(InputError, match=f"outside {dataset}, or {dataset}/derivatives/<name>"):
                require_apart(dataset, f"{dataset}/{inside}")


def test_results_in_derivatives_are_never_taken_for_labels(tmp_path):
    touch(tmp_path, "subject-1-T1.nii", "subject-1-T2.nii", "derivatives/x/subject-1-label.nii")
    assert "label" not in SubjectFolder(str(tmp_path)).require_good()[0]


def test_only_what_is_needed_is_copied_from_a_server():
    anat = [*pair("sub-1_ses-a"), scan("sub-1_ses-a_T1w.json"), scan("sub-1_ses-a_desc-brain_mask.nii.gz")]
    others = [scan("sub-1_ses-a_FLAIR.nii.gz"), "sub-1/ses-a/func/sub-1_ses-a_task-rest_bold.nii.gz"]
    top = ["dataset_description.json", "participants.tsv"]
    assert needed_files([*anat, *others, *top, "derivatives/x/sub-1/anat/sub-1_T1w.nii.gz"]) == {*anat, *top}
    iseg = ["subject-1-T1.nii", "more/subject-1-T2.nii", "README"]
    assert needed_files([*iseg, "derivatives/x/subject-1-label.nii"]) == set(iseg)


def test_names_of_results():
    def path(what: str, suffix: str) -> str:
        return os.fspath(derivative_path("sub-1/ses-a/anat", "sub-1_ses-a_run-1", what, suffix))

    stem = "sub-1/ses-a/anat/sub-1_ses-a_run-1"
    assert path("label", ".nii.gz") == f"{stem}_desc-skipdenseseg_dseg.nii.gz"
    assert path("probability-csf", ".nii") == f"{stem}_label-CSF_desc-skipdenseseg_probseg.nii"
    assert path("uncertainty", ".nii.gz") == f"{stem}_desc-skipdenseseg_uncertainty.nii.gz"
    scored = "sub-1/ses-a/figures/sub-1_ses-a_run-1_desc-skipdenseseg_scored.png"
    assert path("scored", ".png") == scored
    assert path("label", ".png") == "sub-1/ses-a/figures/sub-1_ses-a_run-1_desc-skipdenseseg_dseg.png"


@pytest.mark.parametrize(
    ("space", "masks", "taken"),
    [
        ("", ["", "_space-T2w"], ""),
        ("_space-T1w", ["", "_space-T1w"], "_space-T1w"),
        ("_space-T1w", [""], ""),
        ("", ["_space-T1w", "_space-T2w"], "_space-T1w"),
        ("_space-T1w", ["", "_space-T2w"], ""),
        ("", ["_space-T2w", "_space-orig"], None),
    ],
)
def test_of_several_masks_the_one_in_the_space_of_t1w_is_taken(tmp_path, space, masks, taken):
    touch(tmp_path, *pair(f"sub-1{space}"), *(scan(f"sub-1{each}_desc-brain_mask.nii.gz") for each in masks))
    subjects, left_out = find_bids_subjects(str(tmp_path))
    if taken is None:
        assert not subjects
        assert "space-T2w_desc-brain_mask.nii.gz and sub-1_space-orig_desc-brain_mask.nii.gz; keep the one" in next(
            iter(left_out.values())
        )
    else:
        assert Path(subjects[0]["mask"]).name == f"sub-1{taken}_desc-brain_mask.nii.gz"


def test_a_mask_is_applied_to_both_scans(tmp_path):
    rng, affine = np.random.default_rng(1), np.diag([1.0, 1, 2, 1])
    t1, t2 = rng.uniform(1, 2, (2, 5, 6, 7)).astype(np.float32)
    mask = rng.integers(0, 2, t1.shape).astype(np.uint8)
    paths = {}
    for name, values in (("t1", t1), ("t2", t2), ("mask", mask)):
        paths[name] = str(tmp_path / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(values, affine), paths[name])
    subject = {"subject": "sub-1", "image": [paths["t1"], paths["t2"]], "mask": paths["mask"]}
    loaded = read_subject(subject)
    np.testing.assert_array_equal(loaded["image"], [t1 * mask, t2 * mask])
    np.testing.assert_array_equal(loaded["t1"][0], t1 * mask)
    nib.save(nib.Nifti1Image(mask[1:], affine), paths["mask"])
    with pytest.raises(InputError, match=r"mask.nii.gz: shape .* differs from"):
        read_subject(subject)


def test_a_head_with_its_skull_is_refused_if_nothing_is_to_be_prepared(tmp_path):
    head = np.arange(15000, dtype=np.float32).reshape(20, 25, 30)
    for name, voxel in (("big", 5.2), ("small", 5.0)):  # 2.1 and 1.9 litres
        for kind, values in (("T1", head), ("T2", head[::-1])):
            image = nib.Nifti1Image(values, np.diag([voxel, voxel, voxel, 1]))
            nib.save(image, tmp_path / f"{name}-{kind}.nii")
    read_subject({"image": [str(tmp_path / f"small-{kind}.nii") for kind in ("T1", "T2")]}, [])
    with pytest.raises(InputError, match=r"big-T1.nii: T1 is above 0 in 2,109 ml, more than any brain has"):
        read_subject({"image": [str(tmp_path / f"big-{kind}.nii") for kind in ("T1", "T2")]}, [])


def test_runs_apart_and_averaged(tmp_path):
    touch(tmp_path, *pair("sub-1_run-1"), *pair("sub-1_run-2"), *pair("sub-1_run-10"))
    touch(
        tmp_path, scan("sub-2_acq-a_run-1_T1w.nii.gz"), scan("sub-2_acq-a_run-2_T1w.nii.gz"), scan("sub-2_T2w.nii.gz")
    )
    touch(tmp_path, *pair("sub-3"))
    apart = SubjectFolder(str(tmp_path))
    assert list(names(apart.subjects)) == ["sub-1_run-1", "sub-1_run-2", "sub-1_run-10", "sub-3"]
    assert all("runs" not in subject for subject in apart.subjects)
    averaged = {subject["subject"]: subject for subject in SubjectFolder(str(tmp_path), runs="average").subjects}
    assert list(averaged) == ["sub-1_run-1", "sub-2_acq-a_run-1", "sub-3"]
    runs = [[Path(path).name for path in paths] for paths in averaged["sub-1_run-1"]["runs"]]
    assert runs == [[f"sub-1_run-{run}_T{n}w.nii.gz" for run in (2, 10)] for n in (1, 2)]
    assert [len(paths) for paths in averaged["sub-2_acq-a_run-1"]["runs"]] == [1, 0]
    assert "runs" not in averaged["sub-3"]
    touch(tmp_path / "odd", *pair("sub-1_run-a"), *pair("sub-1_run-02"))
    assert list(names(SubjectFolder(str(tmp_path / "odd"), runs="average").subjects)) == ["sub-1_run-02"]
    with pytest.raises(InputError, match=r"^--runs all: must be one of apart, average$"):
        SubjectFolder(str(tmp_path), runs="all")
