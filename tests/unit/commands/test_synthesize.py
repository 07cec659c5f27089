from contextlib import redirect_stdout
from io import StringIO

import nibabel as nib
import numpy as np
import pytest

from scripts.commands.synthesize import synthesize
from scripts.data.subjects import SubjectFolder
from scripts.errors import InputError
from scripts.synthesis.contrast import histogram_overlap
from scripts.synthesis.label_maps import read_label_map
from scripts.tissues import ISEG_VALUES


@pytest.fixture(scope="module")
def labels(tmp_path_factory, brains):
    """Two label maps: one as NIfTI on axes to the right, the front and the top, one by iSeg's values on other axes."""
    directory = tmp_path_factory.mktemp("labels")
    first, second = (brain["label"] for brain in brains)
    nib.save(nib.Nifti1Image(first[::-1].copy(), np.eye(4)), directory / "A.nii.gz")
    nib.save(
        nib.Nifti1Image(np.array(ISEG_VALUES, dtype=np.uint8)[second], np.diag([-1, 1, 1, 1])), directory / "B.nii"
    )
    return directory


@pytest.fixture(scope="module")
def made(labels, tmp_path_factory):
    directory = tmp_path_factory.mktemp("synthetic")
    with redirect_stdout(StringIO()) as printed:
        synthesize(str(labels), str(directory))
    assert f"synthetic subjects: 2 in {directory}, 2 of them new" in printed.getvalue()
    return directory, printed.getvalue()


def test_each_label_map_becomes_a_subject_that_can_train(made):
    directory, _ = made
    subjects = SubjectFolder(str(directory)).require_good()
    assert [subject["subject"] for subject in subjects] == ["A", "B"]
    assert all("label" in subject for subject in subjects)


def test_overlaps_that_are_told_are_those_of_the_files(made):
    directory, told = made
    t1, label = (np.asarray(nib.load(directory / f"subject-A-{kind}.nii.gz").dataobj) for kind in ("T1", "label"))
    header, row = (
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in told.splitlines()
        if line.startswith(("| subject", "| A"))
    )
    overlap = histogram_overlap(t1[label == 2], t1[label == 3])
    assert float(row[header.index("T1 GM/WM")]) == pytest.approx(overlap, abs=1e-3)
    assert overlap == pytest.approx(0.70, abs=0.05)


def test_label_map_is_kept_voxel_for_voxel_on_axes_to_the_right_front_and_top(labels, made):
    directory, _ = made
    for name, file in (("A", "A.nii.gz"), ("B", "B.nii")):
        given = read_label_map(labels / file)
        written = nib.load(directory / f"subject-{name}-label.nii.gz")
        assert np.array_equal(np.asarray(written.dataobj), given.label)
        assert nib.aff2axcodes(written.affine) == ("R", "A", "S")
        t1 = np.asarray(nib.load(directory / f"subject-{name}-T1.nii.gz").dataobj)
        assert np.array_equal(t1 > 0, given.label > 0)


def test_what_is_there_is_kept_and_further_draws_are_added(labels, made, capsys):
    directory, _ = made
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    synthesize(str(labels), str(directory), draws=2)
    assert "4 in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    first, second = (nib.load(directory / f"subject-{name}-T1.nii.gz").get_fdata() for name in ("A", "A-2"))
    assert np.array_equal(first > 0, second > 0)
    assert np.mean(first != second) > 0.1
    with pytest.raises(InputError, match=r"subject-A-T1.nii.gz: already exists and isn't synthetic nominal seed 1"):
        synthesize(str(labels), str(directory), seed=1)


def test_label_map_that_changed_is_not_taken_for_the_one_before(labels, made, tmp_path):
    directory, _ = made
    image = nib.load(labels / "A.nii.gz")
    label = np.asarray(image.dataobj).copy()
    label[tuple(np.argwhere(label == 2)[0])] = 3
    nib.save(nib.Nifti1Image(label, image.affine), tmp_path / "A.nii.gz")
    with pytest.raises(InputError, match=r"subject-A-T1.nii.gz: already exists and isn't"):
        synthesize(str(tmp_path), str(directory))


def test_only_the_label_maps_that_are_named(labels, tmp_path):
    synthesize(str(labels), str(tmp_path / "o"), names="B")
    assert [subject["subject"] for subject in SubjectFolder(str(tmp_path / "o")).require_good()] == ["B"]
    with pytest.raises(InputError, match=r"--names C: no such label map in .*; it has A, B"):
        synthesize(str(labels), str(tmp_path / "o"), names=["A", "C"])


@pytest.mark.parametrize(("other", "draws"), [("A.nii", 1), ("A-2.nii.gz", 2)])
def test_two_label_maps_of_one_name(labels, tmp_path, other, draws):
    for name in ("A.nii.gz", other):
        nib.save(nib.load(labels / "A.nii.gz"), tmp_path / name)
    with pytest.raises(InputError, match=r"another label map would be called A(-2)? too; rename one"):
        synthesize(str(tmp_path), str(tmp_path / "o"), draws=draws)
    assert not (tmp_path / "o").exists()


def test_bad_label_maps_and_settings(labels, tmp_path):
    ones = np.ones((8, 8, 8), dtype=np.uint8)
    nib.save(nib.Nifti1Image(ones, np.eye(4)), tmp_path / "x.nii")
    with pytest.raises(InputError, match=r"x.nii: has no GM, WM"):
        synthesize(str(tmp_path), str(tmp_path / "o"))
    ones[0, 0, :2] = 2, 3
    nib.save(nib.Nifti1Image(ones, np.diag([2, 2, 2, 1])), tmp_path / "x.nii")
    with pytest.raises(InputError, match=r"x.nii: voxels of 2 x 2 x 2 mm; resample"):
        synthesize(str(tmp_path), str(tmp_path / "o"))
    with pytest.raises(InputError, match="--contrast adult: must be nominal"):
        synthesize(str(labels), str(tmp_path / "o"), contrast="adult")
    with pytest.raises(InputError, match="--draws 0"):
        synthesize(str(labels), str(tmp_path / "o"), draws=0)
    assert not (tmp_path / "o").exists()


def test_infants_are_drawn_from_the_structures(labels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scripts.synthesis.infants.VOLUME", (60, 90))
    synthesize(str(labels), str(tmp_path), contrast="infant", names="A", draws=2)
    assert "2 of them new" in capsys.readouterr().out
    subjects = SubjectFolder(str(tmp_path)).require_good()
    assert [subject["subject"] for subject in subjects] == ["A", "A-2"]
    first, second = (nib.load(subject["label"]) for subject in subjects)
    assert first.shape != second.shape
    assert {*np.unique(np.asarray(first.dataobj))} == {0, 1, 2, 3}
    assert nib.aff2axcodes(first.affine) == ("R", "A", "S")
    synthesize(str(labels), str(tmp_path), contrast="infant", names="A", draws=2)
    assert "0 of them new" in capsys.readouterr().out
