"""Sliding windows as large as memory allows."""

import copy
import logging
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from monai.utils import ensure_tuple_rep

from scripts.errors import InputError, ran_out_of_memory
from scripts.machine import available_memory

logger = logging.getLogger(__name__)

# Bytes that a forward pass needs per voxel of a window: the maximum measured for volumes of 128^3 and more, on a CPU
# without AVX-512, where convolutions need the most memory besides their results. Half precision halves it.
BYTES_PER_VOXEL = 1500


def fitting_window(size: Sequence[int], voxels: float, step: int = 16) -> list[int]:
    """Return the largest window with at most about so many voxels, by shortening the longest side repeatedly.

    Args:
        size: sides of the volume, multiples of `step`.
        voxels: largest number in a window.
        step: by which a side is shortened, down to four steps.
    """
    window = list(size)
    while math.prod(window) > voxels and max(window) > 4 * step:
        longest = window.index(max(window))
        window[longest] -= step
    return window


class LargestWindowInferer(SlidingWindowInferer):
    """MONAI's `SlidingWindowInferer` with windows as large as memory allows: one pass over the volume if it fits.

    A window is never larger than the volume. MONAI would pad it with 0, which after normalisation is the brain's mean
    and not background. The choice is logged.

    Args:
        roi_size: 'auto', or the sides of the largest window, multiples of the network's stride; one number for all
            three.
        kwargs: further arguments of `SlidingWindowInferer`.

    Raises:
        InputError: `roi_size` has another value; when called, if the network doesn't take windows of that size, or
            memory runs out.
    """

    def __init__(self, roi_size: Sequence[int] | int | str = "auto", **kwargs: Any) -> None:
        given = roi_size
        self.automatic = isinstance(roi_size, str) and roi_size == "auto"
        if not self.automatic:
            try:
                roi_size = tuple(operator.index(side) for side in ensure_tuple_rep(roi_size, 3))
            except (TypeError, ValueError):
                roi_size = ()
            if len(roi_size) != 3 or min(roi_size) < 1 or isinstance(given, bool):
                raise InputError(f"--window_size {given}: must be auto or three whole numbers, like [64,64,64]")
        super().__init__(roi_size=(0, 0, 0) if self.automatic else roi_size, **kwargs)

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        size = list(inputs.shape[2:])
        fitting = copy.copy(self)
        bytes_per_voxel = BYTES_PER_VOXEL / (2 if torch.is_autocast_enabled(inputs.device.type) else 1)
        available = available_memory(inputs.device)
        if self.automatic:
            fitting.roi_size = fitting_window(size, available / bytes_per_voxel)
            reason = f"{available / 1e9:.1f} GB available"
        else:
            fitting.roi_size = [min(window, side) for window, side in zip(self.roi_size, size, strict=True)]
            reason = f"window_size {self.roi_size}"
        window = " x ".join(map(str, fitting.roi_size))
        windows = "one pass" if fitting.roi_size == size else f"windows of {window}"
        logger.info("%s over %s voxels (%s)", windows, " x ".join(map(str, size)), reason)
        try:
            return SlidingWindowInferer.__call__(fitting, inputs, network, *args, **kwargs)
        except Exception as error:
            # a network refuses a size by ValueError
            if isinstance(error, ValueError) and not isinstance(error, InputError) and not self.automatic:
                raise InputError(f"--window_size {self.roi_size}: doesn't suit the network: {error}") from error
            if not ran_out_of_memory(error):
                raise
            needed = math.prod(fitting.roi_size) * bytes_per_voxel
            raise InputError(
                f"memory ran out: a window of {window} voxels needs up to {needed / 1e9:.1f} GB and "
                f"{available / 1e9:.1f} GB were free; free more, or give a smaller --window_size, like [64,64,64]"
            ) from error
