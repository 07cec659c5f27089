"""Checkpoints: written whole, loaded whole or not at all, never lost to a later training."""

import glob
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers.checkpoint import BaseSaveHandler
from monai.handlers import CheckpointSaver
from monai.utils import ensure_tuple

from scripts.errors import InputError
from scripts.writers import whole_files


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


def checkpoint_paths(checkpoints: str | Sequence[str]) -> list[str]:
    """The files that the setting `checkpoints` names.

    Args:
        checkpoints: a path, or a pattern such as `cv/fold-*/model.pt` for all that fit it, sorted, or a list of these.
            A path needn't exist.

    Raises:
        InputError: a pattern fits no file, or the list is empty.
    """
    paths: list[str] = []
    for name in ensure_tuple(checkpoints):
        if Path(name).exists() or not glob.has_magic(name):
            paths.append(name)
        elif found := sorted(glob.glob(name, recursive=True)):  # noqa: PTH207 (may be absolute)
            paths += found
        else:
            raise InputError(f"{name}: no checkpoint fits this pattern; train first, or correct --checkpoints")
    if not paths:
        raise InputError(
            "--checkpoints: names none; give a path, a list of paths, or a pattern like cv/fold-*/model.pt"
        )
    return paths


class WeightsLoader:
    """Handler that loads a checkpoint by `load_weights` when the engine starts: the first, if several are named.

    Args:
        checkpoints: as `checkpoint_paths` takes them; `scripts.inferers.AveragingInferer` loads the others.
        network: takes the weights.

    Raises:
        InputError: when the engine starts, as `checkpoint_paths` and `load_weights`.
    """

    def __init__(self, checkpoints: str | Sequence[str], network: torch.nn.Module) -> None:
        self.checkpoints = checkpoints
        self.network = network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(
            Events.STARTED, lambda: load_weights(self.network, checkpoint_paths(self.checkpoints)[0])
        )


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
