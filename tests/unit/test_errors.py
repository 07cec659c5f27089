import errno
import sys

import pytest
import torch

from scripts import errors
from scripts.errors import InputError, one_line_of, require_whole_numbers


def test_input_error_is_one_line_whatever_it_quotes():
    with pytest.raises(InputError) as error:
        require_whole_numbers(1, epochs="two\nlines\x1b[1m and 赤ちゃん")
    assert str(error.value) == "--epochs two\\nlines\\x1b[1m and 赤ちゃん: must be a whole number of at least 1"


def test_input_error_is_shown_in_one_line_and_others_in_full(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    errors.show_input_errors_in_one_line()
    for wrapped, shown in ((InputError("a.hdr: broken"), "error: a.hdr: broken\n"), (KeyError("bug"), "Traceback")):
        try:
            try:
                raise wrapped
            except ValueError as cause:
                raise RuntimeError("applying transform") from cause
        except (RuntimeError, KeyError) as error:
            sys.excepthook(type(error), error, error.__traceback__)
        printed = capsys.readouterr().err
        assert printed == shown if shown.startswith("error") else printed.startswith(shown)


@pytest.mark.parametrize("value", [-1, 2.5, "many", True])
def test_numbers_that_may_be_nought(value):
    require_whole_numbers(0, profile_steps=0)
    with pytest.raises(InputError, match=f"--profile_steps {value}: must be a whole number of at least 0"):
        require_whole_numbers(0, profile_steps=value)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InputError("a.hdr: broken"), "error: a.hdr: broken"),
        (KeyboardInterrupt(), "stopped from the keyboard; "),
        (
            MemoryError("Unable to allocate 3 GiB"),
            "error: memory ran out (Unable to allocate 3 GiB); lower --batch_size",
        ),
        (RuntimeError("can't start new thread"), "error: memory ran out (can't start new thread); lower"),
        (RuntimeError("could not create a primitive descriptor for a convolution"), None),
        (RuntimeError("could not create a primitive"), "error: memory ran out (could not create a primitive); lower"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "error: memory ran out (CUDA out of memory. Tried)"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "error: [Errno 30] Read-only file system: 'x'; make room"),
        (OSError(errno.EIO, "Input/output error"), None),
        (KeyError("a fault of the program"), None),
    ],
)
def test_what_is_told_in_one_line(error, told):
    wrapped = RuntimeError("Failed to instantiate")
    wrapped.__cause__ = error
    for each in (error, wrapped) if isinstance(error, Exception) else (error,):
        line = one_line_of(each)
        assert line is told is None or line.startswith(told)
