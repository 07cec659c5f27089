import nibabel as nib
import numpy as np
import pytest

from scripts.errors import InputError
from scripts.results.label_images import LabelSaver, write_analyze, write_label, write_map

RNG = np.random.default_rng(1)
LABEL = RNG.integers(0, 4, (5, 6, 7)).astype(np.uint8)
OBLIQUE = np.array([[0, 0, 1.5, -3], [-1.2, 0.1, 0, 5], [0.1, 2.0, 0, 7], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1)])
def test_nifti_label_opens_beside_any_t1(tmp_path, suffix, shape):
    nib.save(nib.Nifti1Image(np.ones(shape, np.int16), OBLIQUE), tmp_path / "t1.nii")
    write_label(tmp_path / f"label{suffix}", LABEL, str(tmp_path / "t1.nii"))
    label = nib.load(tmp_path / f"label{suffix}")
    assert label.shape == shape
    assert label.get_data_dtype() == np.uint8
    np.testing.assert_allclose(label.affine, nib.load(tmp_path / "t1.nii").affine)
    np.testing.assert_array_equal(np.asarray(label.dataobj).reshape(LABEL.shape), LABEL)


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


def test_analyze_label_of_a_nifti_t1_keeps_its_affine(tmp_path):
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7), np.int16), OBLIQUE), tmp_path / "t1.nii")
    write_label(tmp_path / "label.hdr", LABEL, str(tmp_path / "t1.nii"))
    np.testing.assert_allclose(nib.load(tmp_path / "label.hdr").affine, OBLIQUE, atol=1e-6)


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
