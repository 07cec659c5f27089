"""What the rest of the tests look at on a processor, on a GPU: skipped where there is none."""

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import configured
from ignite.engine import Events

from scripts.commands.robustness import phantom_scan
from scripts.errors import InputError
from scripts.inference.precision import MixedPrecisionInferer
from scripts.inference.windows import BYTES_PER_VOXEL, LargestWindowInferer
from scripts.network import SkipDenseSeg
from scripts.results.metrics import tissue_dice
from scripts.results.tables import read_csv
from scripts.segment import Segmenter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
QUICK = {"val_interval": 1, "batch_size": 2, "patch_size": [32, 32, 32], "crops_per_epoch": 40, "synthetic_share": 0.25}


def train(dataset, output, **settings):
    """Train on the GPU; returns the loss of each step and the trainer."""
    workflow = configured(dataset, output, "train.json", ckpt_dir=str(output), **QUICK | settings)
    losses = []
    trainer = workflow.trainer
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output[0]["loss"]))
    )
    workflow.run()
    return losses, trainer


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
def test_trains_scores_and_segments(dataset, tmp_path, precision):
    losses, trainer = train(dataset, tmp_path, epochs=3, precision=precision)
    assert trainer.state.device.type == "cuda"
    assert len(losses) == 60
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert next(iter(torch.load(tmp_path / "model.pt", weights_only=True).values())).device.type == "cpu"

    own = {"ckpt_dir": str(tmp_path), "precision": precision}
    configured(dataset, tmp_path / "scores", "train.json", "evaluate.json", **own).run()
    assert len(read_csv(tmp_path / "scores" / "metrics.csv")) == 1
    configured(dataset, tmp_path / "labels", "inference.json", subjects=[11], **own).run()
    on_gpu = np.asarray(nib.load(tmp_path / "labels" / "subject-11-label.nii.gz").dataobj)
    configured(dataset, tmp_path / "cpu", "inference.json", subjects=[11], device="cpu", precision="fp32",
               ckpt_dir=str(tmp_path)).run()  # fmt: skip
    on_cpu = np.asarray(nib.load(tmp_path / "cpu" / "subject-11-label.nii.gz").dataobj)
    assert np.mean((on_gpu == on_cpu)[on_cpu > 0]) > 0.98  # of a network that has learnt for a second


def test_goes_on_after_a_stop(dataset, tmp_path):
    """With the learning rate, the optimiser and the patches of a training that wasn't stopped."""
    whole, _ = train(dataset, tmp_path / "whole", epochs=4)
    workflow = configured(
        dataset, tmp_path / "parts", "train.json", ckpt_dir=str(tmp_path / "parts"), **QUICK, epochs=4
    )
    workflow.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda engine: engine.terminate())
    workflow.run()
    rest, trainer = train(dataset, tmp_path / "parts", epochs=4, resume=True)
    assert trainer.state.iteration == 80
    np.testing.assert_allclose(np.mean(rest[-20:]), np.mean(whole[-20:]), rtol=0.15)


@pytest.fixture(scope="module")
def phantom():
    return phantom_scan(np.random.default_rng([3, 1]))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_included_label_as_in_float32_on_the_processor(phantom, precision):
    truth = np.asarray(phantom["label"].dataobj)
    plain = Segmenter(device="cpu", precision="fp32")(phantom["T1"], phantom["T2"])
    ours = Segmenter(precision=precision)(phantom["T1"], phantom["T2"])
    assert np.mean((plain.label == ours.label)[plain.label > 0]) >= 0.999
    assert tissue_dice(ours.label, truth)["mean"] == pytest.approx(tissue_dice(plain.label, truth)["mean"], abs=0.002)


@pytest.mark.parametrize(
    "settings", [{"flips": True}, {"window_size": [64, 64, 64]}, {"uncertainty": "flips"}], ids=str
)
def test_other_ways_label_as_on_the_processor(phantom, settings):
    plain, ours = (Segmenter(device=device, **settings)(phantom["T1"], phantom["T2"]) for device in ("cpu", "cuda"))
    assert np.mean((plain.label == ours.label)[plain.label > 0]) >= 0.998
    if "uncertainty" in settings:
        assert np.corrcoef(plain.uncertainty.ravel(), ours.uncertainty.ravel())[0, 1] > 0.99


def test_dropout_leaves_random_numbers_of_the_gpu_alone(phantom):
    segmenter = Segmenter(uncertainty="dropout", dropout_samples=2)
    torch.manual_seed(5)
    before = torch.cuda.get_rng_state()
    first, second = (segmenter(phantom["T1"], phantom["T2"]).uncertainty for _ in range(2))
    assert torch.equal(before, torch.cuda.get_rng_state())
    np.testing.assert_allclose(first, second, atol=0.01)


def test_out_of_memory_is_told(phantom):
    segmenter = Segmenter(window_size=[128, 144, 128])
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6e9 / total)
    try:
        with pytest.raises(InputError, match=r"memory ran out: a window of .* voxels needs up to .* GB"):
            segmenter(phantom["T1"], phantom["T2"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_of_the_estimate_suffices():
    """One pass over 192^3 voxels needs no more than what `auto` counts on."""
    network = SkipDenseSeg().cuda().eval()
    image = torch.randn(1, 2, 192, 192, 192, device="cuda")
    for precision, share in (("fp32", 1.0), ("bf16", 0.5)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            MixedPrecisionInferer(LargestWindowInferer(), precision)(image, network)
        needed = torch.cuda.max_memory_reserved() - before
        assert needed < share * BYTES_PER_VOXEL * 192**3, f"{precision}: {needed / 192**3:.0f} bytes a voxel"
