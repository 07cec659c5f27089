"""The subjects that `python -m scripts phantom` makes are as iSeg has them, and as hard to segment."""

import resource

import nibabel as nib
import numpy as np
import pytest
from processes import flags, succeeds

from scripts.commands.phantom import phantom
from scripts.errors import InputError
from scripts.synthesis.contrast import histogram_overlap, nominal, six_month_subject
from scripts.synthesis.phantom_brains import label_map
from scripts.tissues import Tissue

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two labelled subjects and one without label, of the command's own making."""
    directory = tmp_path_factory.mktemp("phantom")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    settings = flags(output_dir=directory, subjects=2, unlabeled=1, seed=5)
    result = succeeds("phantom", *settings, module="scripts", fresh=True)
    assert str(directory) in result.stdout
    # of the processor, so that it counts on a busy machine too
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 3 * 15
    return directory


def volume(folder, subject: int, kind: str) -> np.ndarray:
    return np.asarray(nib.load(folder / f"subject-{subject}-{kind}.hdr").dataobj)[..., 0]


def test_files_are_those_of_iseg(folder):
    names = {
        f"subject-{n}-{kind}.{suffix}" for n in (1, 2) for kind in ("T1", "T2", "label") for suffix in ("hdr", "img")
    }
    names |= {f"subject-3-{kind}.{suffix}" for kind in ("T1", "T2") for suffix in ("hdr", "img")}
    assert {path.name for path in folder.iterdir()} == names
    for kind, dtype in (("T1", np.int16), ("T2", np.int16), ("label", np.uint8)):
        image = nib.load(folder / f"subject-1-{kind}.hdr")
        assert type(image) is nib.Spm2AnalyzeImage
        assert (folder / f"subject-1-{kind}.hdr").stat().st_size == 348
        assert image.shape == (144, 192, 256, 1)
        assert image.get_data_dtype() == dtype
        assert image.header.get_zooms() == (1, 1, 1, 1)
        np.testing.assert_array_equal(image.affine, np.diag([-1, 1, 1, 1]))


@pytest.mark.parametrize("subject", [1, 2])
def test_as_hard_as_a_scan_at_six_months(folder, subject):
    t1, t2, label = (volume(folder, subject, kind) for kind in ("T1", "T2", "label"))
    assert set(np.unique(label)) == {0, 10, 150, 250}
    assert np.array_equal(t1 > 0, label > 0)
    assert min(t1.min(), t2.min()) >= 0
    assert max(t1.max(), t2.max()) <= 1000
    csf, gm, wm = (label == value for value in (10, 150, 250))
    assert histogram_overlap(t1[gm], t1[wm]) == pytest.approx(0.70, abs=0.08)
    assert histogram_overlap(t2[gm], t2[wm]) == pytest.approx(0.87, abs=0.06)
    assert histogram_overlap(t1[csf], t1[gm]) == pytest.approx(0.36, abs=0.10)
    assert histogram_overlap(t2[csf], t2[gm]) == pytest.approx(0.36, abs=0.10)
    brain = np.count_nonzero(label)
    assert 100 * csf.sum() / brain == pytest.approx(22, abs=6)
    assert 100 * gm.sum() / brain == pytest.approx(47, abs=7)
    assert 100 * wm.sum() / brain == pytest.approx(31, abs=7)
    assert 700e3 <= brain <= 900e3


def test_ventricles_deep_grey_and_folds_are_there(folder):
    label = volume(folder, 1, "label")
    box = tuple(slice(v.min(), v.max() + 1) for v in np.nonzero(label))
    inner = label[box]
    deep = inner[tuple(slice(int(0.42 * n), int(0.65 * n)) for n in inner.shape)]
    assert {10, 150, 250} <= set(np.unique(deep))
    # cortex is a ribbon: far more of it borders on white matter or CSF than of a smooth shell of that volume
    gm = label == 150
    border = sum(np.count_nonzero(gm & np.roll(label != 150, shift, axis)) for axis in range(3) for shift in (-1, 1))
    assert border / gm.sum() > 0.8


def test_same_seed_same_subject_and_other_subject_other_brain(folder, tmp_path):
    phantom(str(tmp_path), subjects=1, unlabeled=0, seed=5)
    for kind in ("T1", "T2", "label"):
        assert np.array_equal(volume(tmp_path, 1, kind), volume(folder, 1, kind))
    first, second = (volume(folder, n, "label") for n in (1, 2))
    assert np.mean(first != second) > 0.02


def test_what_is_there_is_kept(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    phantom(str(folder), subjects=2, unlabeled=1, seed=5)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_subjects_of_somebody_else_are_neither_kept_nor_overwritten(folder, tmp_path):
    with pytest.raises(InputError, match=r"subject-1-T1.hdr: .*choose another --output_dir"):
        phantom(str(folder), subjects=1, unlabeled=0, seed=6)
    with pytest.raises(InputError, match=r"subject-2-label.hdr: subject 2 must have no label"):
        phantom(str(folder), subjects=1, unlabeled=1, seed=5)
    (tmp_path / "subject-1-T1.hdr").write_bytes(b"precious")
    with pytest.raises(InputError, match=f"{tmp_path}/subject-1-T1.hdr: "):
        phantom(str(tmp_path), subjects=1)
    assert (tmp_path / "subject-1-T1.hdr").read_bytes() == b"precious"


def test_nominal_subject_overlaps_as_scans_do_at_six_months():
    label = label_map(np.random.default_rng(4))[::-1, :, 60:-60]
    rng = np.random.default_rng(0)
    images = six_month_subject(label, nominal(label, rng), rng)
    for image, overlap in zip(images.values(), (0.70, 0.87), strict=True):
        csf, gm, wm = (image[label == tissue] for tissue in Tissue)
        assert histogram_overlap(gm, wm) == pytest.approx(overlap, abs=0.03)
        assert histogram_overlap(csf, gm) == pytest.approx(0.36, abs=0.03)
        assert np.array_equal(image > 0, label > 0)
        assert image.dtype == np.int16
