"""Checkpoints: found, read safely, compared with a network, loaded if they fit exactly."""

import glob
import hashlib
import io
import logging
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.utils import ensure_tuple

from scripts.errors import InputError, ran_out_of_memory, require_path

logger = logging.getLogger(__name__)

# where checkpoints keep the network: ours and MONAI's, Lightning's, nnU-Net's and other trainers'
WRAPPERS = ("model", "state_dict", "model_state_dict", "network_weights", "network", "net")
# of DataParallel, torch.compile, and trainers that hold the network as an attribute
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")
DEEPEST_WRAPPER = 4


def read_checkpoint(path: str, content: bytes | None = None) -> Any:
    """Return the content of a file written by `torch.save`, on the CPU, without running code from it.

    Args:
        path: the file.
        content: its bytes, if already read.

    Raises:
        InputError: the file can't be read whole, or has other Python objects than tensors, numbers and containers.
    """
    try:
        file = io.BytesIO(Path(path).read_bytes() if content is None else content)
        if zipfile.is_zipfile(file):  # torch doesn't verify the checksums
            with zipfile.ZipFile(file) as archive:
                # torch doesn't compress, and compressed content may expand a thousandfold
                if sum(record.file_size for record in archive.infolist()) > file.getbuffer().nbytes:
                    raise InputError(f"{path}: is compressed, unlike any checkpoint; save it again by torch.save")
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # the kind depends on where the file is damaged
        if ran_out_of_memory(error):
            raise
        if foreign := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path}: refers to {foreign[1]}, so loading could run code; it wasn't loaded; "
                f"have it saved again as a plain state dict"
            ) from error
        raise InputError(f"{path}: can't be read as a checkpoint; copy it again or train anew") from error


def _version(path: str | Path) -> tuple[int, ...]:
    """Numbers that change when a file is replaced or written."""
    status = Path(path).stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def unwrapped(content: Any) -> Mapping[str, Any]:
    """Return the state dict in the content of a checkpoint: itself, or what it holds under names of WRAPPERS.

    Empty if there is none.
    """
    for _ in range(DEEPEST_WRAPPER):
        held = (content[name] for name in WRAPPERS if isinstance(content, Mapping) and name in content)
        content = next((each for each in held if isinstance(each, Mapping)), content)
    return content if isinstance(content, Mapping) else {}


def without_prefix(state: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
    """Return a state dict without the PREFIXES that all its names have and none of a network's `names` needs."""
    while state and not any(name in names for name in state):
        prefix = next((each for each in PREFIXES if all(str(name).startswith(each) for name in state)), None)
        if prefix is None:
            break
        state = {str(name).removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


@lru_cache(maxsize=2)
def _state(path: str, version: tuple[int, ...]) -> Any:
    """The state dict of a checkpoint, read once per version of the file. The caller must not change it."""
    return unwrapped(read_checkpoint(path))


@lru_cache(maxsize=64)
def _sha256(path: str, version: tuple[int, ...]) -> str:
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, computed once per version of the file."""
    return _sha256(str(path), _version(path))


def require_fit(state: Any, network: torch.nn.Module, path: str, remedy: str) -> None:
    """Refuse a state dict unless it has exactly the tensors of a network, all finite.

    Args:
        state: tensors by name; anything else has no tensors.
        network: the network to fit.
        path: the file of `state`, for the message.
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
    """A value as `load_state_dict` copies it into a tensor; None if it can't, or would drop a part."""
    if not isinstance(value, torch.Tensor) or value.shape != tensor.shape or value.is_complex():
        return None
    try:
        return torch.empty_like(tensor, device="cpu").copy_(value)
    except RuntimeError:  # sparse, quantised, or without values
        return None


def load_weights(network: torch.nn.Module, path: str) -> None:
    """Load a checkpoint into a network if it fits exactly.

    Args:
        network: changed in place, on its device.
        path: a state dict as training writes it, or as `unwrapped` and `without_prefix` take it from other trainers.

    Raises:
        InputError: the file doesn't exist, or as `read_checkpoint` and `require_fit`.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; train first, or name another folder by --ckpt_dir")
    found = _state(str(path), _version(path))
    state = without_prefix(found, network.state_dict().keys())
    if state is not found:
        logger.info("%s: a prefix of all names was removed, such as that of %s", path, next(iter(found)))
    require_fit(state, network, path, "set network_def to the network it was trained with")
    network.load_state_dict(state)


def has_weights_of(path: str | Path, network: torch.nn.Module) -> bool:
    """Return whether a file is a readable checkpoint with exactly the weights of a network."""
    if not Path(path).is_file():
        return False
    try:
        state = _state(str(path), _version(path))
    except InputError:
        return False
    weights = network.state_dict()
    if not isinstance(state, Mapping) or state.keys() != weights.keys():
        return False
    found = ((_as_loaded(state[name], tensor), tensor.cpu()) for name, tensor in weights.items())
    return all(value is not None and torch.equal(value, tensor) for value, tensor in found)


def checkpoint_paths(checkpoints: str | Sequence[str]) -> list[str]:
    """Return the files that the setting `checkpoints` names: checkpoints or exported networks.

    Args:
        checkpoints: a path, which needn't exist, or a pattern such as `cv/fold-*/model.pt` for all files that fit,
            sorted, or a list of these.

    Raises:
        InputError: one isn't a path, no file fits a pattern, or the list is empty.
    """
    paths: list[str] = []
    for name in ensure_tuple(checkpoints):
        require_path(name)
        name = str(name)
        if "://" in name:
            raise InputError(f"{name}: --checkpoints takes paths; give a folder by URL as --ckpt_dir, or copy files")
        if Path(name).exists() or not glob.has_magic(name):
            paths.append(name)
        elif found := sorted(glob.glob(name, recursive=True)):  # noqa: PTH207 (may be absolute)
            paths += found
        else:
            raise InputError(f"{name}: no checkpoint fits this pattern; train first, or correct --checkpoints")
    if not paths:
        raise InputError("--checkpoints: is empty; give a path, a list of paths, or a pattern like cv/fold-*/model.pt")
    return paths


def starting_network(
    network: torch.nn.Module, device: torch.device | str, start_from: str | None = None
) -> torch.nn.Module:
    """Return a network on its device, with the weights of a checkpoint if one is given.

    They are loaded before anything starts. So weights that come later replace them: those of a resumed training, and
    those from MONAI Label or a federated server.

    Args:
        network: changed in place.
        device: to move it to.
        start_from: a checkpoint, see `load_weights`.

    Raises:
        InputError: as `load_weights`.
    """
    if start_from is not None:
        load_weights(network, start_from)
    return network.to(device)


def is_fresh_start(engine: Engine) -> bool:
    """Return whether a starting trainer has done no step yet; MONAI's federated client starts it again each round."""
    return engine.state.iteration == 0
