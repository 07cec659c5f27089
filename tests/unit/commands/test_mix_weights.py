import pytest
import torch

from scripts.commands.mix_weights import mix_weights
from scripts.errors import InputError
from scripts.network import SkipDenseSeg
from scripts.weights import load_weights


@pytest.fixture
def checkpoints(tmp_path) -> list[str]:
    paths = [str(tmp_path / f"{name}.pt") for name in ("first", "second")]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        network = SkipDenseSeg()
        network(torch.randn(1, 2, 16, 16, 16))  # statistics and a count of batches
        torch.save(network.state_dict() if seed else {"model": network.state_dict(), "epoch": 1}, path)
    return paths


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_each_tensor_is_the_weighted_mean(checkpoints, tmp_path, share):
    output = tmp_path / "deep" / "mixed.pt"
    mix_weights(*checkpoints, share, str(output))
    first, second, mixed = SkipDenseSeg(), SkipDenseSeg(), SkipDenseSeg()
    for network, path in zip((first, second, mixed), (*checkpoints, str(output)), strict=True):
        load_weights(network, path)
    for name, tensor in mixed.state_dict().items():
        expected = (1 - share) * first.state_dict()[name].double() + share * second.state_dict()[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        assert tensor.dtype == first.state_dict()[name].dtype


def test_what_can_not_be_mixed(checkpoints, tmp_path):
    output = tmp_path / "mixed.pt"
    other = str(tmp_path / "other.pt")
    torch.save(SkipDenseSeg(growth_rate=8).state_dict(), other)
    texts = [str(tmp_path / f"text-{number}.pt") for number in range(2)]
    for path in texts:
        torch.save({"name": "no tensor"}, path)
    for arguments, message in (
        ((checkpoints[0], other, 0.5), "other.pt: has other tensors than .*first.pt; give two checkpoints"),
        ((*texts, 0.5), "text-1.pt: has other tensors than .*text-0.pt; give two checkpoints"),
        ((checkpoints[0], str(tmp_path / "no.pt"), 0.5), "no.pt: no such checkpoint"),
        ((*checkpoints, 1.5), "--share 1.5: must be a number from 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            mix_weights(*arguments, str(output))
        assert not output.exists()
    output.touch()
    with pytest.raises(InputError, match=r"mixed\.pt: already exists; choose another --output"):
        mix_weights(*checkpoints, 0.5, str(output))
