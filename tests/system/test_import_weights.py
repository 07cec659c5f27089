"""Imported weights segment; MindSpore writes a checkpoint."""

from collections import OrderedDict
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import PAPER
from processes import bundle

from scripts.commands.import_weights import import_weights, name_from_mindspore
from scripts.errors import InputError
from scripts.network import SkipDenseSeg
from scripts.weights import load_weights

VARIANTS = {"compact": {}, "paper": PAPER}


@cache
def trained(variant: str) -> SkipDenseSeg:
    """A network none of whose tensors is as initialised, and whose kernels have no symmetry."""
    torch.manual_seed(5)
    network = SkipDenseSeg(**VARIANTS[variant]).eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1:
                tensor.normal_(std=0.3)
    return network


def published(variant: str) -> dict[str, torch.Tensor]:
    """The state dict that the published code would save."""
    return {name: tensor.clone() for name, tensor in trained(variant).state_dict().items()}


def assert_same_logits(variant: str, output: Path) -> None:
    """The imported network on (x, y, z) gives what the published one gives on (z, x, y)."""
    network = SkipDenseSeg(**VARIANTS[variant]).eval()
    load_weights(network, str(output))
    image = torch.randn(1, 2, *(network.stride * sides for sides in (1, 2, 3)))
    with torch.no_grad():
        theirs = trained(variant)(image.permute(0, 1, 4, 2, 3)).permute(0, 1, 3, 4, 2)
        ours, unturned = network(image), trained(variant)(image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (unturned - theirs).abs().max() > 0.1  # the axes matter


@pytest.fixture
def run(tmp_path, capsys):
    """Import `tmp_path/FILE` to `tmp_path/new/model.pt`; gives the latter and what was printed."""

    def call(file: str) -> tuple[Path, str]:
        output = tmp_path / "new" / "model.pt"
        import_weights(str(tmp_path / file), str(output))
        return output, capsys.readouterr().out

    return call


@pytest.fixture
def refused(tmp_path):
    """Importing a file of this content, or the file as it is, ends in one line that names it, and writes nothing."""

    def check(content, match: str, name: str = "weights.pth") -> None:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(InputError, match=match) as error:
            import_weights(str(path), str(tmp_path / "new" / "model.pt"))
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "new").exists()

    return check


@pytest.mark.slow
def test_imported_paper_variant_segments_by_the_settings_that_were_told(dataset, tmp_path):
    torch.save(published("paper"), tmp_path / "weights.pth")
    result = bundle(
        *("import_weights", "--checkpoint", str(tmp_path / "weights.pth"), "--output", str(tmp_path / "model.pt")),
        module="scripts",
    )
    assert result.returncode == 0, result.stderr
    told = result.stdout.splitlines()[-1].partition(" by ")[2].replace('"', "").split()
    segment = ("run", "--config_file", "configs/inference.json", "--dataset_dir", str(dataset))
    result = bundle(*segment, "--output_dir", str(tmp_path / "out"), *told)
    assert result.returncode == 0, result.stderr
    assert nib.load(tmp_path / "out" / "subject-11-label.nii.gz").shape == (60, 72, 64, 1)


OURS_TO_MINDSPORE = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
# what dense blocks 0 and 1, the transition and the upsampling branches are called
NAMINGS = {
    "published": ("0", "0.cells_list.0.cells_list.1", "0", "{}"),
    "plain": ("0", "1", "0", "{}"),
    "full": ("dense_blocks.0", "dense_blocks.1", "transit_blocks.0", "upsampling_blocks.{}"),
}


def mindspore_name(name: str, naming: str) -> str:
    """What MindSpore calls a tensor of the compact variant."""
    blocks, transition, upsampling = NAMINGS[naming][:2], NAMINGS[naming][2], NAMINGS[naming][3]
    *cells, norm_or_conv, tensor = name.split(".")
    part = [*cells, norm_or_conv]
    if part[0] == "dense_blocks":
        place = {"norm1": 0, "conv1": 2, "norm2": 3, "conv2": 5}[norm_or_conv]
        layer = int(part[2].removeprefix("denselayer")) - 1
        part = [blocks[int(part[1])], "cells_list", str(layer), "cells_list", str(place)]
    elif part[0] == "transit_blocks":
        part = [transition, "features", norm_or_conv]
    elif part[0] == "upsampling_blocks":
        part = [upsampling.format(part[1])]
    is_norm = norm_or_conv.startswith(("norm", "pool_norm", "bn_class"))
    return ".".join([*part, f"bn2d.{OURS_TO_MINDSPORE[tensor]}" if is_norm else tensor])


def mindspore_arrays(naming: str) -> dict[str, np.ndarray]:
    state = published("compact")
    return {mindspore_name(n, naming): t.numpy() for n, t in state.items() if not n.endswith("num_batches_tracked")}


