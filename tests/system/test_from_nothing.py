"""What README.md says of a fresh clone: the demo, and the set-up without make."""

import re
import subprocess

import pytest
from helpers import SETUP, copy_bundle, shell_lines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A copy of the bundle, in which `make demo` installed and made all."""
    home = copy_bundle(tmp_path_factory.mktemp("clone"))
    first = subprocess.run(["make", "demo"], cwd=home, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    average = re.search(r"^\| 6 \| .* \| ([\d.]+) \|$", first.stdout, re.MULTILINE)
    assert float(average[1]) >= 85
    for result in re.findall(r"demo/[\w./-]+", first.stdout[first.stdout.rindex("network:") :]):
        assert (home / result).exists(), result
    return home


def test_demo_once_more_keeps_what_is_there(home):
    before = {path: path.stat().st_mtime_ns for path in (home / "demo").rglob("*")}
    again = subprocess.run(["make", "demo"], cwd=home, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (home / "demo").rglob("*")} == before


def test_setup_without_make(home):
    """It installs the same packages, so over those that are there it only has to find them."""
    setup = "\n".join(line for line in shell_lines("README.md") if line in SETUP)
    check = "python -m monai.bundle verify_net_in_out network_def --meta_file configs/metadata.json"
    check += " --config_file configs/inference.json --n 4"
    freeze = [str(home / ".venv" / "bin" / "pip"), "freeze"]
    before = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    result = subprocess.run(["bash", "-ec", f"{setup}\n{check}"], cwd=home, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert subprocess.run(freeze, capture_output=True, text=True, check=True).stdout == before
