"""What holds for any volume: of any orientation, shape and voxel size, drawn at random and the same each time."""

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.networks import one_hot
from monai.transforms import Compose
from nibabel.orientations import inv_ornt_aff
from scipy.ndimage import grey_dilation, grey_erosion

from scripts.commands.prepare_hdf5 import prepare_hdf5
from scripts.data.hdf5 import read_hdf5
from scripts.data.subjects import SubjectFolder
from scripts.data.volumes import read_volume
from scripts.results.label_images import LabelSaver
from scripts.tissues import tissue_labels

ORIENTATIONS = [
    np.c_[axes, flips] for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)
]
steady = settings(deadline=None, derandomize=True, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
# odd; the network's grid is longer than the least of them and, around the brain, shorter than the greatest
sides = st.tuples(*[st.sampled_from([17, 23, 31, 33, 49, 75])] * 3)
spacings = st.tuples(*[st.floats(0.7, 1.5)] * 3)
orientations = st.sampled_from(ORIENTATIONS)


@pytest.fixture(scope="module")
def before_and_after() -> tuple[Compose, Compose]:
    """The transforms of inference before and after the network."""
    config = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "inference.json"))
    config["bundle_root"] = str(ROOT)
    return config.get_parsed_content("preprocessing"), config.get_parsed_content("postprocessing")


def brain_in(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label (0 to 3), T1 and T2 of shells 2 to 3 voxels thick about a place of its own, which leave the corners 0."""
    centre = [rng.uniform(8, side - 9) for side in shape]
    distance = np.linalg.norm([np.indices(shape)[axis] - centre[axis] for axis in range(3)], axis=0)
    label = np.digitize(-distance, [-8, -6, -3]).astype(np.uint8)
    t1, t2 = (np.where(label, 20 * label + rng.integers(1, 20, shape), 0).astype(np.int16) for _ in range(2))
    return label, t1, t2


def save_turned(folder: Path, volumes: dict[str, np.ndarray], order: np.ndarray, spacing: tuple[float, ...]) -> dict:
    """Write a subject in an order of axes, anywhere in the world."""
    affine = np.diag([-spacing[0], *spacing[1:], 1.0]) + np.eye(4, k=3) * 33.25
    affine = affine @ inv_ornt_aff(order, volumes["T1"].shape)
    for kind, values in volumes.items():
        nib.save(nib.Nifti1Image(nib.apply_orientation(values, order), affine), folder / f"subject-1-{kind}.nii")
    return SubjectFolder(str(folder)).require_good()[0]


def there_and_back(before_and_after, shape, order, spacing, rng, suffix) -> tuple[np.ndarray, np.ndarray]:
    """A label on disk, and what inference writes if the network gives that label; both as (X, Y, Z)."""
    before, after = before_and_after
    label, t1, t2 = brain_in(shape, rng)
    with TemporaryDirectory() as name:
        folder = Path(name)
        subject = save_turned(folder, {"T1": t1, "T2": t2, "label": label}, order, spacing)
        loaded = before(subject)
        sides = loaded["image"].shape[1:]
        assert max(sides) < 75  # cut
        assert not any(side % 16 for side in sides)  # padded as the paper's network wants it
        logits = one_hot(loaded["label"].as_tensor()[None], num_classes=4)[0]
        found = after(loaded | {"pred": MetaTensor(logits)}) | {"subject": "1"}
        LabelSaver(str(folder / "out"), suffix).write(found)
        values, affine = read_volume(str(folder / "out" / f"subject-1-label{suffix}"))
        of_t1 = nib.load(folder / "subject-1-T1.nii")
        np.testing.assert_allclose(affine, of_t1.affine, atol=1e-4)
        return tissue_labels(np.asarray(nib.load(subject["label"]).dataobj), "label"), tissue_labels(values, "found")


@pytest.mark.parametrize("order", ORIENTATIONS, ids=lambda order: str(order.tolist()))
@settings(steady, max_examples=2)
@given(shape=sides, seed=seeds, suffix=st.sampled_from([".nii", ".nii.gz", ".hdr"]))
def test_label_comes_back_from_the_networks_grid_as_it_was(before_and_after, order, shape, seed, suffix):
    rng = np.random.default_rng(seed)
    label, found = there_and_back(before_and_after, shape, order, (1.0, 1.0, 1.0), rng, suffix)
    np.testing.assert_array_equal(found, label)


@steady
@given(shape=sides, order=orientations, spacing=spacings, seed=seeds)
def test_label_of_other_voxels_changes_only_beside_its_boundaries(before_and_after, shape, order, spacing, seed):
    """Where a voxel and the 26 about it have one label, it stays."""
    rng = np.random.default_rng(seed)
    label, found = there_and_back(before_and_after, shape, order, spacing, rng, ".nii.gz")
    inside = grey_dilation(label, 3, mode="nearest") == grey_erosion(label, 3, mode="nearest")
    assert np.count_nonzero(inside & (label > 0)) > 20
    np.testing.assert_array_equal(found[inside], label[inside])


@settings(steady, max_examples=12)
@given(shape=sides, order=orientations, spacing=st.one_of(st.just((1.0, 1.0, 1.0)), spacings), seed=seeds)
def test_subject_is_the_same_from_hdf5(before_and_after, shape, order, spacing, seed):
    """The network gets the same array; and the file holds the same brain as it is read."""
    before, _ = before_and_after
    label, t1, t2 = brain_in(shape, np.random.default_rng(seed))
    with TemporaryDirectory() as name:
        scans, prepared = Path(name) / "scans", Path(name) / "prepared"
        scans.mkdir()
        of_images = before(save_turned(scans, {"T1": t1, "T2": t2, "label": label}, order, spacing))
        prepare_hdf5(str(scans), str(prepared), val_subjects=[])
        subject = SubjectFolder(str(prepared)).require_good()[0]
        of_hdf5 = before(subject)
        image, labels = read_hdf5(subject["image"][0])
    torch.testing.assert_close(of_hdf5["image"].as_tensor(), of_images["image"].as_tensor(), rtol=0, atol=1e-4)
    assert torch.equal(of_hdf5["label"].as_tensor(), of_images["label"].as_tensor())
    if spacing == (1.0, 1.0, 1.0):
        brain = image[0] > 0
        assert np.count_nonzero(brain) == np.count_nonzero(t1)
        np.testing.assert_array_equal(np.bincount(labels.ravel(), minlength=4)[1:], np.bincount(label.ravel())[1:])
        # in units of the spread over the brain, in whatever order of voxels
        for ours, scan in zip(image, (t1, t2), strict=True):
            np.testing.assert_allclose(np.sort(ours[brain]), np.sort(scan[t1 > 0] / scan[t1 > 0].std()), atol=1e-4)
