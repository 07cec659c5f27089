"""Random fields, blur and lower resolution, as torch operations on volumes of shape (channels, X, Y, Z)."""

from collections.abc import Sequence

import numpy as np
import torch
from monai.networks.layers import gaussian_1d, separable_filtering
from torch.nn.functional import interpolate


def smooth_field(rng: np.random.Generator, shape: Sequence[int], step: float, channels: int = 1) -> torch.Tensor:
    """Return random fields (channels, X, Y, Z), normal with deviation 1 at the nodes of a grid, linear in between.

    Args:
        rng: the source of all randomness.
        shape: X, Y, Z.
        step: voxels from one node to the next.
    """
    nodes = [int(np.ceil(size / step)) + 2 for size in shape]
    coarse = torch.from_numpy(rng.standard_normal((1, channels, *nodes), dtype=np.float32))
    fine = [max(size, round((count - 1) * step) + 1) for size, count in zip(shape, nodes, strict=True)]
    start = [int(rng.integers(0, larger - size + 1)) for larger, size in zip(fine, shape, strict=True)]
    box = tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
    return interpolate(coarse, fine, mode="trilinear", align_corners=True)[0][(slice(None), *box)]


def blurred(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return an image blurred by a Gaussian with this standard deviation in voxels."""
    kernel = gaussian_1d(torch.tensor(sigma), truncated=3.0)
    return separable_filtering(image[None], kernel, mode="replicate")[0]


def with_thick_slices(image: torch.Tensor, axis: int, factor: float) -> torch.Tensor:
    """Return an image as if its slices along an axis, 0 to 2, were `factor` voxels thick."""
    shape = list(image.shape[1:])
    shape[axis] = max(2, round(shape[axis] / factor))
    coarse = interpolate(image[None], shape, mode="area")
    return interpolate(coarse, image.shape[1:], mode="trilinear", align_corners=False)[0]
