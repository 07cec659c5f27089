"""What every run of a config does first."""

import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import monai.bundle
import torch
import tqdm.std
from ignite.engine import Engine
from monai.utils import ensure_tuple, set_determinism

from scripts.data.subjects import Ids
from scripts.errors import InputError, require_whole_numbers, show_input_errors_in_one_line
from scripts.files import alone
from scripts.inference.exported import is_exported
from scripts.machine import keep_freed_memory, require_device
from scripts.settings import refuse_unknown_overrides, require_tracking_package


def require_training_settings(
    network: torch.nn.Module,
    patch_size: Sequence[int],
    val_subjects: Ids,
    learning_rate: float,
    start_from: str | None = None,
    **whole_numbers: int,
) -> None:
    """Refuse settings that can't train before anything is loaded.

    Args:
        network: whose `stride`, if it has one, the patch must be a multiple of.
        patch_size: voxels along each axis, or one number for all three.
        val_subjects: must name at least one.
        learning_rate: must be a finite number above 0.
        start_from: must be a checkpoint that can be trained further, if given.
        whole_numbers: settings that must be whole numbers of at least 1, by name.

    Raises:
        InputError: one of them isn't so.
    """
    require_whole_numbers(1, **whole_numbers)
    stride = getattr(network, "stride", 1)
    sides = (patch_size,) * 3 if isinstance(patch_size, int) else ensure_tuple(patch_size)
    if len(sides) != 3 or any(not isinstance(side, int) or side < 1 or side % stride for side in sides):
        raise InputError(f"--patch_size {patch_size}: must be multiples of {stride}, like [64,64,64]")
    if not ensure_tuple(val_subjects):
        raise InputError(f"--val_subjects {val_subjects}: names none; name at least one labelled subject, like [9]")
    is_number = isinstance(learning_rate, int | float) and not isinstance(learning_rate, bool)
    if not is_number or not 0 < learning_rate < math.inf:
        raise InputError(f"--learning_rate {learning_rate}: must be a number above 0, like 0.006")
    if start_from is not None and (not isinstance(start_from, str) or is_exported(start_from)):
        raise InputError(f"--start_from {start_from}: isn't a checkpoint that can be trained; name one, like model.pt")
    if start_from is not None and not os.path.isfile(start_from):  # noqa: PTH113 (Path fails on names too long)
        raise InputError(f"--start_from {start_from}: no such file; name a checkpoint, like models/model.pt")


def require_alone(kind: str, folders: Iterable[str]) -> None:
    """Refuse a second run before it reads anything; raises InputError as `scripts.files.alone`."""
    with alone(kind, folders):
        pass


def run_alone(engine: Engine, kind: str, folders: Iterable[str]) -> None:
    """Run an engine while no other run of its kind writes to its folders; raises InputError as `alone`."""
    with alone(kind, folders):
        engine.run()


def start(seed: int, device: torch.device | str) -> None:
    """Prepare the process: memory and randomness, and on the command line how errors look and what may be overridden.

    Args:
        seed: for Python, NumPy and torch.
        device: where it will be computed.

    Raises:
        InputError: as `refuse_unknown_overrides`, `require_tracking_package` and `scripts.machine.require_device`.
    """
    # MONAI's surface distances warn of an argument that MONAI itself passes
    warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
    # MONAI's trainer makes the loss scaler of float16 by a name that torch deprecates
    warnings.filterwarnings("ignore", r".*torch\.cuda\.amp\.GradScaler", FutureWarning)
    # in somebody's own program, how errors look and what its arguments mean is theirs to say
    if Path(sys.argv[0]) == Path(monai.bundle.__file__).with_name("__main__.py"):
        show_input_errors_in_one_line()
        refuse_unknown_overrides(sys.argv[1:])
        require_tracking_package(sys.argv[1:])
        # progress is timed by the clock of day, which may be set back; a thread that watches it would compare the two
        tqdm.std.time = time.monotonic
        tqdm.std.tqdm.monitor_interval = 0
    # MLflow, if there is one, would tell its makers of its use
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    require_device(device)
    keep_freed_memory()
    set_determinism(seed)
