"""Real scans with labels: which files are found, and what is done to them before they are segmented."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from helpers import head_of

from scripts.commands.real_scans import TREATMENTS, find_real_scans, score_real_scans, summary
from scripts.commands.robustness import robustness
from scripts.errors import InputError


def save_scan(folder, brain, names=("month-03-T1", "month-03-T2", "month-03-Seg"), side=0.8, label=None):
    """A scan whose T1 shows more than the label: a cube beside the brain."""
    images = {"T1": brain["T1"].astype(np.float32), "T2": brain["T2"].astype(np.float32), "label": brain["label"]}
    for kind, name in zip(images, names, strict=True):
        values = images[kind] if kind != "label" or label is None else label
        values = values.copy()
        if kind != "label":
            values[:4, :4, :4] = 300
        nib.save(nib.Nifti1Image(values, np.diag([side, side, side, 1])), folder / f"{name}.nii.gz")


@pytest.mark.parametrize(
    "names",
    [
        ("month-03-T1", "month-03-T2", "month-03-Seg"),
        ("subject-9-T1", "subject-9-T2", "subject-9-label"),
        ("sub-1_ses-3mo_T1w", "sub-1_ses-3mo_T2w", "sub-1_ses-3mo_desc-aseg_dseg"),
    ],
)
def test_scans_are_found_by_any_of_three_namings(brains, tmp_path, names):
    folder = tmp_path / "anat"
    folder.mkdir()
    save_scan(folder, brains[0], names)
    (found,) = find_real_scans(str(tmp_path)).values()
    assert {kind: path.name.removesuffix(".nii.gz") for kind, path in found.items()} == dict(
        zip(("t1", "t2", "label"), names, strict=True)
    )


class Perfect:
    """A segmenter that knows the label, and keeps what it was given."""

    def __init__(self, label: np.ndarray) -> None:
        self.label = label
        self.seen: list[list[np.ndarray | None]] = []

    def __call__(self, *scans: nib.Nifti1Image | None) -> SimpleNamespace:
        self.seen.append([scan and scan.get_fdata() for scan in scans])
        shape = next(scan for scan in scans if scan).shape
        label = self.label if shape == self.label.shape else np.zeros(shape, dtype=np.uint8)
        return SimpleNamespace(label=np.where(label, label, 2))


def test_scores_are_within_the_label_and_treatments_are_what_they_say(brains, tmp_path):
    save_scan(tmp_path, brains[0])
    label = brains[0]["label"]
    segmenter = Perfect(label)
    rows = list(score_real_scans(find_real_scans(str(tmp_path)), segmenter, 0))
    assert [row["treatment"] for row in rows] == list(TREATMENTS)
    whole, cut, coarse, noise, t1_alone, no_t1 = (seen for seen, _ in segmenter.seen)
    assert no_t1 is None
    assert np.array_equal(t1_alone, cut)
    assert [t2 is None for _, t2 in segmenter.seen] == [False] * 4 + [True, False]
    assert rows[0]["dice_mean"] == rows[1]["dice_mean"] == 1
    assert rows[0]["share_csf"] == pytest.approx(np.mean(label[label > 0] == 1))
    assert (whole[:4, :4, :4] == 300).all()
    assert not cut[label == 0].any()
    assert np.array_equal(cut[label > 0], whole[label > 0])
    assert [abs(new - 0.8 * old) <= 1 for new, old in zip(coarse.shape, label.shape, strict=True)] == [True] * 3
    assert np.array_equal(noise > 0, cut > 0)
    gm = label == 2
    assert (noise - cut)[gm].std() == pytest.approx(0.7 * cut[gm].std(), rel=0.05)
    first = summary(rows)[0]
    assert first["scan"] == "month-03"
    assert first["mean"] == "100.0"
    assert first["CSF/GM/WM"] == "/".join(f"{100 * np.mean(label[label > 0] == tissue):.0f}" for tissue in (1, 2, 3))


def test_folder_without_labels(brains, tmp_path):
    save_scan(tmp_path, brains[0])
    (tmp_path / "month-03-Seg.nii.gz").unlink()
    with pytest.raises(InputError, match="has no scan with label; give a folder with <scan>-T1, <scan>-T2 and <scan>-"):
        robustness(atlas_dir=str(tmp_path), output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_folder_that_is_none(tmp_path):
    for folder, message in ((str(tmp_path / "nowhere"), "nowhere: no such folder; give the folder"), (2024, "2024")):
        with pytest.raises(InputError, match=message):
            robustness(atlas_dir=folder, output_dir=str(tmp_path / "out"))


def test_hidden_and_incomplete_scans_do_not_count(brains, tmp_path, caplog):
    save_scan(tmp_path, brains[0])
    for name in ("._month-03-T1.nii.gz", "other-T1.nii.gz", "other-T2.nii.gz"):
        (tmp_path / name).write_bytes((tmp_path / "month-03-T1.nii.gz").read_bytes())
    assert list(find_real_scans(str(tmp_path))) == ["month-03"]
    assert "scan other has no T1, no T2 or no label; skipped" in caplog.text


def test_two_labels_of_a_scan(brains, tmp_path):
    save_scan(tmp_path, brains[0])
    (tmp_path / "month-03-label.nii.gz").write_bytes((tmp_path / "month-03-Seg.nii.gz").read_bytes())
    with pytest.raises(
        InputError,
        match=r"month-03-label.nii.gz: .*month-03-Seg.nii.gz is a label of scan month-03 too; rename or remove one",
    ):
        find_real_scans(str(tmp_path))


def test_label_without_a_tissue_or_on_another_grid(brains, tmp_path):
    label = brains[0]["label"]
    save_scan(tmp_path, brains[0], label=np.where(label == 3, 2, label))
    with pytest.raises(InputError, match=r"month-03-Seg.nii.gz: has no WM; give a label map of CSF, GM and WM"):
        list(score_real_scans(find_real_scans(str(tmp_path)), Perfect(label), 0))
    save_scan(tmp_path, brains[0], label=label[1:])
    with pytest.raises(InputError, match=r"month-03-T1\.nii\.gz"):
        list(score_real_scans(find_real_scans(str(tmp_path)), Perfect(label), 0))


def test_head_with_freesurfers_numbers_is_scored_where_it_is_labelled(brains, tmp_path, caplog):
    label = brains[0]["label"]
    head = head_of(label)
    head[head >= 500] = 0  # bone and skin have no label, but are in the scan
    shown = np.where(brains[0]["T1"] > 0, brains[0]["T1"], 50)
    save_scan(
        tmp_path, brains[0] | {"T1": shown}, ("s_space-x_T1w", "s_space-x_T2w", "s_space-x_desc-aseg_dseg"), 1, head
    )
    rows = list(score_real_scans(find_real_scans(str(tmp_path)), Perfect(label), 0))
    assert [row["treatment"] for row in rows] == list(TREATMENTS)

    class Refusing(Perfect):
        def __call__(self, t1, t2):
            if t1 is not None and (t1.get_fdata() > 0).all():
                raise InputError("T1: no brain is found in it")
            return super().__call__(t1, t2)

    rows = list(score_real_scans(find_real_scans(str(tmp_path)), Refusing(label), 0))
    assert [row["treatment"] for row in rows] == [name for name in TREATMENTS if name != "whole"]
    assert "s_space-x, whole: T1: no brain is found in it" in caplog.text
    save_scan(
        tmp_path,
        brains[0],
        ("s_space-x_T1w", "s_space-x_T2w", "s_space-x_desc-aseg_dseg"),
        1,
        np.where(head == 4, 3004, head).astype(np.int16),
    )
    with pytest.raises(
        InputError, match=r"dseg.nii.gz: label value 3004 isn't known; give a map like FreeSurfer's aseg"
    ):
        list(score_real_scans(find_real_scans(str(tmp_path)), Perfect(label), 0))


def test_neither_folder():
    with pytest.raises(InputError, match="give label maps by --labels_dir, real scans with labels by --atlas_dir"):
        robustness()
