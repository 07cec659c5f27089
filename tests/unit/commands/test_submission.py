import hashlib
import zipfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from helpers import save_volume

from scripts.commands.submission import TEST_SUBJECTS, submission
from scripts.errors import InputError
from scripts.results.label_images import write_label
from scripts.tissues import ISEG_VALUES

SHAPES = {str(number): (6, 7, 8) for number in TEST_SUBJECTS} | {"11": (144, 192, 256), "23": (160, 192, 256)}


def brain_of(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A T1 of a small block and its labels, all different from their mirror images."""
    label = np.zeros(shape, dtype=np.uint8)
    label[1:5, 2:5, 3:5] = 1
    label[2:5, 2:4, 3] = 2
    label[4, 3:5, 4] = 3
    return np.where(label > 0, 100 * label, 0).astype(np.int16), label


def save_t1(path: Path, t1: np.ndarray, subject: str) -> None:
    """As iSeg has it, but with a header in which each field shows, that is carried over or isn't."""
    image = nib.Spm2AnalyzeImage(t1[..., None], None)
    image.header.set_zooms((1.0, 1.0, 1.0, 1.0))
    image.header["descrip"] = f"scan of {subject}".encode()
    image.header["origin"][:3] = (3, 4, 5)
    nib.save(image, path)


def make(directory: Path, shapes: dict[str, tuple[int, int, int]]) -> tuple[Path, Path]:
    """Dataset and predictions: every other one in Analyze, the others in NIfTI."""
    data, predictions = directory / "data", directory / "labels"
    data.mkdir()
    for position, (subject, shape) in enumerate(shapes.items()):
        t1, label = brain_of(shape)
        for kind in ("T1", "T2"):
            save_t1(data / f"subject-{subject}-{kind}.hdr", t1, subject)
        suffix = (".nii.gz", ".hdr")[position % 2]
        t1_path = str(data / f"subject-{subject}-T1.hdr")
        write_label(predictions / f"subject-{subject}-label{suffix}", label, t1_path)
    return data, predictions


def pack(data: Path, predictions: Path, name: str = "submission.zip", **options) -> Path:
    output = data.parent / name
    submission(str(predictions), str(data), str(output), **options)
    return output


@pytest.fixture
def small(tmp_path) -> tuple[Path, Path]:
    """Subjects 11 (segmented in NIfTI) and 12 (in Analyze)."""
    return make(tmp_path, {"11": (6, 7, 8), "12": (6, 7, 8)})


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """All thirteen subjects: the zip, as the command makes it, and what it unpacks to."""
    directory = tmp_path_factory.mktemp("submission")
    data, predictions = make(directory, SHAPES)
    (predictions / "volumes.csv").write_text("subject\n")
    output = directory / "new" / "submission.zip"
    with redirect_stdout(StringIO()) as printed:
        submission(str(predictions), str(data), str(output))
    assert f"13 subjects in {output}" in printed.getvalue()
    assert "outside" not in printed.getvalue() and "warning" not in printed.getvalue()
    assert list(output.parent.iterdir()) == [output]
    with zipfile.ZipFile(output) as archive:
        names = [f"subject-{subject}-label.{suffix}" for subject in SHAPES for suffix in ("hdr", "img")]
        assert archive.namelist() == names
        archive.extractall(directory / "unpacked")
    return directory / "unpacked"


@pytest.mark.parametrize("subject", SHAPES)
def test_pair_in_the_zip_lies_as_the_t1_and_tells_nothing_of_its_subject(unpacked, subject):
    header = unpacked / f"subject-{subject}-label.hdr"
    shape = SHAPES[subject]
    assert header.stat().st_size == 348
    assert header.with_suffix(".img").stat().st_size == np.prod(shape)
    label, t1 = nib.load(header), nib.load(unpacked.parent / "data" / f"subject-{subject}-T1.hdr")
    assert type(label) is nib.Spm2AnalyzeImage
    assert label.shape == (*shape, 1)
    assert label.get_data_dtype() == np.uint8
    for field in ("dim", "pixdim", "origin"):
        np.testing.assert_array_equal(label.header[field], t1.header[field])
    assert b"scan of" not in header.read_bytes()
    np.testing.assert_array_equal(label.affine, t1.affine)
    np.testing.assert_array_equal(np.asarray(label.dataobj)[..., 0], np.array(ISEG_VALUES)[brain_of(shape)[1]])


@pytest.mark.parametrize("subject", SHAPES)
def test_another_reader_sees_the_label_where_it_sees_the_t1(unpacked, subject):
    label = SimpleITK.ReadImage(unpacked / f"subject-{subject}-label.hdr")
    t1 = SimpleITK.ReadImage(unpacked.parent / "data" / f"subject-{subject}-T1.hdr")
    assert label.GetSize() == t1.GetSize() == SHAPES[subject]  # ITK drops the fourth dimension of length 1
    assert label.GetSpacing() == t1.GetSpacing() == (1, 1, 1)
    assert (label.GetOrigin(), label.GetDirection()) == (t1.GetOrigin(), t1.GetDirection())
    assert label.GetPixelIDTypeAsString() == "8-bit unsigned integer"
    values = SimpleITK.GetArrayViewFromImage(label).transpose()  # from (z, y, x)
    np.testing.assert_array_equal(values, np.array(ISEG_VALUES)[brain_of(SHAPES[subject])[1]])


def test_same_bytes_each_time_in_any_order(small):
    files = [pack(*small, name, subjects=ids) for name, ids in (("a.zip", [11, 12]), ("b.zip", ["12", 11, 11]))]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in files}) == 1


