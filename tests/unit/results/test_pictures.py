import itertools

import matplotlib.colors
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.results.pictures import DISAGREEMENT_COLOR, TISSUE_COLORS, UNCERTAINTY_COLORS, segmentation_picture


def pixels(figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def volumes(affine: np.ndarray) -> list[MetaTensor]:
    """T1 that brightens towards the front and the top, and a segmentation in three layers along x."""
    y, z = np.meshgrid(np.arange(1, 31), np.arange(1, 41), indexing="ij")
    t1 = np.broadcast_to(y * 10 + z, (20, 30, 40))
    label = np.broadcast_to(np.repeat([1, 2, 3], [6, 8, 6])[:, None, None], t1.shape)
    return [
        MetaTensor(torch.from_numpy(v[None].astype(np.float32)), affine=torch.from_numpy(affine)) for v in (t1, label)
    ]


def test_each_tissue_has_its_colour_and_so_has_a_disagreement():
    t1, label = volumes(np.eye(4))
    prediction = label.clone()
    prediction[0, :, :, 22:] = 1
    figure = segmentation_picture(t1, prediction, label, "subject 9")
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["T1", "segmentation", "label", "disagreement"]
    assert figure.get_suptitle() == "subject 9"
    image = pixels(figure)
    color = np.array(matplotlib.colors.to_rgb(DISAGREEMENT_COLOR))
    assert (np.abs(image - color).max(axis=-1) < 0.02).any()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["CSF", "GM", "WM", "disagreement"]


def test_the_subjects_right_is_on_the_left_of_the_picture():
    t1, label = volumes(np.eye(4))  # x runs to the subject's right
    axial, _, coronal = segmentation_picture(t1, label).axes[:3]
    for axis in (axial, coronal):
        assert [text.get_text() for text in axis.texts] == ["R"]
    segmentation = segmentation_picture(t1, label).axes[1].images[1].get_array()
    assert segmentation.shape == (30, 20)
    assert set(segmentation[:, 0].tolist()) == {3.0}  # white matter, the rightmost layer
    assert set(segmentation[:, -1].tolist()) == {1.0}


def test_without_a_label_nothing_is_compared():
    t1, label = volumes(np.eye(4))
    titles = [axis.get_title() for axis in segmentation_picture(t1, label).axes if axis.get_title()]
    assert titles == ["T1", "segmentation"]


def test_same_picture_whatever_the_order_of_the_axes_on_disk():
    t1, label = volumes(np.eye(4))
    expected = pixels(segmentation_picture(t1, label))
    # the same brain stored as (z, y flipped, x)
    turned = [
        MetaTensor(
            torch.flip(v.as_tensor().permute(0, 3, 2, 1), dims=[2]),
            affine=torch.tensor([[0, 0, 1, 0], [0, -1, 0, 29], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64),
        )
        for v in (t1, label)
    ]
    np.testing.assert_array_equal(pixels(segmentation_picture(*turned)), expected)


def test_voxels_that_are_not_cubes_keep_the_shape_of_the_brain():
    t1, label = volumes(np.diag([1.0, 1.0, 2.0, 1.0]))
    axes = segmentation_picture(t1, label).axes
    assert [axis.get_aspect() for axis in axes[::2]] == [1.0, 2.0, 2.0]


def test_column_of_the_uncertainty_with_its_scale():
    t1, label = volumes(np.eye(4))
    t1[0, :5] = 0
    uncertainty = MetaTensor(torch.full(t1.shape, 0.25), affine=t1.affine)
    figure = segmentation_picture(t1, label, label, uncertainty=uncertainty)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["T1", "segmentation", "label", "disagreement", "uncertainty"]
    bar = figure.axes[-1]
    assert "0: certain" in bar.get_ylabel()
    assert bar.get_ylim() == (0, 1)
    shown = figure.axes[4].images[1]
    assert shown.get_clim() == (0, 1)
    # nothing outside the brain, which the picture is cut to
    assert shown.get_array().shape == (30, 15)
    assert set(shown.get_array().compressed().tolist()) == {0.25}
    color = np.array(matplotlib.colormaps[UNCERTAINTY_COLORS](0.25)[:3])
    assert (np.abs(pixels(figure) - color).max(axis=-1) < 0.02).any()


# what is left of linear RGB without one of the three kinds of cones (Machado, Oliveira, Fernandes 2009)
COLOR_VISION = {
    "usual": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def cie_lab(color: str, vision: str) -> np.ndarray:
    """Where a colour appears in CIELAB, in which equal distances look alike: lightness and two of hue."""
    srgb = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(COLOR_VISION[vision]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    x, y, z = np.cbrt(np.maximum(xyz / (0.9505, 1, 1.089), 1e-3))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", COLOR_VISION)
def test_colours_are_told_apart_and_from_grey(vision):
    """A distance of 2 can just be seen side by side; green beside red had 13 in deuteranopia."""
    colors = [cie_lab(color, vision) for color in (*TISSUE_COLORS.values(), DISAGREEMENT_COLOR)]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(colors, 2)) > 30
    assert min(np.linalg.norm(color[1:]) for color in colors) > 15


def test_title_is_no_formula():
    t1, label = volumes(np.eye(4))
    pixels(segmentation_picture(t1, label, title="subject $\\frac{"))
