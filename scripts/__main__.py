"""`python -m scripts COMMAND`: the commands that MONAI's bundle commands don't cover."""

import ast
import difflib
import getpass
import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import fire

from scripts.errors import InputError, show_input_errors_in_one_line

# module in scripts/commands/ by command; imported only to run the command, since most modules import torch and MONAI
COMMANDS = {
    **{name: name for name in ("phantom", "synthesize", "prepare_hdf5", "import_weights", "cross_validate")},
    "gather_folds": "cross_validate",
    **{name: name for name in ("submission", "package", "robustness", "brain_masks", "compare_recipes", "bench")},
}


def overview() -> str:
    """Return the help text: each command with the first line of its docstring, read without importing it."""
    lines = ["usage: python -m scripts COMMAND [OPTIONS]", "       python -m scripts COMMAND --help", "", "commands:"]
    for name, module in COMMANDS.items():
        source = Path(__file__).with_name("commands").joinpath(f"{module}.py").read_text(encoding="utf-8")
        functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
        docstring = next(ast.get_docstring(function) for function in functions if function.name == name)
        lines.append(f"  {name:16}{docstring.splitlines()[0]}")
    return "\n".join(lines)


def refuse_unknown_options(name: str, command: Callable[..., None], arguments: list[str]) -> None:
    """Refuse misspelt options before the command runs; `fire` complains only afterwards.

    A command with `**settings` checks these itself, against a config.

    Raises:
        InputError: an option is unknown, with the nearest known one, or its value is a URL.
    """
    from scripts.settings import given_options, nearest  # imports MONAI

    options = given_options(arguments)
    for option, value in options.items():
        if "://" in str(value):
            raise InputError(f"--{option} {value}: {name} takes paths, not URLs; copy the files first")
    known = inspect.signature(command).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for option in options:
        if option not in known and option != "help":
            hint = nearest(option, known) or ", --".join(known)
            raise InputError(f"--{option}: no such option of {name}; did you mean --{hint}?")


def take_text_as_it_is(command: Callable[..., None]) -> None:
    """Stop `fire` from parsing the values of text options: it would turn a folder called 2024 into a number."""
    texts = [name for name, option in inspect.signature(command).parameters.items() if option.annotation is str]
    fire.decorators.SetParseFns(**dict.fromkeys(texts, str))(command)


def have_user_name() -> None:
    """Give the process a user name if it has none, as in a container that runs as any user id: MONAI asks for it."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the type depends on Python's version
        os.environ["USER"] = "user"


def main(arguments: list[str]) -> None:
    """Run the command that the arguments begin with, or print an overview of all commands."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help", "--"):
        print(overview())
        return
    if name not in COMMANDS:
        hint = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5) or [", ".join(COMMANDS)]
        raise InputError(f"{name}: no such command; did you mean {hint[0]}?")
    command = getattr(import_module(f"scripts.commands.{COMMANDS[name]}"), name)
    refuse_unknown_options(name, command, arguments[1:])
    take_text_as_it_is(command)
    fire.Fire({name: command}, command=arguments, name="python -m scripts")


if __name__ == "__main__":
    show_input_errors_in_one_line()
    have_user_name()
    main(sys.argv[1:])
