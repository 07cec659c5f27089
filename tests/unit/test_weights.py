import io
import zipfile

import pytest
import torch
from monai.networks.nets import UNet

from scripts.errors import InputError
from scripts.network import SkipDenseSeg
from scripts.weights import checkpoint_paths, has_weights_of, load_weights, starting_network


@pytest.fixture
def checkpoint(tmp_path):
    network = SkipDenseSeg()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt", network


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoint_of_this_network(checkpoint, nested):
    path, saved = checkpoint
    if nested:
        torch.save({"model": saved.state_dict(), "epoch": 3}, path)
    network = SkipDenseSeg()
    load_weights(network, str(path))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), saved.parameters(), strict=True))


@pytest.mark.parametrize("wrappers", [("state_dict",), ("network_weights",), ("model", "net"), ("model_state_dict",)])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod.", "module.network."])
def test_checkpoint_of_other_trainers(checkpoint, caplog, wrappers, prefix):
    path, saved = checkpoint
    content = {f"{prefix}{name}": tensor for name, tensor in saved.state_dict().items()}
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "epoch": 3, "optimizer": {"lr": 1}}
    torch.save(content, path)
    network = SkipDenseSeg()
    with caplog.at_level("INFO"):
        load_weights(network, str(path))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), saved.parameters(), strict=True))
    assert f"model.pt: a prefix of all names was removed, such as that of {prefix}" in caplog.text


def test_name_of_the_network_beside_its_state_is_no_state(checkpoint):
    path, saved = checkpoint
    torch.save({"model": "SkipDenseSeg", "state_dict": saved.state_dict()}, path)
    load_weights(SkipDenseSeg(), str(path))
    inside: dict = {"epoch": 3}
    inside["model"] = inside
    torch.save(inside, path)
    with pytest.raises(InputError, match="a checkpoint of another network"):
        load_weights(SkipDenseSeg(), str(path))


def test_prefix_that_belongs_to_the_network_stays(tmp_path):
    networks = [UNet(3, 2, 4, channels=(4, 8), strides=(2,)) for _ in range(3)]
    for number, names in enumerate(("{}", "module.{}")):
        path = tmp_path / f"{number}.pt"
        torch.save({names.format(name): tensor for name, tensor in networks[0].state_dict().items()}, path)
        load_weights(networks[1 + number], str(path))
        for name, tensor in networks[0].state_dict().items():
            assert torch.equal(networks[1 + number].state_dict()[name], tensor)
    assert has_weights_of(tmp_path / "0.pt", networks[1])


def test_prefix_that_not_all_tensors_have_is_no_prefix(checkpoint):
    path, saved = checkpoint
    state = {f"module.{name}": tensor for name, tensor in saved.state_dict().items()}
    torch.save(state | {"loss.weight": torch.ones(4)}, path)
    with pytest.raises(InputError, match="a checkpoint of another network"):
        load_weights(SkipDenseSeg(), str(path))


@pytest.mark.parametrize(
    "other",
    [{"block_config": (4, 4, 4, 4)}, {"growth_rate": 8}, {"block_config": (4,)}, {"grouped_upsampling": True}],
)
def test_checkpoint_of_another_network_changes_nothing(checkpoint, other):
    network = SkipDenseSeg(**other)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(InputError, match=r"model.pt: a checkpoint of another network: .*set network_def"):
        load_weights(network, str(checkpoint[0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"not a checkpoint", None, ["a list"], {"features.conv0.weight": "text"}),
        *({"model": 3}, {"model": torch.ones(2)}, {"model": None}),
    ],
)
def test_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=str(path)):
        load_weights(SkipDenseSeg(), str(path))


def test_checkpoint_that_is_larger_than_its_file(checkpoint):
    path, network = checkpoint
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as records, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in records.namelist():
            packed.writestr(name, bytes(len(records.read(name))) if "/data/" in name else records.read(name))
    assert path.stat().st_size < len(content) / 10
    with pytest.raises(InputError, match=f"{path}: is compressed"):
        load_weights(network, str(path))


