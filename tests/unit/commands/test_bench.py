"""The measurements of `bench` on small volumes: that they are taken of the right work and say what they say."""

import pytest
import torch
from helpers import save_subject

from scripts.commands import bench
from scripts.errors import InputError
from scripts.results.tables import markdown_table

CPU = torch.device("cpu")


def test_folder_without_a_label_is_refused_before_anything_is_measured(tmp_path, brains):
    save_subject(tmp_path / "scans", "1", brains[0], labeled=False)
    for folder, reason in (
        ("scans", "no subject left to measure among 1, 0 of them labelled"),
        ("out", "no such folder"),
    ):
        with pytest.raises(InputError, match=f"{folder}: {reason}"):
            bench.bench(str(tmp_path / "out"), dataset_dir=str(tmp_path / folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"subjects": 0}, {"rounds": 1.5}])
def test_numbers_are_refused_before_anything_is_measured(tmp_path, settings):
    with pytest.raises(InputError, match="must be a whole number of at least 1"):
        bench.bench(str(tmp_path / "out"), **settings)
    assert not (tmp_path / "out").exists()


def test_peak_memory_is_that_of_the_call():
    peak = bench.peak_memory(lambda: torch.ones(100_000_000), CPU)
    assert peak is None or 0.35 < peak < 0.5


def test_medians_take_the_ways_in_turn():
    calls = []
    ways = {
        name: (lambda name=name: calls.append(f"set up {name}"), lambda name=name: calls.append(name)) for name in "ab"
    }
    medians = bench.interleaved_medians(ways, 2, "")
    assert calls == ["set up a", "a", "set up b", "b"] * 2
    assert set(medians) == {"a", "b"}


def test_tables_leave_out_what_a_row_lacks():
    table = markdown_table([{"way": "a", "seconds": 1.23456}, {"way": "b", "seconds": 12345.6, "peak GB": None}])
    assert table.splitlines() == [
        "| way | seconds | peak GB |",
        "|---|---|---|",
        "| a | 1.235 |  |",
        "| b | 12,346 |  |",
    ]
