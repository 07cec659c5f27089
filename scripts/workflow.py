"""What every run of a config does first."""

import ctypes
import difflib
import inspect
import math
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from typing import Any

import monai.bundle
import torch
import tqdm.std
from fire.parser import DefaultParseValue
from ignite.engine import Engine
from monai.bundle import ConfigComponent, ConfigParser, ConfigWorkflow, ReferenceResolver, run
from monai.bundle.utils import ID_SEP_KEY
from monai.utils import ensure_tuple, set_determinism

from scripts.distributed import require_device
from scripts.errors import InputError, require_whole_numbers, show_input_errors_in_one_line
from scripts.exported import is_exported
from scripts.subjects import Ids
from scripts.writers import alone


def given_options(arguments: Sequence[str]) -> dict[str, Any]:
    """The options among command-line arguments, as `fire` reads them: `--name value`, `--name=value`, `-name value`.

    Raises:
        InputError: a value looks like Python's and isn't.
    """
    options: dict[str, Any] = {}
    for position, argument in enumerate(arguments):
        if option := re.fullmatch(r"--?([a-zA-Z][^=]*)(?:=(.*))?", argument, re.DOTALL):
            name, value = option.groups()
            following = arguments[position + 1] if position + 1 < len(arguments) else ""
            text = following if value is None else value
            try:
                options[name.replace("-", "_")] = DefaultParseValue(text)
            except MemoryError:  # Python's parser has room for so many brackets
                raise InputError(f"--{name} {text}: can't be read (too many brackets); correct it") from None
            except Exception as error:  # what fire takes for Python and can't evaluate
                raise InputError(f"--{name} {text}: can't be read ({error}); correct it") from error
    return options


def _names_at(config: ConfigParser, parent: str) -> set[str]:
    """What may be set in a part of a config: what stands there and, in a component, the arguments it takes."""
    part = config.get(parent)
    if isinstance(part, list):
        return {str(position) for position in range(len(part))}
    if not isinstance(part, dict):
        return set()
    names = set(part)
    if "_target_" in part:
        with suppress(Exception):  # there is no such component, as the run will say, or it doesn't tell what it takes
            component = ConfigComponent(part, id=parent, locator=config.locator).resolve_module_name()
            names |= set(inspect.signature(locate(component) if isinstance(component, str) else component).parameters)
        names |= {"_target_", "_disabled_", "_mode_", "_desc_", "_requires_"}
    return names


def _read_settings(option: str, files: Any, read: Callable[[Any], Any]) -> dict[str, Any]:
    """What `read` finds in the files that an option names; InputError where that isn't settings by name."""
    try:
        settings = read(files)
    except Exception as error:  # what is raised for a damaged file depends on where the damage is
        reason = " ".join(str(error).split())
        raise InputError(f"--{option} {files}: can't be read ({reason}); correct or copy it again") from error
    if not isinstance(settings, dict):
        raise InputError(f"--{option} {files}: holds no settings by name; write them as in configs/train.json")
    return settings


def _run_options(arguments: Sequence[str]) -> dict[str, Any]:
    """The options of `monai.bundle run`, those of its `--args_file` included."""
    options = given_options(arguments)
    if "args_file" in options:
        options = _read_settings("args_file", options["args_file"], ConfigParser.load_config_file) | options
    return options


def refuse_unknown_overrides(arguments: Sequence[str]) -> None:
    """Refuse a command-line override that names nothing in the configs; MONAI would accept and ignore it.

    Args:
        arguments: those of `monai.bundle run`.

    Raises:
        InputError: a name isn't known, with the nearest known one, or a file can't be read.
    """
    options = _run_options(arguments)
    if "config_file" not in options:  # not started from the command line
        return
    config = ConfigParser(_read_settings("config_file", options["config_file"], ConfigParser.load_config_files))
    of_monai = {*inspect.signature(run).parameters, *inspect.signature(ConfigWorkflow).parameters}
    for name in options:
        if hint := unknown_setting(name, config, of_monai):
            raise InputError(f"--{name}: no such setting; {hint}")


def require_tracking_package(arguments: Sequence[str]) -> None:
    """Refuse `--tracking mlflow` among the arguments of `monai.bundle run`, by InputError, where MLflow is missing."""
    if _run_options(arguments).get("tracking") == "mlflow" and find_spec("mlflow") is None:
        raise InputError("--tracking mlflow: a package is missing; pip install mlflow==3.17.2")


def unknown_setting(name: str, config: ConfigParser, others: Collection[str] = ()) -> str | None:
    """None if a config has a setting or one of `others` is meant, else what may have been meant, as a sentence."""
    parents: list[str] = []
    for part in ReferenceResolver.split_id(name):
        known = _names_at(config, ID_SEP_KEY.join(parents))
        allowed = known if parents else known | set(others)
        if part not in allowed:
            near = None if part.isdigit() else nearest(part, allowed)
            return f"did you mean --{ID_SEP_KEY.join([*parents, near])}?" if near else f"known are {sorted(known)}"
        parents.append(part)
    return None


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that is most like a misspelt one, if any is."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


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
    """Refuse a second run before it reads anything; raises InputError as `scripts.writers.alone`."""
    with alone(kind, folders):
        pass


def run_alone(engine: Engine, kind: str, folders: Iterable[str]) -> None:
    """Run an engine while no other run of its kind writes to its folders; raises InputError as `alone`."""
    with alone(kind, folders):
        engine.run()


def keep_freed_memory() -> None:
    """Let the C library keep large blocks for the next step instead of giving them back and clearing new ones.

    Activations are tens of MB and come and go each step; a training step on a CPU gets 1.1 to 1.4 times as fast, for
    about a quarter more memory. Only glibc can be told so; elsewhere nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # from malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)  # never


def start(seed: int, device: torch.device | str) -> None:
    """Prepare the process: memory and randomness, and on the command line how errors look and what may be overridden.

    Args:
        seed: for Python, NumPy and torch.
        device: where it will be computed.

    Raises:
        InputError: as `refuse_unknown_overrides`, `require_tracking_package` and `scripts.distributed.require_device`.
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
