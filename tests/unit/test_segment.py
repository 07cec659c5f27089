import logging
import random
import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT, configured, save_subject

from scripts.errors import InputError
from scripts.results.label_images import write_analyze
from scripts.results.tables import read_csv
from scripts.segment import Segmentation, Segmenter, segment
from scripts.tissues import Tissue

LAS = np.diag([-1.0, 1.0, 1.0, 1.0])


def same(first: Segmentation, second: Segmentation) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("label", "probabilities"))


@pytest.fixture(scope="module")
def arrays(brains) -> list[np.ndarray]:
    """T1 and T2 of a part of a brain with an edge: 32 x 40 x 32 voxels."""
    return [brains[1][kind][14:46, :40, 16:48] for kind in ("T1", "T2")]


@pytest.fixture(scope="module")
def paths(tmp_path_factory, arrays) -> list[Path]:
    directory = tmp_path_factory.mktemp("small")
    save_subject(directory, "11", dict(zip(("T1", "T2"), arrays, strict=True)), labeled=False)
    return [directory / f"subject-11-{kind}.hdr" for kind in ("T1", "T2")]


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter()


@pytest.fixture(scope="module")
def segmented(segmenter, paths) -> Segmentation:
    return segmenter(*paths)


def test_label_and_volumes_are_those_of_the_command(paths, segmented, tmp_path):
    configured(paths[0].parent, tmp_path).run()
    written = np.asarray(nib.load(tmp_path / "subject-11-label.nii.gz").dataobj)[..., 0]
    assert segmented.label.dtype == np.uint8
    np.testing.assert_array_equal(segmented.label, written)
    (row,) = read_csv(tmp_path / "volumes.csv")
    assert row.pop("subject") == "11"
    assert {name: float(value) for name, value in row.items()} == segmented.volumes


def test_probabilities_sum_to_one_and_their_highest_is_the_label(segmented, arrays):
    assert segmented.probabilities.shape == (1 + len(Tissue), *segmented.label.shape)
    assert segmented.probabilities.dtype == np.float32
    np.testing.assert_allclose(segmented.probabilities.sum(0), 1, atol=1e-6)
    np.testing.assert_array_equal(segmented.probabilities.argmax(0), segmented.label)
    assert (segmented.probabilities[0, arrays[0] == 0] == 1).all()
    np.testing.assert_array_equal(segmented.affine, LAS)
    assert segmented.uncertainty is None


def test_files_images_and_arrays_give_the_same(segmenter, segmented, paths, arrays):
    images = [nib.load(path) for path in paths]
    in_memory = [nib.Nifti1Image(values, LAS) for values in arrays]
    for given in (map(str, paths), images, in_memory, (paths[0], in_memory[1])):
        assert same(segmenter(*given), segmented)
    assert same(segmenter(*arrays, affine=LAS), segmented)
    assert same(segmenter(*map(torch.from_numpy, arrays), LAS.tolist()), segmented)


