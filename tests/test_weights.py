import pytest
import torch
from ignite.engine import Engine, Events

from scripts.errors import InputError
from scripts.network import SkipDenseSeg
from scripts.weights import EarlierWeightsKeeper, WholeCheckpointSaver, checkpoint_paths, load_weights


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


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None, ["a list"], {"features.conv0.weight": "text"}])
def test_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=str(path)):
        load_weights(SkipDenseSeg(), str(path))


def test_truncated_checkpoint(checkpoint):
    path, network = checkpoint
    path.write_bytes(path.read_bytes()[:-1000])
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


@pytest.mark.parametrize(
    ("setting", "message"), [("cv/fold-*/model.pt", r"cv/fold-\*/model.pt: no"), ([], "names none")]
)
def test_checkpoints_that_name_none(setting, message):
    with pytest.raises(InputError, match=message):
        checkpoint_paths(setting)


def keep_earlier_weights(path):
    engine = Engine(lambda engine, batch: None)
    EarlierWeightsKeeper(str(path)).attach(engine)
    engine.run([0])


def test_earlier_weights_stay_beside_the_new(checkpoint, capsys):
    path, _ = checkpoint
    content = path.read_bytes()
    for _ in range(2):
        keep_earlier_weights(path)
    path.write_bytes(b"trained anew")
    copies = [p for p in path.parent.iterdir() if p != path]
    assert len(copies) == 1
    assert copies[0].read_bytes() == content
    assert str(copies[0]) in capsys.readouterr().out


def test_no_earlier_weights(tmp_path):
    keep_earlier_weights(tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"save_interval": 1, "n_saved": 1}, "model_epoch=1.pt"),
        ({"save_interval": 1, "n_saved": 1, "interval_filename": "last.pt"}, "last.pt"),
        ({"save_key_metric": True, "key_metric_filename": "model.pt"}, "model.pt"),
    ],
)
def test_interrupted_save_leaves_the_former_checkpoint(tmp_path, monkeypatch, arguments, name):
    network = torch.nn.Linear(2, 2)
    engine = Engine(lambda engine, batch: None)
    engine.state.key_metric_name = "dice"

    @engine.on(Events.EPOCH_COMPLETED)
    def improve():
        engine.state.metrics["dice"] = engine.state.epoch / 10

    WholeCheckpointSaver(save_dir=str(tmp_path), save_dict={"model": network}, **arguments).attach(engine)
    engine.run([0])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    former = (tmp_path / name).read_bytes()

    def broken(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(torch, "save", broken)
        engine.run([0], max_epochs=2)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == former

    engine.run([0], max_epochs=3)
    assert len(list(tmp_path.iterdir())) == 1
