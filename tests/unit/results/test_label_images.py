import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import inv_ornt_aff

from scripts.data.volumes import read_volume
from scripts.errors import InputError
from scripts.results.label_images import LabelSaver, write_analyze, write_label, write_map
from scripts.tissues import ISEG_VALUES, tissue_labels

RNG = np.random.default_rng(1)
LABEL = RNG.integers(0, 4, (5, 6, 7)).astype(np.uint8)
OBLIQUE = np.array([[0, 0, 1.5, -3], [-1.2, 0.1, 0, 5], [0.1, 2.0, 0, 7], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("write", [write_label, write_map])
@pytest.mark.parametrize("codes", [(1, 1), (4, 0), (0, 1), (0, 0)])
def test_programs_find_the_grid_of_t1_whichever_affine_they_take(write, codes, tmp_path):
    t1 = nib.Nifti1Image(np.ones(LABEL.shape, np.int16), np.diag([-1.0, 1, 1, 1]))
    rotated = np.array([[-0.96, 0.28, 0, 10], [0.28, 0.96, 0, 11], [0, 0, 1.2, -12], [0, 0, 0, 1.0]])
    t1.set_sform(OBLIQUE, codes[0])
    t1.set_qform(rotated, codes[1])
    nib.save(t1, tmp_path / "t1.nii.gz")
    write(tmp_path / "label.nii.gz", LABEL, str(tmp_path / "t1.nii.gz"))
    label, t1 = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("label", "t1"))
    for form in ("get_sform", "get_qform"):
        (affine, code), (expected, expected_code) = (getattr(image, form)(coded=True) for image in (label, t1))
        assert code == expected_code
        np.testing.assert_array_equal(affine, expected)
    np.testing.assert_array_equal(label.affine, t1.affine)
    np.testing.assert_array_equal(label.header["pixdim"], t1.header["pixdim"])


def test_affine_of_a_former_label_does_not_stay(tmp_path):
    nib.save(nib.Nifti1Image(np.ones(LABEL.shape, np.int16), OBLIQUE), tmp_path / "t1.nii")
    write_label(tmp_path / "label.hdr", LABEL, str(tmp_path / "t1.nii"))
    assert (tmp_path / "label.mat").exists()
    write_analyze(tmp_path / "t1.hdr", np.ones(LABEL.shape, np.int16))
    write_label(tmp_path / "label.hdr", LABEL, str(tmp_path / "t1.hdr"))
    np.testing.assert_array_equal(nib.load(tmp_path / "label.hdr").affine, nib.load(tmp_path / "t1.hdr").affine)


def test_analyze_label_of_an_iseg_subject(tmp_path):
    write_analyze(tmp_path / "t1.hdr", np.ones((5, 6, 7), np.int16), "of subject 11")
    write_label(tmp_path / "out" / "label.hdr", LABEL, str(tmp_path / "t1.hdr"))
    label, t1 = (nib.load(path) for path in (tmp_path / "out" / "label.hdr", tmp_path / "t1.hdr"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["label.hdr", "label.img"]
    assert label.shape == t1.shape == (5, 6, 7, 1)
    np.testing.assert_array_equal(label.affine, t1.affine)
    for field in ("dim", "pixdim", "origin"):
        np.testing.assert_array_equal(label.header[field], t1.header[field])
    assert label.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(label.dataobj)[..., 0], np.array([0, 10, 150, 250])[LABEL])


def test_unknown_suffix():
    with pytest.raises(InputError, match=r"label_suffix must be .* got '.mha'"):
        LabelSaver("out", ".mha")


@pytest.mark.parametrize("write", [write_label, write_map])
def test_label_or_map_of_a_file_of_t1_and_t2(write, tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((*LABEL.shape, 2), np.int16), OBLIQUE), tmp_path / "both.nii.gz")
    write(tmp_path / "label.nii.gz", LABEL, str(tmp_path / "both.nii.gz"))
    label = nib.load(tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(label.get_fdata()[..., 0], LABEL)
    np.testing.assert_allclose(label.affine, OBLIQUE, atol=1e-6)


ORIENTATIONS = [
    np.c_[axes, flips] for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)
]
steady = settings(deadline=None, derandomize=True, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(*[st.integers(1, 9)] * 3)
spacings = st.tuples(*[st.floats(0.7, 1.5)] * 3)
orientations = st.sampled_from(ORIENTATIONS)


@steady
@given(shape=shapes, dtype=st.sampled_from([np.int16, np.uint8]), seed=seeds)
def test_analyze_is_read_as_it_was_written(shape, dtype, seed):
    limits = np.iinfo(dtype)
    values = np.random.default_rng(seed).integers(limits.min, limits.max, shape, dtype, endpoint=True)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "volume.hdr"
        write_analyze(path, values)
        read, affine = read_volume(str(path))
        np.testing.assert_array_equal(read, values)
        np.testing.assert_array_equal(affine, np.diag([-1, 1, 1, 1]))
        # by the published layout, without nibabel: the first axis runs fastest, and voxels count from 1
        stored = np.fromfile(path.with_suffix(".img"), dtype).reshape(shape, order="F")
        np.testing.assert_array_equal(stored, values)
        np.testing.assert_array_equal(np.frombuffer(path.read_bytes(), "<i2", 3, offset=253), 1)


@steady
@given(shape=shapes, seed=seeds, spacing=spacings, place=st.tuples(*[st.integers(1, 9)] * 3))
def test_analyze_label_has_the_origin_of_its_t1_without_a_file_beside_it(shape, seed, spacing, place):
    label = np.random.default_rng(seed).integers(0, 4, shape, np.uint8)
    place = np.minimum(place, shape)
    with TemporaryDirectory() as folder:
        t1, path = (Path(folder) / name for name in ("t1.hdr", "label.hdr"))
        image = nib.Spm2AnalyzeImage(np.ones(shape, np.int16), None)
        image.header.set_zooms(spacing)
        image.header["origin"][:3] = place
        nib.save(image, t1)
        write_label(path, label, str(t1))
        read, affine = read_volume(str(path))
        assert not path.with_suffix(".mat").exists()
        np.testing.assert_array_equal(tissue_labels(read, "label"), label)
        size = np.array(spacing, np.float32) * [-1, 1, 1]
        np.testing.assert_allclose(affine, nib.affines.from_matvec(np.diag(size), -(place - 1) * size), rtol=1e-6)


@steady
@given(
    shape=shapes, order=orientations, spacing=spacings, seed=seeds, axes=st.sampled_from([(), (1,), (1, 1)]),
    offset=st.tuples(*[st.floats(-1e5, 1e5)] * 3), suffix=st.sampled_from([".nii", ".nii.gz", ".hdr"]),
)  # fmt: skip
def test_label_has_the_grid_of_any_t1(shape, order, spacing, seed, axes, offset, suffix):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, shape, np.uint8)
    turn = nib.eulerangles.euler2mat(*rng.uniform(-np.pi, np.pi, 3))
    affine = nib.affines.from_matvec(turn @ np.diag(spacing), offset) @ inv_ornt_aff(order, shape)
    with TemporaryDirectory() as folder:
        t1, path = Path(folder) / "t1.nii.gz", Path(folder) / f"label{suffix}"
        nib.save(nib.Nifti1Image(np.ones((*shape, *axes), np.int16), affine), t1)
        write_label(path, label, str(t1))
        assert nib.load(path).shape == (*shape, *axes)
        read, read_affine = read_volume(str(path))
        np.testing.assert_array_equal(read, np.array(ISEG_VALUES)[label] if suffix == ".hdr" else label)
        np.testing.assert_allclose(read_affine, nib.load(t1).affine, rtol=1e-6, atol=1e-6)
