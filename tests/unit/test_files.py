import pytest

from scripts.errors import InputError
from scripts.files import whole_files
from scripts.results.tables import write_csv


def test_failure_leaves_nothing_and_what_was_there_stays(tmp_path):
    (tmp_path / "table.csv").write_text("old")
    with pytest.raises(RuntimeError), whole_files(tmp_path) as temporary:
        (temporary / "table.csv").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert (tmp_path / "table.csv").read_text() == "old"


def test_file_where_a_folder_should_be_and_the_reverse(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "table.csv" / "mine").mkdir(parents=True)
    with pytest.raises(InputError, match=f"^{tmp_path}/file: can't be written .*; make room or allow it, or choose"):
        write_csv(tmp_path / "file" / "table.csv", [{"a": 1}])
    with pytest.raises(InputError, match=f"^{tmp_path}: can't be written .*; make room or allow it, or choose"):
        write_csv(tmp_path / "table.csv", [{"a": 1}])
    assert {path.name for path in tmp_path.iterdir()} == {"file", "table.csv"}
    assert (tmp_path / "table.csv" / "mine").exists()


def test_success_moves_every_file_into_a_new_folder(tmp_path):
    with whole_files(tmp_path / "a" / "b") as temporary:
        (temporary / "x.hdr").write_text("1")
        (temporary / "x.img").write_text("2")
    assert {p.name: p.read_text() for p in (tmp_path / "a" / "b").iterdir()} == {"x.hdr": "1", "x.img": "2"}
