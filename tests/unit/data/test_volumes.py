import gzip
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import read_subject, save_volume

from scripts.data.hdf5 import read_hdf5
from scripts.data.volumes import read_scans, read_volume
from scripts.errors import InputError
from scripts.weights import read_checkpoint

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 900, (5, 6, 7)).astype(np.int16)
VALUES[0, 0, 0] = 0  # background


@pytest.mark.parametrize("suffix", [".hdr", ".nii", ".nii.gz"])
def test_every_format_gives_the_values_and_the_grid_on_disk(tmp_path, suffix):
    path = tmp_path / f"volume{suffix}"
    save_volume(path, VALUES)
    values, affine = read_volume(str(path))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, VALUES)
    np.testing.assert_array_equal(affine, np.diag([-1, 1, 1, 1]))


def nifti(path, sform_code: int, qform_code: int, qform: np.ndarray, kind=nib.Nifti1Image) -> str:
    image = kind(VALUES, np.diag([-1.0, 1, 1, 1]))
    image.set_qform(qform, code=qform_code, update_affine=False)
    image.set_sform(image.affine, code=sform_code)
    nib.save(image, path)
    return str(path)


SIDEWAYS = np.array([[0, 0, -1.0, 4], [-1, 0, 0, 5], [0, 1, 0, 6], [0, 0, 0, 1]])


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    ("codes", "qform", "expected"),
    [
        ((0, 0), SIDEWAYS, r"doesn't state the orientation; [LRAPIS]{3} is assumed, so left and right may be"),
        ((2, 1), SIDEWAYS, "its sform and qform differ by 90 degrees; the sform is used"),
        ((1, 1), np.diag([1.0, 1, -1, 1]), "its sform and qform differ by 180 degrees; the sform is used"),
        ((4, 4), np.diag([-1.0, 1, 1, 1]), None),
        ((1, 0), SIDEWAYS, None),
        ((0, 1), SIDEWAYS, None),
    ],
)
def test_doubtful_orientation_is_told(tmp_path, caplog, kind, codes, qform, expected):
    path = nifti(tmp_path / "a.nii.gz", *codes, qform, kind)
    values = np.stack([scan.values for scan in read_scans([path, path])])
    np.testing.assert_array_equal(values[0], VALUES)
    assert len(caplog.messages) == (expected is not None)
    if expected:
        assert re.fullmatch(rf"{path}: .*{expected}.*", caplog.messages[0]), caplog.messages


@pytest.mark.parametrize("quaternion", [0.9, np.nan])
def test_quaternion_that_can_not_be_beside_a_good_sform(tmp_path, caplog, quaternion):
    path = Path(nifti(tmp_path / "a.nii", 1, 1, np.diag([-1.0, 1, 1, 1])))
    content = bytearray(path.read_bytes())
    content[256:268] = np.float32([quaternion] * 3).tobytes()
    path.write_bytes(content)
    (values, affine, _), _ = read_scans([str(path), str(path)])
    np.testing.assert_array_equal(values, VALUES)
    np.testing.assert_array_equal(affine, np.diag([-1, 1, 1, 1]))
    assert not caplog.messages


@pytest.mark.parametrize(("suffix", "offset"), [(".nii", 0), (".nii", 200), (".nii.gz", 0)])
def test_values_inside_the_header_are_refused(tmp_path, suffix, offset):
    path = Path(nifti(tmp_path / "a.nii", 1, 1, np.diag([-1.0, 1, 1, 1])))
    content = bytearray(path.read_bytes())
    content[108:112] = np.float32(offset).tobytes()
    path = tmp_path / f"b{suffix}"
    path.write_bytes(gzip.compress(bytes(content)) if suffix.endswith("gz") else bytes(content))
    with pytest.raises(InputError, match=r"b\.nii.*vox.offset"):
        read_volume(str(path))


def test_file_that_goes_on_long_after_its_values(tmp_path):
    save_volume(path := tmp_path / "a.nii.gz", VALUES)
    whole = path.read_bytes()
    path.write_bytes(whole + gzip.compress(bytes(2**20)))
    assert read_volume(str(path))[0].shape == VALUES.shape
    path.write_bytes(whole + gzip.compress(bytes(2**25)))
    with pytest.raises(InputError, match=f"{path}: continues long after its last value; copy"):
        read_volume(str(path))


@pytest.mark.parametrize("read", [read_volume, read_hdf5, read_checkpoint])
def test_lack_of_memory_is_no_fault_of_the_file(tmp_path, monkeypatch, read):
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate")

    (tmp_path / "scan").touch()
    for name in ("nibabel.load", "h5py.File", "torch.load"):
        monkeypatch.setattr(name, fail)
    with pytest.raises(MemoryError):
        read(str(tmp_path / "scan"))


@pytest.mark.parametrize(
    ("t1", "t2"),
    [
        ("subject-9-T1.nii.gz", "subject-9-T2.nii.gz"),
        ("subject-t1-t1.nii", "subject-t1-t2.nii"),
        ("subject-9-T1.hdr", "subject-9-T2.hdr"),
        ("sub_T1.nii.gz", "sub_T2.nii.gz"),
        ("T1.nii.gz", "T2.nii.gz"),
    ],
)
def test_t2_is_found_beside_its_t1(tmp_path, t1, t2):
    save_volume(tmp_path / t1, VALUES)
    save_volume(tmp_path / t2, VALUES + 7)
    loaded = read_subject({"image": str(tmp_path / t1)})
    np.testing.assert_array_equal(loaded["image"], np.stack([VALUES, VALUES + 7]))


def test_t1_without_its_t2(tmp_path):
    save_volume(tmp_path / "subject-9-T1.nii.gz", VALUES)
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/subject-9-T2.nii.gz: not found, and .*subject-9-T1.* has only T1"
    ):
        read_subject({"image": str(tmp_path / "subject-9-T1.nii.gz")})


@pytest.mark.parametrize("name", ["tmpt1x_9a.nii.gz", "subjectT1.nii.gz", "subject-T11.nii.gz", "subject-9-T1w.nii.gz"])
def test_name_that_does_not_say_t1(tmp_path, name):
    save_volume(tmp_path / name, VALUES)
    save_volume(tmp_path / name.replace("T1", "T2").replace("t1", "t2"), VALUES)
    with pytest.raises(InputError, match=f"{name}: has one volume, and its name doesn't end in -T1"):
        read_subject({"image": str(tmp_path / name)})