def test_truncated_checkpoint(checkpoint):
    path, network = checkpoint
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="can't be read as a checkpoint"):
        load_weights(network, str(path))


@pytest.mark.parametrize("content", [{"model": 3}, dict.fromkeys(SkipDenseSeg().state_dict(), 3)])
def test_file_of_other_things_does_not_hold_the_network(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    assert not has_weights_of(tmp_path / "model.pt", SkipDenseSeg())


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.to_sparse(),
    ],
    ids=["complex", "without values", "sparse"],
)
def test_tensor_of_another_kind_is_refused(checkpoint, change):
    path, network = checkpoint
    state = network.state_dict() | {"conv_class.weight": change(network.conv_class.weight.detach())}
    torch.save(state, path)
    with pytest.raises(InputError, match=r"model.pt: .* 1 of another shape or kind \(the first: conv_class.weight\)"):
        load_weights(SkipDenseSeg(), str(path))


@pytest.mark.parametrize("change", [lambda tensor: tensor * torch.nan, lambda tensor: tensor.double() + 1e300])
def test_weights_that_are_not_finite_are_refused(checkpoint, change):
    path, network = checkpoint
    torch.save(network.state_dict() | {"conv_class.weight": change(network.conv_class.weight.detach())}, path)
    with pytest.raises(InputError, match=r"model.pt: conv_class.weight has NaN or infinite values; give another"):
        load_weights(SkipDenseSeg(), str(path))


def test_one_wrong_bit_among_the_weights_is_refused(checkpoint):
    path, network = checkpoint
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="can't be read as a checkpoint"):
        load_weights(network, str(path))


def test_checkpoints_that_a_setting_names(tmp_path):
    for fold in (2, 10, 1):
        (tmp_path / f"fold-{fold}").mkdir()
        (tmp_path / f"fold-{fold}" / "model.pt").touch()
    (tmp_path / "fold-3").mkdir()
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "model.pt").touch()
    one, ten, two = (str(tmp_path / f"fold-{fold}" / "model.pt") for fold in (1, 10, 2))
    assert checkpoint_paths("not/there.pt") == ["not/there.pt"]
    assert checkpoint_paths(str(tmp_path / "run[1]" / "model.pt")) == [str(tmp_path / "run[1]" / "model.pt")]
    pattern = str(tmp_path / "fold-*" / "model.pt")
    assert checkpoint_paths(pattern) == [one, ten, two]
    assert checkpoint_paths(["not/there.pt", pattern]) == ["not/there.pt", one, ten, two]


@pytest.mark.parametrize(("setting", "message"), [("cv/fold-*/model.pt", r"cv/fold-\*/model.pt: no"), ([], "is empty")])
def test_checkpoints_that_name_none(setting, message):
    with pytest.raises(InputError, match=message):
        checkpoint_paths(setting)


def test_checkpoint_that_holds_a_network(checkpoint):
    path, network = checkpoint
    assert has_weights_of(path, network)
    assert not has_weights_of(path.with_name("absent.pt"), network)
    assert not has_weights_of(path, SkipDenseSeg())
    assert not has_weights_of(path, SkipDenseSeg(block_config=(4,)))
    torch.save({"model": network.state_dict(), "epoch": 3}, path)
    assert has_weights_of(path, network)
    path.write_bytes(path.read_bytes()[:-1000])
    assert not has_weights_of(path, network)


def test_network_that_training_starts_with(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "model.pt")
    fresh = SkipDenseSeg()
    given = starting_network(fresh, "cpu", str(tmp_path / "model.pt"))
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in given.state_dict().items())
    other = SkipDenseSeg()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    assert all(torch.equal(v, before[n]) for n, v in starting_network(other, "cpu").state_dict().items())
    with pytest.raises(InputError, match=r"absent\.pt"):
        starting_network(SkipDenseSeg(), "cpu", str(tmp_path / "absent.pt"))
