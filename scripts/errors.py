"""What a person sees when something is wrong with what they gave."""

import sys
from types import TracebackType

from ignite.engine import Engine, Events


class InputError(ValueError):
    """Something given from outside can't be used. The message is one line: what, what is wrong with it, what to do.

    Args:
        message: line breaks and the like, which quoted text may have, are shown by their escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def require_whole_numbers(least: int, **settings: int) -> None:
    """Refuse settings, given by name, that aren't whole numbers of at least so much, by InputError."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"--{name} {value}: must be a whole number of at least {least}")


def require_true_or_false(**settings: bool) -> None:
    """Refuse settings, given by name, that are neither; the text 'false' would count as true. Raises InputError."""
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise InputError(f"--{name} {value}: must be True or False")


def input_error_in(error: BaseException | None) -> InputError | None:
    """The InputError that `error` is or was raised from, if any: MONAI wraps what its components raise."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    input_error = input_error_in(error)
    if input_error is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"error: {input_error}", file=sys.stderr)


def show_input_errors_in_one_line() -> None:
    """From here on an uncaught InputError ends the process with its message alone; others keep their traceback."""
    sys.excepthook = _show


class InputErrorsPass:
    """Handler that lets an InputError out of an engine before MONAI's handlers after it log it with its traceback."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.let_out)

    def let_out(self, error: Exception) -> None:
        if input_error_in(error):
            raise error
