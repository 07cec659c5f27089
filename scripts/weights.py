"""Checkpoints: written whole, loaded whole or not at all, never lost to a later training."""

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers.checkpoint import BaseSaveHandler
from monai.handlers import CheckpointSaver

from scripts.errors import InputError
from scripts.writers import whole_files


def read_checkpoint(path: str) -> Any:
    """What `torch.save` wrote to a file, on the CPU; nothing in the file is run.

    Raises:
        InputError: the file can't be read whole, or holds other Python objects than tensors, numbers and containers.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for a damaged file depends on where the damage is
        if foreign := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path}: refers to {foreign[1]}, so loading it could run code; it wasn't loaded; "
                f"have it saved again as a plain state dict"
            ) from error
        raise InputError(f"{path}: can't be read as a checkpoint; copy it again or train anew") from error


def require_fit(state: Mapping[str, Any], network: torch.nn.Module, path: str, remedy: str) -> None:
    """Refuse a state dict that hasn't exactly the tensors of a network.

    Args:
        state: tensors by name.
        network: whose tensors they should be.
        path: where `state` is from, for the message.
        remedy: what to do, for the message.

    Raises:
        InputError: tensors are missing, unknown or of another shape.
    """
    expected = network.state_dict()
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    misshapen = [n for n in expected if n in state and getattr(state[n], "shape", None) != expected[n].shape]
    if missing or unknown or misshapen:
        first = (missing + misshapen + unknown)[0]
        raise InputError(
            f"{path}: a checkpoint of another network: {len(missing)} of {len(expected)} tensors missing, "
            f"{len(unknown)} unknown, {len(misshapen)} of another shape (the first: {first}); {remedy}"
        )


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
    state = read_checkpoint(path)
    state = state.get("model", state) if isinstance(state, dict) else {}
    require_fit(state, network, path, "set network_def to the network it was trained with")
    network.load_state_dict(state)


class WeightsLoader:
    """Handler that loads a checkpoint by `load_weights` when the engine starts.

    Args:
        path: the checkpoint.
        network: takes the weights.

    Raises:
        InputError: when the engine starts, as `load_weights`.
    """

    def __init__(self, path: str, network: torch.nn.Module) -> None:
        self.path = path
        self.network = network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda: load_weights(self.network, self.path))


class _WholeFileSaver(BaseSaveHandler):
    """Writes a checkpoint whole, and only then removes the one that it takes the place of."""

    def __init__(self, directory: str, filename: str | None) -> None:
        self.directory = Path(directory)
        self.filename = filename
        self.outdated: set[str] = set()

    @idist.one_rank_only()
    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        filename = self.filename or filename
        with whole_files(self.directory) as temporary:
            torch.save(checkpoint, temporary / filename)
        for outdated in self.outdated - {filename}:
            (self.directory / outdated).unlink(missing_ok=True)
        self.outdated.clear()

    def remove(self, filename: str) -> None:
        self.outdated.add(self.filename or filename)


class WholeCheckpointSaver(CheckpointSaver):
    """MONAI's CheckpointSaver, but a file under its final name is always a whole checkpoint.

    MONAI's own removes the former checkpoint and then writes the new one in place, so that a process that ends
    between the two leaves none.

    Args:
        interval_filename: the one file name for the checkpoints of `save_interval`, instead of one with the epoch's
            number.
        kwargs: those of MONAI's CheckpointSaver.
    """

    def __init__(self, *, interval_filename: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self._interval_checkpoint is not None:
            self._interval_checkpoint.save_handler.filename = interval_filename
        for checkpoint in (self._final_checkpoint, self._key_metric_checkpoint, self._interval_checkpoint):
            if checkpoint is not None:
                checkpoint.save_handler = _WholeFileSaver(self.save_dir, checkpoint.save_handler.filename)


class EarlierWeightsKeeper:
    """Handler that, when training starts, copies the checkpoint that it will replace.

    Args:
        path: the checkpoint; the copy beside it is named after the content, so that none is kept twice.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.keep)

    @idist.one_rank_only()
    def keep(self) -> None:
        if not self.path.is_file():
            return
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:8]
        copy = self.path.with_name(f"{self.path.stem}-{digest}{self.path.suffix}")
        if not copy.exists():
            with whole_files(copy.parent) as temporary:
                shutil.copy2(self.path, temporary / copy.name)
        print(f"{self.path} will be replaced; its present content stays in {copy}")
