"""Precision, memory layout and window size around MONAI's inferers."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer, SlidingWindowInferer

from scripts.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def fast_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes it in hardware, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


class MixedPrecisionInferer(Inferer):
    """Run the network of another inferer under autocast and in channels-last layout.

    Called with (B, C, X, Y, Z) and a network, it returns the network's logits as float32, (B, classes, X, Y, Z).

    MONAI's engines ignore `amp` on a CPU, and on a CPU it gains most, so autocast is entered here, for training and
    inference alike.

    Args:
        inferer: the inferer that calls the network.
        precision: 'auto' (see `fast_precision`), 'fp32' or 'bf16'.

    Raises:
        InputError: another precision is asked for.
    """

    def __init__(self, inferer: Inferer, precision: str = "auto") -> None:
        super().__init__()
        if precision not in ("auto", *PRECISIONS):
            raise InputError(f"precision must be 'auto', 'fp32' or 'bf16', got {precision!r}")
        self.inferer = inferer
        self.precision = precision

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        dtype = fast_precision(inputs.device) if self.precision == "auto" else PRECISIONS[self.precision]

        def run(patch: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            patch = patch.contiguous(memory_format=torch.channels_last_3d)
            with torch.autocast(patch.device.type, dtype=dtype, enabled=dtype != torch.float32):
                return network(patch, *args, **kwargs).float()

        return self.inferer(inputs, run, *args, **kwargs)


class LargestWindowInferer(SlidingWindowInferer):
    """Sliding windows that are never larger than the volume, so that a small one is taken whole and unpadded.

    Padding would be with 0, which after normalisation is the brain's mean and not background. Arguments as
    `SlidingWindowInferer`.
    """

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        fitting = copy.copy(self)
        fitting.roi_size = [min(window, size) for window, size in zip(self.roi_size, inputs.shape[2:], strict=True)]
        return SlidingWindowInferer.__call__(fitting, inputs, network, *args, **kwargs)
