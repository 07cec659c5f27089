import pytest
import torch
from helpers import SpyNetwork
from monai.inferers import SimpleInferer

from scripts.errors import InputError
from scripts.inference import precision
from scripts.inference.precision import MixedPrecisionInferer, fuse_batch_norms, needs_loss_scaling, network_precision

# elsewhere bfloat16 is computed by slow emulation, which nobody is given unasked
BF16_IN_HARDWARE = pytest.mark.skipif(
    network_precision(torch.device("cpu"), "auto") != torch.bfloat16, reason="no bfloat16 in this processor"
)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_of_the_network_and_float32_logits(precision, dtype):
    spy = SpyNetwork()
    logits = MixedPrecisionInferer(SimpleInferer(), precision)(torch.randn(1, 2, 8, 8, 8), spy)
    assert spy.dtypes == [dtype]
    assert logits.dtype == torch.float32


def test_automatic_precision_follows_the_processor(monkeypatch):
    for capable, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capable=capable: {"avx512_bf16": capable})
        spy = SpyNetwork()
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
        MixedPrecisionInferer(SimpleInferer(), precision)(torch.randn(1, 2, 8, 8, 8), SpyNetwork())


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


def test_batch_norms_behind_convolutions_are_fused_into_them(network):
    def norms(module):
        return sum(isinstance(m, torch.nn.BatchNorm3d) for m in module.modules())

    def features(module):
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}

    before = features(network)
    image = torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fuse_batch_norms(network)(image), network(image), rtol=1e-4, atol=1e-4)
    # two of the stem, one of each of eight dense layers, one of the transition
    assert norms(fuse_batch_norms(network)) == norms(network) - 11
    torch.testing.assert_close(features(network), before)


def test_folding_of_a_batch_norm_that_is_off():
    layers = [torch.nn.Conv3d(2, 3, 3, padding=1), torch.nn.BatchNorm3d(3), torch.nn.ReLU(), torch.nn.Conv3d(3, 2, 1)]
    network = torch.nn.Sequential(*layers).eval()
    with torch.no_grad():
        # a feature of 0, one of a constant, one whose bias is too small for bfloat16
        network[1].weight.copy_(torch.tensor([0.0, 0.0, 1.0]))
        network[1].bias.copy_(torch.tensor([0.0, 0.3, 1e-45]))
        network[0].bias.zero_()
        image = torch.randn(1, 2, 8, 8, 8)
        torch.testing.assert_close(fuse_batch_norms(network)(image), network(image), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("fused", [False, True])
def test_fused_network_follows_every_optimizer(fused):
    """Torch doesn't count the changes of a fused optimizer."""
    network = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 1), torch.nn.InstanceNorm3d(4))
    inferer, image = MixedPrecisionInferer(SimpleInferer(), "fp32"), torch.randn(1, 2, 8, 8, 8)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(inferer(image, network.eval()), network(image), rtol=1e-4, atol=1e-4)
        (network.train()(image) * torch.arange(8)).sum().backward()
        optimizer.step()


def test_network_made_for_inference_only():
    with torch.inference_mode():
        network, image = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 1)).eval(), torch.randn(1, 2, 8, 8, 8)
        logits = MixedPrecisionInferer(SimpleInferer(), "fp32")(image, network)
        torch.testing.assert_close(logits, network(image), rtol=1e-4, atol=1e-4)


def test_network_is_fused_once_for_all_volumes(network, monkeypatch):
    made = []
    monkeypatch.setattr(precision, "fuse_batch_norms", lambda network: made.append(network) or network)
    inferer = MixedPrecisionInferer(SimpleInferer(), "fp32")
    with torch.no_grad():
        for _ in range(3):
            inferer(torch.randn(1, 2, 16, 16, 16), network)
    assert len(made) == 1
