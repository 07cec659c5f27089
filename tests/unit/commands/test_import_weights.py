import os
import pickle
import sys
import types
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PAPER, ROOT

from scripts.commands.import_weights import import_weights, name_from_mindspore
from scripts.errors import InputError
from scripts.network import SkipDenseSeg
from scripts.weights import load_weights

VARIANTS = {"compact": {}, "paper": PAPER}
PUBLISHED_NAMES = (ROOT / "tests/data/checkpoint_keys.tsv").read_text().splitlines()


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_logits_on_our_axes(tmp_path, run, variant):
    torch.save(published(variant), tmp_path / "weights.pth")
    output, _ = run("weights.pth")
    assert_same_logits(variant, output)
    assert list(output.parent.iterdir()) == [output]


def test_says_which_variant_and_how_the_configs_load_it(tmp_path, run, capsys):
    torch.save(published("paper"), tmp_path / "weights.pth")
    output, printed = run("weights.pth")
    assert f"paper variant, 1,552,256 parameters, in {output}" in printed
    settings = '--network_def#block_config "[4,4,4,4]" --network_def#grouped_upsampling True --network_def#bias True'
    assert f"every config loads it by --ckpt_dir {output.parent} {settings}\n" in printed
    assert "ignored" not in printed and "warning" not in printed
    torch.save(published("compact"), tmp_path / "weights.pth")
    import_weights(str(tmp_path / "weights.pth"), str(tmp_path / "compact.pt"))
    printed = capsys.readouterr().out
    assert "compact variant, 466,320 parameters" in printed
    assert "\nas FOLDER/model.pt, every config loads it by --ckpt_dir FOLDER\n" in printed


@pytest.mark.parametrize("wrap", [dict, lambda s: {"epoch": 3, "state_dict": s}, lambda s: {"model": s, "best": 0.9}])
@pytest.mark.parametrize("parallel", ["", "module."])
@pytest.mark.parametrize("new_format", [True, False])
def test_forms_of_the_authors_file(tmp_path, run, wrap, parallel, new_format):
    """By the published names and shapes; in files of torch before 0.4.1 no batches are counted."""
    state = {}
    for name, shape in (line.split("\t") for line in PUBLISHED_NAMES):
        if new_format or not name.endswith("num_batches_tracked"):
            shape = tuple(int(side) for side in shape.strip("()").split(",") if side)
            state[parallel + name] = torch.randn(shape) if shape else torch.tensor(7)
    torch.save(wrap(state), tmp_path / "weights.pth", _use_new_zipfile_serialization=new_format)
    imported = torch.load(run("weights.pth")[0], weights_only=True)
    assert len(imported) == len(PUBLISHED_NAMES)
    assert imported["features.norm0.num_batches_tracked"] == (7 if new_format else 0)
    for name, tensor in imported.items():
        if not name.endswith("num_batches_tracked"):
            theirs = state[parallel + name]
            assert torch.equal(tensor, theirs.permute(0, 1, 3, 4, 2) if theirs.ndim == 5 else theirs), name


@pytest.mark.parametrize("nested", [False, True])
def test_file_of_this_bundle_brings_a_warning(tmp_path, run, nested):
    state = SkipDenseSeg(**PAPER).state_dict()
    torch.save({"model": state, "optimizer": {}} if nested else state, tmp_path / "model.pt")
    assert f"warning: {tmp_path}/model.pt was saved from this bundle's own network" in run("model.pt")[1]


class Malicious:
    """Runs `function(argument)` when it is unpickled."""

    def __init__(self, function, argument):
        self.call = (function, (argument,))

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("save", [torch.save, partial(torch.save, _use_new_zipfile_serialization=False), pickle.dump])
@pytest.mark.parametrize(("function", "name"), [(os.system, "posix.system"), (exec, "exec")])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, refused, save, function, name):
    touched, path = tmp_path / "touched", tmp_path / "weights.pth"
    code = f"touch {touched}" if function is os.system else f"open({str(touched)!r}, 'w').close()"
    with path.open("wb") as file:
        save({"state_dict": published("compact"), "x": Malicious(function, code)}, file)
    could_run_code = f"refers to {name}, so loading could run code; it wasn't loaded; have it saved again"
    refused(None, "can't be read as a checkpoint" if save is pickle.dump else could_run_code)
    assert not touched.exists()
    # the file isn't harmless
    with path.open("rb") as file:
        pickle.load(file) if save is pickle.dump else torch.load(file, weights_only=False)
    assert touched.exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_truncated_file_is_refused(tmp_path, refused, new_format):
    path = tmp_path / "weights.pth"
    torch.save(published("compact"), path, _use_new_zipfile_serialization=new_format)
    refused(path.read_bytes()[:-1000], "can't be read as a checkpoint; copy it again")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "neither a PyTorch nor a MindSpore checkpoint"),
        (b"<html>not found</html>", "neither a PyTorch nor a MindSpore checkpoint"),
        (["a list"], "holds no state dict"),
        ({3: torch.zeros(2)}, "holds no state dict"),
        ({"epoch": 3, "optimizer": {"state": {}, "lr": 0.1}}, "holds no state dict"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "another network: 113 of 135 tensors missing, 1 unknown"),
        (dict(SkipDenseSeg(growth_rate=8).state_dict()), "another network: 0 of .* of another shape"),
        (dict(SkipDenseSeg(block_config=(4, 4, 4, 4)).state_dict()), "another network: .* missing"),
        (dict(SkipDenseSeg(block_config=(4, 4, 4)).state_dict()), "compact or the paper variant of 3D-SkipDenseSeg"),
        (dict(SkipDenseSeg(bias=True).state_dict()), "another network: 0 of .* 2 unknown"),
    ],
)
def test_foreign_files_are_refused(refused, content, match):
    refused(content, match)


