import sys

import pytest

from scripts import errors
from scripts.errors import InputError, require_whole_numbers


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
