"""A training that may be stopped at any moment and go on as if it hadn't been."""

from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from monai.engines import Evaluator
from monai.utils import set_determinism

from scripts.datasets import epoch_seed
from scripts.errors import InputError
from scripts.weights import load_weights
from scripts.writers import whole_files


class ResumableTraining:
    """Handler that writes the state of a training after each epoch and, when asked, goes on from there.

    All that is random in an epoch is drawn anew from the seed, the epoch's number and the rank, so the file needs no
    random state, and on a processor a resumed training takes the very steps that an uninterrupted one takes.

    Args:
        path: the file, written whole: what the parts' `state_dict` give, under their names, and the progress. It is
            also a checkpoint that `load_weights` takes.
        resume: whether to go on from the file; where there is none, training starts at the first epoch.
        seed: for another training.
        validator: the evaluator whose best metric is kept.
        model: the network.
        parts: whatever else has a state: optimiser, learning rate scheduler.

    Raises:
        InputError: when training starts, if the file is damaged or belongs to a training of other settings.
    """

    def __init__(
        self, path: str, resume: bool, seed: int, validator: Evaluator, model: torch.nn.Module, **parts: Any
    ) -> None:
        self.path = Path(path)
        self.resume = resume
        self.seed = seed
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
        set_rnd(engine.data_loader.dataset, seed)

    @idist.one_rank_only()
    def save(self, engine: Engine) -> None:
        """Write the state after the epoch that was completed."""
        best = self.validator.state
        stateful = self._stateful(engine)
        state = {name: part.state_dict() for name, part in stateful.items()}
        state["kinds"] = _kinds(stateful)
        state["progress"] = {
            "epoch": engine.state.epoch,
            "epochs": engine.state.max_epochs,
            "steps_per_epoch": engine.state.epoch_length,
            "best_metric": float(best.best_metric),
            "best_metric_epoch": best.best_metric_epoch,
        }
        with whole_files(self.path.parent) as temporary:
            torch.save(state, temporary / self.path.name)

    def go_on(self, engine: Engine) -> None:
        """Load the state and count on from its epoch."""
        if not self.path.exists():
            print(f"{self.path} isn't there: training starts at the first epoch")
            return
        load_weights(self.model, str(self.path))
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        remedy = "give the settings that it began with, or train anew without --resume"
        try:
            progress, stateful = state["progress"], self._stateful(engine)
            if state["kinds"] != _kinds(stateful):  # torch loads the state of one optimiser into another
                raise InputError(f"{self.path}: its training has {state['kinds']}, not {_kinds(stateful)}; {remedy}")
            for name, now in (("epochs", engine.state.max_epochs), ("steps_per_epoch", engine.state.epoch_length)):
                if progress[name] != now:
                    raise InputError(f"{self.path}: its training has {progress[name]} {name}, not {now}; {remedy}")
            for name, part in stateful.items():
                part.load_state_dict(state[name])
            engine.state.epoch = progress["epoch"]
            self.validator.state.best_metric = progress["best_metric"]
            self.validator.state.best_metric_epoch = progress["best_metric_epoch"]
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path}: isn't the state of this training ({error}); {remedy}") from error
        engine.state.iteration = engine.state.epoch * engine.state.epoch_length
        print(f"training goes on after epoch {engine.state.epoch} of {engine.state.max_epochs}, from {self.path}")

    def _stateful(self, engine: Engine) -> dict[str, Any]:
        scaler = {} if engine.scaler is None else {"scaler": engine.scaler}
        return {"model": self.model, **self.parts, **scaler}


def _kinds(stateful: dict[str, Any]) -> dict[str, str]:
    return {name: type(part).__name__ for name, part in stateful.items()}
