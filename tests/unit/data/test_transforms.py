import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_subject, save_subject, save_volume
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor
from monai.transforms import AsDiscreted, Spacingd
from scipy.ndimage import gaussian_filter

from scripts.data.subjects import SubjectFolder
from scripts.data.transforms import MostLikelyTissued, NormalizeByT1Maskd
from scripts.errors import InputError
from scripts.tissues import tissue_labels

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 900, (5, 6, 7)).astype(np.int16)
VALUES[0, 0, 0] = 0  # background


def subject_of(directory, **volumes) -> dict:
    for kind, values in volumes.items():
        save_volume(directory / f"subject-1-{kind}.nii.gz", values)
    return SubjectFolder(str(directory)).require_good()[0]


def test_label_values():
    iseg = np.array([0, 10, 150, 250, 10])
    np.testing.assert_array_equal(tissue_labels(iseg, "x"), [0, 1, 2, 3, 1])
    np.testing.assert_array_equal(tissue_labels(np.array([3, 0, 1]), "x"), [3, 0, 1])
    for values, unknown in (([0, 10, 7], "7"), ([0.5], "0.5"), ([-1, 2], "-1"), ([4], "4")):
        with pytest.raises(InputError, match=f"x: label value {unknown} isn't known"):
            tissue_labels(np.array(values), "x")
    with pytest.raises(InputError, match="x: mixes iSeg's label values with 1, 2, 3"):
        tissue_labels(np.array([0, 1, 10]), "x")


@pytest.mark.parametrize("values", [(0, 1, 2, 3), (0, 10, 150, 250)])
def test_labels_that_are_off_by_rounding(values):
    exact = np.array(values)
    for dtype, off in ((np.float32, 1e-6), (np.float64, -9e-4), (np.float32, 5e-4)):
        np.testing.assert_array_equal(tissue_labels((exact + off).astype(dtype), "x"), [0, 1, 2, 3])
    with pytest.raises(InputError, match=r"x: label value 3.002 isn't known|x: label value 250.002 isn't known"):
        tissue_labels(exact + 0.002 * (exact == exact.max()), "x")


