import fire

from scripts.__main__ import take_text_as_it_is


def test_folder_named_by_a_number():
    given = []

    def command(folder: str, number: int) -> None:
        given.append((folder, number))

    take_text_as_it_is(command)
    fire.Fire(command, command=["--folder", "007", "--number", "7"])
    assert given == [("007", 7)]
