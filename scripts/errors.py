"""Errors in what a user gave: each is shown in one line, without a traceback."""

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG),
}
# PyTorch has an error class for a GPU's memory, but none for the CPU's; a thread needs memory for its stack
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|bad_alloc|can't start new thread")


class InputError(ValueError):
    """Something given by the user can't be used. The message is one line: what, what is wrong with it, what to do.

    Args:
        message: line breaks and other unprintable characters, as in quoted text, are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def require_whole_numbers(least: int, **settings: int) -> None:
    """Raise InputError for a setting, given by name, that isn't a whole number of at least `least`."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"--{name} {value}: must be a whole number of at least {least}")


def require_true_or_false(**settings: bool) -> None:
    """Raise InputError for a setting, given by name, that isn't a bool; the text 'false' would count as true."""
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise InputError(f"--{name} {value}: must be True or False")


def require_share(**settings: float) -> None:
    """Raise InputError for a setting, given by name, that isn't a number from 0 to 1."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"--{name} {value}: must be a number from 0 to 1")


def require_path(path: str | os.PathLike[str]) -> None:
    """Raise InputError if a value isn't a path: on the command line `2024` is a number."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{path}: isn't text, so it can't be a path; write ./{path}")


def input_error_in(error: BaseException | None) -> InputError | None:
    """Return the InputError that `error` is or was raised from, or None: MONAI wraps the errors of its components."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, NumPy or PyTorch raised `error` because memory ran out."""
    if isinstance(error, RuntimeError):
        # oneDNN, which computes the convolutions, can't create a primitive; a missing descriptor has other reasons
        return any(re.search(each, str(error)) for each in (OUT_OF_MEMORY, "create a primitive(?! desc)"))
    return isinstance(error, MemoryError)


def reason_of(error: BaseException) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split())


@contextmanager
def refuse_damaged(source: str, remedy: str) -> Iterator[None]:
    """Raise InputError if reading `source` fails within the block; libraries' errors depend on where a file is damaged.

    InputError and a lack of memory pass unchanged.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        raise InputError(f"{source}: can't be read ({reason_of(error)}); {remedy}") from error


def one_line_of(error: BaseException) -> str | None:
    """Return the line to show for an error, or None if it may be a fault of the program and needs its traceback."""
    if input_error := input_error_in(error):
        return f"error: {input_error}"
    while error.__cause__:  # MONAI wraps the errors of its components
        error = error.__cause__
    reason = reason_of(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped from the keyboard; finished files are kept; resume a training by --resume True"
    if ran_out_of_memory(error):
        remedy = "lower --batch_size or --patch_size to train, --window_size to score or segment, or free memory"
        if "thread" in reason:
            remedy += ", or allow this user more processes (ulimit -u)"
        return f"error: memory ran out ({reason}); {remedy}"
    if isinstance(error, RuntimeError) and re.match(r"DataLoader worker .*(is killed|exited unexpectedly)", reason):
        return (
            f"error: a process that prepares patches was killed ({reason}); use fewer of them, as by "
            "--train#dataloader#num_workers 0, or provide more memory and shared memory (in Docker by --shm-size)"
        )
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"error: {reason}; make room or allow it, or choose another folder"
    return None


def _print_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    line = one_line_of(error)
    if line is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        for bar in list(tqdm._instances):  # else the line would follow a progress bar
            bar.close()
        print(line, file=sys.stderr)


class OneLineErrorFilter(logging.Filter):
    """Drop log records of errors that end the process in one line; MONAI's handlers log them with a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and record.exc_info[1] and one_line_of(record.exc_info[1]))


def show_input_errors_in_one_line() -> None:
    """From now on, end the process with one line for errors that `one_line_of` knows; others keep their traceback."""
    sys.excepthook = _print_error


def keep_input_errors_out_of_logs() -> None:
    """Keep errors that end the process in one line out of all loggers that exist; MONAI's handlers have their own.

    Does nothing where errors aren't shown in one line.
    """
    if sys.excepthook is _print_error:
        for logger in [logging.getLogger(), *logging.root.manager.loggerDict.values()]:
            if isinstance(logger, logging.Logger):
                logger.addFilter(OneLineErrorFilter())
