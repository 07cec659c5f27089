"""A training that can be stopped at any moment and resumed without a trace."""

import functools
import inspect
import math
import reprlib
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from monai.engines import Evaluator
from monai.utils import set_determinism
from torch import nn
from torch.nn.modules.loss import _Loss

from scripts.data.datasets import epoch_seed
from scripts.data.subjects import names_of
from scripts.distributed import gathered
from scripts.errors import InputError, require_true_or_false
from scripts.files import whole_files
from scripts.weights import is_fresh_start, load_weights, read_checkpoint, sha256


def describe(part: Any, within: tuple[int, ...] = ()) -> Any:
    """Describe how an object was configured, in plain types for a checkpoint, so that two objects can be compared.

    Args:
        part: a network, a loss, transforms or a setting. The description of an object has its kind and its public
            attributes, recursively, without a network's weights. That of an array has its values, or its shape if they
            are many. That of a function is its name, which is the same for all lambdas of a scope.
        within: `id` of each object that contains it; a cycle is described by kind only.
    """
    if isinstance(part, torch.dtype | torch.device | np.dtype | Enum | slice):
        return str(part)
    if isinstance(part, torch.Tensor | np.ndarray | np.generic):
        return part.tolist() if math.prod(part.shape) <= 16 else {"kind": type(part).__name__, "shape": [*part.shape]}
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if inspect.isroutine(part) or inspect.isclass(part):
        return part.__qualname__
    if isinstance(part, list | tuple):
        return [describe(value, (*within, id(part))) for value in part]
    if isinstance(part, Mapping):
        return {str(name): describe(value, (*within, id(part))) for name, value in part.items()}
    if isinstance(part, functools.partial):
        return describe({"kind": "partial", "func": part.func, "args": part.args, **part.keywords}, within)
    attributes = {} if id(part) in within else getattr(part, "__dict__", {})
    # other private attributes may change in use; buffers are the class weights of a loss, but results of training in a
    # network
    kept = ("_modules", "_buffers") if isinstance(part, _Loss) else ("_modules",) if isinstance(part, nn.Module) else ()
    attributes = {name: value for name, value in attributes.items() if name in kept or not name.startswith("_")}
    return {"kind": type(part).__name__} | describe(attributes, (*within, id(part)))


def first_difference(name: str, then: Any, now: Any) -> tuple[str, Any, Any]:
    """Return where two results of `describe` first differ: the path from `name`, and both values."""
    if isinstance(then, dict) and isinstance(now, dict):
        if then.get("kind") != now.get("kind"):
            return name, then.get("kind"), now.get("kind")
        pairs = {key: (then[key], now[key]) for key in then if key in now} if then.keys() == now.keys() else {}
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = dict(enumerate(zip(then, now, strict=True)))
    else:
        pairs = {}
    for key, (first, second) in pairs.items():
        if first != second:
            return first_difference(f"{name} {key}", first, second)
    return name, then, now


# settings that a resumed training may change, and settings that are compared by their effect
NOT_COMPARED = {
    *("dataset_dir", "checkpoint_interval", "checkpoints_kept", "profile_steps", "picture_interval"),
    *("epochs", "crops_per_epoch", "val_subjects", "optimizer", "lr_scheduler"),
}


