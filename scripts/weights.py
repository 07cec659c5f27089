"""Checkpoints: written whole, loaded whole or not at all, never lost to a later training."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointSaver

from scripts.errors import InputError


def load_weights(network: torch.nn.Module, path: str) -> None:
    """Load a checkpoint into a network if it fits it exactly.

    Args:
        network: takes the weights in place, on the device where it is.
        path: a state dict as written by training, or a dict that holds one under `model`.

    Raises:
        InputError: the file isn't there, isn't such a checkpoint, or is one of another architecture.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; train first, or name another folder by --ckpt_dir")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for a damaged file depends on where the damage is
        raise InputError(f"{path}: can't be read as a checkpoint; copy it again or train anew") from error
    state = state.get("model", state) if isinstance(state, dict) else {}
    expected = network.state_dict()
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    misshapen = [n for n in expected if n in state and getattr(state[n], "shape", None) != expected[n].shape]
    if missing or unknown or misshapen:
        first = (missing + misshapen + unknown)[0]
        raise InputError(
            f"{path}: a checkpoint of another network: {len(missing)} of {len(expected)} tensors missing, "
            f"{len(unknown)} unknown, {len(misshapen)} of another shape (the first: {first}); "
            f"set network_def to the network it was trained with"
        )
    network.load_state_dict(state)


class WeightsLoader:
    """Handler that loads a checkpoint by `load_weights` before the engine runs."""

    def __init__(self, path: str, network: torch.nn.Module) -> None:
        self.path = path
        self.network = network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda: load_weights(self.network, self.path))


class WholeCheckpointSaver(CheckpointSaver):
    """MONAI's CheckpointSaver, but each file appears whole: written to a temporary name, then renamed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for checkpoint in (self._final_checkpoint, self._key_metric_checkpoint, self._interval_checkpoint):
            if checkpoint is not None:
                checkpoint.save_handler._atomic = True


def keep_earlier_weights(path: str) -> None:
    """Copy a checkpoint that training is about to replace to a name made from its content, beside it."""
    weights = Path(path)
    if weights.is_file():
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
        copy = weights.with_name(f"{weights.stem}-{digest}{weights.suffix}")
        if not copy.exists():
            shutil.copy2(weights, copy)
        print(f"{weights} will be replaced; its present content stays in {copy}")
