"""Steps of every run of a config: prepare the process, check settings, lock folders, run the engine."""

import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import monai.bundle
import torch
import tqdm.std
from filelock import FileLock, Timeout
from ignite.engine import Engine
from monai.utils import ensure_tuple, set_determinism

from scripts.data.storage import Folders
from scripts.data.subjects import Subject, SubjectFolder, require_apart
from scripts.errors import (
    InputError,
    keep_input_errors_out_of_logs,
    require_true_or_false,
    require_whole_numbers,
    show_input_errors_in_one_line,
)
from scripts.files import UNFINISHED, unfinished_named, whole_files
from scripts.inference.exported import is_exported
from scripts.machine import keep_freed_memory, require_device
from scripts.settings import (
    refuse_rewritten_values,
    refuse_unknown_overrides,
    require_tracking_package,
)

# settings that must be whole numbers, by their smallest value
LEAST = {
    0: ("foreground_margin", "profile_steps", "picture_interval"),
    1: ("epochs", "crops_per_epoch", "batch_size", "val_interval"),
}
# images with nearly a subject's name that are logged one by one
MOST_UNUSED = 10
TRUE_OR_FALSE = ("probabilities", "stop_at_bad_subject", "save_prepared")

logger = logging.getLogger(__name__)


def start(seed: int, device: torch.device | str) -> None:
    """Prepare the process: device, memory and seeds; on the command line also display of errors and overrides.

    Args:
        seed: for Python, NumPy and torch.
        device: the device of the network.

    Raises:
        InputError: as `refuse_unknown_overrides`, `refuse_rewritten_values`, `require_tracking_package` and
            `require_device`.
    """
    # MONAI's surface distances warn about an argument that MONAI itself passes
    warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
    # MONAI's trainer creates the GradScaler by a name that torch deprecates
    warnings.filterwarnings("ignore", r".*torch\.cuda\.amp\.GradScaler", FutureWarning)
    # a user's own program decides on its display of errors and its arguments
    if Path(sys.argv[0]) == Path(monai.bundle.__file__).with_name("__main__.py"):
        show_input_errors_in_one_line()
        refuse_unknown_overrides(sys.argv[1:])
        refuse_rewritten_values(sys.argv[1:])
        require_tracking_package(sys.argv[1:])
        # tqdm uses the wall clock, which may be set back; its monitor thread would compare it with the new one
        tqdm.std.time = time.monotonic
        tqdm.std.tqdm.monitor_interval = 0
    # MLflow, if installed, would report its use
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    require_device(device)
    keep_freed_memory()
    set_determinism(seed)


def require_settings(purpose: str, settings: Mapping[str, Any]) -> None:
    """Refuse invalid settings before anything is loaded.

    Args:
        purpose: 'train', 'validate' or 'segment'.
        settings: by name. To train, `patch_size` must be a multiple of the `stride` of `network_def`, `val_subjects`
            must name a subject, `learning_rate` must be a finite number above 0, and `start_from`, if given, must be a
            checkpoint that can be trained.

    Raises:
        InputError: a setting is invalid.
    """
    for least, names in LEAST.items():
        require_whole_numbers(least, **{name: settings[name] for name in names if name in settings})
    require_true_or_false(**{name: settings[name] for name in TRUE_OR_FALSE if name in settings})
    if purpose != "train":
        return
    names = ("network_def", "patch_size", "val_subjects", "learning_rate", "start_from")
    network, patch_size, val_subjects, learning_rate, start_from = (settings[name] for name in names)
    stride = getattr(network, "stride", 1)
    sides = (patch_size,) * 3 if isinstance(patch_size, int) else ensure_tuple(patch_size)
    if len(sides) != 3 or any(not isinstance(side, int) or side < 1 or side % stride for side in sides):
        raise InputError(f"--patch_size {patch_size}: must be multiples of {stride}, like [64,64,64]")
    if not ensure_tuple(val_subjects):
        raise InputError(f"--val_subjects {val_subjects}: is empty; name at least one labelled subject, like [9]")
    is_number = isinstance(learning_rate, int | float) and not isinstance(learning_rate, bool)
    if not is_number or not 0 < learning_rate < math.inf:
        raise InputError(f"--learning_rate {learning_rate}: must be a number above 0, like 0.006")
    if start_from is not None and (not isinstance(start_from, str) or is_exported(start_from)):
        raise InputError(f"--start_from {start_from}: isn't a checkpoint that can be trained; name one, like model.pt")
    if start_from is not None and not os.path.isfile(start_from):  # noqa: PTH113 (Path fails on names too long)
        raise InputError(f"--start_from {start_from}: no such file; name a checkpoint, like models/model.pt")


