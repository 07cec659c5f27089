import pytest
from processes import forked

FULL_DISK = """
import resource, signal, sys, torch
from scripts.files import whole_files
from scripts.results.tables import write_csv
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, kind = sys.argv[1:]
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
try:
    if kind == "table":
        write_csv(f"{folder}/table.csv", [{"subject": "a" * 2000}])
    else:
        with whole_files(folder) as temporary:
            torch.save({"weight": torch.zeros(10000)}, temporary / "model.pt")
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)  # for what is printed
"""


@pytest.mark.parametrize("kind", ["table", "checkpoint"])
def test_what_can_not_be_written_ends_in_one_line_and_leaves_what_was_there(tmp_path, kind):
    for name in ("table.csv", "model.pt"):
        (tmp_path / name).write_text("old")
    result = forked(FULL_DISK, str(tmp_path), kind)
    assert f"InputError: {tmp_path}: can't be written" in result.stderr.strip().splitlines()[-1]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"table.csv": "old", "model.pt": "old"}
