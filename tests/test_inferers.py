import itertools
import logging
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.metrics import compute_dice
from monai.networks import one_hot

from scripts.errors import InputError
from scripts.inference import averaging as inferers
from scripts.inference.averaging import AveragingInferer
from scripts.inference.precision import MixedPrecisionInferer, folded, needs_loss_scaling, network_precision
from scripts.inference.windows import LargestWindowInferer, fitting_window
from scripts.machine import available_memory, left_by_groups
from scripts.network import SkipDenseSeg
from scripts.synthesis.contrast import T1_CONTRAST, T2_CONTRAST, nominal, six_month_image, six_month_subject
from scripts.synthesis.label_maps import read_label_map
from scripts.synthesis.phantom_brains import label_map
from scripts.weights import load_weights

LABEL_MAPS = ROOT.parent / "shared" / "data" / "anatomies"
# elsewhere bfloat16 is computed by slow emulation, which nobody is given unasked
BF16_IN_HARDWARE = pytest.mark.skipif(
    network_precision(torch.device("cpu"), "auto") != torch.bfloat16, reason="no bfloat16 in this processor"
)


class Spy:
    """A network that remembers what it was given and under which precision."""

    def __init__(self):
        self.shapes, self.dtypes = [], []

    def __call__(self, patch):
        self.shapes.append(tuple(patch.shape[2:]))
        self.dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        assert patch.is_contiguous(memory_format=torch.channels_last_3d)
        return patch.to(self.dtypes[-1])


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_of_the_network_and_float32_logits(precision, dtype):
    spy = Spy()
    logits = MixedPrecisionInferer(SimpleInferer(), precision)(torch.randn(1, 2, 8, 8, 8), spy)
    assert spy.dtypes == [dtype]
    assert logits.dtype == torch.float32


def test_automatic_precision_follows_the_processor(monkeypatch):
    for capable, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capable=capable: {"avx512_bf16": capable})
        spy = Spy()
        MixedPrecisionInferer(SimpleInferer())(torch.randn(1, 2, 8, 8, 8), spy)
        assert spy.dtypes == [dtype]


def test_automatic_precision_follows_the_gpu(monkeypatch):
    gpu = torch.device("cuda")
    for capable, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, capable=capable: capable)
        assert network_precision(gpu, "auto") == dtype
        assert network_precision(gpu, "auto", training=True) == torch.float16
    assert needs_loss_scaling("cuda", "auto")
    assert not needs_loss_scaling("cuda", "bf16")
    assert needs_loss_scaling(gpu, "fp16")
    assert not needs_loss_scaling("cpu", "auto")


@pytest.mark.parametrize("precision", ["fp16", "half", 16])
def test_precision_that_the_processor_does_not_do(precision):
    with pytest.raises(InputError, match=f"--precision {precision}: "):
        MixedPrecisionInferer(SimpleInferer(), precision)(torch.randn(1, 2, 8, 8, 8), Spy())


def test_float32_logits_are_those_of_the_bare_network(network):
    image = torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        logits = MixedPrecisionInferer(SimpleInferer(), "fp32")(image, network)
        torch.testing.assert_close(logits, network(image), rtol=1e-4, atol=1e-4)


@BF16_IN_HARDWARE
def test_bf16_gives_almost_the_same_labels(network):
    image = torch.randn(1, 2, 48, 48, 48)
    with torch.no_grad():
        labels = [
            MixedPrecisionInferer(SimpleInferer(), precision)(image, network).argmax(1)
            for precision in ("fp32", "bf16")
        ]
    # an untrained network on noise is full of near ties, more than a trained one ever sees
    assert (labels[0] == labels[1]).float().mean() > 0.95


