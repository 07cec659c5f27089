"""Averages over networks, mirror images and dropout; and loading the checkpoints for them."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.inferers import Inferer
from torch import nn

from scripts.errors import InputError, require_true_or_false, require_whole_numbers
from scripts.inference.exported import ExportedNetwork, is_exported
from scripts.weights import checkpoint_paths, load_weights

logger = logging.getLogger(__name__)

PAPER_DROPOUT = 0.2
# sources of a label's uncertainty, see `AveragingInferer`
UNCERTAINTIES = ("network", "flips", "dropout")


def with_dropout(network: Callable[..., torch.Tensor]) -> nn.Module:
    """Return a copy of a network in evaluation mode, except that its dropout layers drop features.

    A layer with probability 0, as in `configs/train.json`, gets the probability of the paper.

    Raises:
        InputError: there is no dropout layer, as in an exported network.
    """
    if isinstance(network, nn.Module) and any(isinstance(module, nn.Dropout) for module in network.modules()):
        network = copy.deepcopy(network)
        for module in network.modules():
            module.training = isinstance(module, nn.Dropout)
            if module.training:
                module.p = module.p or PAPER_DROPOUT
        return network
    raise InputError(
        "--uncertainty dropout: this network has no dropout; use flips, or a checkpoint (.pt) of a network with dropout"
    )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers on the CPU and the device within the block; restore their state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class AveragingInferer(Inferer):
    """Average the class probabilities of several networks and mirror images, with an inferer that runs one network.

    Called with (B, C, X, Y, Z) and a network, it returns logits, float32 (B, classes, X, Y, Z): the logarithm of the
    mean class probabilities, so that resampling and labelling work as for one network. With one checkpoint, no flips
    and no dropout, they are the inferer's logits, unchanged. For evaluation only: it works in place.

    Args:
        inferer: runs a network.
        checkpoints: see `scripts.weights.checkpoint_paths`. With one, the network is used as given. With several, it
            gives the architecture, and a copy with the weights of each is made at the first volume. Exported networks
            are also loaded then, and need no architecture.
        flips: whether to average over the eight mirror images of a volume, one for each set of axes, flipped back.
        uncertainty: what else to average over, for the entropy of the mean (see `scripts.results.probabilities`):
            nothing (None or 'network'), the mirror images ('flips'), or passes with random dropout ('dropout').
        dropout_samples: passes of each network with dropout.
        seed: for dropout, set for each volume, so that its logits don't depend on former volumes.

    Raises:
        InputError: `flips` isn't a bool, or `uncertainty` or `dropout_samples` is invalid; when called, as
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

            They are added in pairs, so that a mirrored volume gives exactly the mirrored mean.
            """
            if not axes:
                return self.inferer(inputs, network, *args, **kwargs).softmax(1)
            axis, *others = axes
            mean = probabilities(inputs, network, others)
            mean += probabilities(inputs.flip(axis), network, others).flip(axis)
            return mean.div_(2)

        with seeded(self.seed, inputs.device):
            mean = probabilities(inputs, networks[0], axes)
            for other in networks[1:]:
                mean += probabilities(inputs, other, axes)
        # a probability too small for float32 is 0, and an infinite logit can't be resampled
        return mean.div_(len(networks)).clamp_(min=torch.finfo(mean.dtype).tiny).log_()

    def networks(self, network: nn.Module, device: torch.device) -> list[nn.Module | ExportedNetwork]:
        """Return the given network if there is one checkpoint, else those of the files, loaded at the first call."""
        paths = checkpoint_paths(self.checkpoints)
        if len(paths) == 1 and not is_exported(paths[0]):
            return [network]
        if not self.loaded:
            self.loaded = [self.load(path, network, device) for path in paths]
            if len(paths) > 1:
                logger.info("average of %d networks: %s", len(paths), ", ".join(paths))
        return self.loaded

    def load(self, path: str, network: nn.Module, device: torch.device) -> nn.Module | ExportedNetwork:
        """Return an exported network, or a copy of the given network with the weights of a checkpoint."""
        if is_exported(path):
            return ExportedNetwork(path, device)
        network = copy.deepcopy(network)
        load_weights(network, path)
        return network


class CheckpointLoader:
    """Handler that loads the first checkpoint by `load_weights` when the engine starts.

    MONAI's federated client disables a handler with `CheckpointLoader` in its name, to score the weights that it got.

    Args:
        checkpoints: see `checkpoint_paths`; `AveragingInferer` loads the others, and exported networks.
        network: changed in place.

    Raises:
        InputError: when the engine starts, as `checkpoint_paths` and `load_weights`.
    """

    def __init__(self, checkpoints: str | Sequence[str], network: torch.nn.Module) -> None:
        self.checkpoints = checkpoints
        self.network = network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.load)

    def load(self) -> None:
        first = checkpoint_paths(self.checkpoints)[0]
        if not is_exported(first):
            load_weights(self.network, first)
