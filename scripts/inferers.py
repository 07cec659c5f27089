"""Precision, memory layout, window size and averages around MONAI's inferers."""

import copy
import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.inferers import Inferer, SlidingWindowInferer
from monai.utils import ensure_tuple_rep
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scripts.errors import InputError, ran_out_of_memory, require_true_or_false, require_whole_numbers
from scripts.exported import ExportedNetwork, is_exported
from scripts.machine import available_memory
from scripts.weights import checkpoint_paths, load_weights

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {name: getattr(torch, name) for name in ("channels_last_3d", "contiguous_format")}
# what the uncertainty of a label may be taken from, see `AveragingInferer`
UNCERTAINTIES = ("network", "flips", "dropout")

# Memory of a forward pass for each voxel of a window, in bytes: the most measured over volumes of 128^3 and more, on a
# processor without AVX-512, where convolutions need the most beside their results. Half precision halves it.
BYTES_PER_VOXEL = 1500


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


class FixedLossScale:
    """Handler that keeps the factor of the loss where float16 wants one; it is halved only after an overflow.

    Args:
        scale: the factor; None leaves it to torch, which looks for the largest that doesn't overflow.
    """

    def __init__(self, scale: float | None) -> None:
        self.scale = scale

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.replace)

    def replace(self, engine: Engine) -> None:
        if self.scale is not None and engine.scaler is not None:
            never = 2**31 - 1
            device = engine.state.device.type
            engine.scaler = torch.amp.GradScaler(device, init_scale=self.scale, growth_interval=never)


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


def folded(network: nn.Module) -> nn.Module:
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
    """Run the network of another inferer in the precision and memory layout that suit, and when not training `folded`.

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

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        training = isinstance(network, nn.Module) and network.training
        dtype = network_precision(inputs.device, self.precision, training)
        if isinstance(network, ExportedNetwork) and network.always_float32:
            dtype = torch.float32  # so that windows are chosen for the memory that float32 takes
        # where gradients are wanted, they are those of the network's own weights
        if isinstance(network, nn.Module) and not training and not torch.is_grad_enabled():
            network = folded(network)

        def run(patch: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            patch = patch.contiguous(memory_format=self.memory_format)
            return network(patch, *args, **kwargs).float()

        with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.inferer(inputs, run, *args, **kwargs)


def fitting_window(size: Sequence[int], voxels: float, step: int = 16) -> list[int]:
    """The largest window of about that many voxels over a volume: the longest side is shortened again and again.

    Args:
        size: of the volume, multiples of `step`.
        voxels: that a window may have.
        step: sides are multiples of it, and are not made shorter than four of it.
    """
    window = list(size)
    while math.prod(window) > voxels and max(window) > 4 * step:
        longest = window.index(max(window))
        window[longest] -= step
    return window


class LargestWindowInferer(SlidingWindowInferer):
    """Sliding windows as large as memory allows: one pass over the volume if it fits.

    A window is never larger than the volume: padding would be with 0, which after normalisation is the brain's mean
    and not background. The choice is logged. Arguments as MONAI's `SlidingWindowInferer`, but for:

    Args:
        roi_size: 'auto', or the sides of the largest window, multiples of the network's stride; one number
            stands for three.

    Raises:
        InputError: `roi_size` is something else; or when called, if the network doesn't take windows of that size, or
            memory runs out all the same.
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
        ways = "one pass over" if fitting.roi_size == size else f"windows of {window} over"
        logger.info("%s %s voxels (%s)", ways, " x ".join(map(str, size)), reason)
        try:
            return SlidingWindowInferer.__call__(fitting, inputs, network, *args, **kwargs)
        except Exception as error:
            # by which a network refuses a size
            if isinstance(error, ValueError) and not isinstance(error, InputError) and not self.automatic:
                raise InputError(f"--window_size {self.roi_size}: doesn't suit the network: {error}") from error
            if not ran_out_of_memory(error):
                raise
            needed = math.prod(fitting.roi_size) * bytes_per_voxel
            raise InputError(
                f"memory ran out: a window of {window} voxels needs up to {needed / 1e9:.1f} GB and "
                f"{available / 1e9:.1f} GB were free; free more, or give a smaller --window_size, like [64,64,64]"
            ) from error


