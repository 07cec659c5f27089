"""Settings on the command line: how they are read, and which ones a config has."""

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pydoc import locate
from typing import Any

from fire.parser import DefaultParseValue
from monai.bundle import ConfigComponent, ConfigParser, ConfigWorkflow, ReferenceResolver, run
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS, ID_SEP_KEY
from monai.utils import ensure_tuple

from scripts.errors import InputError, refuse_damaged

# settings that are ids of subjects, and those that are paths, beside all that end in `_dir`
IDS = ("subjects", "val_subjects")
PATHS = ("checkpoints", "start_from", "filename", "logging_file")


def given_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options among arguments as `fire` reads them: `--name value`, `--name=value`, `-name value`.

    Raises:
        InputError: a value looks like Python but can't be evaluated.
    """
    return {name: value for name, value, _ in _given(arguments)}


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """Name, value and text of each option, see `given_options`."""
    for position, argument in enumerate(arguments):
        if option := re.fullmatch(r"--?([a-zA-Z][^=]*)(?:=(.*))?", argument, re.DOTALL):
            name, value = option.groups()
            following = arguments[position + 1] if position + 1 < len(arguments) else ""
            text = following if value is None else value
            try:
                yield name.replace("-", "_"), DefaultParseValue(text), text
            except MemoryError:  # the number of brackets that Python's parser takes is limited
                raise InputError(f"--{name} {text}: can't be read (too many brackets); correct it") from None
            except Exception as error:  # fire takes it for Python and can't evaluate it
                raise InputError(f"--{name} {text}: can't be read ({error}); correct it") from error


def _values_by_option(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each option with the arguments up to the next one."""
    result: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if re.match(r"--?[a-zA-Z]", argument):
            option, equals, value = argument.partition("=")
            result.append((option, [value] if equals else []))
        elif result:
            result[-1][1].append(argument)
    return result


def _names_at(config: ConfigParser, parent: str) -> set[str]:
    """The names that can be set in a part of a config: those in it, and the arguments of a component."""
    part = config.get(parent)
    if isinstance(part, list):
        return {str(position) for position in range(len(part))}
    if not isinstance(part, dict):
        return set()
    names = set(part)
    if "_target_" in part:
        with suppress(Exception):  # the run reports a missing component; others have no signature
            component = ConfigComponent(part, id=parent, locator=config.locator).resolve_module_name()
            names |= set(inspect.signature(locate(component) if isinstance(component, str) else component).parameters)
        names |= {"_target_", "_disabled_", "_mode_", "_desc_", "_requires_"}
    return names


def _read_settings(option: str, files: Any, read: Callable[[Any], Any]) -> dict[str, Any]:
    """The settings that `read` returns for the files of an option; InputError if they aren't settings by name."""
    with refuse_damaged(f"--{option} {files}", "correct it or copy it again"):
        settings = read(files)
    if not isinstance(settings, dict):
        raise InputError(f"--{option} {files}: has no settings by name; write them as in configs/train.json")
    return settings


def _run_options(arguments: Sequence[str]) -> dict[str, Any]:
    """The options of `monai.bundle run`, with those in its `--args_file`."""
    options = given_options(arguments)
    if "args_file" in options:
        options = _read_settings("args_file", options["args_file"], ConfigParser.load_config_file) | options
    return options


def refuse_unknown_overrides(arguments: Sequence[str]) -> None:
    """Refuse a command-line override of a setting that no config has; MONAI would silently ignore it.

    So is a second value of a setting, unless it names a part of the config to run, for which MONAI takes it.

    Args:
        arguments: of `monai.bundle run`.

    Raises:
        InputError: a name is unknown, with the nearest known one, a setting has two values, or a file can't be read.
    """
    options = _run_options(arguments)
    if "config_file" not in options:  # not started from the command line
        return
    config = ConfigParser(_read_settings("config_file", options["config_file"], ConfigParser.load_config_files))
    monai_options = {*inspect.signature(run).parameters, *inspect.signature(ConfigWorkflow).parameters}
    monai_options |= DEFAULT_MLFLOW_SETTINGS["configs"].keys()  # for `--tracking mlflow`
    for name in options:
        if hint := unknown_setting(name, config, monai_options):
            raise InputError(f"--{name}: no such setting; {hint}")
    for option, values in _values_by_option(arguments):
        if len(values) > 1 and values[-1] not in config:
            several = ",".join(f"'{value}'" for value in values)
            raise InputError(f'{option} {" ".join(values)}: has more than one value; write several as "[{several}]"')


def refuse_rewritten_values(arguments: Sequence[str]) -> None:
    """Refuse ids and paths on the command line that would arrive as something else.

    Python reads `12_1` as 121 and takes `#` for a comment, and only a shell knows `~`.

    Args:
        arguments: of `monai.bundle run`.

    Raises:
        InputError: an id of IDS outside quotes is a number written otherwise than Python would, or a path has `#` or a
            leading `~`.
    """
    for name, value, text in _given(arguments):
        if name in IDS and value != text:
            bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
            if any(str(DefaultParseValue(token)) != token for token in re.findall(r"[\w.+-]+", bare)):
                raise InputError(f"--{name} {text}: is read as {value}; put ids in quotes, like \"['12_1']\"")
        if not (name.endswith("_dir") or name in PATHS) or text.startswith(("@", "$", "%")):
            continue
        if "#" in text:  # fire takes the rest for a comment, MONAI takes it for a separator
            raise InputError(f"--{name} {text}: # would be changed or cut off; choose a path without it")
        if any(str(each).startswith("~") for each in ensure_tuple(value)):
            raise InputError(f"--{name} {text}: ~ isn't your home folder here; write the path in full")


def require_tracking_package(arguments: Sequence[str]) -> None:
    """Raise InputError if `monai.bundle run` has `--tracking mlflow` among its arguments and MLflow isn't installed."""
    if _run_options(arguments).get("tracking") == "mlflow" and find_spec("mlflow") is None:
        raise InputError("--tracking mlflow: a package is missing; pip install mlflow==3.17.2")


def unknown_setting(name: str, config: ConfigParser, others: Collection[str] = ()) -> str | None:
    """Return None if a setting is in a config or in `others`, else a hint as to which one may be meant."""
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
    """Return the known name most similar to a misspelt one, or None."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)
