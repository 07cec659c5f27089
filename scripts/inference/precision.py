"""The number type and memory layout in which a network computes."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from monai.inferers import Inferer
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scripts.errors import InputError
from scripts.inference.exported import ExportedNetwork

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {name: getattr(torch, name) for name in ("channels_last_3d", "contiguous_format")}


def network_precision(device: torch.device, precision: str, training: bool = False) -> torch.dtype:
    """Return the number type in which the network computes.

    On a GPU, training uses float16: in bfloat16 a step takes five times as long, nearly all in cuDNN's gradients of
    convolutions (H100). Inference uses bfloat16, which is as fast there and doesn't overflow.

    Args:
        device: the device of the network.
        precision: 'fp32', 'bf16', 'fp16' (GPU only), or 'auto' for the fastest safe type. On a GPU that is float16 to
            train, and to segment bfloat16, or float16 if the GPU lacks it. On a CPU it is bfloat16 if the hardware
            computes it, else float32.
        training: whether gradients are needed; in float16 they are scaled, see `needs_loss_scaling`.

    Raises:
        InputError: `precision` has another value, or is 'fp16' on a CPU.
    """
    if precision == "auto":
        if device.type == "cuda":
            bfloat16 = not training and torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if bfloat16 else torch.float16
        fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
        return torch.bfloat16 if fast else torch.float32
    if precision not in PRECISIONS:
        raise InputError(f"--precision {precision}: must be auto, {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16: needs a GPU; use bf16 or auto on a CPU")
    return PRECISIONS[precision]


def float16_or_auto(device: torch.device | str) -> str:
    """Return the `precision` of a recipe published in float16: 'fp16' on a GPU, else 'auto'."""
    return "fp16" if torch.device(device).type == "cuda" else "auto"


def needs_loss_scaling(device: torch.device | str, precision: str) -> bool:
    """Return `amp` of MONAI's trainer: whether it needs a GradScaler, as in float16, where small gradients vanish."""
    return network_precision(torch.device(device), precision, training=True) == torch.float16


@torch.no_grad()
def _make_bias_exact(convolution: nn.Conv3d, following: nn.Conv3d) -> None:
    """Scale the features between two convolutions with a ReLU, so that bfloat16 represents each bias exactly.

    A rounded bias would shift all voxels of a feature alike, and no later sum evens that out. `following` undoes the
    scale.
    """
    rounded = convolution.bias.bfloat16().to(convolution.bias.dtype)
    scale = rounded / convolution.bias
    possible = scale.isfinite() & (scale > 0)  # not for biases at or near 0
    scale = torch.where(possible, scale, 1)
    convolution.bias.copy_(torch.where(possible, rounded, convolution.bias))
    convolution.weight.mul_(scale[:, None, None, None, None])
    following.weight.div_(scale[:, None, None, None])


def fuse_batch_norms(network: nn.Module) -> nn.Module:
    """Return a copy of a network in evaluation mode with each batch norm fused into the convolution before it.

    The logits are equal except for rounding, with fewer passes over memory. Only layers of an nn.Sequential are fused,
    since they run in order. Features between two of its convolutions may be scaled, see `_make_bias_exact`.
    """
    network = copy.deepcopy(network)
    for parent in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for (name, convolution), (next_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(convolution, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d):
                setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, next_name, nn.Identity())
        layers = [layer for layer in parent.children() if not isinstance(layer, nn.Identity)]
        for first, between, second in zip(layers, layers[1:], layers[2:], strict=False):
            kinds = (first, nn.Conv3d), (between, nn.ReLU), (second, nn.Conv3d)
            if all(isinstance(*pair) for pair in kinds) and first.bias is not None and second.groups == 1:
                _make_bias_exact(first, second)
    return network


class MixedPrecisionInferer(Inferer):
    """Inferer that runs a network in a chosen precision and memory layout, by another inferer.

    Called with (B, C, X, Y, Z) and a network, it returns the network's logits as float32, (B, classes, X, Y, Z). If no
    gradients are needed, batch norms are fused, see `fuse_batch_norms`.

    MONAI's engines ignore `amp` on a CPU, where autocast gains most. So autocast is entered here, to train and to
    segment.

    Args:
        inferer: calls the network.
        precision: see `network_precision`.
        memory_format: of patches: 'channels_last_3d', the faster one in all measurements, or 'contiguous_format'.

    Raises:
        InputError: `memory_format` has another value; when called, as `network_precision`.
    """

    def __init__(self, inferer: Inferer, precision: str = "auto", memory_format: str = "channels_last_3d") -> None:
        super().__init__()
        if memory_format not in MEMORY_FORMATS:
            raise InputError(f"--memory_format {memory_format}: must be {' or '.join(MEMORY_FORMATS)}")
        self.inferer = inferer
        self.precision = precision
        self.memory_format = MEMORY_FORMATS[memory_format]
        self.fused: WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], nn.Module]] = WeakKeyDictionary()

    def _fused(self, network: nn.Module) -> nn.Module:
        """The network by `fuse_batch_norms`, made again only when its weights have changed."""
        versions = [(tensor.data_ptr(), tensor._version) for tensor in network.state_dict(keep_vars=True).values()]
        if network not in self.fused or self.fused[network][0] != versions:
            self.fused[network] = versions, fuse_batch_norms(network)
        return self.fused[network][1]

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        training = isinstance(network, nn.Module) and network.training
        dtype = network_precision(inputs.device, self.precision, training)
        if isinstance(network, ExportedNetwork) and network.always_float32:
            dtype = torch.float32  # so that windows fit the memory that float32 needs
        # gradients, if needed, are those of the network's own weights
        if isinstance(network, nn.Module) and not training and not torch.is_grad_enabled():
            network = self._fused(network)

        def run(patch: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            patch = patch.contiguous(memory_format=self.memory_format)
            return network(patch, *args, **kwargs).float()

        with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.inferer(inputs, run, *args, **kwargs)
