import re

import pytest
from helpers import touch

from scripts.data.subjects import (
    SubjectFolder,
    require_apart,
)
from scripts.errors import InputError


def analyze(stem: str) -> list[str]:
    return [f"{stem}.hdr", f"{stem}.img"]


def ids(subjects) -> list[str]:
    return [subject["subject"] for subject in subjects]


def test_both_namings_and_all_suffixes_in_one_folder(tmp_path):
    touch(tmp_path, *analyze("subject-10-T1"), "subject-10-T2.nii", "subject-10-label.nii.gz")
    touch(tmp_path, "subject-9-t1.nii.gz", *analyze("subject-9-t2"), *analyze("subject-9-label"))
    touch(tmp_path, "iSeg-2019-Validation/subject-40-T1.nii", "iSeg-2019-Validation/subject-40-T2.nii", "notes.txt")
    assert SubjectFolder(str(tmp_path)).require_good() == [
        {
            "subject": "9",
            "image": [str(tmp_path / "subject-9-t1.nii.gz"), str(tmp_path / "subject-9-t2.hdr")],
            "label": str(tmp_path / "subject-9-label.hdr"),
        },
        {
            "subject": "10",
            "image": [str(tmp_path / "subject-10-T1.hdr"), str(tmp_path / "subject-10-T2.nii")],
            "label": str(tmp_path / "subject-10-label.nii.gz"),
        },
        {
            "subject": "40",
            "image": [str(tmp_path / f"iSeg-2019-Validation/subject-40-T{i}.nii") for i in (1, 2)],
        },
    ]


def test_hdf5_files_beside_images_of_others(tmp_path):
    names = [f"data_{part}_no_cut/train_iseg_nocut_{subject}.h5" for part, subject in (("train", 10), ("val", 9))]
    touch(tmp_path, *names, "subject-2-T1.nii", "subject-2-T2.nii", "other.h5", "._train_iseg_nocut_3.h5")
    ten, nine = (str(tmp_path / name) for name in names)
    assert SubjectFolder(str(tmp_path)).require_good()[1:] == [
        {"subject": "9", "image": [nine, nine], "label": nine},
        {"subject": "10", "image": [ten, ten], "label": ten},
    ]
    assert ids(SubjectFolder(str(tmp_path)).training([9])) == ["10"]
    assert ids(SubjectFolder(str(tmp_path)).validation([9])) == ["9"]
    assert ids(SubjectFolder(str(tmp_path)).to_segment(None)) == ["2"]
    with pytest.raises(InputError, match=r"nocut_9.h5: lacks the scan .* give its T1 and T2 images"):
        SubjectFolder(str(tmp_path)).to_segment([2, 9])


def test_leftovers_of_a_mac_are_passed_over(tmp_path):
    touch(tmp_path, "subject-1-T1.nii", "subject-1-T2.nii")
    touch(tmp_path, "__MACOSX/subject-2-T1.hdr", "._subject-1-T1.hdr", ".hidden/subject-3-T1.nii")
    touch(tmp_path, "__MACOSX/iSeg/._subject-1-label.hdr")
    assert ids(SubjectFolder(str(tmp_path)).require_good()) == ["1"]


def test_folder_that_is_itself_hidden(tmp_path):
    touch(tmp_path / ".cache", "subject-1-T1.nii", "subject-1-T2.nii")
    assert ids(SubjectFolder(str(tmp_path / ".cache")).require_good()) == ["1"]


def test_split(tmp_path):
    for subject in (1, 2, 9, 10):
        touch(tmp_path, *(f"subject-{subject}-{kind}.nii" for kind in ("T1", "T2", "label")))
    touch(tmp_path, "subject-11-T1.nii", "subject-11-T2.nii")
    root = str(tmp_path)
    assert ids(SubjectFolder(root).training([9])) == ["1", "2", "10"]
    assert ids(SubjectFolder(root).validation([9, "1"])) == ["9", "1"]
    assert ids(SubjectFolder(root).validation(9)) == ["9"]
    assert ids(SubjectFolder(root).training("9")) == ["1", "2", "10"]
    assert ids(SubjectFolder(root).to_segment(None)) == ["11"]
    assert all("label" not in subject for subject in SubjectFolder(root).to_segment([2]))
    assert ids(SubjectFolder(root).to_segment([11, 2])) == ["11", "2"]