def in_its_box(image, label):
    """Normalised image (1, 2, X, Y, Z) and label (X, Y, Z) of a brain's box, whose sides are multiples of 16."""
    brain = image[0] > 0
    mean, deviation = (
        statistic[:, None, None, None] for statistic in (image[:, brain].mean(1), image[:, brain].std(1))
    )
    start = [int(axis.min()) // 16 * 16 for axis in np.nonzero(label)]
    stop = [-(-int(axis.max() + 1) // 16) * 16 for axis in np.nonzero(label)]
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    image = torch.from_numpy(((image - mean) / deviation)[(slice(None), *box)]).float()
    return image[None], torch.from_numpy(label[box])


@pytest.fixture(scope="module")
def phantom_brain():
    rng = np.random.default_rng([3, 1])
    label = label_map(rng)
    return in_its_box(
        np.stack([six_month_image(label, contrast, rng) for contrast in (T1_CONTRAST, T2_CONTRAST)]), label
    )


@pytest.fixture(scope="module", params=[13, 14])
def synthetic_brain(request):
    """A scan as the weights included were trained on, of a brain that they weren't."""
    path = LABEL_MAPS / f"anatomy-{request.param}.nii.gz"
    if not path.exists():
        pytest.skip("the label maps of real brains aren't here")
    label, rng = read_label_map(path).label, np.random.default_rng(request.param)
    volumes = six_month_subject(label, nominal(label, rng), rng)
    return in_its_box(np.stack([volumes["T1"], volumes["T2"]]).astype(np.float32), label)


@pytest.fixture(scope="module")
def trained_network():
    network = SkipDenseSeg()
    load_weights(network, str(ROOT / "models" / "model.pt"))
    return network.eval()


PRECISIONS_HERE = ["fp32", pytest.param("bf16", marks=BF16_IN_HARDWARE)]


def mean_dice(labels, truth):
    pair = [one_hot(x[None, None].long(), 4) for x in (labels, truth)]
    return float(compute_dice(*pair, include_background=False).mean())


def require_labels_of_plain_float32(image, truth, network, precision, least):
    with torch.inference_mode():
        probabilities = network(image).softmax(1)[0]
        ours = MixedPrecisionInferer(LargestWindowInferer(), precision)(image, network).argmax(1)[0]
    brain, plain = truth > 0, probabilities.argmax(0)
    first, second = probabilities.topk(2, dim=0).values
    same, sure = plain == ours, brain & (first - second > 0.05)
    assert same[brain].float().mean() >= least
    # near ties alone may be decided otherwise
    assert sure.sum() > 0.98 * brain.sum()
    assert same[sure].float().mean() >= 0.9999
    assert mean_dice(ours, truth) == pytest.approx(mean_dice(plain, truth), abs=0.002)
    assert mean_dice(plain, truth) > 0.8


@pytest.mark.parametrize(
    # trained on other brains, the network is less sure of a phantom, so there are more near ties
    ("precision", "least"), [("fp32", 0.9999), pytest.param("bf16", 0.9984, marks=BF16_IN_HARDWARE)],
)  # fmt: skip
def test_trained_network_labels_a_phantom_as_in_plain_float32(phantom_brain, trained_network, precision, least):
    require_labels_of_plain_float32(*phantom_brain, trained_network, precision, least)


@BF16_IN_HARDWARE
def test_trained_network_labels_a_brain_as_in_plain_float32(synthetic_brain, trained_network):
    require_labels_of_plain_float32(*synthetic_brain, trained_network, "bf16", 0.9991)


@pytest.mark.slow
def test_one_pass_is_as_good_as_overlapping_windows(synthetic_brain, trained_network):
    image, truth = synthetic_brain
    with torch.inference_mode():
        ours, windows = (
            MixedPrecisionInferer(inferer)(image, trained_network).argmax(1)[0]
            for inferer in (LargestWindowInferer(), SlidingWindowInferer([64, 64, 64], overlap=0.5, mode="gaussian"))
        )
    assert mean_dice(ours, truth) == pytest.approx(mean_dice(windows, truth), abs=0.002)
    assert mean_dice(ours, truth) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS_HERE)
def test_training_loss_as_in_plain_float32(phantom_brain, precision):
    image, truth = phantom_brain

    def losses(inferer):
        torch.manual_seed(0)
        network = SkipDenseSeg(dropout_prob=0.0).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        rng, found = np.random.default_rng(0), []
        for _ in range(30):
            at = tuple(slice(start, start + 32) for start in (rng.integers(0, n - 31) for n in truth.shape))
            loss = torch.nn.functional.cross_entropy(inferer(image[(..., *at)], network), truth[at][None].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    plain, ours = losses(SimpleInferer()), losses(MixedPrecisionInferer(SimpleInferer(), precision))
    assert np.mean(plain[-10:]) < 0.8 * np.mean(plain[:5])
    assert np.mean(ours[-10:]) == pytest.approx(np.mean(plain[-10:]), rel=0.05)


def test_batch_norms_behind_convolutions_are_folded_into_them(network):
    def norms(module):
        return sum(isinstance(m, torch.nn.BatchNorm3d) for m in module.modules())

    def features(module):
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}

    before = features(network)
    image = torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(folded(network)(image), network(image), rtol=1e-4, atol=1e-4)
    # two of the stem, one of each of eight dense layers, one of the transition
    assert norms(folded(network)) == norms(network) - 11
    torch.testing.assert_close(features(network), before)


def test_bfloat16_holds_the_biases_of_folded_batch_norms(trained_network):
    convolutions = [
        m for m in folded(trained_network).modules() if isinstance(m, torch.nn.Conv3d) and m.bias is not None
    ]
    assert len(convolutions) == 11
    for convolution in convolutions:
        assert torch.equal(convolution.bias.bfloat16().float(), convolution.bias)
    image = torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(folded(trained_network)(image), trained_network(image), rtol=1e-4, atol=1e-4)


def test_folding_of_a_batch_norm_that_is_off():
    layers = [torch.nn.Conv3d(2, 3, 3, padding=1), torch.nn.BatchNorm3d(3), torch.nn.ReLU(), torch.nn.Conv3d(3, 2, 1)]
    network = torch.nn.Sequential(*layers).eval()
    with torch.no_grad():
        # a feature of 0, one of a constant, one whose bias is too small for bfloat16
        network[1].weight.copy_(torch.tensor([0.0, 0.0, 1.0]))
        network[1].bias.copy_(torch.tensor([0.0, 0.3, 1e-45]))
        network[0].bias.zero_()
        image = torch.randn(1, 2, 8, 8, 8)
        torch.testing.assert_close(folded(network)(image), network(image), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_network_itself(network):
    MixedPrecisionInferer(SimpleInferer(), "fp32")(torch.randn(1, 2, 16, 16, 16), network).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.zero_grad()


@pytest.mark.parametrize("layout", ["channels_last_3d", "contiguous_format"])
def test_memory_format_that_is_asked_for(network, layout):
    given = []

    def spy(patch):
        given.append(patch)
        return network(patch)

    image = torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        logits = MixedPrecisionInferer(SimpleInferer(), "fp32", layout)(image, spy)
        torch.testing.assert_close(logits, network(image), rtol=1e-4, atol=1e-4)
    assert given[0].is_contiguous(memory_format=getattr(torch, layout))


def test_memory_format_that_is_none():
    with pytest.raises(
        InputError, match="--memory_format channels_last: must be channels_last_3d or contiguous_format"
    ):
        MixedPrecisionInferer(SimpleInferer(), memory_format="channels_last")


def test_small_volume_is_taken_whole_and_unpadded():
    spy = Spy()
    inferer = MixedPrecisionInferer(LargestWindowInferer([64, 64, 64], mode="gaussian"), "fp32")
    inferer(torch.randn(1, 2, 32, 48, 16), spy)
    assert spy.shapes == [(32, 48, 16)]


def test_large_volume_is_taken_in_windows_as_by_monai():
    spy = Spy()
    image = torch.randn(1, 2, 48, 32, 80)
    logits = MixedPrecisionInferer(LargestWindowInferer([32, 32, 32], overlap=0.5, mode="gaussian"), "fp32")(image, spy)
    assert set(spy.shapes) == {(32, 32, 32)}
    expected = SlidingWindowInferer([32, 32, 32], overlap=0.5, mode="gaussian")(image, torch.clone)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    ("megabytes", "precision", "shape"),
    [
        (10_000, "fp32", (96, 128, 112)),
        (1500, "fp32", (96, 96, 96)),
        (1500, "bf16", (96, 128, 112)),
        (100, "fp32", (64, 64, 64)),
    ],
)
def test_windows_are_as_large_as_memory_allows(monkeypatch, caplog, megabytes, precision, shape):
    monkeypatch.setattr(inferers, "available_memory", lambda device: megabytes * 1_000_000)
    spy = Spy()
    with caplog.at_level(logging.INFO):
        MixedPrecisionInferer(LargestWindowInferer(), precision)(torch.randn(1, 2, 96, 128, 112), spy)
    assert set(spy.shapes) == {shape}
    ways = "one pass over" if shape == (96, 128, 112) else f"windows of {' x '.join(map(str, shape))} over"
    assert caplog.messages == [f"{ways} 96 x 128 x 112 voxels ({megabytes / 1000:.1f} GB available)"]


@pytest.mark.parametrize("size", ["large", [64, 64], [64] * 4, [0, 0, 0], -16, True, None, [64.0] * 3])
def test_window_that_can_not_be(size):
    with pytest.raises(InputError, match=r"^--window_size .*: must be auto or three whole numbers, like"):
        LargestWindowInferer(size)


def test_window_that_the_network_does_not_take(network):
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=r"--window_size \(50, 50, 50\): doesn't suit .* of 4"),
    ):
        LargestWindowInferer([50, 50, 50])(torch.zeros(1, 2, 64, 64, 64), network)