def with_dropout(network: Callable[..., torch.Tensor]) -> nn.Module:
    """A copy of a network in evaluation mode whose dropout layers, and they alone, drop features as in training.

    Raises:
        InputError: there is no dropout layer that drops anything, as in an exported network.
    """
    if isinstance(network, nn.Module) and any(isinstance(m, nn.Dropout) and m.p > 0 for m in network.modules()):
        network = copy.deepcopy(network)
        for module in network.modules():
            module.training = isinstance(module, nn.Dropout)
        return network
    raise InputError(
        "--uncertainty dropout: this network has no dropout; use flips, or a checkpoint (.pt) of a network with dropout"
    )


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """A block in which torch draws from a seed on the CPU and the device; afterwards it goes on as if nothing was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class AveragingInferer(Inferer):
    """Average what several networks and mirror images of the volume say, around an inferer that runs one network.

    Called with (B, C, X, Y, Z) and a network, it returns logits, float32 (B, classes, X, Y, Z): the logarithm of the
    mean of the class probabilities, by which a grid is changed and labels are chosen as by those of one network. With
    one checkpoint, no flips and no dropout they are those of the inferer, unchanged. For evaluation only: it works in
    place.

    Args:
        inferer: what runs a network.
        checkpoints: as `scripts.weights.checkpoint_paths` takes them. If one, the network is taken as it is given; if
            several, it only says the architecture, and a copy of it is loaded with each when the first volume comes.
            Exported networks are loaded then too, and say their architecture themselves.
        flips: whether to average over the mirror images along each set of axes, eight of a volume, each turned back.
        uncertainty: what besides is averaged over, for the entropy of the mean (see `scripts.probabilities`): nothing
            (None or 'network'), the mirror images ('flips'), or passes whose dropout layers drop at random ('dropout').
        dropout_samples: the passes of each network with dropout.
        seed: for dropout; each volume is begun with it, so that its logits don't depend on those before it.

    Raises:
        InputError: `flips` isn't a bool, `uncertainty` or `dropout_samples` something else; when called, as
            `checkpoint_paths`, `load_weights`, `ExportedNetwork` and `with_dropout`.
    """

    def __init__(
        self,
        inferer: Inferer,
        checkpoints: str | Sequence[str],
        flips: bool = False,
        uncertainty: str | None = None,
        dropout_samples: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_true_or_false(flips=flips)
        if uncertainty not in (None, *UNCERTAINTIES):
            raise InputError(f"--uncertainty {uncertainty}: must be None, {', '.join(UNCERTAINTIES)}")
        require_whole_numbers(1, dropout_samples=dropout_samples)
        flips = flips or uncertainty == "flips"
        self.dropout_samples = dropout_samples if uncertainty == "dropout" else 0
        self.seed = seed
        self.inferer = inferer
        self.checkpoints = checkpoints
        self.flips = flips
        self.loaded: list[nn.Module | ExportedNetwork] = []

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        networks = self.networks(network, inputs.device)
        axes = range(2, inputs.ndim) if self.flips else ()
        if self.dropout_samples:
            networks = [with_dropout(each) for each in networks] * self.dropout_samples
        if len(networks) == 1 and not axes and not self.dropout_samples:
            return self.inferer(inputs, networks[0], *args, **kwargs)

        def probabilities(
            inputs: torch.Tensor, network: nn.Module | ExportedNetwork, axes: Sequence[int]
        ) -> torch.Tensor:
            """The mean over the mirror images along the axes.

            They are added in pairs, so that those of a mirrored volume give the mirrored mean to the last bit.
            """
            if not axes:
                return self.inferer(inputs, network, *args, **kwargs).softmax(1)
            axis, *others = axes
            mean = probabilities(inputs, network, others)
            mean += probabilities(inputs.flip(axis), network, others).flip(axis)
            return mean.div_(2)

        with own_randomness(self.seed, inputs.device):
            mean = probabilities(inputs, networks[0], axes)
            for other in networks[1:]:
                mean += probabilities(inputs, other, axes)
        # a probability too small for float32 is 0, and a grid can't be changed where a logit is infinite
        return mean.div_(len(networks)).clamp_(min=torch.finfo(mean.dtype).tiny).log_()

    def networks(self, network: nn.Module, device: torch.device) -> list[nn.Module | ExportedNetwork]:
        """The given network if there is one checkpoint of it, else those of the files, loaded the first time."""
        paths = checkpoint_paths(self.checkpoints)
        if len(paths) == 1 and not is_exported(paths[0]):
            return [network]
        if not self.loaded:
            self.loaded = [self.load(path, network, device) for path in paths]
            if len(paths) > 1:
                logger.info("average of %d networks: %s", len(paths), ", ".join(paths))
        return self.loaded

    def load(self, path: str, network: nn.Module, device: torch.device) -> nn.Module | ExportedNetwork:
        """The network of a file: an exported one, or a copy of the given one with the weights of a checkpoint."""
        if is_exported(path):
            return ExportedNetwork(path, device)
        own = copy.deepcopy(network)
        load_weights(own, path)
        return own
