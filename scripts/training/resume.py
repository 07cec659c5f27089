"""A training that may be stopped at any moment and go on as if it hadn't been."""

import functools
import hashlib
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
from scripts.distributed import gathered
from scripts.errors import InputError, require_true_or_false
from scripts.files import whole_files
from scripts.weights import begins, load_weights


def made_with(part: Any, within: tuple[int, ...] = ()) -> Any:
    """What an object is and was made with, in the plain types that a checkpoint may hold, so that two can be compared.

    Args:
        part: a network, a loss, transforms or a setting. Of an object its kind and its public attributes are told, and
            so on for these, but of a network no weights; of an array its values, or its shape if they are many; of a
            function its name, which is the same for any two lambdas of one scope.
        within: the objects whose attribute it is, by `id`; of one that leads back to itself only the kind is told.
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
    # what else is private may change when it is used; the weights of classes are a loss's buffers, while those of a
    # network come from its training
    kept = ("_modules", "_buffers") if isinstance(part, _Loss) else ("_modules",) if isinstance(part, nn.Module) else ()
    attributes = {name: value for name, value in attributes.items() if name in kept or not name.startswith("_")}
    return {"kind": type(part).__name__} | made_with(attributes, (*within, id(part)))


def first_difference(name: str, then: Any, now: Any) -> tuple[str, Any, Any]:
    """Where two that differ, as `made_with` tells them, do so first: the path to it from `name`, and both values."""
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


class ResumableTraining:
    """Handler that writes the state of a training after each epoch and, when asked, goes on from there.

    All that is random in an epoch is drawn anew from the seed, the epoch's number and the rank, so the file needs no
    random state, and on a processor a resumed training takes the very steps that an uninterrupted one takes.

    Args:
        path: the file, written whole: what the parts' `state_dict` give, under their names, and the progress. It is
            also a checkpoint that `load_weights` takes.
        resume: whether to go on from the file; where there is none, training starts at the first epoch.
        seed: for another training.
        settings: what a training can't change on its way, by name: plain values, or what was made by settings, like the
            loss, of which `made_with` tells. Its epochs, their steps and `parts` are seen to besides.
        best_path: the checkpoint of the best epoch.
        validator: the evaluator whose best metric is kept.
        model: the network.
        parts: whatever else has a state: optimiser, learning rate scheduler.

    Raises:
        InputError: `resume` isn't a bool; when training starts, if the file is damaged or belongs to a training of
            other settings, or processes would go on from different epochs.
    """

    def __init__(
        self,
        path: str,
        resume: bool,
        seed: int,
        settings: dict[str, Any],
        best_path: str,
        validator: Evaluator,
        model: torch.nn.Module,
        **parts: Any,
    ) -> None:
        require_true_or_false(resume=resume)
        self.path = Path(path)
        self.resume = resume
        self.seed = seed
        # before the first step changes anything; a schedule and an optimiser tell how they begin by their state
        self.settings = {name: made_with(value) for name, value in settings.items()}
        self.beginnings = {
            name: {"kind": type(part).__name__, "state": made_with(part.state_dict())} for name, part in parts.items()
        }
        self.best_path = Path(best_path)
        self.validator = validator
        self.model = model
        self.parts = parts

    def attach(self, engine: Engine) -> None:
        if self.resume:
            engine.add_event_handler(Events.STARTED, self.go_on)
        engine.add_event_handler(Events.EPOCH_STARTED, self.draw_anew)
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
        stateful = self._stateful(engine)
        state = {name: part.state_dict() for name, part in stateful.items()}
        state["settings"] = self._settings(engine)
        state["progress"] = {
            "epoch": engine.state.epoch,
            "best_network": self._best_network(),
            "best_metric": float(best.best_metric),
            "best_metric_epoch": best.best_metric_epoch,
        }
        with whole_files(self.path.parent) as temporary:
            torch.save(state, temporary / self.path.name)

    def go_on(self, engine: Engine) -> None:
        """Load the state and count on from its epoch, when training begins."""
        if not begins(engine):
            return
        if self.path.exists():
            self._load(engine)
        else:
            print(f"{self.path} isn't there: training starts at the first epoch")
        if len(epochs := set(gathered([engine.state.epoch]))) > 1:
            raise InputError(
                f"{self.path}: isn't the same for all processes, which would go on after epochs {sorted(epochs)}; "
                f"put --output_dir where all of them see it"
            )

    def _load(self, engine: Engine) -> None:
        load_weights(self.model, str(self.path))
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        remedy = "give the settings that it began with, or train anew without --resume"
        try:
            progress, stateful = state["progress"], self._stateful(engine)
            if unknown := [name for name in self.settings if name not in state["settings"]]:
                raise InputError(
                    f"{self.path}: doesn't tell the {', '.join(unknown)} of its training, so another version wrote it; "
                    f"go on with that version, or train anew without --resume"
                )
            for name, now in self._settings(engine).items():
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
        print(f"training goes on after epoch {engine.state.epoch} of {engine.state.max_epochs}, from {self.path}")

    def _stateful(self, engine: Engine) -> dict[str, Any]:
        scaler = {} if engine.scaler is None else {"scaler": engine.scaler}
        return {"model": self.model, **self.parts, **scaler}

    def _settings(self, engine: Engine) -> dict[str, Any]:
        steps = {"epochs": engine.state.max_epochs, "steps per epoch": engine.state.epoch_length}
        # torch would load the state of one optimiser into another, and lose what was set of the second
        return {**steps, **self.settings, **self.beginnings, "loss scaler": engine.scaler is not None}

    def _best_network(self) -> str | None:
        """SHA-256 of the best epoch's checkpoint; None where there is none."""
        return hashlib.sha256(self.best_path.read_bytes()).hexdigest() if self.best_path.is_file() else None