def test_voxels_outside_the_brain_become_background_and_gaps_are_told(small, capsys):
    data, predictions = small
    label = brain_of((6, 7, 8))[1]
    label[0, 0, :3] = 3  # outside
    label[2, 4, 4] = 0  # a gap
    write_label(predictions / "subject-12-label.hdr", label, str(data / "subject-12-T1.hdr"))
    output = pack(data, predictions, subjects=[11, 12])
    printed = capsys.readouterr().out
    path = predictions / "subject-12-label.hdr"
    assert f"{path}: 3 labelled voxels outside the brain (T1 0) set to background; warning: 1 voxels of the" in printed
    assert "subject-11" not in printed
    with zipfile.ZipFile(output) as archive:
        archive.extractall(data.parent / "unpacked")
    values = np.asarray(nib.load(data.parent / "unpacked" / "subject-12-label.hdr").dataobj)[..., 0]
    label[0, 0, :3] = 0
    np.testing.assert_array_equal(values, np.array(ISEG_VALUES)[label])


def refused(small, match: str, **options) -> None:
    """A submission is refused by one line and leaves nothing."""
    data, predictions = small
    before = {path: path.read_bytes() for path in data.parent.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=match) as error:
        pack(data, predictions, **{"subjects": [11, 12], **options})
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in data.parent.rglob("*") if path.is_file()} == before


def test_missing_segmentations_are_named(tmp_path):
    data, predictions = make(tmp_path, {str(number): (6, 7, 8) for number in TEST_SUBJECTS})
    for subject in ("12", "23"):
        for path in predictions.glob(f"subject-{subject}-*"):
            path.unlink()
    refused((data, predictions), r"labels: no subject-<id>-label of subject 12, 23; segment", subjects=TEST_SUBJECTS)
    refused((data, tmp_path / "nowhere"), "nowhere: no subject-<id>-label of subject 11; ", subjects=11)


def test_subjects_that_the_dataset_lacks(small, tmp_path):
    refused(small, r"data: subjects names subject 13, which isn't there; choose from 11, 12", subjects=TEST_SUBJECTS)
    refused((tmp_path / "nowhere", small[1]), "nowhere: no such folder")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda label: label[:-1], r"shape \(5, 7, 8\) differs from \(6, 7, 8\) of .*subject-11-T1.hdr"),
        (lambda label: np.where(label == 3, 4, label), "label value 4 isn't known"),
        (lambda label: np.where(label == 3, 250, label), "mixes iSeg's label values with 1, 2, 3"),
        (lambda label: np.where(label == 2, 1, label), "no voxel of the brain is GM"),
        (lambda label: np.where(label == 3, 2, label) + 3 * (np.arange(8) == 0), "no voxel of the brain is WM"),
    ],
)
def test_wrong_labels_are_refused(small, change, match):
    data, predictions = small
    affine = nib.load(data / "subject-11-T1.hdr").affine
    save_volume(predictions / "subject-11-label.nii.gz", change(brain_of((6, 7, 8))[1]).astype(np.uint8), affine)
    refused(small, rf"{predictions}/subject-11-label.nii.gz: {match}")


def test_other_affine_is_refused(small):
    label = brain_of((6, 7, 8))[1]
    save_volume(small[1] / "subject-11-label.nii.gz", label, np.diag([1.0, 1, 1, 1]))
    refused(small, r"subject-11-label.nii.gz: its affine differs from that of .*subject-11-T1.hdr")


def test_two_files_for_one_subject_are_refused(small):
    data, predictions = small
    write_label(predictions / "subject-11-label.hdr", brain_of((6, 7, 8))[1], str(data / "subject-11-T1.hdr"))
    refused(small, r"subject-11-label.nii.gz: subject 11 has .*subject-11-label.hdr as well")


def test_half_a_pair_and_a_damaged_file_are_refused(small):
    path = small[1] / "subject-11-label.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    refused(small, "subject-11-label.nii.gz: can't be read")
    (small[1] / "subject-12-label.img").unlink()
    refused(small, r"subject-12-label.hdr: its image subject-12-label.img is missing")


def test_existing_file_stays(small):
    (small[0].parent / "submission.zip").write_text("mine")
    refused(small, r"submission.zip: already exists; choose another --output")


@pytest.mark.parametrize("mirrored", [False, True])
def test_t1_in_nifti(small, mirrored):
    data, predictions = small
    t1, label = brain_of((6, 7, 8))
    affine = np.diag([1.0 if mirrored else -1.0, 1.2, 2, 1])
    affine[:3, 3] = (4.3, -5, -7)
    for kind in ("T1", "T2"):
        (data / f"subject-11-{kind}.hdr").unlink()
        (data / f"subject-11-{kind}.img").unlink()
        save_volume(data / f"subject-11-{kind}.nii", t1[..., None], affine)
    write_label(predictions / "subject-11-label.nii.gz", label, str(data / "subject-11-T1.nii"))
    if mirrored:  # Analyze has no way to say so
        refused(small, "subject-11-T1.nii: an Analyze header can't describe its orientation; use iSeg's own T1")
        return
    with zipfile.ZipFile(pack(data, predictions, subjects=[11])) as archive:
        assert archive.namelist() == ["subject-11-label.hdr", "subject-11-label.img"]
        archive.extractall(data.parent / "unpacked")
    written = nib.load(data.parent / "unpacked" / "subject-11-label.hdr")
    assert written.shape == (6, 7, 8, 1)
    np.testing.assert_allclose(written.affine[:3, :3], affine[:3, :3], atol=1e-6)
    np.testing.assert_allclose(written.affine[:3, 3], affine[:3, 3], atol=1.01)
    np.testing.assert_array_equal(np.asarray(written.dataobj)[..., 0], np.array(ISEG_VALUES)[label])
