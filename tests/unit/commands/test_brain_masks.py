"""Figures of brain masks, where what is found is known."""

import numpy as np
import pytest
import torch
from helpers import head_of, save_volume, small_brain

from scripts.commands import brain_masks as command
from scripts.errors import InputError
from scripts.preparation.brain import FoundBrain
from scripts.results.tables import read_csv


@pytest.fixture
def heads(tmp_path):
    for name in "AB":
        save_volume(tmp_path / "heads" / f"{name}.nii.gz", head_of(small_brain(1)["label"]), np.eye(4))
    return tmp_path / "heads"


def test_figures(heads, tmp_path, monkeypatch, capsys):
    truth = np.zeros((60, 60, 60), bool)
    truth[10:40, 10:40, 10:40] = True
    found = truth.copy()
    found[10:20] = False  # a third of it
    found[50:60, 50:60, 50:60] = True  # 1 ml of something else
    found[42:44, 10:40, 10:40] = True  # beside the brain
    image = torch.ones(1, *truth.shape)
    monkeypatch.setattr(command, "draw_whole_head", lambda head, rng, contrast: (image, torch.from_numpy(truth)[None]))
    answers = {"T1": FoundBrain(found, 1, 0), "T2": FoundBrain(truth, 1, 0)}

    def find_brain(scan, affine, path):
        contrast = command.CONTRASTS[len(calls) // 2 % 3]
        calls.append(contrast)
        if contrast == "any":
            raise InputError("refused")
        return answers[contrast]

    calls: list[str] = []
    monkeypatch.setattr(command, "find_brain", find_brain)
    command.brain_masks(str(heads), str(tmp_path / "out"), draws=2)
    rows = read_csv(tmp_path / "out" / "brain_masks.csv")
    assert len(rows) == 2 * 3 * 2
    expected = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    by_contrast = {row["contrast"]: (float(row["dice"]), float(row["other_ml"])) for row in rows}
    assert by_contrast == {"T1": (pytest.approx(expected), 1.0), "T2": (1.0, 0.0), "any": (0.0, 0.0)}
    table = (tmp_path / "out" / "brain_masks.md").read_text()
    assert f"| T1 | 4 | {100 * expected:.1f} | {100 * expected:.1f} | 0 | 1.0 |" in table
    assert "| T2 | 4 | 100.0 | 100.0 | 0 | 0.0 |" in table
    assert "| any | 4 | 0.0 | 0.0 | 4 | 0.0 |" in table
    assert table in capsys.readouterr().out


def test_bad_options(heads, tmp_path):
    with pytest.raises(InputError, match="draws"):
        command.brain_masks(str(heads), str(tmp_path), draws=0)
    with pytest.raises(InputError, match="--heads"):
        command.brain_masks(str(heads), str(tmp_path), heads=["C"])
