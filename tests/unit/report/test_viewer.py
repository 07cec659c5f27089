"""The pictures of the report: right values at the right position."""

import io

import numpy as np
import pytest
import torch
from helpers import decoded, segmented_subject, volume_in_memory
from monai.data import MetaTensor
from PIL import Image

from scripts.report.viewer import LABEL_STEP, LONGEST_SIDE, draw_pictures, side_by_side
from scripts.results.pictures import brain_box


def unfolded(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The volume from the picture that the viewer gets, by another way than the one it was made."""
    grey, (width, depth, height) = decoded(content)[..., 0], shape
    columns = int(np.ceil(np.sqrt(height * depth / width)))
    tiles = [divmod(z, columns) for z in range(height)]
    slices = [grey[r * depth : (r + 1) * depth, c * width : (c + 1) * width][::-1].T for r, c in tiles]
    return np.stack(slices, axis=-1)


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1), (40, 3, 2), (2, 3, 70)])
def test_slices_side_by_side(shape):
    values = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(side_by_side(values)).save(content, "PNG")
    np.testing.assert_array_equal(unfolded(content.getvalue(), shape), values)


def test_labels_are_shown_voxel_by_voxel_with_x_to_the_right(brains):
    item = segmented_subject(brains[0], labeled=True)
    pictures = draw_pictures(item["t1"], item["t2"], item["pred"], item["label"])
    box = brain_box(brains[0]["T1"])
    expected = [np.pad(volume_[0].numpy()[box][::-1], 1) for volume_ in (item["pred"], item["label"])]
    assert pictures.shape == expected[0].shape
    shown = unfolded(pictures.layers["labels"], pictures.shape)
    np.testing.assert_array_equal(shown, LABEL_STEP * (expected[0] + 4 * expected[1]))
    assert set(pictures.layers) == {"t1", "t2", "labels"}
    grey = unfolded(pictures.layers["t1"], pictures.shape)
    assert np.corrcoef(grey.ravel(), np.pad(brains[0]["T1"][box][::-1], 1).ravel())[0, 1] > 0.9


def test_same_pictures_whatever_the_order_of_the_axes_on_disk(brains):
    item = segmented_subject(brains[0], labeled=True, uncertain=True)
    names = ("t1", "t2", "pred", "label", "uncertainty")
    turned = {
        name: MetaTensor(
            torch.flip(item[name].as_tensor().permute(0, 3, 2, 1), dims=[2]),
            affine=torch.tensor([[0, 0, -1, 0], [0, -1, 0, 71], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64),
        )
        for name in names
    }
    assert draw_pictures(*(turned[name] for name in names)) == draw_pictures(*(item[name] for name in names))


def test_voxels_that_are_not_cubes_are_shown_in_true_proportion():
    t1 = np.zeros((12, 12, 12), np.float32)
    t1[1:-1, 1:-1, 1:-1] = np.random.default_rng(0).uniform(1, 9, (10, 10, 10))
    prediction = np.zeros((12, 12, 12), np.uint8)
    prediction[1:-1, 1:-1, 1:6], prediction[1:-1, 1:-1, 6:-1] = 1, 2
    affine = torch.diag(torch.tensor([1.0, 0.5, 3, 1], dtype=torch.float64))
    pictures = draw_pictures(*(volume_in_memory(v, affine) for v in (t1, t1, prediction)))
    assert pictures.shape == (12, 7, 32)
    shown = unfolded(pictures.layers["labels"], pictures.shape)[5, 3] // LABEL_STEP
    assert shown.tolist() == [0, *[1] * 15, *[2] * 15, 0]
    huge = torch.diag(torch.tensor([1e5, 1, 1, 1], dtype=torch.float64))
    pictures = draw_pictures(*(volume_in_memory(v, huge) for v in (t1, t1, prediction)))
    assert max(pictures.shape) <= LONGEST_SIDE + 2


def test_a_brain_with_no_voxel_on_the_coarser_grid_is_shown():
    t1 = np.zeros((9, 9, 9), np.float32)
    t1[[0, -1], [0, -1], [0, -1]] = 7
    small = torch.diag(torch.tensor([1 / 3, 1 / 3, 1 / 3, 1], dtype=torch.float64))
    scan, prediction = volume_in_memory(t1, small), volume_in_memory((t1 > 0).astype(np.uint8), small)
    assert draw_pictures(scan, scan, prediction).shape == (5, 5, 5)


def test_static_picture_has_a_row_for_each_layer(brains):
    plain, whole = (
        draw_pictures(*(item.get(name) for name in ("t1", "t2", "pred", "label", "uncertainty")))
        for item in (segmented_subject(brains[0]), segmented_subject(brains[0], labeled=True, uncertain=True))
    )
    rows = [decoded(pictures.static) for pictures in (plain, whole)]
    assert rows[1].shape[0] == 2 * rows[0].shape[0]
    assert rows[0].std() > 20
    # of the coarser cubes those that lie in the brain with all their voxels are at half of what is most
    segmented = unfolded(whole.layers["labels"], whole.shape) > 0
    coarse = unfolded(whole.layers["uncertainty"], [-(-size // 2) for size in whole.shape])
    padded = np.pad(segmented, [(0, size % 2) for size in segmented.shape])
    parts = padded.reshape([side for size in coarse.shape for side in (size, 2)])
    assert abs(coarse[parts.all((1, 3, 5))].mean() - 0.5 * 255) < 3
    assert coarse[~parts.any((1, 3, 5))].mean() < 5
