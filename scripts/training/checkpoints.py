"""The checkpoints that a training writes, keeps and replaces."""

import hashlib
import re
import shutil
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from scripts.errors import InputError
from scripts.files import whole_files
from scripts.weights import begins, holds


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