def mindspore_network(mindspore):
    """The compact network of MindSpore's own cells, put together in the order that gives the published names."""
    from mindspore import nn, ops

    def conv(inputs, outputs, size, **options):
        return nn.Conv3d(inputs, outputs, size, **({"padding": 1, "pad_mode": "pad"} if size == 3 else {}), **options)

    class Layer(nn.Cell):
        def __init__(self, features):
            super().__init__()
            bottleneck = [nn.BatchNorm3d(features), nn.ReLU(), conv(features, 64, 1)]
            self.cells_list = nn.SequentialCell([*bottleneck, nn.BatchNorm3d(64), nn.ReLU(), conv(64, 16, 3)])

        def construct(self, image):
            return ops.concat((image, self.cells_list(image)), 1)

    class Block(nn.Cell):
        def __init__(self, features):
            super().__init__()
            self.cells_list = nn.SequentialCell([])
            for i in range(4):
                self.cells_list.append(Layer(features + 16 * i))

        def construct(self, image):
            return self.cells_list(image)

    def named(**cells):
        return nn.SequentialCell(OrderedDict(cells))

    class Transition(nn.Cell):
        def __init__(self):
            super().__init__()
            halve = {"norm": nn.BatchNorm3d(96), "relu": nn.ReLU(), "conv": conv(96, 48, 1)}
            pool = {"pool_norm": nn.BatchNorm3d(48), "pool_relu": nn.ReLU(), "pool": conv(48, 48, 2, stride=2)}
            self.features = named(**halve, **pool)

        def construct(self, image):
            return self.features(image)

    def upsampling(features, scale):
        return nn.Conv3dTranspose(features, 4, scale + 2, stride=scale, padding=1, pad_mode="pad")

    class Network(nn.Cell):
        def __init__(self):
            super().__init__()
            first = {"conv0": conv(2, 32, 3), "norm0": nn.BatchNorm3d(32), "relu0": nn.ReLU()}
            second = {"conv1": conv(32, 32, 3), "norm1": nn.BatchNorm3d(32), "relu1": nn.ReLU()}
            self.features = named(**first, **second, conv2=conv(32, 32, 3))
            self.features_bn = named(norm2=nn.BatchNorm3d(32), relu2=nn.ReLU())
            self.conv_pool_first = conv(32, 32, 2, stride=2)
            self.dense_blocks, self.transit_blocks, self.upsampling_blocks = (nn.CellList([]) for _ in range(3))
            self.dense_blocks.append(Block(32))
            self.upsampling_blocks.append(upsampling(96, 2))
            self.transit_blocks.append(Transition())
            self.dense_blocks.append(Block(48))
            self.upsampling_blocks.append(upsampling(112, 4))
            self.bn_class = nn.BatchNorm3d(40)
            self.conv_class = conv(40, 4, 1)

        def construct(self, image):
            full = self.features(image)
            half = self.dense_blocks[0](self.conv_pool_first(self.features_bn(full)))
            quarter = self.dense_blocks[1](self.transit_blocks[0](half))
            branches = (self.upsampling_blocks[0](half), self.upsampling_blocks[1](quarter), full)
            return self.conv_class(ops.relu(self.bn_class(ops.concat(branches, 1))))

    network = Network()
    network.set_train(False)
    state = published("compact")
    for parameter in network.get_parameters():
        parameter.set_data(mindspore.Tensor(state[name_from_mindspore(parameter.name)].numpy()))
    return network


def test_checkpoint_that_mindspore_wrote(tmp_path, run, refused):
    """Needs mindspore; its own logits are compared where it computes, which mindspore 2.10 does with NumPy 1 only."""
    mindspore = pytest.importorskip("mindspore")
    network = mindspore_network(mindspore)
    assert {parameter.name for parameter in network.get_parameters()} == set(mindspore_arrays("published"))
    optimiser = mindspore.nn.SGD(params=network.trainable_params(), learning_rate=2e-4)
    training = mindspore.nn.TrainOneStepCell(mindspore.nn.WithLossCell(network, mindspore.nn.MSELoss()), optimiser)
    mindspore.save_checkpoint(
        training, str(tmp_path / "weights.ckpt"), append_dict={"epoch_num": 3, "loss_scale": 256.0}
    )
    output, printed = run("weights.ckpt")
    assert "143 entries ignored" in printed
    assert_same_logits("compact", output)
    if int(np.__version__.split(".")[0]) == 1:
        network.set_train(False)
        ours = SkipDenseSeg().eval()
        load_weights(ours, str(output))
        image = torch.randn(1, 2, 16, 20, 28)
        with torch.no_grad():
            logits = ours(image).permute(0, 1, 4, 2, 3)
        theirs = network(mindspore.Tensor(image.permute(0, 1, 4, 2, 3).contiguous().numpy())).asnumpy()
        np.testing.assert_allclose(logits.numpy(), theirs, rtol=0, atol=1e-4)
    output.unlink()
    output.parent.rmdir()
    content = (tmp_path / "weights.ckpt").read_bytes()
    (tmp_path / "weights.ckpt").chmod(0o600)  # MindSpore writes it read-only
    refused(content[:-1000], "MindSpore can't read it; copy the file again", "weights.ckpt")
