import csv

from scripts.results.tables import markdown_table, write_csv


def test_text_in_a_table_stays_in_its_cell():
    assert markdown_table([{"subject": "a|b", "dice": 1.0}]).splitlines()[-1] == "| a\\|b | 1 |"


def test_csv(tmp_path):
    write_csv(tmp_path / "new" / "table.csv", [{"subject": "1", "csf_ml": 1.5}, {"subject": "b", "csf_ml": 2}])
    with (tmp_path / "new" / "table.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"subject": "1", "csf_ml": "1.5"}, {"subject": "b", "csf_ml": "2"}]
