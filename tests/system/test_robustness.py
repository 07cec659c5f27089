"""The table of `python -m scripts robustness`."""

import nibabel as nib
import numpy as np
import pytest
from processes import flags, succeeds

from scripts.commands.robustness import CONDITIONS
from scripts.results.tables import read_csv


@pytest.mark.slow
def test_table_is_the_mean_of_the_rows(brains, tmp_path):
    nib.save(nib.Nifti1Image(brains[0]["label"][::-1], np.eye(4)), tmp_path / "A.nii.gz")
    out = tmp_path / "out"
    result = succeeds("robustness", *flags(labels_dir=tmp_path, output_dir=out), module="scripts")
    rows = read_csv(out / "robustness.csv")
    assert [row["condition"] for row in rows] == [*CONDITIONS, "procedural phantom"]
    assert (out / "robustness.md").read_text() in result.stdout
    for row, line in zip(rows, (out / "robustness.md").read_text().splitlines()[2:], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        expected = [f"{100 * float(row[name]):.1f}" for name in ("csf", "gm", "wm", "mean", "mean")]
        assert cells == [row["condition"], *expected]
    by_condition = {row["condition"]: float(row["mean"]) for row in rows}
    # each channel is normalised, so a gain changes nothing but rounding
    assert by_condition["gain x 2"] == pytest.approx(by_condition["nominal"], abs=0.005)
    assert by_condition["procedural phantom"] > 0.8
