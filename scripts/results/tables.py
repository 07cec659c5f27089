"""Tables: CSV, TSV and Markdown."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.files import whole_files


class _TabSeparated(csv.excel_tab):
    """TSV as BIDS defines it."""

    lineterminator = "\n"


def _dialect(path: str | Path) -> type[csv.Dialect]:
    return _TabSeparated if Path(path).suffix == ".tsv" else csv.excel


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header line; a `.tsv` is read as TSV."""
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file, dialect=_dialect(path)))


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as a CSV file with a header line; a `.tsv` is written as TSV."""
    path = Path(path)
    with whole_files(path.parent) as temporary, (temporary / path.name).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), dialect=_dialect(path))
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table, with the columns in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        return str(value).replace("|", "\\|")

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)
