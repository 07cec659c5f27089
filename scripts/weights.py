"""Checkpoints: written whole, loaded whole or not at all, never lost to a later training."""

import glob
import hashlib
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.utils import ensure_tuple

from scripts.errors import InputError, ran_out_of_memory, require_path
from scripts.files import whole_files


def read_checkpoint(path: str) -> Any:
    """What `torch.save` wrote to a file, on the CPU; nothing in the file is run.

    Raises:
        InputError: the file can't be read whole, or holds other Python objects than tensors, numbers and containers.
    """
    try:
        if zipfile.is_zipfile(path):  # torch doesn't compare the checksums
            with zipfile.ZipFile(path) as archive:
                # torch packs nothing, and what is packed may take a thousand times its room
                if sum(record.file_size for record in archive.infolist()) > Path(path).stat().st_size:
                    raise InputError(f"{path}: is packed, as no checkpoint is; save it again by torch.save")
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
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
    state = read_checkpoint(path)
    state = state.get("model", state) if isinstance(state, dict) else {}
    require_fit(state, network, path, "set network_def to the network it was trained with")
    network.load_state_dict(state)


def holds(path: str | Path, network: torch.nn.Module) -> bool:
    """Whether a checkpoint is there that has the very weights of a network; one that can't be read has not."""
    if not Path(path).is_file():
        return False
    try:
        state = read_checkpoint(str(path))
    except InputError:
        return False
    weights = network.state_dict()
    state = state.get("model", state) if isinstance(state, dict) else {}
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


def begins(engine: Engine) -> bool:
    """Whether a trainer that starts has done nothing yet; MONAI's federated client starts it anew for each round."""
    return engine.state.iteration == 0


def _write(network: torch.nn.Module, path: Path) -> None:
    with whole_files(path.parent) as temporary:
        # on the CPU, so that whoever loads them needn't have a GPU
        torch.save({name: tensor.cpu() for name, tensor in network.state_dict().items()}, temporary / path.name)


class BestWeightsSaver:
    """Handler of an evaluator that writes the network each time its key metric is better than ever before.

    MONAI's CheckpointSaver removes the former file and then writes the new one in place, so that a process that ends
    between the two leaves none. Here what is under the name is always whole. What is that network already stays.

    Args:
        path: the checkpoint, a state dict.
        network: whose weights are written.
    """

    def __init__(self, path: str, network: torch.nn.Module) -> None:
        self.path = Path(path)
        self.network = network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    @idist.one_rank_only()
    def save(self, engine: Engine) -> None:
        if engine.state.best_metric_epoch == engine.state.epoch and not holds(self.path, self.network):
            _write(self.network, self.path)


class FoundWeightsValidator:
    """Handler of a trainer that validates the checkpoint which training will replace, if training starts from it.

    Then only a network that is better on the validation subjects replaces it. MONAI Label trains so.

    Args:
        path: the checkpoint, as `BestWeightsSaver` has it.
        network: that is trained, its weights loaded by the time when training starts.
        validator: the evaluator that has the `BestWeightsSaver`.
    """

    def __init__(self, path: str, network: torch.nn.Module, validator: Evaluator) -> None:
        self.path = Path(path)
        self.network = network
        self.validator = validator

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.validate)

    def validate(self, engine: Engine) -> None:
        if begins(engine) and holds(self.path, self.network):
            print(f"training starts from {self.path}, which stays unless a network is better than it")
            self.validator.run()
            self.validator.state.best_metric_epoch = 0  # it ran as epoch 1, which is yet to come


class StepWeightsSaver:
    """Handler of a trainer that writes the network as `step-<n>.pt` each so many steps and keeps the newest.

    Args:
        output_dir: the folder to write to.
        network: whose weights are written.
        interval: steps from one to the next.
        keep: how many files stay, at least 1.
        resume: whether such files may be there at the start, since they are this training's own.

    Raises:
        InputError: when training begins and isn't resumed, if the folder holds such files of an earlier one.
    """

    def __init__(self, output_dir: str, network: torch.nn.Module, interval: int, keep: int, resume: bool) -> None:
        self.output_dir = Path(output_dir)
        self.network = network
        self.interval = interval
        self.keep = keep
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        if not self.resume:
            engine.add_event_handler(Events.STARTED, self.require_none)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self.save)

    def _steps(self) -> list[int]:
        names = [re.fullmatch(r"step-([1-9]\d*)\.pt", path.name) for path in self.output_dir.glob("step-*.pt")]
        return sorted(int(name[1]) for name in names if name)

    def require_none(self, engine: Engine) -> None:
        if begins(engine) and (steps := self._steps()):
            raise InputError(
                f"{self.output_dir}/step-{steps[0]}.pt: is of an earlier training; choose another --output_dir, "
                f"or go on with that one by --resume True"
            )

    @idist.one_rank_only()
    def save(self, engine: Engine) -> None:
        _write(self.network, self.output_dir / f"step-{engine.state.iteration}.pt")
        for step in self._steps()[: -self.keep]:
            (self.output_dir / f"step-{step}.pt").unlink()


class EarlierWeightsKeeper:
    """Handler that, when training begins, copies the checkpoint that it will replace.

    Args:
        path: the checkpoint; the copy beside it is named after the content, so that none is kept twice.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.keep)

    @idist.one_rank_only()
    def keep(self, engine: Engine) -> None:
        if not begins(engine) or not self.path.is_file():
            return
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:8]
        copy = self.path.with_name(f"{self.path.stem}-{digest}{self.path.suffix}")
        if not copy.exists():
            with whole_files(copy.parent) as temporary:
                shutil.copy2(self.path, temporary / copy.name)
        print(f"{self.path} will be replaced; its present content stays in {copy}")
