"""What every run of a config does first."""

import ctypes
import difflib
import inspect
import platform
import sys
import warnings
from collections.abc import Sequence

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser, ConfigWorkflow, run
from monai.utils import set_determinism

from scripts.errors import InputError, show_input_errors_in_one_line


def refuse_unknown_overrides(arguments: Sequence[str]) -> None:
    """Refuse a command-line override that names nothing in the configs; MONAI would accept and ignore it.

    Args:
        arguments: those of `monai.bundle run`, as `--name value` or `--name=value`.

    Raises:
        InputError: a top-level name isn't known, with the nearest known one. (MONAI itself refuses nested ones.)
    """
    given: dict[str, str] = {}
    for position, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            following = "".join(arguments[position + 1 : position + 2])
            given[name.replace("-", "_")] = value if equals else following
    options = dict(given)
    if "args_file" in given:
        options = ConfigParser.load_config_file(given["args_file"]) | given
    config_file = options.get("config_file")
    if config_file is None:  # not started from the command line
        return
    if isinstance(config_file, str):
        config_file = DefaultParseValue(config_file)
    config = ConfigParser.load_config_files(config_file)
    known = {*config, *inspect.signature(run).parameters, *inspect.signature(ConfigWorkflow).parameters}
    for name in options:
        if name not in known and not any(separator in name for separator in ("#", "::")):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else f"known are {', '.join(sorted(config))}"
            raise InputError(f"--{name}: no such setting; {hint}")


def keep_freed_memory() -> None:
    """Let the C library keep large blocks for the next step instead of giving them back and clearing new ones.

    Activations are tens of MB and come and go each step; a training step on a CPU gets 1.1 to 1.4 times as fast, for
    about a quarter more memory. Only glibc can be told so; elsewhere nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # from malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def start(seed: int) -> None:
    """Prepare the process: input errors end it in one line, unknown overrides are refused, all is seeded.

    Args:
        seed: for Python, NumPy and torch.
    """
    show_input_errors_in_one_line()
    # MONAI's surface distances warn of an argument that MONAI itself passes
    warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
    refuse_unknown_overrides(sys.argv[1:])
    keep_freed_memory()
    set_determinism(seed)
