"""The checkpoints that a training writes, keeps and replaces."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from scripts.data.storage import Folders
from scripts.errors import InputError, require_whole_numbers
from scripts.files import whole_files
from scripts.training.resume import ResumableTraining
from scripts.weights import has_weights_of, is_fresh_start, sha256


def _require_finite(network: torch.nn.Module, when: str) -> None:
    """Raise InputError if a weight or a statistic of batch normalisation is NaN or infinite."""
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values() if tensor.is_floating_point()):
        raise InputError(
            f"{when}: the training diverged, weights are NaN or infinite; give a lower --learning_rate, or --precision "
            f"fp32; checkpoints of earlier steps are as they were"
        )


def _write(network: torch.nn.Module, path: Path) -> None:
    with whole_files(path.parent) as temporary:
        # on the CPU, so that they can be loaded without a GPU
        torch.save({name: tensor.cpu() for name, tensor in network.state_dict().items()}, temporary / path.name)


class Checkpoints:
    """Handler of a trainer that keeps, loads, compares and writes all its checkpoints.

    It may stand anywhere among the handlers. It keeps copies of a `model.pt` and a `last.pt` that the training will
    replace, resumes from `last.pt` if asked, and validates the weights in `model.pt` if the training starts from them.
    It writes `model.pt` after the best validation so far, `last.pt` after each epoch, and `step-<n>.pt` if asked.

    Args:
        folders: `model.pt` is in the folder of checkpoints, the others are in that of results.
        network: the network to write.
        validator: the evaluator whose best metric decides.
        settings, seed, resume: see `ResumableTraining`.
        interval: steps from one `step-<n>.pt` to the next; 0 for none.
        keep: how many of these to keep.
        parts: other objects with a state, see `ResumableTraining`.

    Raises:
        InputError: as `DivergenceStopper`, `ResumableTraining` and `StepWeightsSaver`.
    """

    def __init__(
        self,
        folders: Folders,
        network: torch.nn.Module,
        validator: Evaluator,
        settings: Mapping[str, Any],
        seed: int,
        resume: bool = False,
        interval: int = 0,
        keep: int = 16,
        **parts: Any,
    ) -> None:
        require_whole_numbers(0, checkpoint_interval=interval)
        require_whole_numbers(1, checkpoints_kept=keep)
        best, last = Path(folders.checkpoints, "model.pt"), Path(folders.output, "last.pt")
        self.validator = validator
        self.best = BestWeightsSaver(best, network)
        self.handlers = [
            DivergenceStopper(network),
            EarlierWeightsKeeper(best),
            *([] if resume else [EarlierWeightsKeeper(last)]),
            ResumableTraining(last, resume, seed, settings, best, validator, network, **parts),
            FoundWeightsValidator(best, network, validator),
            *([StepWeightsSaver(folders.output, network, interval, keep, resume)] if interval else []),
        ]

    def attach(self, engine: Engine) -> None:
        self.best.attach(self.validator)
        for handler in self.handlers:
            handler.attach(engine)


class DivergenceStopper:
    """Handler of a trainer that stops after an epoch with NaN or infinite weights, before they are written.

    Args:
        network: the network to train.

    Raises:
        InputError: a weight isn't finite.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def attach(self, engine: Engine) -> None:
        last_of_epoch = Events.ITERATION_COMPLETED(lambda engine, step: step % engine.state.epoch_length == 0)
        engine.add_event_handler(last_of_epoch, self.stop)

    def stop(self, engine: Engine) -> None:
        _require_finite(self.network, f"epoch {engine.state.epoch}")


class BestWeightsSaver:
    """Handler of an evaluator that writes the network when its key metric is the best so far.

    MONAI's CheckpointSaver removes the old file before it writes the new one, so a process that ends in between leaves
    none. Here the file is always whole. It isn't rewritten if it already has these weights.

    Args:
        path: the checkpoint, a state dict.
        network: the network to write.
    """

    def __init__(self, path: str | Path, network: torch.nn.Module) -> None:
        self.path = Path(path)
        self.network = network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    @idist.one_rank_only()
    def save(self, engine: Engine) -> None:
        if engine.state.best_metric_epoch == engine.state.epoch and not has_weights_of(self.path, self.network):
            _write(self.network, self.path)


class FoundWeightsValidator:
    """Handler of a trainer that validates the checkpoint to be replaced, if training starts from its weights.

    Only a network that is better on the validation subjects then replaces it. MONAI Label trains this way.

    Args:
        path: the checkpoint of `BestWeightsSaver`.
        network: the network to train, with its weights loaded when training starts.
        validator: the evaluator with the `BestWeightsSaver`.
    """

    def __init__(self, path: str | Path, network: torch.nn.Module, validator: Evaluator) -> None:
        self.path = Path(path)
        self.network = network
        self.validator = validator

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.validate)

    def validate(self, engine: Engine) -> None:
        if is_fresh_start(engine) and has_weights_of(self.path, self.network):
            print(f"training starts from {self.path}, which stays until a network is better")
            self.validator.run()
            self.validator.state.best_metric_epoch = 0  # it ran as epoch 1, which is still to come


class StepWeightsSaver:
    """Handler of a trainer that writes the network as `step-<n>.pt` at an interval and keeps the newest files.

    Args:
        output_dir: the folder to write to.
        network: the network to write.
        interval: steps from one file to the next.
        keep: how many files to keep, at least 1.
        resume: whether existing files belong to this training.

    Raises:
        InputError: when training starts and isn't resumed, if the folder has such files of an earlier training.
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
        if is_fresh_start(engine) and (steps := self._steps()):
            raise InputError(
                f"{self.output_dir}/step-{steps[0]}.pt: is of an earlier training; choose another --output_dir, "
                f"or resume that training by --resume True"
            )

    @idist.one_rank_only()
    def save(self, engine: Engine) -> None:
        _require_finite(self.network, f"step {engine.state.iteration}")
        _write(self.network, self.output_dir / f"step-{engine.state.iteration}.pt")
        for step in self._steps()[: -self.keep]:
            (self.output_dir / f"step-{step}.pt").unlink()


class EarlierWeightsKeeper:
    """Handler that copies the checkpoint that training will replace, when training starts.

    Args:
        path: the checkpoint. The copy beside it is named after the content, so that the same is kept only once.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.keep)

    @idist.one_rank_only()
    def keep(self, engine: Engine) -> None:
        if not is_fresh_start(engine) or not self.path.is_file():
            return
        digest = sha256(self.path)[:8]
        copy = self.path.with_name(f"{self.path.stem}-{digest}{self.path.suffix}")
        if not copy.exists():
            with whole_files(copy.parent) as temporary:
                shutil.copy2(self.path, temporary / copy.name)
        print(f"{self.path} will be replaced; its present content is kept in {copy}")
