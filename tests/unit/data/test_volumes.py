import gzip
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import read_subject, save_volume
from nibabel.affines import voxel_sizes

from scripts.data.hdf5 import read_hdf5
from scripts.data.volumes import on_same_grid, read_scans, read_volume
from scripts.errors import InputError
from scripts.results.label_images import write_label
from scripts.weights import read_checkpoint

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 900, (5, 6, 7)).astype(np.int16)
VALUES[0, 0, 0] = 0  # background


def written(path: Path) -> Path:
    """Write VALUES at 1 mm on axes to the left, the front and the top, in the format that the suffix names."""
    if ".mg" in path.name:
        nib.save(nib.MGHImage(VALUES, np.diag([-1.0, 1, 1, 1])), path)
    else:
        save_volume(path.with_name("saved.hdr" if ".hdr" in path.name.lower() else path.name), VALUES)
    for half in ("hdr", "img") if ".hdr" in path.name.lower() else ():
        content = path.with_name(f"saved.{half}").read_bytes()
        packed = path.suffix == ".gz"
        path.with_name(path.name.replace("hdr", half)).write_bytes(gzip.compress(content) if packed else content)
    return path


@pytest.mark.filterwarnings(
    "ignore:.*FileIO name=.*mgh:pytest.PytestUnraisableExceptionWarning"
)  # nibabel leaves it open
@pytest.mark.parametrize("suffix", [".hdr", ".hdr.gz", ".nii", ".nii.gz", ".mgh", ".mgz"])
def test_every_format_gives_the_values_and_the_grid_on_disk(tmp_path, suffix):
    values, affine = read_volume(str(written(tmp_path / f"volume{suffix}")))
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


@pytest.mark.parametrize(("header", "image"), [(".HDR", ".img"), (".hdr", ".IMG"), (".HDR", ".IMG")])
def test_halves_of_a_pair_whose_endings_differ_in_case(tmp_path, header, image):
    pair = written(tmp_path / "a.hdr")
    pair.rename(tmp_path / f"b{header}")
    pair.with_suffix(".img").rename(tmp_path / f"b{image}")
    values, _ = read_volume(str(tmp_path / f"b{header}"))
    np.testing.assert_array_equal(values, VALUES)


def with_bytes(path: Path, offset: int, content: bytes) -> Path:
    before = bytearray(path.read_bytes())
    before[offset : offset + len(content)] = content
    path.write_bytes(before)
    return path


@pytest.mark.parametrize("excess", [1e-7, 5e-7, 2e-6, 1e-5])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti1Pair])
def test_quaternion_a_little_too_long(tmp_path, excess, kind):
    name = "a.nii" if kind is nib.Nifti1Image else "a.hdr"
    path = Path(nifti(tmp_path / name, 0, 1, np.diag([-1.0, 1, -1, 1]), kind))
    with_bytes(path, 256, np.float32([0, 1 + excess, 0]).tobytes())
    values, affine = read_volume(str(path))
    np.testing.assert_array_equal(values, VALUES)
    np.testing.assert_allclose(affine, np.diag([-1, 1, -1, 1]), atol=1e-4)


@pytest.mark.parametrize(
    ("unit", "size", "millimetres"),
    [("meter", 0.001, 1), ("micron", 800, 0.8), ("mm", 1, 1), ("unknown", 1, 1), ("meter", 1, 1), ("micron", 0.9, 0.9)],
)
def test_units_of_length_count_unless_they_can_not_be(tmp_path, unit, size, millimetres):
    image = nib.Nifti1Image(VALUES, np.diag([-size, size, size, 1.0]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_allclose(voxel_sizes(read_volume(str(tmp_path / "a.nii.gz"))[1]), millimetres, rtol=1e-6)
    write_label(tmp_path / "label.nii.gz", np.ones(VALUES.shape, np.uint8), str(tmp_path / "a.nii.gz"))
    beside = nib.load(tmp_path / "label.nii.gz")  # opens beside the scan, by tools that heed the unit or don't
    np.testing.assert_allclose(beside.affine, image.affine)
    np.testing.assert_allclose(voxel_sizes(read_volume(str(tmp_path / "label.nii.gz"))[1]), millimetres, rtol=1e-6)


@pytest.mark.parametrize("zeros", [(0, 0, 0), (0, 1, 1), (1, 1, 0)])
def test_voxel_sizes_of_0_beside_a_good_sform(tmp_path, zeros):
    path = Path(nifti(tmp_path / "a.nii", 1, 0, np.eye(4)))
    with_bytes(path, 80, np.float32(zeros).tobytes())
    values, affine = read_volume(str(path))
    np.testing.assert_array_equal(values, VALUES)
    np.testing.assert_array_equal(affine, np.diag([-1, 1, 1, 1]))
    write_label(tmp_path / "label.nii", np.ones(VALUES.shape, np.uint8), str(path))
    assert nib.load(tmp_path / "label.nii").header.get_zooms() == (1, 1, 1)


@pytest.mark.parametrize("zeros", [(0, 0, 0), (0, 1, 1), (1, 1, 0)])
@pytest.mark.parametrize("name", ["a.nii", "a.hdr"])
def test_voxel_sizes_of_0_and_nothing_else_to_go_by(tmp_path, name, zeros):
    path = Path(nifti(tmp_path / name, 0, 0, np.eye(4))) if name == "a.nii" else written(tmp_path / name)
    with_bytes(path, 80, np.float32(zeros).tobytes())
    with pytest.raises(InputError, match=rf"{name}: its voxel size of .* can't be; correct its header"):
        read_volume(str(path))


@pytest.mark.parametrize(
    ("stored", "slices"), [(1, "coronal"), (2, "sagittal"), (5, "sagittal and flipped"), (0, None)]
)
def test_orientation_of_analyze_that_is_not_heeded_is_told(tmp_path, caplog, stored, slices):
    path = str(with_bytes(written(tmp_path / "a.hdr"), 252, bytes([stored])))
    read_scans([path, path])
    expected = f"{path}: its header calls its slices {slices}, which few tools heed; here they are transverse"
    assert caplog.messages == ([expected] if slices else [])


@pytest.mark.parametrize(("moved", "same"), [(0.2, True), (0.45, True), (0.6, False)])
@pytest.mark.parametrize("side", [0.8, 1.0, 2.0])
def test_grids_that_differ_by_less_than_half_a_voxel_are_one(moved, same, side):
    first = np.diag([-side, side, side, 1.0])
    second = first.copy()
    second[1, 3] += moved * side
    assert on_same_grid(VALUES, second, VALUES, first) == same


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