def test_window_of_one_number():
    assert LargestWindowInferer(64).roi_size == LargestWindowInferer(np.int64([64, 64, 64])).roi_size == (64, 64, 64)


def test_fitting_window():
    assert fitting_window([160, 192, 160], 1e9) == [160, 192, 160]
    assert fitting_window([160, 192, 160], 160**3) == [160, 160, 160]
    assert fitting_window([160, 192, 160], 0) == [64, 64, 64]
    assert fitting_window([16, 192, 32], 0) == [16, 64, 32]


@pytest.mark.parametrize(
    ("kind", "limit", "used", "cache"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_memory_that_containers_and_jobs_leave(tmp_path, kind, limit, used, cache):
    job = tmp_path / kind / "slurm" / "job"
    job.mkdir(parents=True)
    for folder, allowed in ((job, 900), (job.parent, 1000), (job.parent.parent, "max")):
        (folder / limit).write_text(f"{allowed}\n")
        (folder / used).write_text("700\n")
        (folder / "memory.stat").write_text(f"anon 100\n{cache} 500\n")
    own = tmp_path / "own"
    own.write_text(f"1:name=systemd:/x\n2:{kind}:/slurm/job/step\n")
    assert left_by_groups(tmp_path, own) == [700, 800]
    assert left_by_groups(tmp_path, tmp_path / "absent") == []
    (job / "memory.stat").unlink()
    assert left_by_groups(tmp_path, own) == [200, 800]
    own.write_text("1:cpu:/slurm/job\n")
    assert left_by_groups(tmp_path, own) == []


@pytest.mark.slow
def test_available_memory_heeds_the_limit_of_the_user():
    code = (
        "import resource, torch; from scripts.machine import available_memory as a;"
        "cpu = torch.device('cpu');"
        "free = a(cpu); limit = 6 * 2**30; resource.setrlimit(resource.RLIMIT_AS, (limit, limit));"
        "assert 0 < a(cpu) < min(free + 1, limit), (free, a(cpu))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)
    assert available_memory(torch.device("cpu")) <= psutil.virtual_memory().total


FP32 = MixedPrecisionInferer(SimpleInferer(), "fp32")


@pytest.fixture
def checkpoints(tmp_path):
    """Two checkpoints, and their networks."""
    networks = []
    for fold in (1, 2):
        torch.manual_seed(fold)
        network = SkipDenseSeg()
        network(torch.randn(2, 2, 32, 32, 32))
        (tmp_path / f"fold-{fold}").mkdir()
        torch.save(network.state_dict(), tmp_path / f"fold-{fold}" / "model.pt")
        networks.append(network.eval())
    return str(tmp_path / "fold-*" / "model.pt"), networks


@pytest.mark.parametrize("flips", [False, True])
def test_average_of_networks_and_mirror_images(network, checkpoints, flips):
    pattern, members = checkpoints
    image = torch.randn(1, 2, 8, 12, 16)
    mirrors = [axes for n in range(4) for axes in itertools.combinations((2, 3, 4), n)] if flips else [()]
    with torch.no_grad():
        each = [m(image.flip(axes)).flip(axes).softmax(1) for m in members for axes in mirrors]
        logits = AveragingInferer(FP32, pattern, flips)(image, network)
    assert len(each) == (16 if flips else 2)
    assert logits.dtype == torch.float32
    mean = torch.stack(each).mean(0)
    torch.testing.assert_close(logits.softmax(1), mean, rtol=1e-3, atol=1e-5)
    # the network that is given only says the architecture, and no one of them is the average
    for other in (network, *members):
        assert (other(image).softmax(1) - mean).abs().max() > 0.01


@pytest.mark.parametrize("axes", [(2,), (3, 4), (2, 3, 4)])
def test_mirrored_image_gives_the_mirrored_logits(network, axes):
    image = torch.randn(1, 2, 8, 12, 16)
    inferer = AveragingInferer(FP32, "given.pt", flips=True)
    with torch.no_grad():
        assert torch.equal(inferer(image.flip(axes), network).flip(axes), inferer(image, network))
        assert not torch.equal(FP32(image.flip(axes), network).flip(axes), FP32(image, network))


def test_one_checkpoint_without_flips_changes_nothing(network, tmp_path):
    image = torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        logits = AveragingInferer(FP32, str(tmp_path / "missing.pt"))(image, network)
        assert torch.equal(logits, FP32(image, network))


def test_checkpoints_are_loaded_once(network, checkpoints, monkeypatch):
    inferer = AveragingInferer(FP32, checkpoints[0])
    image = torch.randn(1, 2, 16, 16, 16)
    with torch.no_grad():
        first = inferer(image, network)
        monkeypatch.setattr(inferers, "load_weights", lambda *_: pytest.fail("loaded twice"))
        assert torch.equal(inferer(image, network), first)


def test_averaged_logits_are_finite():
    sure = AveragingInferer(SimpleInferer(), "given.pt", flips=True)(torch.randn(1, 4, 4, 4, 4), lambda x: x * 1e4)
    assert sure.isfinite().all()


def test_second_checkpoint_that_can_not_be_used(network, checkpoints, tmp_path):
    first, image = str(tmp_path / "fold-1" / "model.pt"), torch.randn(1, 2, 16, 16, 16)
    with pytest.raises(InputError, match=r"fold-3/model.pt: no such checkpoint"):
        AveragingInferer(FP32, [first, str(tmp_path / "fold-3" / "model.pt")])(image, network)
    torch.save(SkipDenseSeg(growth_rate=8).state_dict(), tmp_path / "fold-2" / "model.pt")
    with pytest.raises(InputError, match=r"fold-2/model.pt: a checkpoint of another network"):
        AveragingInferer(FP32, checkpoints[0])(image, network)


def test_flips_that_are_neither_true_nor_false():
    with pytest.raises(InputError, match="--flips false: must be True or False"):
        AveragingInferer(FP32, "given.pt", flips="false")
