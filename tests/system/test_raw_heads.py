"""Whole heads as scanners give them, from files to labels."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from helpers import configured, read_subject, refusal, refused_run, save_bids, save_volume, voxels
from scipy.ndimage import affine_transform

from scripts.commands.phantom import phantom
from scripts.data.subjects import SubjectFolder
from scripts.preparation.brain import may_show_a_head
from scripts.segment import segment
from scripts.synthesis.contrast import T1_CONTRAST, T2_CONTRAST, six_month_image
from scripts.synthesis.phantom_brains import label_map
from scripts.synthesis.phantom_heads import raw_scans, with_margin
from scripts.tissues import ISEG_AFFINE, Tissue


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * np.sum(first & second) / (first.sum() + second.sum()))


def mean_dice(label: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([dice(label == tissue, truth == tissue) for tissue in Tissue]))


@pytest.fixture(scope="module")
def child() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    label = label_map(rng)
    scans = [six_month_image(label, contrast, rng) for contrast in (T1_CONTRAST, T2_CONTRAST)]
    t1, t2, matrix = raw_scans(*scans, rng)
    label = with_margin(label)
    # the same scans, prepared by what is known
    back = affine_transform(t2.astype(np.float32), matrix[:3, :3], matrix[:3, 3], order=3)
    prepared = [np.where(label > 0, np.rint(scan).clip(1), 0).astype(np.int16) for scan in (t1, back)]
    return {"T1": t1, "T2": t2, "matrix": matrix, "label": label, "prepared": prepared}


def save_pair(folder: Path, subject: str, t1: np.ndarray | None, t2: np.ndarray | None) -> list[str | None]:
    paths: list[str | None] = []
    for kind, values in (("T1", t1), ("T2", t2)):
        path = folder / f"subject-{subject}-{kind}.nii.gz"
        if values is not None:
            save_volume(path, values, ISEG_AFFINE)
        paths.append(None if values is None else str(path))
    return paths


@pytest.fixture(scope="module")
def results(child, tmp_path_factory) -> Path:
    """Of the raw scans, of the same ones prepared, and of each raw scan alone."""
    folder = tmp_path_factory.mktemp("raw")
    save_pair(folder / "data", "raw", child["T1"], child["T2"])
    save_pair(folder / "data", "prepared", *child["prepared"])
    save_pair(folder / "data", "T1-alone", child["T1"], None)
    save_pair(folder / "data", "T2-alone", None, child["T2"])
    configured(folder / "data", folder / "out", contrasts="any", save_prepared=True).run()
    return folder / "out"


def test_labels_of_raw_scans_are_those_of_prepared_ones(child, results):
    truth = child["label"]
    of_raw, of_prepared = (voxels(results / f"subject-{name}-label.nii.gz") for name in ("raw", "prepared"))
    assert mean_dice(of_raw, truth) > mean_dice(of_prepared, truth) - 0.02
    found = voxels(results / "subject-raw-brain-mask.nii.gz") > 0
    assert dice(found, truth > 0) > 0.97
    alone = voxels(results / "subject-T1-alone-brain-mask.nii.gz") > 0
    np.testing.assert_array_equal(alone, found)


def test_t2_alone_is_stripped_where_it_is(child, results):
    found = voxels(results / "subject-T2-alone-brain-mask.nii.gz") > 0
    affine = child["matrix"]  # in voxels of 1 mm, as both scans are on one grid
    places = np.rint(nib.affines.apply_affine(np.linalg.inv(affine), np.argwhere(found))).astype(int)
    inside = ((places >= 0) & (places < child["label"].shape)).all(1)
    in_brain = child["label"][tuple(places[inside].T)] > 0
    assert 2 * in_brain.sum() / (found.sum() + np.count_nonzero(child["label"])) > 0.96


def test_what_was_prepared_can_be_looked_at(child, results):
    """In the report, and as files that other programs read."""
    page = (results / "report.html").read_text()
    assert page.count("The brain was found in T1: ") == 2
    assert page.count("The brain was found in T2: ") == 1
    assert page.count("T2 was registered to T1: turned by") == 1
    assert page.count("How the scans were prepared") == 3
    names = {path.name for path in results.glob("subject-*")}
    assert {"subject-raw-T2-registered.nii.gz", "subject-raw-T2-to-T1.txt"} <= names
    assert not any("prepared-T2" in name or "alone-T2" in name for name in names)
    transform = sitk.ReadTransform(str(results / "subject-raw-T2-to-T1.txt"))
    to_voxels = np.linalg.inv(ISEG_AFFINE)
    for voxel in np.argwhere(child["label"] > 0)[::100_000]:
        place = nib.affines.apply_affine(ISEG_AFFINE, voxel) * [-1, -1, 1]  # to the left, the back and the top
        moved = nib.affines.apply_affine(to_voxels, np.array(transform.TransformPoint(place.tolist())) * [-1, -1, 1])
        assert np.linalg.norm(moved - nib.affines.apply_affine(child["matrix"], voxel)) < 1
    registered, mask = (voxels(results / f"subject-raw-{name}.nii.gz") for name in ("T2-registered", "brain-mask"))
    assert not registered[mask == 0].any()
    assert (registered[mask > 0] > 0).mean() > 0.99


def test_prepared_scans_pass_through_unchanged(child, results, tmp_path):
    save_pair(tmp_path / "data", "prepared", *child["prepared"])
    configured(tmp_path / "data", tmp_path / "out", prepare=[]).run()
    label = voxels(tmp_path / "out" / "subject-prepared-label.nii.gz")
    np.testing.assert_array_equal(label, voxels(results / "subject-prepared-label.nii.gz"))


def test_the_function_takes_raw_scans_too(child, results):
    label = segment(child["T1"], child["T2"], ISEG_AFFINE).label
    np.testing.assert_array_equal(label, voxels(results / "subject-raw-label.nii.gz"))


def test_stripped_scans_in_a_tight_box(child):
    """They touch the faces of their volume, so the network has to tell."""
    box = tuple(slice(places.min(), places.max() + 1) for places in np.nonzero(child["label"]))
    t1, t2 = (scan[box] for scan in child["prepared"])
    tight = tuple(slice(6, -6) for _ in range(3))
    images = [nib.Nifti1Image(scan[tight], ISEG_AFFINE) for scan in (t1, t2)]
    assert may_show_a_head(images[0].get_fdata(), ISEG_AFFINE)
    loaded = read_subject({"image": images})
    assert "head" not in loaded
    np.testing.assert_array_equal(loaded["t1"][0], t1[tight])


def test_scans_without_a_brain_or_with_half_of_one(child, tmp_path):
    rng = np.random.default_rng(0)
    shape = child["T1"].shape
    air = np.abs(rng.normal(0, 8, shape)).astype(np.int16)
    save_pair(tmp_path / "data", "air", air, air[::-1])
    save_pair(tmp_path / "data", "good", *child["prepared"])
    message = refused_run(tmp_path / "data", tmp_path / "out")
    assert "subject-air-T1.nii.gz: no brain is found in it" in message
    assert message.endswith("check the scan and its orientation, or give it skull-stripped, 0 outside the brain")
    assert {path.name for path in (tmp_path / "out").glob("subject-*")} == {
        *("subject-good-label.nii.gz", "subject-good-label.png")
    }
    half = child["T1"][: shape[0] // 2]
    loaded = read_subject({"image": [nib.Nifti1Image(half, ISEG_AFFINE), None]})
    assert loaded["head"].meta["at_edge"] > 5000


def test_t2_without_overlap_in_space(child):
    t1 = nib.Nifti1Image(child["prepared"][0], ISEG_AFFINE)
    away = ISEG_AFFINE.copy()
    away[:3, 3] = 900
    noise = np.random.default_rng(0).integers(1, 300, (90, 90, 90)).astype(np.int16)
    message = refusal(read_subject, {"image": [t1, nib.Nifti1Image(noise, away)]})
    assert message.startswith("T2: couldn't be registered to T1; check that both show the same head")


def test_runs_of_a_session_are_averaged(child, tmp_path):
    """Two noisy runs of T1, in the second of which the child has moved: less noise, so better labels."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    box = tuple(slice(places.min() - 4, places.max() + 5) for places in np.nonzero(child["label"]))
    label, (t1, t2) = child["label"][box], (scan[box] for scan in child["prepared"])

    def noisy(scan: np.ndarray) -> np.ndarray:
        values = scan + rng.normal(0, 1.5 * scan[label == Tissue.GM].std(), scan.shape)
        return np.where(scan > 0, values.clip(1), 0).astype(np.int16)

    save_bids(data, "sub-1_run-1", {"T1": noisy(t1), "T2": t2})
    save_bids(data, "sub-1_run-2", {"T1": np.roll(noisy(t1), 3, axis=1), "T2": t2})
    (data / "sub-1/anat/sub-1_run-2_T2w.nii.gz").unlink()
    noise = {}
    for runs in ("apart", "average"):
        (subject,) = SubjectFolder(str(data), "any", runs).to_segment("sub-1_run-1")
        loaded = read_subject(subject)["t1"][0].numpy()
        noise[runs] = (loaded - t1)[label == Tissue.GM].std()
    assert noise["average"] < 0.8 * noise["apart"]
    (data / "sub-1/anat/sub-1_run-2_T1w.nii.gz").unlink()
    save_bids(data, "sub-1_run-2", {"T1": noisy(t1)[::-1, ::-1], "T2": t2})
    (subject,) = SubjectFolder(str(data), "T1", "average").to_segment()
    assert "sub-1_run-2_T1w.nii.gz: " in refusal(read_subject, subject)


def test_raw_phantoms(tmp_path):
    phantom(str(tmp_path), subjects=1, unlabeled=0, seed=1, raw=True)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in before} == {f"subject-1-{kind}.nii.gz" for kind in ("T1", "T2", "label")}
    t1, t2, label = (nib.load(tmp_path / f"subject-1-{kind}.nii.gz") for kind in ("T1", "T2", "label"))
    assert t1.shape == t2.shape == label.shape
    assert may_show_a_head(t1.get_fdata(), t1.affine)
    assert set(np.unique(label.dataobj)) == {0, 1, 2, 3}
    phantom(str(tmp_path), subjects=1, unlabeled=0, seed=1, raw=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert refusal(phantom, str(tmp_path), raw="yes") == "--raw yes: must be True or False"
    message = refusal(phantom, str(tmp_path), subjects=1, seed=2, raw=True)
    assert "already exists and isn't phantom version" in message