def test_exchanged_scans_and_labels_of_another_order_are_reported(brains, tmp_path, caplog):
    brain = brains[0]
    usual = {kind: brain[kind] for kind in ("T1", "T2", "label")}
    cases = {
        "as they should be": (usual, None),
        "exchanged": (usual | {"T1": brain["T2"], "T2": brain["T1"]}, "intensities of T1 look like those of a T2"),
        "exchanged, scaled, no label": ({"T1": 3 * brain["T2"], "T2": brain["T1"] // 2}, "swap the files if they"),
        "GM, WM, CSF": (
            usual | {"label": np.array([0, 3, 1, 2], np.uint8)[brain["label"]]},
            r"darkest in T1 \(WM is\)",
        ),
        "CSF last, iSeg's values": (
            usual | {"label": np.array([0, 250, 150, 10], np.uint8)[brain["label"]]},
            r"brightest in T2 \(WM is\); check that its values are 1 CSF, 2 GM, 3 WM",
        ),
    }
    for number, (volumes, expected) in enumerate(cases.values()):
        caplog.clear()
        read_subject(subject_of(tmp_path / str(number), **volumes))
        assert bool(caplog.messages) == bool(expected), caplog.messages
        if expected:
            assert re.search(expected, caplog.messages[0]), caplog.messages
            assert len(caplog.messages) == 1
            assert caplog.messages[0].startswith(str(tmp_path / str(number) / "subject-1-"))


@pytest.mark.parametrize(("kind", "count", "value"), [("T1", 20, 32767), ("T2", 30, 9000), ("T2", 10, -8000)])
def test_extreme_voxels_are_reported(brains, tmp_path, caplog, kind, count, value):
    brain = {kind: brains[1][kind].astype(np.int16) for kind in ("T1", "T2")}
    inside = np.argwhere(brain["T1"] > 0)
    chosen = inside[np.random.default_rng(0).choice(len(inside), count, replace=False)]
    brain[kind][tuple(chosen.T)] = value
    read_subject(subject_of(tmp_path, **brain))
    assert any(
        re.search(rf"most extreme voxels of {kind}, .*{value}.*, distort its normalisation", message)
        for message in caplog.messages
    )


@pytest.mark.parametrize("rest", [1e-10, -1e-10, 3e-5])
def test_residue_of_interpolation_in_the_air_is_air(brains, tmp_path, rest):
    brain = {kind: brains[0][kind].astype(np.float32) for kind in ("T1", "T2")}
    clean = read_subject(subject_of(tmp_path / "clean", **brain))
    rng = np.random.default_rng(0)
    air = {kind: np.where(values == 0, rest * rng.random(values.shape), values) for kind, values in brain.items()}
    loaded = read_subject(subject_of(tmp_path / "air", **{kind: x.astype(np.float32) for kind, x in air.items()}))
    np.testing.assert_array_equal(loaded["t1"], clean["t1"])
    np.testing.assert_allclose(loaded["t2"], clean["t2"], atol=1e-4)


def test_interpolated_mask_counts_from_one_half(brains, tmp_path):
    brain = {kind: brains[0][kind] for kind in ("T1", "T2")}
    inside = gaussian_filter((brain["T1"] > 0).astype(np.float32), 1.0)
    for name, mask, expected in (
        ("soft", inside, inside >= inside.max() / 2),
        ("percent", 100 * inside, inside >= inside.max() / 2),
        ("parts and rounding", 1.000001 * np.where(inside > 0.8, 3, inside > 0.2), inside > 0.2),
        ("parts", np.where(inside > 0.8, 3, inside > 0.2).astype(np.uint8), inside > 0.2),
    ):
        data = subject_of(tmp_path / name, **brain, label=brains[0]["label"])
        save_volume(tmp_path / name / "mask.nii.gz", mask)
        loaded = read_subject(data | {"mask": str(tmp_path / name / "mask.nii.gz")})
        np.testing.assert_array_equal(loaded["t1"][0] > 0, expected & (brain["T1"] > 0))


def test_loaded_subject(tmp_path):
    label = np.array([0, 10, 150, 250], np.uint8)[RNG.integers(0, 4, VALUES.shape)]
    loaded = read_subject(subject_of(tmp_path, T1=VALUES, T2=VALUES + 7, label=label))
    np.testing.assert_array_equal(loaded["image"], np.stack([VALUES, VALUES + 7]))
    np.testing.assert_array_equal(loaded["t1"], VALUES[None])
    np.testing.assert_array_equal(loaded["t2"], VALUES[None] + 7)
    assert Path(loaded["t2"].meta["filename_or_obj"]).name.startswith("subject-1-T2")
    np.testing.assert_array_equal(loaded["label"], np.searchsorted([0, 10, 150, 250], label)[None])
    assert loaded["subject"] == "1"
    assert loaded["image"].affine.diag().tolist() == [-1, 1, 1, 1]


AFFINE = np.array([[0, 0, 1.5, -3], [-1.2, 0, 0, 5], [0, 2.0, 0, 7], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("axes", [(), (1,)])
def test_one_file_of_t1_and_t2(tmp_path, axes):
    values = np.stack([VALUES, VALUES + 7], axis=-1).reshape(*VALUES.shape, *axes, 2)
    save_volume(tmp_path / "both.nii.gz", values, AFFINE)
    for kind, volume in (("T1", VALUES), ("T2", VALUES + 7)):
        save_volume(tmp_path / f"subject-1-{kind}.nii.gz", volume, AFFINE)
    loaded = read_subject({"image": str(tmp_path / "both.nii.gz")})
    pair = read_subject(SubjectFolder(str(tmp_path)).require_good()[0])
    for key in ("image", "t1", "t2"):
        np.testing.assert_array_equal(loaded[key], pair[key])
        np.testing.assert_array_equal(loaded[key].affine, pair[key].affine)
        # files aren't, and then all that selects voxels is slow
        assert loaded[key].is_contiguous()
        assert pair[key].is_contiguous()
    assert loaded["t1"].meta["filename_or_obj"] == str(tmp_path / "both.nii.gz")


@pytest.mark.parametrize("count", [3, 4])
def test_file_of_more_than_two_volumes(tmp_path, count):
    save_volume(tmp_path / "more.nii.gz", np.stack([VALUES] * count, axis=-1))
    with pytest.raises(InputError, match=f"more.nii.gz: has {count} volumes, not two; give T1 and T2, in this order"):
        read_subject({"image": str(tmp_path / "more.nii.gz")})


def test_path_beside_the_image_does_not_disturb_a_change_of_voxel_size(tmp_path):
    """MONAI Label puts `image_path` there."""
    save_volume(tmp_path / "both.nii.gz", np.stack([VALUES, VALUES[::-1]], axis=-1))
    loaded = read_subject({"image": str(tmp_path / "both.nii.gz"), "image_path": "both.nii.gz"})
    assert Spacingd("image", pixdim=[2, 2, 2])(loaded)["image_path"] == "both.nii.gz"


def test_published_normalisation(tmp_path):
    t1 = np.where(RNG.random(VALUES.shape) > 0.4, VALUES, 0).astype(np.int16)
    t2 = VALUES[::-1] * (t1 > 0)
    loaded = NormalizeByT1Maskd("image")(read_subject(subject_of(tmp_path, T1=t1, T2=t2)))
    for channel, values in zip(loaded["image"].numpy(), (t1, t2), strict=True):
        brain = values[t1 > 0].astype(np.float64)
        np.testing.assert_allclose(channel, (values - brain.mean()) / brain.std(), atol=1e-5)


def clipped(kind: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """T1 and T2 of a small brain, and what is 0 in T1 though it is brain, or not."""
    t1 = np.zeros((12, 13, 14), np.int16)
    t1[2:10, 2:11, 2:12] = RNG.integers(100, 900, (8, 9, 10))
    hole = np.zeros(t1.shape, bool)
    hole[{"within": np.s_[4:7, 5:7, 5:9], "one voxel": np.s_[5:6, 5:6, 5:6], "open": np.s_[5:6, 5:6, 5:]}[where]] = True
    t2 = np.where(t1 > 0, 1000 - t1, 0).astype(np.int16)
    if kind == "gap of the mask":
        t2[hole] = 0
    t1[hole] = 0
    return np.stack([t1, t2]), hole


@pytest.mark.parametrize("where", ["within", "one voxel", "open"])
@pytest.mark.parametrize("kind", ["CSF", "gap of the mask"])
def test_holes_of_t1_in_the_brain_count_as_brain(tmp_path, caplog, kind, where):
    (t1, t2), hole = clipped(kind, where)
    loaded = read_subject(subject_of(tmp_path, T1=t1, T2=t2))
    filled = kind == "CSF" and where != "open"
    np.testing.assert_array_equal(loaded["t1"][0], np.where(hole & filled, t1[t1 > 0].min(), t1))
    told = f"{hole.sum()} voxels inside the brain are 0 in T1; they count as brain"
    assert [told in message for message in caplog.messages] == [True] * filled


def test_holes_of_a_scan_alone_count_as_brain_and_those_of_its_mask_do_not(tmp_path):
    (t1, _), hole = clipped("CSF", "within")
    save_volume(tmp_path / "t1.nii.gz", t1)
    paths = {"subject": "1", "image": [str(tmp_path / "t1.nii.gz"), None]}
    assert (read_subject(paths)["t1"][0].numpy()[hole] > 0).all()
    save_volume(tmp_path / "mask.nii.gz", (~hole).astype(np.uint8))
    assert (read_subject(paths | {"mask": str(tmp_path / "mask.nii.gz")})["t1"][0].numpy()[hole] == 0).all()


def test_t2_of_a_head_beside_a_stripped_t1(tmp_path):
    t1 = VALUES.copy()
    t1[:3, :3] = 0
    head = VALUES[::-1].copy()
    loaded = read_subject(subject_of(tmp_path / "head", T1=t1, T2=head))
    np.testing.assert_array_equal(loaded["image"][1], head * (t1 > 0))
    normalised = np.where(t1 > 0, head, -3).astype(np.int16)
    loaded = read_subject(subject_of(tmp_path / "constant", T1=t1, T2=normalised))
    np.testing.assert_array_equal(loaded["image"][1], normalised)


@pytest.mark.filterwarnings("ignore:std_mean:UserWarning")
def test_constant_image_is_refused(tmp_path):
    with pytest.raises(InputError, match="the T2 of this subject is constant inside the brain"):
        read_subject(subject_of(tmp_path / "mask", T1=VALUES, T2=np.full_like(VALUES, 5)))
    loaded = read_subject(subject_of(tmp_path / "scan", T1=VALUES, T2=VALUES[::-1]))
    for channel, name in ((1, "T2"), (0, "T1")):  # T1 nowhere above 0, as after resampling a brain of a few voxels
        loaded["image"][channel] = 0
        with pytest.raises(InputError, match=f"the {name} of this subject is constant inside the brain"):
            NormalizeByT1Maskd("image")(loaded)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[dict]:
    """40 subjects whose T1 is all n and whose T2 is all 100 + n, but for the first voxel, and the last, which is 0."""
    directory = tmp_path_factory.mktemp("many")
    for n in range(1, 41):
        volume = np.full((12, 12, 12), n, np.int16)
        volume[0, 0, 0] += 1000
        volume[-1, -1, -1] = 0
        save_subject(directory, str(n), {"T1": volume, "T2": np.where(volume, volume + 100, 0)}, labeled=False)
    return SubjectFolder(str(directory)).require_good()


def assert_none_lost_or_swapped(items) -> None:
    seen = [(int(item["subject"]), item["image"].reshape(2, -1)) for item in items]
    assert len(seen) == 40
    for number, channels in seen:
        assert channels.shape == (2, 12**3)
        assert torch.equal(channels[:, 1:-1].unique(dim=1).flatten(), torch.tensor([number, number + 100.0]))


def test_t1_and_t2_under_many_threads(many):
    for _ in range(3):
        assert_none_lost_or_swapped(CacheDataset(many, read_subject, num_workers=16, progress=False))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes:UserWarning")
def test_t1_and_t2_under_many_processes(many):
    loader = DataLoader(Dataset(many, read_subject), batch_size=1, num_workers=8)
    batches = list(loader)
    assert_none_lost_or_swapped({"subject": b["subject"][0], "image": b["image"][0]} for b in batches)


def test_label_of_logits_is_that_of_monai():
    logits = MetaTensor(torch.randn(4, 8, 9, 10).round(decimals=1), affine=torch.diag(torch.tensor([2.0, 1, 1, 1])))
    assert (logits.sort(dim=0, descending=True).values.diff(dim=0)[0] == 0).any()  # some are equal
    found = MostLikelyTissued("pred")({"pred": logits})["pred"]
    expected = AsDiscreted("pred", argmax=True)({"pred": logits})["pred"]
    assert found.dtype == expected.dtype
    assert torch.equal(found.as_tensor(), expected.as_tensor())
    assert torch.equal(found.affine, expected.affine)
