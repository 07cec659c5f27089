import pytest

from scripts.commands.phantom import phantom
from scripts.errors import InputError


@pytest.mark.parametrize(
    "numbers",
    [{"subjects": 0}, {"subjects": 2.5}, {"subjects": "a"}, {"subjects": True}, {"unlabeled": -1}, {"seed": -1}],
)
def test_impossible_numbers(tmp_path, numbers):
    with pytest.raises(InputError, match=next(iter(numbers))):
        phantom(str(tmp_path), **numbers)
    assert not list(tmp_path.iterdir())
