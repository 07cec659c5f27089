"""The measurements of `python -m scripts bench`, on small volumes."""

import json

import pytest
import torch
from helpers import save_subject

from scripts.commands import bench
from scripts.errors import InputError
from scripts.inference.precision import network_precision

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory, brains) -> dict:
    """A whole run with patches of 32 voxels on small subjects, of which one is segmented end to end."""
    output = tmp_path_factory.mktemp("bench")

    def small_subjects(output_dir, subjects, unlabeled, seed):
        for number in range(subjects + unlabeled):
            save_subject(output / "subjects", str(number + 1), brains[number], labeled=number < subjects)
        assert output_dir == str(output / "subjects")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "PATCH", 32)
        patch.setattr(bench, "CUBES", (32, 48))
        patch.setattr(bench, "FEED_STEPS", 4)
        patch.setattr(bench, "phantom", small_subjects)
        bench.bench(str(output), rounds=1, subjects=1, precision="fp32")
    assert "### training step" in (output / "bench.md").read_text()
    return json.loads((output / "bench.json").read_text())


def test_training_steps_of_both_variants_and_the_other_networks(results):
    rows = {(row["network"], row["batch"]): row for row in results["training step, patch of 32^3"]}
    for batch in (1, 4):
        for variant in ("SkipDenseSeg compact", "SkipDenseSeg paper"):
            ours, plain = rows[variant, batch], rows[f"{variant}, plain eager float32", batch]
            assert ours["times as fast as plain"] == pytest.approx(plain["seconds"] / ours["seconds"])
            assert 0 < ours["share of the ceiling"] < 1.5
        assert {(name, batch) for name in ("DynUNet", "SegResNet", "UNet")} < set(rows)


def test_one_subject_by_each_way(results):
    published, common, foreground, ours, *others = results["one subject, network only"]
    # 60 x 72 x 64 voxels, padded to 64 x 80 x 64: (32 / 8 + 1) * (48 / 8 + 1) * (32 / 8 + 1)
    assert "175 windows at stride 8" in published["way"]
    assert published["seconds"] / ours["seconds"] == pytest.approx(ours["times as fast as published"])
    assert common["labels as the first"] == 1.0
    for row in (foreground, ours):
        assert 0.85 < row["labels as the first"] <= 1
        assert row["Dice"] == pytest.approx(common["Dice"], abs=0.05)
    in_one_pass, in_windows = others[::2], others[1::2]
    for name, once, often in zip(("DynUNet", "SegResNet", "UNet"), in_one_pass, in_windows, strict=True):
        assert once["way"].startswith(name)
        assert often["way"].startswith(name)
        assert often["way"].endswith("in 32^3 windows, overlap 0.25")
    assert sum(row["seconds"] for row in in_windows) > sum(row["seconds"] for row in in_one_pass)


def test_own_subject_by_the_published_way_in_full(tmp_path, brains, monkeypatch):
    monkeypatch.setattr(bench, "PATCH", 32)
    save_subject(tmp_path, "7", brains[0], labeled=True)
    subject = bench.labeled_subject(str(tmp_path))
    published, common, _, ours, *_ = bench.one_subject(CPU, "fp32", 1, 1.0, subject, published_in_full=True)
    assert published["way"] == "the published way: 175 windows at stride 8, float32"
    assert published["times as fast as published"] == published["labels as the first"] == 1.0
    assert published["seconds"] > common["seconds"] > ours["seconds"]
    for row in (common, ours):
        assert 0.85 < row["labels as the first"] < 1
        assert row["Dice"] == pytest.approx(published["Dice"], abs=0.05)


def test_memory_grows_with_the_volume(results):
    small, large = results["growth with volume"]
    assert (small["volume"], large["volume"]) == ("32^3", "48^3")
    assert small["peak GB"] is None or 0 < small["peak GB"] < large["peak GB"] < 1


def test_feed_and_end_to_end(results):
    (feed,) = results["training feed, batch 4"]
    assert feed["steps per second, feed alone"] > 1
    (folder,) = results["a folder of subjects, end to end"]
    assert folder["subjects"] == 1
    assert folder["start-up, s"] + folder["seconds per subject"] < folder["seconds"] + 1
    assert "network" in folder["of which"]


def test_why_segmenting_a_folder_failed_is_told(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: segmenting ended with status 1: error: .*no such folder"):
        bench.end_to_end(tmp_path / "nowhere", tmp_path / "out", "fp32")


def test_ceiling_is_of_the_type_that_is_used():
    assert bench.convolution_ceiling(CPU, network_precision(CPU, "auto")) > 1
