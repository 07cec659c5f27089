"""Label maps of heads: which numbers are which tissue, and where the boundaries lie."""

import nibabel as nib
import numpy as np
import pytest

from scripts.data.structures import MAIN, NAMES, STRUCTURES, TISSUE_OF
from scripts.errors import InputError
from scripts.synthesis.structures import RIM, read_structure_map
from scripts.tissues import ISEG_VALUES, Tissue


def test_each_number_is_of_one_structure():
    numbers = [number for structure in STRUCTURES.values() for number in structure.numbers]
    assert len(numbers) == len(set(numbers))
    assert all(STRUCTURES[name].tissue == tissue for tissue, name in MAIN.items())


def test_boundaries_part_the_tissues_of_the_file(heads_dir):
    source = read_structure_map(heads_dir / "A.nii.gz")
    values = nib.load(heads_dir / "A.nii.gz").get_fdata().astype(int)
    of_number = {number: structure.tissue for structure in STRUCTURES.values() for number in structure.numbers}
    tissue = np.vectorize(lambda number: of_number.get(number, 0))(values)
    low = np.argwhere((values > 0) & (values < 500)).min(0)
    white, inner, brain = source.boundaries.astype(float)
    box = tuple(slice(RIM, RIM + 30) for _ in range(3))
    there = tissue[tuple(slice(start, start + 30) for start in low)]
    found = np.where(white[box] < 0, Tissue.WM, Tissue.GM)
    found = np.where(inner[box] < 0, found, Tissue.CSF) * (brain[box] < 0)
    assert np.mean(found == there) > 0.93  # the boundaries are smoothed
    # one voxel further in, the boundary is one voxel further
    assert np.abs(np.diff(brain, axis=0)).max() < 1.2
    assert (TISSUE_OF[source.nearest] == np.array(Tissue)[:, None, None, None]).all()
    assert source.sizes.sum() == pytest.approx(np.isin(values, [*of_number]).sum(), rel=0.05)


def test_shares_move_with_the_boundary(heads_dir):
    source = read_structure_map(heads_dir / "A.nii.gz")
    inside = source.boundaries[2] < 0
    for share in (0.2, 0.8):
        moved = source.boundaries[1] < np.interp(share, np.linspace(0, 1, 101), source.tissue_quantiles)
        assert moved[inside].mean() == pytest.approx(share, abs=0.05)


def test_three_tissues_do_as_well_by_either_set_of_values(heads_dir, tmp_path):
    image = nib.load(heads_dir / "C.nii.gz")
    values = np.array(ISEG_VALUES, dtype=np.uint8)[np.asarray(image.dataobj)]
    nib.save(nib.Nifti1Image(values, image.affine), tmp_path / "D.nii.gz")
    first, second = read_structure_map(heads_dir / "C.nii.gz"), read_structure_map(tmp_path / "D.nii.gz")
    assert np.array_equal(first.boundaries, second.boundaries)
    assert [NAMES[number - 1] for number in np.flatnonzero(first.sizes)] == [MAIN[tissue] for tissue in Tissue]


def test_other_axes_give_the_same_map(heads_dir, tmp_path):
    image = nib.load(heads_dir / "A.nii.gz")
    nib.save(image.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]])), tmp_path / "A.nii.gz")
    first, second = read_structure_map(heads_dir / "A.nii.gz"), read_structure_map(tmp_path / "A.nii.gz")
    assert np.array_equal(first.nearest[:, first.boundaries[2] < 0], second.nearest[:, second.boundaries[2] < 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda values: np.where(values == 3, 99, values),
            "label value 99 isn't known; give a map like Free",
        ),
        (
            lambda values: np.where(values == 3, -1, values),
            "label value -1 isn't known; give a map like Free",
        ),
        (
            lambda values: np.where(values == 3, 2.5, values),
            "label value 2.5 isn't known; give a map like Free",
        ),
        (lambda values: np.where(np.isin(values, [2, 16]), 3, values), "has no WM; give a label map of CSF, GM and WM"),
        (lambda values: np.zeros_like(values), "has no CSF, GM, WM; give a label map of CSF, GM and WM"),
    ],
)
def test_map_that_can_not_be(heads_dir, tmp_path, change, message):
    image = nib.load(heads_dir / "A.nii.gz")
    nib.save(nib.Nifti1Image(change(image.get_fdata()).astype(np.float32), image.affine), tmp_path / "A.nii.gz")
    with pytest.raises(InputError, match=f"A.nii.gz: {message}"):
        read_structure_map(tmp_path / "A.nii.gz")


def test_voxels_far_from_1_mm(heads_dir, tmp_path):
    values = np.asarray(nib.load(heads_dir / "A.nii.gz").dataobj)
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 2, 2, 1])), tmp_path / "A.nii.gz")
    with pytest.raises(InputError, match="voxels of 2 x 2 x 2 mm; resample it to 1 mm"):
        read_structure_map(tmp_path / "A.nii.gz")