def test_incomplete_or_diverged_weights_are_refused(refused):
    for lost in ("features.conv0.weight", "dense_blocks.3.denselayer4.norm2.running_var"):
        state = published("paper")
        del state[lost]
        refused(state, f"another network: 1 of 261 tensors missing, .*the first: {lost}")
    state = published("compact")
    state["conv_class.weight"][2, 3] = torch.nan
    refused(state, "conv_class.weight has NaN or infinite values; give another epoch's")


def test_what_is_there_stays(tmp_path):
    torch.save(published("compact"), tmp_path / "weights.pth")
    (tmp_path / "model.pt").write_text("mine")
    with pytest.raises(InputError, match=r"model.pt: already exists; choose another --output"):
        import_weights(str(tmp_path / "weights.pth"), str(tmp_path / "model.pt"))
    assert (tmp_path / "model.pt").read_text() == "mine"
    with pytest.raises(InputError, match=r"none.pth: no such file"):
        import_weights(str(tmp_path / "none.pth"), str(tmp_path / "new.pt"))


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


class Entry:
    """What MindSpore's load_checkpoint gives for a name, as far as it is used."""

    def __init__(self, array: np.ndarray):
        self.array = np.asarray(array)
        self.size = self.array.size

    def asnumpy(self) -> np.ndarray:
        return self.array


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A module `mindspore` that gives these entries for tmp_path/weights.ckpt."""

    def install(entries: dict) -> None:
        def load_checkpoint(path: str) -> dict:
            assert path == str(tmp_path / "weights.ckpt")
            return {name: entry if isinstance(entry, str) else Entry(entry) for name, entry in entries.items()}

        (tmp_path / "weights.ckpt").write_bytes(b"\n\x20 a protocol buffer")
        monkeypatch.setitem(sys.modules, "mindspore", types.SimpleNamespace(load_checkpoint=load_checkpoint))

    return install


@pytest.mark.parametrize("naming", NAMINGS)
def test_mindspore_checkpoint_gives_the_same_logits(stand_in, run, naming):
    stand_in(mindspore_arrays(naming))
    output, printed = run("weights.ckpt")
    assert_same_logits("compact", output)
    assert "compact variant" in printed and "ignored" not in printed


@pytest.mark.parametrize("naming", NAMINGS)
def test_state_of_mindspores_optimiser_is_ignored_and_counted(stand_in, run, naming):
    arrays = mindspore_arrays(naming)
    trainable = {name: array for name, array in arrays.items() if "moving" not in name}
    training = {f"{state}.{name}": array for state in ("accum", "stat") for name, array in trainable.items()}
    training |= {"global_step": np.array([3]), "learning_rate": np.array(0.1), "loss_scale": np.array(256.0)}
    stand_in({**training, **arrays, "note": "text"})
    output, printed = run("weights.ckpt")
    load_weights(SkipDenseSeg(), str(output))
    assert f"{2 * len(trainable) + 4} entries ignored" in printed


def test_incomplete_or_foreign_mindspore_checkpoints_are_refused(stand_in, refused):
    arrays = mindspore_arrays("published")
    stand_in({name: array for name, array in arrays.items() if name != "1.weight"})
    refused(None, "another network: 1 of .*the first: upsampling_blocks.1.weight", "weights.ckpt")
    stand_in({**arrays, "decoder.weight": np.zeros((2, 2))})
    refused(None, "another network: 0 of .* 1 unknown.*the first: decoder.weight", "weights.ckpt")
    stand_in({**arrays, "1.cells_list.0.cells_list.0.bn2d.beta": np.zeros(48)})
    refused(None, "has dense_blocks.1.denselayer1.norm1.bias under two names", "weights.ckpt")
    stand_in({**arrays, "note": np.array(["one", "two"])})
    refused(None, "note holds <U3, not real numbers; give the published file", "weights.ckpt")


def test_without_mindspore(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "mindspore", None)
    refused(
        b"\n\x20 a protocol buffer", "a MindSpore checkpoint needs MindSpore .* pip install mindspore$", "weights.ckpt"
    )


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