def check(
    purpose: str,
    dataset: SubjectFolder,
    subjects: Sequence[Subject],
    settings: Mapping[str, Any],
    folders: Folders,
) -> None:
    """Refuse a run that can't succeed, before anything is loaded.

    Args:
        purpose: 'train', 'validate' or 'segment'.
        dataset: the dataset of the subjects.
        subjects: chosen for the purpose.
        settings: of the config, by name.
        folders: of the run.

    Raises:
        InputError: no subject was chosen, or as `require_settings`, `require_apart` and `exclusive_run`.
    """
    require_settings(purpose, settings)
    if purpose == "segment":
        require_apart(settings["dataset_dir"], settings["output_dir"])
    require_apart(folders.dataset, folders.output)
    for path, remedy in list(dataset.unused.items())[:MOST_UNUSED]:
        logger.warning("%s: isn't used, since its name isn't that of a subject's file; %s", path, remedy)
    if len(dataset.unused) > MOST_UNUSED:
        logger.warning("%s: %d more files like these aren't used", dataset.folder, len(dataset.unused) - MOST_UNUSED)
    dataset.require(subjects, purpose)
    with _locked(purpose, folders):
        pass


def run(engine: Engine, purpose: str, folders: Folders) -> None:
    """Run an engine while no other run of its kind writes to its folders.

    Args:
        engine: a trainer or evaluator.
        purpose: 'train', 'validate' or 'segment'.
        folders: of the run.

    Raises:
        InputError: as `exclusive_run`, or as the engine's components.
    """
    keep_input_errors_out_of_logs()
    with _locked(purpose, folders):
        engine.run()


def _locked(purpose: str, folders: Folders) -> AbstractContextManager[None]:
    """Lock the folders that a run with this purpose writes to."""
    if purpose == "train":
        return exclusive_run("training", [folders.output, folders.checkpoints])
    return exclusive_run("results", [folders.output])


@contextmanager
def exclusive_run(kind: str, folders: Iterable[str]) -> Iterator[None]:
    """Keep other runs of a kind out of folders within the block, and remove unfinished files of killed runs.

    The system frees the lock when the process ends in any way. Of the processes that `torchrun` starts, the first
    locks for all and the others wait for it. If a folder can't be locked, as on some network file systems, the block
    runs without a lock and removes nothing there.

    Args:
        kind: 'training', or 'results' for scoring and segmenting. These write different files, so the best network so
            far may be scored during a training.
        folders: created if missing.

    Raises:
        InputError: another run of this kind uses one of the folders, or one can't be written.
    """
    with ExitStack() as stack:
        for folder in dict.fromkeys(Path(folder).resolve() for folder in folders) if idist.get_rank() == 0 else ():
            with whole_files(folder):
                pass  # raises InputError before anything is computed, if the folder can't be written
            path = folder / f".{kind}.lock"
            try:
                # `check` of another run holds the lock for a moment
                stack.enter_context(FileLock(path, timeout=1, fallback_to_soft=False))
            except Timeout:
                raise InputError(
                    f"{folder}: another run ({kind}) is writing here; wait until it ends, or choose another folder by "
                    f"--output_dir{', --ckpt_dir' if kind == 'training' else ''}"
                ) from None
            except OSError as error:  # a network file system may have no locks
                logger.warning("%s: can't be locked (%s); don't start a second run there", folder, error)
                continue
            stack.callback(path.unlink, missing_ok=True)
            for subfolders in ("", "sub-*/**/"):  # results of a BIDS dataset are in sub-*
                for unfinished in folder.glob(f"{subfolders}{UNFINISHED}{kind}-*"):
                    shutil.rmtree(unfinished, ignore_errors=True)
        idist.barrier()  # before others write
        with unfinished_named(kind):
            yield
