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
    """The type in which the network computes.

    On a GPU training takes float16: a step in bfloat16 takes five times as long, nearly all of it in cuDNN's gradients
    of convolutions (H100). Inference takes bfloat16, as fast there, in which nothing overflows.

    Args:
        device: where it computes.
        precision: 'fp32', 'bf16', 'fp16' (GPU only), or 'auto' for the fastest that is safe: on a GPU float16 to train
            and bfloat16 to segment, or float16 where it lacks that; on a CPU bfloat16 if computed in hardware; else
            float32.
        training: whether gradients are wanted, which are scaled in float16, see `needs_loss_scaling`.

    Raises:
        InputError: another precision is asked for, or float16 elsewhere than on a GPU.
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
        raise InputError("--precision fp16: is for a GPU; use bf16 or auto on a processor")
    return PRECISIONS[precision]


def float16_or_auto(device: torch.device | str) -> str:
    """The precision setting of a recipe that was made for float16: where that can't be, the fastest that is safe."""
    return "fp16" if torch.device(device).type == "cuda" else "auto"


def needs_loss_scaling(device: torch.device | str, precision: str) -> bool:
    """Whether training wants a GradScaler: with float16, whose small gradients vanish. For `amp` of MONAI's trainer."""
    return network_precision(torch.device(device), precision, training=True) == torch.float16


@torch.no_grad()
def _make_bias_exact(convolution: nn.Conv3d, following: nn.Conv3d) -> None:
    """Scale the features between two convolutions, with a ReLU there, so that bfloat16 holds each bias as it is.

    A rounded bias moves all voxels of a feature alike, which no later sum evens out. `following` undoes the scale.
    """
    rounded = convolution.bias.bfloat16().to(convolution.bias.dtype)
    scale = rounded / convolution.bias
    possible = scale.isfinite() & (scale > 0)  # it isn't for biases of 0 and near it
    scale = torch.where(possible, scale, 1)
    convolution.bias.copy_(torch.where(possible, rounded, convolution.bias))
    convolution.weight.mul_(scale[:, None, None, None, None])
    following.weight.div_(scale[:, None, None, None])


def fuse_batch_norms(network: nn.Module) -> nn.Module:
    """A copy of a network in evaluation mode in which each batch norm right behind a convolution is part of it.

    The logits are those of the network but for rounding, with fewer passes over memory. In an nn.Sequential, whose
    children must run in their order, features between two convolutions with a ReLU there may be scaled, see
    `_make_bias_exact`.
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
    """Run the network of another inferer in the precision and memory layout that suit.

    Without gradients the network runs with its batch norms fused, see `fuse_batch_norms`.

    Called with (B, C, X, Y, Z) and a network, it returns the network's logits as float32, (B, classes, X, Y, Z).

    MONAI's engines ignore `amp` on a CPU, and on a CPU it gains most, so autocast is entered here, for training and
    inference alike.

    Args:
        inferer: the inferer that calls the network.
        precision: see `network_precision`.
        memory_format: how patches lie in memory: 'channels_last_3d', the faster one wherever measured, or
            'contiguous_format'.

    Raises:
        InputError: another memory format is asked for, or as `network_precision`, when called.
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
        """The network by `fuse_batch_norms`, made once and anew only when its weights have changed."""
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
            dtype = torch.float32  # so that windows are chosen for the memory that float32 takes
        # where gradients are wanted, they are those of the network's own weights
        if isinstance(network, nn.Module) and not training and not torch.is_grad_enabled():
            network = self._fused(network)

        def run(patch: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            patch = patch.contiguous(memory_format=self.memory_format)
            return network(patch, *args, **kwargs).float()

        with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.inferer(inputs, run, *args, **kwargs)
