"""A training that may be stopped at any moment and resumed as if it hadn't been."""

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


def made_with(part: Any, within: tuple[int, ...] = ()) -> Any:
    """Describe what an object was made with, in plain types that a checkpoint may hold, so that two can be compared.

    Args:
        part: a network, a loss, transforms or a setting. An object is described by its kind and its public attributes,
            recursively, a network without its weights; an array by its values, or by its shape if they are many; a
            function by its name, which is the same for any two lambdas of one scope.
        within: the objects whose attribute it is, by `id`; cycles are described by kind only.
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
        return [made_with(value, (*within, id(part))) for value in part]
    if isinstance(part, Mapping):
        return {str(name): made_with(value, (*within, id(part))) for name, value in part.items()}
    if isinstance(part, functools.partial):
        return made_with({"kind": "partial", "func": part.func, "args": part.args, **part.keywords}, within)
    attributes = {} if id(part) in within else getattr(part, "__dict__", {})
    # other private attributes may change in use; a loss keeps its class weights in buffers, while those of a network
    # come from its training
    kept = ("_modules", "_buffers") if isinstance(part, _Loss) else ("_modules",) if isinstance(part, nn.Module) else ()
    attributes = {name: value for name, value in attributes.items() if name in kept or not name.startswith("_")}
    return {"kind": type(part).__name__} | made_with(attributes, (*within, id(part)))


def first_difference(name: str, then: Any, now: Any) -> tuple[str, Any, Any]:
    """Return where two differing results of `made_with` first differ: the path to it from `name`, and both values."""
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


# settings of a training that may change when it is resumed, and those that are compared by what they lead to
NOT_COMPARED = {
    *("dataset_dir", "checkpoint_interval", "checkpoints_kept", "profile_steps", "picture_interval"),
    *("epochs", "crops_per_epoch", "val_subjects", "optimizer", "lr_scheduler"),
}


class ResumableTraining:
    """Handler that writes the state of a training after each epoch and resumes from there when asked.

    All that is random in an epoch is drawn from the seed, the epoch's number and the rank. So the file needs no random
    state, and on a processor a resumed training takes the very steps that an uninterrupted one takes.

    Args:
        path: the file, written whole: the `state_dict` of each part under its name, and the progress. It is also a
            checkpoint that `load_weights` takes.
        resume: whether to resume from the file; where there is none, training starts at the first epoch.
        seed: for another training.
        settings: by name, plain values or objects, see `made_with`; except NOT_COMPARED they can't change on the way.
            Nor can the subjects, the transforms, the number of epochs and their steps.
        best_path: the checkpoint of the best epoch.
        validator: the evaluator whose best metric is kept.
        model: the network.
        parts: whatever else has a state: optimiser, learning rate scheduler.

    Raises:
        InputError: `resume` isn't a bool; when training starts, if the file is damaged or belongs to a training with
            other settings, or processes would resume from different epochs.
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
        # described now: the first step changes the state of an optimiser and a schedule
        self.settings = {name: made_with(value) for name, value in settings.items() if name not in NOT_COMPARED}
        self.settings |= {
            name: {"kind": type(part).__name__, "state": made_with(part.state_dict())} for name, part in parts.items()
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
            "transforms": made_with(training.transform),
        }
        if self.resume:
            engine.add_event_handler(Events.STARTED, self.resume_training)
        engine.add_event_handler(Events.STARTED, self.save_after_others)
        engine.add_event_handler(Events.EPOCH_STARTED, self.draw_anew)

    def save_after_others(self, engine: Engine) -> None:
        """Save after each epoch, behind the validation, wherever that stands: all handlers are attached by now."""
        if not engine.has_event_handler(self.save, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def draw_anew(self, engine: Engine) -> None:
        """Set every random state to that of the epoch and rank."""
        seed = epoch_seed(self.seed, engine.state.epoch, idist.get_rank())
        set_determinism(seed)
        # bound to one order of sums, cuDNN takes 15 times as long for the grouped upsampling of the paper's variant
        # (0.68 s a step, else 0.05 s, on an H100)
        grouped = any(isinstance(each, nn.ConvTranspose3d) and each.groups > 1 for each in self.model.modules())
        torch.backends.cudnn.deterministic = not grouped
        set_rnd(engine.data_loader.dataset, seed)

    @idist.one_rank_only()
    def save(self, engine: Engine) -> None:
        """Write the state after the epoch that was completed."""
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
        """Load the state and continue with its next epoch, when training starts."""
        if not is_fresh_start(engine):
            return
        if self.path.exists():
            self._load(engine)
        else:
            print(f"{self.path} isn't there: training starts at the first epoch")
        if len(epochs := set(gathered([engine.state.epoch]))) > 1:
            raise InputError(
                f"{self.path}: isn't the same for all processes, which would resume after epochs {sorted(epochs)}; "
                f"put --output_dir where all of them see it"
            )

    def _load(self, engine: Engine) -> None:
        load_weights(self.model, str(self.path))
        state = read_checkpoint(str(self.path))
        remedy = "give the settings that it began with, or train anew without --resume"
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
                print(f"{self.best_path} isn't the best network so far: the next one that is validated counts as such")
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
            # torch would load the state of one optimiser into another, and lose what was set of the second
            "loss scaler": engine.scaler is not None,
        }

    def _best_network(self) -> str | None:
        """SHA-256 of the best epoch's checkpoint; None where there is none."""
        return sha256(self.best_path) if self.best_path.is_file() else None