def test_absent_folder_has_no_subjects(tmp_path):
    absent = SubjectFolder(str(tmp_path / "absent"))
    assert absent.training([9]) == absent.validation([9]) == absent.to_segment([1]) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["subject-1-T1.nii"], r"subject-1-T1.nii: subject 1 has no T2; put subject-1-T2 beside it"),
        (["subject-1-T2.nii"], r"subject 1 has no T1"),
        (["subject-1-label.nii"], r"subject 1 has no T1"),
        (["subject-1-T1.hdr"], r"subject-1-T1.hdr: its image subject-1-T1.img is missing"),
        (["subject-1-T1.img"], r"subject-1-T1.img: its header subject-1-T1.hdr is missing"),
        ([*analyze("subject-1-T1"), "subject-1-T1.nii.gz"], r"subject 1 has .*subject-1-T1.hdr as well; keep one"),
        (["a/subject-1-T1.nii", "b/subject-1-T1.nii"], r"keep one of the two"),
        (["a/T1/subject-1-T1.nii", "b/T2/subject-1-T2.nii"], r"b/T2/subject-1-T2.nii: lies elsewhere than .*a/T1/"),
        (["subject1/subject-5-T1.nii", "subject2/subject-5-T2.nii"], r"subject2/.*: lies elsewhere than .*subject1/"),
        (["A/subject-5-T1.nii", "a/subject-5-T2.nii"], r"a/subject-5-T2.nii: lies elsewhere than .*A/"),
        (
            ["scans/subject-1-T1.nii", "scans/subject-1-T2.nii", "labels/subject-1-label.nii"],
            r"labels/subject-1-label.nii: lies elsewhere than .*scans/subject-1-T1.nii, and may be a segmentation; put",
        ),
        (["train_iseg_nocut_1.h5", "subject-1-T1.nii"], r"nocut_1.h5: subject 1 has .*subject-1-T1.nii as well; keep"),
        (["a/train_iseg_nocut_1.h5", "b/train_iseg_nocut_1.h5"], r"subject 1 has .*nocut_1.h5 as well; keep one"),
    ],
)
def test_incomplete_or_ambiguous_subjects_are_refused(tmp_path, names, message):
    with pytest.raises(InputError, match=message):
        SubjectFolder(str(touch(tmp_path, *names))).require_good()


def test_folders_behind_links_are_entered_once(tmp_path):
    touch(tmp_path / "elsewhere", "subject-1-T1.nii", "subject-1-T2.nii")
    data = tmp_path / "data"
    touch(data, "subject-2-T1.nii", "subject-2-T2.nii", "derivatives/subject-3-T1.nii")
    links = {"one": "elsewhere", "two": "elsewhere", "itself": "data", "up": "", "results": "data/derivatives"}
    for link, target in links.items():
        (data / link).symlink_to(tmp_path / target)
    assert ids(SubjectFolder(str(data)).require_good()) == ["1", "2"]


@pytest.mark.parametrize(
    "folders",
    [
        ("A/T1", "A/T2", "A/label"),
        ("T1w", "T2w", "labels"),
        ("sub1_T1", "sub1_T2", "sub1_label"),
        ("t1_nii", "t2_nii", "label_nii"),
        ("imagesTr", "imagesTr", "labelsTr"),
        (".", ".", "labels/final"),
    ],
)
def test_a_folder_for_each_kind(tmp_path, folders):
    names = ("subject-1-T1.nii", "subject-1-T2.nii", "subject-1-label.nii")
    touch(tmp_path, *(f"{folder}/{name}" for folder, name in zip(folders, names, strict=True)))
    assert ids(SubjectFolder(str(tmp_path)).training([])) == ["1"]
    assert ids(SubjectFolder(tmp_path).training([])) == ["1"]


def test_folder_that_can_not_be_read(open_folder, as_nobody):
    touch(open_folder, "subject-1-T1.nii", "subject-1-T2.nii", "more/subject-2-T1.nii", "lost+found/x")
    for folder in ("more", "lost+found"):
        (open_folder / folder).chmod(0)
    told = f"{open_folder}/more: can't be read (Permission denied); allow it, or remove the folder"
    with as_nobody():
        with pytest.raises(InputError, match=re.escape(told)):
            SubjectFolder(str(open_folder)).require_good()
        assert ids(SubjectFolder(str(open_folder)).to_segment(None, stop_at_bad_subject=False)) == ["1"]
        assert SubjectFolder(str(open_folder)).reasons_bad(None) == [told]
        assert SubjectFolder(str(open_folder)).reasons_bad([1]) == []


def test_ids_that_are_not_there(tmp_path):
    touch(tmp_path, "subject-1-T1.nii", "subject-1-T2.nii")
    told = r"val_subjects names subject 9 \(the default\), which isn't there; "
    with pytest.raises(InputError, match=f"{told}no subject has a label; add some"):
        SubjectFolder(str(tmp_path)).validation([9])
    touch(tmp_path, *(f"subject-{subject}-{kind}.nii" for subject in (2, 3) for kind in ("T1", "T2", "label")))
    with pytest.raises(InputError, match=f"{told}choose from 2, 3$"):
        SubjectFolder(str(tmp_path)).validation([9])
    with pytest.raises(InputError, match="val_subjects names subject 1, which has no label"):
        SubjectFolder(str(tmp_path)).validation([1])
    with pytest.raises(InputError, match=r"subjects names subject 4, which isn't there; choose from 1, 2, 3$"):
        SubjectFolder(str(tmp_path)).to_segment([4])


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (["subject-4-T1.nii", "subject-4-T2.nii", "subject-4-label.nii"], r"name others by --subjects \"\['4'\]\"$"),
        (["train_iseg_nocut_4.h5"], "HDF5 files lack the scan and its grid; give T1 and T2 images$"),
    ],
)
def test_hint_that_is_given_works(tmp_path, names, remedy):
    touch(tmp_path, *names)
    folder = SubjectFolder(str(tmp_path))
    with pytest.raises(InputError, match=f"no subject left to segment among 1, 1 of them labelled; .*{remedy}"):
        folder.require(folder.to_segment(None), "segment")
    if "name others" in remedy:
        assert ids(folder.to_segment(["4"])) == ["4"]


