"""The page on Python: its examples run; cropped scans are segmented as whole ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import ROOT, save_subject

from scripts.segment import Segmenter
from scripts.synthesis.contrast import T1_CONTRAST, T2_CONTRAST, six_month_image
from scripts.synthesis.phantom_brains import label_map
from scripts.tissues import Tissue

PAGE = (ROOT / "docs" / "from_python.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LAS = np.diag([-1.0, 1.0, 1.0, 1.0])


@pytest.mark.slow
@pytest.mark.parametrize("around", [16, 5])  # voxels to the faces of the scan, in which the wider box then ends
def test_little_around_the_brain_is_enough(around):
    rng = np.random.default_rng(4)
    truth = label_map(rng)
    box = tuple(slice(places.min() - around, places.max() + 1 + around) for places in np.nonzero(truth))
    scans = [nib.Nifti1Image(six_month_image(truth, c, rng)[box], LAS) for c in (T1_CONTRAST, T2_CONTRAST)]
    usual, wide = (Segmenter(**settings)(*scans).label for settings in ({}, {"foreground_margin": 16}))
    # where the boxes begin a multiple of 4 voxels apart, only what is around the brain differs
    assert np.mean((usual == wide)[truth[box] > 0]) >= (0.995 if around == 16 else 0.9)
    dice = []
    for label in (usual, wide):
        pairs = [(label == tissue, truth[box] == tissue) for tissue in Tissue]
        dice.append(np.mean([2 * np.sum(found & true) / (np.sum(found) + np.sum(true)) for found, true in pairs]))
    assert dice[0] == pytest.approx(dice[1], abs=0.002 if around == 16 else 0.005)
    assert dice[0] > 0.8


@pytest.fixture
def home(tmp_path, brains) -> Path:
    """A folder that isn't the bundle's, with the data and the paths of the examples."""
    for subject in (11, 12):
        save_subject(tmp_path / "data" / "iSeg-2017-Testing", str(subject), brains[subject % 2], labeled=False)
    for name, target in (("infant_brain", ROOT), ("models", ROOT / "models")):
        (tmp_path / name).symlink_to(target)
    return tmp_path


def test_example_of_the_page(home, monkeypatch, capsys):
    assert len(EXAMPLES) == 4
    assert len(EXAMPLES[0].splitlines()) == 5
    monkeypatch.chdir(home)
    assert EXAMPLES[0] in (ROOT / "README.md").read_text()
    exec(compile(EXAMPLES[0] + EXAMPLES[1], "from_python.md", "exec"), {})
    assert "'gm_ml': " in capsys.readouterr().out
    assert nib.load(home / "label.nii.gz").shape == (60, 72, 64)


@pytest.mark.slow
@pytest.mark.parametrize(("example", "path"), [("".join(EXAMPLES[:3]), str(ROOT)), (EXAMPLES[3], "")])
def test_examples_of_the_page_as_programs(home, example, path):
    (home / "program.py").write_text(example)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "program.py"],
        cwd=home, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    if path:
        assert result.stdout.count("'wm_ml': ") == 3
    else:
        names = {path.name for path in (home / "labels").iterdir()}
        assert {"subject-11-label.nii.gz", "subject-12-label.nii.gz", "volumes.csv"} <= names
