"""What a person sees when something is wrong with what they gave."""

import errno
import logging
import os
import re
import sys
from types import TracebackType

from tqdm import tqdm

UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG),
}


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


def require_path(path: str | os.PathLike[str]) -> None:
    """Refuse what isn't a path, by InputError: on the command line `2024` is a number."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{path}: isn't text, as a path must be; write ./{path}")


def input_error_in(error: BaseException | None) -> InputError | None:
    """The InputError that `error` is or was raised from, if any: MONAI wraps what its components raise."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error is Python's, NumPy's or PyTorch's way to say that there is no memory left."""
    # PyTorch has a kind of error for a GPU's memory, and none for that of a processor
    told = (
        *("out of memory", "can't allocate memory", "bad_alloc"),
        "can't start new thread",  # whose stack needs memory
    )
    if isinstance(error, RuntimeError):
        # as oneDNN says it, which computes the convolutions; a descriptor is missing for other reasons
        return any(t in str(error) for t in told) or bool(re.search("create a primitive(?! desc)", str(error)))
    return isinstance(error, MemoryError)


def one_line_of(error: BaseException) -> str | None:
    """What a person is told, in one line, of an error that isn't a fault of the program; None of another."""
    if input_error := input_error_in(error):
        return f"error: {input_error}"
    while error.__cause__:  # MONAI wraps what its components raise
        error = error.__cause__
    reason = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "stopped from the keyboard; what was finished is kept, and a training goes on by --resume True"
    if ran_out_of_memory(error):
        remedy = "lower --batch_size or --patch_size to train, --window_size to score or segment, or free some"
        if "thread" in reason:
            remedy += ", or allow this user more processes (ulimit -u)"
        return f"error: memory ran out ({reason}); {remedy}"
    if isinstance(error, RuntimeError) and re.match(r"DataLoader worker .*(is killed|exited unexpectedly)", reason):
        return (
            f"error: a process that prepares patches was ended ({reason}); give fewer of them, as by "
            "--train#dataloader#num_workers 0, or more shared memory (in Docker by --shm-size) and memory"
        )
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"error: {reason}; make room or allow it, or choose another folder"
    return None


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    line = one_line_of(error)
    if line is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        for bar in list(tqdm._instances):  # else the line would stand behind a progress bar
            bar.close()
        print(line, file=sys.stderr)


class OneLineErrorsLeftOut(logging.Filter):
    """Drop log records of errors that end the process in one line; MONAI's handlers log them with their traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and record.exc_info[1] and one_line_of(record.exc_info[1]))


def show_input_errors_in_one_line() -> None:
    """From here on, end the process with one line for errors that `one_line_of` knows; others keep their traceback."""
    sys.excepthook = _show
    for handler in logging.getLogger().handlers:
        handler.addFilter(OneLineErrorsLeftOut())
