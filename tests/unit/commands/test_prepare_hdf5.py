"""The published HDF5 layout: what is written, what is read, and that training sees the same subject either way."""

import h5py
import nibabel as nib
import numpy as np
import pytest
from helpers import save_subject

from scripts.commands.prepare_hdf5 import prepare_hdf5
from scripts.errors import InputError


def test_validation_subjects_are_not_among_those_for_training(hdf5_prepared):
    files = {str(path.relative_to(hdf5_prepared)) for path in hdf5_prepared.rglob("*") if path.is_file()}
    assert files == {
        "data_train_no_cut/train_iseg_nocut_1.h5",
        "data_train_no_cut/train_iseg_nocut_2.h5",
        "data_val_no_cut/train_iseg_nocut_9.h5",
    }


def test_values_are_those_of_the_published_preparation(hdf5_scans, hdf5_prepared):
    """Written from its description: float64, whole volume first, then the box of T1 > 0 and 32 voxels around it."""
    t1, t2, label = (
        np.asarray(nib.load(hdf5_scans / f"subject-1-{kind}.hdr").dataobj)[..., 0].astype(np.float64)
        for kind in ("T1", "T2", "label")
    )
    brain = t1 > 0
    box = []
    for axis in range(3):
        occupied = np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis})))
        box.append(slice(max(occupied[0] - 32, 0), min(occupied[-1] + 1 + 32, brain.shape[axis])))
    box = tuple(box)
    assert sum(part.stop - part.start < size for part, size in zip(box, brain.shape, strict=True)) == 3
    with h5py.File(hdf5_prepared / "data_train_no_cut" / "train_iseg_nocut_1.h5") as file:
        assert set(file) == {"data", "label"}
        for name, dtype, channels in (("data", np.float32, 2), ("label", np.uint8, 1)):
            assert file[name].dtype == dtype
            assert file[name].chunks is file[name].compression is None
            x, y, z = (part.stop - part.start for part in box)
            assert file[name].shape == (1, channels, z, x, y)
        for channel, volume in enumerate((t1, t2)):
            expected = (volume - volume[brain].mean()) / np.sqrt(((volume[brain] - volume[brain].mean()) ** 2).mean())
            np.testing.assert_allclose(file["data"][0, channel], expected[box].transpose(2, 0, 1), rtol=0, atol=1e-5)
        classes = sum((label == value) * n for n, value in enumerate((0, 10, 150, 250)))
        np.testing.assert_array_equal(file["label"][0, 0], classes[box].transpose(2, 0, 1))


def test_nothing_is_held_out_when_asked_so(hdf5_scans, tmp_path):
    prepare_hdf5(str(hdf5_scans), str(tmp_path), val_subjects=[])
    assert [path.name for path in tmp_path.iterdir()] == ["data_train_no_cut"]
    assert len(list(tmp_path.glob("*/train_iseg_nocut_*.h5"))) == 3


def test_same_files_are_kept(hdf5_scans, hdf5_prepared):
    before = {path: path.stat().st_mtime_ns for path in hdf5_prepared.rglob("*.h5")}
    prepare_hdf5(str(hdf5_scans), str(hdf5_prepared))
    assert {path: path.stat().st_mtime_ns for path in hdf5_prepared.rglob("*.h5")} == before


def test_files_of_somebody_else_are_neither_kept_nor_overwritten(hdf5_scans, tmp_path):
    path = tmp_path / "data_train_no_cut" / "train_iseg_nocut_1.h5"
    path.parent.mkdir()
    path.write_bytes(b"precious")
    with pytest.raises(InputError, match=r"nocut_1.h5: already exists and differs from what subject 1 gives now"):
        prepare_hdf5(str(hdf5_scans), str(tmp_path))
    assert [p.read_bytes() for p in path.parent.iterdir()] == [b"precious"]


@pytest.mark.parametrize(("folder", "val_subjects"), [("data_train_no_cut", [9]), ("data_val_no_cut", [])])
def test_no_subject_ends_in_both_folders(hdf5_scans, tmp_path, folder, val_subjects):
    path = tmp_path / folder / "train_iseg_nocut_9.h5"
    path.parent.mkdir()
    path.touch()
    with pytest.raises(
        InputError, match=rf"{folder}/train_iseg_nocut_9.h5: already exists, but subject 9 now belongs in"
    ):
        prepare_hdf5(str(hdf5_scans), str(tmp_path), val_subjects)
    assert list(tmp_path.rglob("*.h5")) == [path]


def test_subjects_that_can_not_be_prepared(hdf5_scans, tmp_path, brains):
    with pytest.raises(InputError, match="choose an --output_dir outside"):
        prepare_hdf5(str(hdf5_scans), str(hdf5_scans / "hdf5"))
    with pytest.raises(InputError, match="val_subjects names subject 12, which isn't there; choose from 1, 2, 9"):
        prepare_hdf5(str(hdf5_scans), str(tmp_path / "out"), 12)
    save_subject(tmp_path / "unlabelled", "1", brains[0], labeled=False)
    with pytest.raises(InputError, match="no subject left to train among 1, 0 of them labelled"):
        prepare_hdf5(str(tmp_path / "unlabelled"), str(tmp_path / "out"), [])
    t1 = brains[0]["T1"].copy()
    t1[0, 0, 0] = 5
    save_subject(tmp_path / "corner", "1", brains[0] | {"T1": t1})
    with pytest.raises(InputError, match=r"subject-1-T1.hdr: T1 isn't lowest, and the same, in all corners"):
        prepare_hdf5(str(tmp_path / "corner"), str(tmp_path / "out"), [])
    assert not list(tmp_path.rglob("*.h5"))