def test_output_among_the_subjects(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for output in ("data", "data/labels", "data/../data", "link/x"):
        with pytest.raises(InputError, match="lies in the dataset"):
            require_apart(str(tmp_path / "data"), str(tmp_path / output))
    for output in ("", "labels", "data-labels"):
        require_apart(str(tmp_path / "data"), str(tmp_path / output))
    for output in ("labels", "label", "."):
        with pytest.raises(InputError, match=r"is a folder for true labels of .*/images, and segmentations would be"):
            require_apart(str(tmp_path / "images"), str(tmp_path / output))
    for output in ("segmentations", "labels/first", "images-labels"):
        require_apart(str(tmp_path / "images"), str(tmp_path / output))


def test_output_among_the_subjects_by_url(tmp_path):
    dataset = "s3://bucket/data"
    for output in ("s3://bucket/data/", "s3://bucket/data/labels", "s3a://bucket/data", "s3://bucket/x/../data/y"):
        with pytest.raises(InputError, match="lies in the dataset"):
            require_apart(dataset, output)
    for output in ("s3://bucket", "s3://bucket/data-labels", "gs://bucket/data/x", "bucket/data/x", "eval"):
        require_apart(dataset, output)
    require_apart("bucket/data", "s3://bucket/data/x")
    with pytest.raises(InputError, match="lies in the dataset"):
        require_apart(str(tmp_path), f"file://{tmp_path}/labels")
    with pytest.raises(InputError, match="lies in the dataset"):
        require_apart("s3://bucket", "s3://bucket/labels")


@pytest.mark.parametrize("name", ["series/IM0001", "series/1.2.840.dcm", "DICOMDIR"])
def test_dicom_files_are_named_with_the_way_to_convert_them(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "README").write_text("short")
    path.write_bytes(bytes(128) + b"DICM" + bytes(100))
    folder = SubjectFolder(str(tmp_path))
    with pytest.raises(InputError, match=rf"{name}: is DICOM, which isn't read; convert each series .* with dcm2niix"):
        folder.require([], "segment")


def test_nothing_to_work_on(tmp_path):
    with pytest.raises(
        InputError, match=r"no subjects found; looked for subject-<id>-T1.*\.nii\.gz, \.hdr/\.img or \.mgz"
    ):
        SubjectFolder(str(tmp_path)).require([], "train")
    touch(tmp_path, "subject-1-T1.nii", "subject-1-T2.nii")
    with pytest.raises(InputError, match="no subject left to train among 1, 0 of them labelled"):
        SubjectFolder(str(tmp_path)).require([], "train")
    with pytest.raises(InputError, match="val_subjects names none"):
        SubjectFolder(str(tmp_path)).require([], "validate")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("subject_2_T1.nii.gz", "rename it to subject-2-T1.nii.gz to use it"),
        ("subject-3-T2w.nii", "rename it to subject-3-T2.nii to use it"),
        ("subject-4-T1-brain.hdr", "rename it to subject-4-T1.hdr to use it"),
        ("sub-5-t2.nii.gz", "rename it to subject-5-T2.nii.gz to use it"),
        ("baby 07 seg.nii.gz", "rename it to subject-baby 07-label.nii.gz to use it"),
        ("T1.nii.gz", "rename it to subject-<id>-T1.nii.gz to use it"),
        ("subject_6_T1.mgz", "rename it to subject-6-T1.mgz to use it"),
        ("deep/er/subject-6-label.nrrd", "convert it to subject-6-label.nii.gz to use it"),
        ("subject-6-T2.nii.bz2", "convert it to subject-6-T2.nii.gz to use it"),
        ("subject_6_T2.img.gz", "rename it to subject-6-T2.img.gz to use it"),
        ("mask.nii.gz", None),
        ("subject-1-T1-raw.nii.gz", None),
        ("subject-9-T1_brain_mask.nii.gz", None),
        ("subject-9-T1_to_MNI.nii.gz", None),
        ("submarine-3-T1.nii.gz", "rename it to subject-submarine-3-T1.nii.gz to use it"),
        ("t1000.nii.gz", None),
        ("notes-T1.txt", None),
        ("derivatives/subject_2_T1.nii.gz", None),
        (".subject_2_T1.nii.gz", None),
    ],
)
def test_image_that_looks_like_a_subjects_is_not_left_out_without_a_word(tmp_path, name, remedy):
    for kind in ("T1", "T2"):
        (tmp_path / f"subject-1-{kind}.nii.gz").touch()
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    folder = SubjectFolder(str(tmp_path))
    assert folder.unused == ({str(tmp_path / name): remedy} if remedy else {})
    assert [subject["subject"] for subject in folder.require_good()] == ["1"]