class ResumableTraining:
    """Handler that writes the state of a training after each epoch and resumes from it if asked.

    The random numbers of an epoch depend only on the seed, the epoch and the rank. So the file needs no random state,
    and on a CPU a resumed training takes exactly the steps of an uninterrupted one.

    Args:
        path: the file, written whole, with the `state_dict` of each part by name, and the progress. `load_weights` also
            takes it as a checkpoint.
        resume: whether to resume from the file; if it doesn't exist, training starts at the first epoch.
        seed: of the training.
        settings: by name, plain values or objects, see `describe`. A resumed training must have the same, except
            NOT_COMPARED, and the same subjects, transforms, number of epochs and steps per epoch.
        best_path: the checkpoint of the best epoch.
        validator: the evaluator whose best metric is kept.
        model: the network.
        parts: other objects with a state: optimiser, learning rate scheduler.

    Raises:
        InputError: `resume` isn't a bool; when training starts, if the file is damaged or of a training with other
            settings, or if processes would resume from different epochs.
    """

    def __init__(
        self,
        path: str | Path,
        resume: bool,
        seed: int,
        settings: Mapping[str, Any],
        best_path: str | Path,
        validator: Evaluator,
        model: torch.nn.Module,
        **parts: Any,
    ) -> None:
        require_true_or_false(resume=resume)
        self.path = Path(path)
        self.resume = resume
        self.seed = seed
        # now, because the first step changes the state of an optimiser and a schedule
        self.settings = {name: describe(value) for name, value in settings.items() if name not in NOT_COMPARED}
        # by kind too: torch would load the state of one optimiser into another
        self.settings |= {
            name: {"kind": type(part).__name__, "state": describe(part.state_dict())} for name, part in parts.items()
        }
        self.best_path = Path(best_path)
        self.validator = validator
        self.model = model
        self.parts = parts

    def attach(self, engine: Engine) -> None:
        training, validation = engine.data_loader.dataset, self.validator.data_loader.dataset
        self.settings |= {
            "subjects": names_of(training.data),
            "val_subjects": names_of(validation.data),
            "transforms": describe(training.transform),
        }
        if self.resume:
            engine.add_event_handler(Events.STARTED, self.resume_training)
        engine.add_event_handler(Events.STARTED, self.save_after_others)
        engine.add_event_handler(Events.EPOCH_STARTED, self.seed_epoch)

    def save_after_others(self, engine: Engine) -> None:
        """Save after each epoch and after its validation: all handlers are attached by now."""
        if not engine.has_event_handler(self.save, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def seed_epoch(self, engine: Engine) -> None:
        """Set every random state from the epoch and the rank."""
        seed = epoch_seed(self.seed, engine.state.epoch, idist.get_rank())
        set_determinism(seed)
        # deterministic cuDNN takes 15 times as long for the grouped upsampling of the paper's variant (0.68 s instead
        # of 0.05 s per step, on an H100)
        grouped = any(isinstance(each, nn.ConvTranspose3d) and each.groups > 1 for each in self.model.modules())
        torch.backends.cudnn.deterministic = not grouped
        set_rnd(engine.data_loader.dataset, seed)

    @idist.one_rank_only()
    def save(self, engine: Engine) -> None:
        """Write the state after an epoch."""
        best = self.validator.state
        state = {name: part.state_dict() for name, part in self._stateful(engine).items()}
        state["settings"] = self._settings(engine)
        state["progress"] = {
            "epoch": engine.state.epoch,
            "best_network": self._best_network(),
            "best_metric": float(best.best_metric),
            "best_metric_epoch": best.best_metric_epoch,
        }
        with whole_files(self.path.parent) as temporary:
            torch.save(state, temporary / self.path.name)

    def resume_training(self, engine: Engine) -> None:
        """Load the state when training starts, and continue with the next epoch."""
        if not is_fresh_start(engine):
            return
        if self.path.exists():
            self._load(engine)
        else:
            print(f"{self.path} doesn't exist: training starts at the first epoch")
        if len(epochs := set(gathered([engine.state.epoch]))) > 1:
            raise InputError(
                f"{self.path}: isn't the same for all processes, which would resume after epochs {sorted(epochs)}; "
                f"put --output_dir where all of them see it"
            )

    def _load(self, engine: Engine) -> None:
        load_weights(self.model, str(self.path))
        state = read_checkpoint(str(self.path))
        remedy = "use the settings that it began with, or train anew without --resume"
        try:
            progress, stateful, settings = state["progress"], self._stateful(engine), self._settings(engine)
            if unknown := [name for name in settings if name not in state["settings"]]:
                raise InputError(
                    f"{self.path}: has no record of {', '.join(unknown)}, so another version of this bundle wrote it; "
                    f"resume with that version, or train anew without --resume"
                )
            for name, now in settings.items():
                if state["settings"][name] != now:
                    where, *values = first_difference(name, state["settings"][name], now)
                    then, now = map(reprlib.repr, values)
                    raise InputError(f"{self.path}: its training began with {where} {then}, not {now}; {remedy}")
            for name, part in stateful.items():
                part.load_state_dict(state[name])
            engine.state.epoch = progress["epoch"]
            if progress["best_network"] == self._best_network():
                self.validator.state.best_metric = progress["best_metric"]
                self.validator.state.best_metric_epoch = progress["best_metric_epoch"]
            else:
                print(f"{self.best_path} isn't the best network so far: the next validation counts as the best")
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path}: isn't the state of this training ({error}); {remedy}") from error
        engine.state.iteration = engine.state.epoch * engine.state.epoch_length
        print(f"training resumes after epoch {engine.state.epoch} of {engine.state.max_epochs}, from {self.path}")

    def _stateful(self, engine: Engine) -> dict[str, Any]:
        scaler = {} if engine.scaler is None else {"scaler": engine.scaler}
        return {"model": self.model, **self.parts, **scaler}

    def _settings(self, engine: Engine) -> dict[str, Any]:
        return {
            "epochs": engine.state.max_epochs,
            "steps per epoch": engine.state.epoch_length,
            **self.settings,
            # else the state of a scaler would be dropped, or its absence reported as damage
            "loss scaler": engine.scaler is not None,
        }

    def _best_network(self) -> str | None:
        """SHA-256 of the best epoch's checkpoint, or None without one."""
        return sha256(self.best_path) if self.best_path.is_file() else None