def test_arrays_on_another_grid_come_back_on_it(segmenter, segmented, arrays):
    """Axes turned: the same labels; voxels of half the size along one axis: nearly."""
    size = arrays[0].shape[0]
    turned_affine = np.array([[0, 0, 1, 1 - size], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    turned = segmenter(*(values[::-1].transpose(2, 1, 0) for values in arrays), affine=turned_affine)
    np.testing.assert_array_equal(turned.label.transpose(2, 1, 0)[::-1], segmented.label)
    np.testing.assert_array_equal(turned.affine, turned_affine)
    assert turned.volumes == segmented.volumes

    finer = segmenter(*(np.repeat(values, 2, axis=2) for values in arrays), affine=np.diag([-1, 1, 0.5, 1]))
    assert finer.label.shape == (*segmented.label.shape[:2], 2 * segmented.label.shape[2])
    np.testing.assert_allclose(finer.probabilities.sum(0), 1, atol=1e-6)
    np.testing.assert_array_equal(finer.probabilities.argmax(0), finer.label)
    brain = segmented.label > 0
    sure = brain & (segmented.probabilities.max(0) > 0.9)

    def agreement(where: np.ndarray, shift: int = 0, axis: int = 0) -> float:
        return (np.roll(finer.label[..., ::2], shift, axis) == segmented.label)[where].mean()

    assert sure.sum() > brain.sum() / 3
    assert agreement(sure) > 0.95
    # and nowhere else do the two agree as well
    shifted = [agreement(brain, shift, axis) for shift in (-1, 1) for axis in range(3)]
    assert agreement(brain) > max(shifted) + 0.05
    assert finer.volumes["brain_ml"] == pytest.approx(segmented.volumes["brain_ml"], rel=0.05)


def test_settings_are_those_of_the_config(segmented, paths, tmp_path):
    flipped = segment(*paths, flips=True)
    assert 0 < (flipped.label != segmented.label).mean() < 0.1
    shutil.copy(ROOT / "models" / "model.pt", tmp_path)
    assert same(segment(*paths, ckpt_dir=str(tmp_path), device="cpu"), segmented)
    assert segment(*paths, uncertainty="network").uncertainty.shape == segmented.label.shape


def test_the_process_is_left_as_it_was(paths, capfd, caplog, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hook, handlers, level = sys.excepthook, list(logging.getLogger().handlers), logging.getLogger().level
    random.seed(1), torch.manual_seed(1)
    expected = random.random(), torch.rand(1)
    random.seed(1), torch.manual_seed(1)
    with caplog.at_level(logging.INFO):
        segment(*paths, uncertainty="dropout", dropout_samples=2)
    assert (random.random(), torch.rand(1)) == expected
    assert (sys.excepthook, logging.getLogger().handlers, logging.getLogger().level) == (hook, handlers, level)
    assert capfd.readouterr() == ("", "")
    assert any("one pass over" in message for message in caplog.messages)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "x.pt"}, "checkpoint: no such setting; did you mean checkpoints?"),
        ({"output_dir": "x"}, "output_dir: is a setting of the command"),
        ({"dataset#data": []}, "dataset#data: is a setting of the command"),
        ({"flips": "yes"}, "--flips yes: must be True or False"),
        ({"uncertainty": "some"}, "--uncertainty some: must be None, network, flips, dropout"),
        ({"ckpt_dir": "nowhere"}, "nowhere/model.pt: no such checkpoint"),
        ({"precision": "half"}, "--precision half: must be auto"),
        ({"device": "gpu"}, "--device gpu: can't be used "),
        ({"device": "cuda:99"}, "--device cuda:99: can't be used "),
        ({"foreground_margin": 2.5}, "--foreground_margin 2.5: must be a whole number"),
        ({"foreground_margin": -1}, "--foreground_margin -1: must be a whole number"),
        ({"foreground_margin": "auto"}, "--foreground_margin auto: must be a whole number"),
        ({"checkpoints": 5}, "5: isn't text, so it can't be a path; write ./5"),
        ({"ckpt_dir": 5}, "5: isn't text, so it can't be a path; write ./5"),
    ],
)
def test_settings_that_can_not_be(settings, message, paths):
    with pytest.raises(InputError, match=re.escape(message)):
        segment(*paths, **settings)


ONES = np.ones((5, 6, 7))
IMAGE = nib.Nifti1Image(ONES, LAS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("nowhere-T1.nii", "nowhere-T2.nii"), "nowhere-T1.nii: can't be read"),
        ((ONES, ONES), "T1: is an array, which has no grid; give the 4 x 4 affine"),
        ((ONES, ONES, np.eye(3)), "affine: must be an invertible 4 x 4 matrix"),
        ((ONES, ONES, np.zeros((4, 4))), "affine: must be an invertible 4 x 4 matrix"),
        ((IMAGE, IMAGE, LAS), "affine: is for arrays, and the T1 is a file or an image"),
        ((np.pad(ONES, 1), ONES, LAS), "T2: shape (5, 6, 7) differs from (7, 8, 9) of T1"),
        (
            [nib.Nifti1Image(np.pad(ONES, 1).astype(np.float32), affine) for affine in (LAS, np.eye(4))],
            "T2: its affine differs from that of T1",
        ),
        ((ONES * np.nan, ONES, LAS), "T1: has NaN or infinite values"),
        ((ONES[0], ONES[0], LAS), "T1: shape (6, 7) isn't a 3-D volume"),
        ((ONES * 0, ONES, LAS), "T1: T1 is nowhere above 0"),
        ((ONES, ONES, LAS), "T1: T1 is above 0 everywhere, so the brain can't be told from its background"),
        ((np.pad(ONES, 1),) * 2 + (LAS,), "T1: the T1 of this subject is constant inside the brain"),
        ((["a", "b"], ONES, LAS), "T1: isn't a path, an image or an array of numbers"),
        (("train_iseg_nocut_9.h5", "train_iseg_nocut_9.h5"), "train_iseg_nocut_9.h5: lacks the scan and its grid"),
        ((nib.Spm2AnalyzeImage(ONES.astype(np.float32), None),) * 2, "T1: the image has no affine"),
    ],
)
def test_volumes_that_can_not_be_used(segmenter, given, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        segmenter(*given)


def test_analyze_pair_named_by_its_image(paths, tmp_path):
    t1, t2 = (nib.load(path) for path in paths)
    for name, image in (("t1", t1), ("t2", t2)):
        values = np.asarray(image.dataobj)
        write_analyze(tmp_path / f"{name}.hdr", values.reshape(values.shape[:3]))
    by_header, by_image = (
        segment(*(tmp_path / f"{name}.{suffix}" for name in ("t1", "t2"))) for suffix in ("hdr", "img")
    )
    np.testing.assert_array_equal(by_image.label, by_header.label)
