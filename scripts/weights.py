"""Checkpoints: written whole, loaded whole or not at all, never lost to a later training."""

import glob
import hashlib
import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.utils import ensure_tuple

from scripts.errors import InputError, ran_out_of_memory, require_path


def read_checkpoint(path: str, content: bytes | None = None) -> Any:
    """Return what `torch.save` wrote to a file, on the CPU; nothing in the file is run.

    Args:
        path: the file.
        content: its bytes, if they were read already.

    Raises:
        InputError: the file can't be read whole, or holds other Python objects than tensors, numbers and containers.
    """
    try:
        file = io.BytesIO(Path(path).read_bytes() if content is None else content)
        if zipfile.is_zipfile(file):  # torch doesn't compare the checksums
            with zipfile.ZipFile(file) as archive:
                # torch doesn't compress, and compressed content may take a thousand times its room
                if sum(record.file_size for record in archive.infolist()) > file.getbuffer().nbytes:
                    raise InputError(f"{path}: is packed, as no checkpoint is; save it again by torch.save")
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # what torch raises for a damaged file depends on where the damage is
        if ran_out_of_memory(error):
            raise
        if foreign := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path}: refers to {foreign[1]}, so loading it could run code; it wasn't loaded; "
                f"have it saved again as a plain state dict"
            ) from error
        raise InputError(f"{path}: can't be read as a checkpoint; copy it again or train anew") from error


def _version(path: str | Path) -> tuple[int, ...]:
    """Numbers that change whenever a file is replaced or written."""
    status = Path(path).stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=16)
def _state_and_hash(path: str, version: tuple[int, ...]) -> tuple[Any, str]:
    """A checkpoint's state dict, which must not be changed, and the file's SHA-256: each version is read once."""
    content = Path(path).read_bytes()
    state = read_checkpoint(path, content)
    state = state.get("model", state) if isinstance(state, Mapping) else {}
    return state, hashlib.sha256(content).hexdigest()


@lru_cache(maxsize=16)
def _hash(path: str, version: tuple[int, ...]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file; a file is read once for it, and a checkpoint not at all after it was loaded."""
    try:
        return _state_and_hash(str(path), _version(path))[1]
    except InputError:  # an exported network, or anything else
        return _hash(str(path), _version(path))


def require_fit(state: Any, network: torch.nn.Module, path: str, remedy: str) -> None:
    """Refuse a state dict that hasn't exactly the tensors of a network, all of them finite.

    Args:
        state: tensors by name, or what was found in their place.
        network: whose tensors they should be.
        path: where `state` is from, for the message.
        remedy: what to do, for the message.

    Raises:
        InputError: tensors are missing, unknown, of another shape or kind, or have NaN or infinite values.
    """
    expected = network.state_dict()
    state = state if isinstance(state, Mapping) else {}
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    values = {name: _as_loaded(state[name], tensor) for name, tensor in expected.items() if name in state}
    misshapen = [name for name, value in values.items() if value is None]
    if missing or unknown or misshapen:
        first = (missing + misshapen + unknown)[0]
        raise InputError(
            f"{path}: a checkpoint of another network: {len(missing)} of {len(expected)} tensors missing, "
            f"{len(unknown)} unknown, {len(misshapen)} of another shape or kind (the first: {first}); {remedy}"
        )
    for name, value in values.items():
        if not value.isfinite().all():
            raise InputError(f"{path}: {name} has NaN or infinite values; give another epoch's checkpoint")


def _as_loaded(value: Any, tensor: torch.Tensor) -> torch.Tensor | None:
    """A value as `load_state_dict` puts it into a tensor; None where it can't, or would leave out a part."""
    if not isinstance(value, torch.Tensor) or value.shape != tensor.shape or value.is_complex():
        return None
    try:
        return torch.empty_like(tensor, device="cpu").copy_(value)
    except RuntimeError:  # it is sparse, quantised, or without values
        return None


def load_weights(network: torch.nn.Module, path: str) -> None:
    """Load a checkpoint into a network if it fits it exactly.

    Args:
        network: takes the weights in place, on the device where it is.
        path: a state dict as written by training, or a dict that holds one under `model`.

    Raises:
        InputError: the file isn't there, isn't such a checkpoint, or as `require_fit`.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; train first, or name another folder by --ckpt_dir")
    state, _ = _state_and_hash(str(path), _version(path))
    require_fit(state, network, path, "set network_def to the network it was trained with")
    network.load_state_dict(state)


def holds(path: str | Path, network: torch.nn.Module) -> bool:
    """Whether a checkpoint is there that has the very weights of a network; one that can't be read has not."""
    if not Path(path).is_file():
        return False
    try:
        state, _ = _state_and_hash(str(path), _version(path))
    except InputError:
        return False
    weights = network.state_dict()
    if not isinstance(state, Mapping) or state.keys() != weights.keys():
        return False
    found = ((_as_loaded(state[name], tensor), tensor.cpu()) for name, tensor in weights.items())
    return all(value is not None and torch.equal(value, tensor) for value, tensor in found)


def checkpoint_paths(checkpoints: str | Sequence[str]) -> list[str]:
    """The files that the setting `checkpoints` names, checkpoints or exported networks.

    Args:
        checkpoints: a path, or a pattern such as `cv/fold-*/model.pt` for all that fit it, sorted, or a list of these.
            A path needn't exist.

    Raises:
        InputError: one isn't a path, a pattern fits no file, or the list is empty.
    """
    paths: list[str] = []
    for name in ensure_tuple(checkpoints):
        require_path(name)
        name = str(name)
        if "://" in name:
            raise InputError(
                f"{name}: --checkpoints takes paths; give one folder by URL as --ckpt_dir, or copy the files"
            )
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


def starting_network(
    network: torch.nn.Module, device: torch.device | str, start_from: str | None = None
) -> torch.nn.Module:
    """A network on its device, with the weights of a checkpoint if one is given.

    They are there before anything starts, so weights that come later take their place: those of a training that is
    resumed, and those that MONAI Label or a federated server hands over.

    Args:
        network: takes the weights.
        device: where it goes.
        start_from: a checkpoint, as `load_weights` takes it.

    Raises:
        InputError: as `load_weights`.
    """
    if start_from is not None:
        load_weights(network, start_from)
    return network.to(device)


def is_fresh_start(engine: Engine) -> bool:
    """Whether a trainer that starts has done nothing yet; MONAI's federated client starts it again each round."""
    return engine.state.iteration == 0
