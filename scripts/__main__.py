"""`python -m scripts COMMAND`: the commands that MONAI's bundle commands don't cover."""

import inspect
import sys
from collections.abc import Callable

import fire

from scripts.commands.bench import bench
from scripts.commands.compare_recipes import compare_recipes
from scripts.commands.cross_validate import cross_validate, gather_folds
from scripts.commands.import_weights import import_weights
from scripts.commands.package import package
from scripts.commands.phantom import phantom
from scripts.commands.prepare_hdf5 import prepare_hdf5
from scripts.commands.robustness import robustness
from scripts.commands.submission import submission
from scripts.commands.synthesize import synthesize
from scripts.errors import InputError, show_input_errors_in_one_line
from scripts.settings import given_options, nearest

COMMANDS = {
    "phantom": phantom,
    "synthesize": synthesize,
    "prepare_hdf5": prepare_hdf5,
    "import_weights": import_weights,
    "cross_validate": cross_validate,
    "gather_folds": gather_folds,
    "submission": submission,
    "package": package,
    "robustness": robustness,
    "compare_recipes": compare_recipes,
    "bench": bench,
}


def refuse_unknown_options(arguments: list[str]) -> None:
    """Refuse a misspelt option before the command runs; `fire` would complain only afterwards.

    A command with `**settings` looks at them itself: they are those of a config.

    Raises:
        InputError: an option isn't known, with the nearest known one, or is a URL.
    """
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is None:
        return
    options = given_options(arguments[1:])
    for name, value in options.items():
        if "://" in str(value):
            raise InputError(f"--{name} {value}: {arguments[0]} takes paths, not URLs; copy the files first")
    known = inspect.signature(command).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for name in options:
        if name not in known and name != "help":
            hint = nearest(name, known) or ", --".join(known)
            raise InputError(f"--{name}: no such option of {arguments[0]}; did you mean --{hint}?")


def take_text_as_it_is(command: Callable[..., None]) -> None:
    """Let `fire` leave the options of a command alone that are text: it would make a number of the folder 2024."""
    texts = [name for name, option in inspect.signature(command).parameters.items() if option.annotation is str]
    fire.decorators.SetParseFns(**dict.fromkeys(texts, str))(command)


if __name__ == "__main__":
    show_input_errors_in_one_line()
    refuse_unknown_options(sys.argv[1:])
    for each in COMMANDS.values():
        take_text_as_it_is(each)
    fire.Fire(COMMANDS, name="python -m scripts")
