"""Averages over networks, mirror images and dropout; and the checkpoints that are averaged."""

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
# what the uncertainty of a label may be taken from, see `AveragingInferer`
UNCERTAINTIES = ("network", "flips", "dropout")


def with_dropout(network: Callable[..., torch.Tensor]) -> nn.Module:
    """Return a copy of a network in evaluation mode whose dropout layers, and they alone, drop features.

    A layer with a probability of 0, as `configs/train.json` trains, gets that of the paper.

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
        uncertainty: what besides is averaged over, for the entropy of the mean (see `scripts.results.probabilities`):
            nothing (None or 'network'), the mirror images ('flips'), or passes whose dropout layers drop at random
            ('dropout').
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


class CheckpointLoader:
    """Handler that loads a checkpoint by `load_weights` when the engine starts: the first, if several are named.

    MONAI's federated client switches off what has `CheckpointLoader` in its name, to score the weights it was sent.

    Args:
        checkpoints: as `checkpoint_paths` takes them; `AveragingInferer` loads the others, and exported networks
            wherever they stand.
        network: takes the weights.

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
