import errno
import io
import zipfile

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from monai.engines import SupervisedEvaluator

from scripts.errors import InputError
from scripts.network import SkipDenseSeg
from scripts.training.checkpoints import BestWeightsSaver, EarlierWeightsKeeper, FoundWeightsValidator, StepWeightsSaver
from scripts.weights import checkpoint_paths, holds, load_weights, starting_network


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
    with pytest.raises(InputError, match=f"{path}: is packed"):
        load_weights(network, str(path))


def test_truncated_checkpoint(checkpoint):
    path, network = checkpoint
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="can't be read as a checkpoint"):
        load_weights(network, str(path))


@pytest.mark.parametrize("content", [{"model": 3}, dict.fromkeys(SkipDenseSeg().state_dict(), 3)])
def test_file_of_other_things_does_not_hold_the_network(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    assert not holds(tmp_path / "model.pt", SkipDenseSeg())


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


@pytest.fixture
def evaluator():
    """An engine whose key metric is that of the epoch: 1 in the first, 3 in the second, 2 in the third."""
    engine = Engine(lambda engine, batch: None)
    engine.state.best_metric, engine.state.best_metric_epoch = -1, -1

    @engine.on(Events.EPOCH_COMPLETED)
    def compare():
        metric = (1, 3, 2)[engine.state.epoch - 1]
        if metric > engine.state.best_metric:
            engine.state.best_metric, engine.state.best_metric_epoch = metric, engine.state.epoch

    return engine


def counting(engine):
    """A network of one weight that is the number of the step, as training would leave it."""
    network = torch.nn.Linear(1, 1, bias=False)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: network.weight.data.fill_(engine.state.iteration))
    return network


def weight(path) -> float:
    return torch.load(path, weights_only=True)["weight"].item()


def test_best_network_is_kept(tmp_path, evaluator):
    BestWeightsSaver(str(tmp_path / "new" / "model.pt"), counting(evaluator)).attach(evaluator)
    evaluator.run([0], max_epochs=3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.pt"]
    assert weight(tmp_path / "new" / "model.pt") == 2


def test_checkpoint_that_holds_a_network(checkpoint):
    path, network = checkpoint
    assert holds(path, network)
    assert not holds(path.with_name("absent.pt"), network)
    assert not holds(path, SkipDenseSeg())
    assert not holds(path, SkipDenseSeg(block_config=(4,)))
    torch.save({"model": network.state_dict(), "epoch": 3}, path)
    assert holds(path, network)
    path.write_bytes(path.read_bytes()[:-1000])
    assert not holds(path, network)


@pytest.mark.parametrize(
    ("weights", "found", "left", "replaced"),
    [
        ([1.0, 1.5], 2.0, 2.0, False),  # nothing better than what was found
        ([1.0, 3.0], 2.0, 3.0, True),
        ([3.0, 2.5], 2.0, 3.0, True),
        ([1.0, 0.5], None, 1.0, True),  # another file was found than training starts from
    ],
)
def test_weights_found_are_replaced_by_better_ones_only(tmp_path, weights, found, left, replaced):
    path = tmp_path / "model.pt"
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(2.0)
    torch.save(network.state_dict() if found else {"weight": torch.tensor([[9.0]])}, path)
    content = path.read_bytes()
    # scores a network by its weight
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}],
        network=network,
        decollate=False,
        key_val_metric={"weight": Average(output_transform=lambda output: output["pred"].item())},
        val_handlers=[BestWeightsSaver(str(path), network)],
    )
    trainer = Engine(lambda engine, batch: network.weight.data.fill_(weights[engine.state.epoch - 1]))
    FoundWeightsValidator(str(path), network, evaluator).attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(trainer.state.epoch))
    trainer.run([0], max_epochs=2)
    assert weight(path) == left
    assert (path.read_bytes() != content) == replaced


def test_interrupted_save_leaves_the_former_checkpoint(tmp_path, evaluator, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(b"former")
    BestWeightsSaver(str(path), counting(evaluator)).attach(evaluator)

    def broken(state, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=r"can't be written .*No space left.*make room"),
    ):
        patch.setattr(torch, "save", broken)
        evaluator.run([0])
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"former"


def test_newest_step_checkpoints_are_kept_also_after_resuming(tmp_path):
    engine = Engine(lambda engine, batch: None)
    StepWeightsSaver(str(tmp_path), counting(engine), interval=3, keep=2, resume=False).attach(engine)
    engine.run(range(5), max_epochs=2)
    assert {path.name: weight(path) for path in tmp_path.iterdir()} == {"step-6.pt": 6, "step-9.pt": 9}
    resumed = Engine(lambda engine, batch: None)

    @resumed.on(Events.STARTED)
    def count_on():
        resumed.state.epoch, resumed.state.iteration = 2, 10

    StepWeightsSaver(str(tmp_path), counting(resumed), interval=3, keep=2, resume=True).attach(resumed)
    resumed.run(range(5), max_epochs=3)
    assert {path.name for path in tmp_path.iterdir()} == {"step-12.pt", "step-15.pt"}


def test_files_of_like_names_stay(tmp_path):
    for name in ("step-best.pt", "step-0002.pt", "step-1.pt.bak"):
        (tmp_path / name).touch()
    engine = Engine(lambda engine, batch: None)
    StepWeightsSaver(str(tmp_path), counting(engine), interval=1, keep=1, resume=False).attach(engine)
    engine.run(range(3))
    assert {path.name for path in tmp_path.iterdir()} == {"step-best.pt", "step-0002.pt", "step-1.pt.bak", "step-3.pt"}


def test_step_checkpoints_of_an_earlier_training_are_not_replaced(tmp_path):
    (tmp_path / "step-6.pt").write_bytes(b"earlier")
    engine = Engine(lambda engine, batch: None)
    StepWeightsSaver(str(tmp_path), counting(engine), interval=3, keep=2, resume=False).attach(engine)
    with pytest.raises(InputError, match=r"step-6.pt: is of an earlier training; choose another --output_dir"):
        engine.run(range(10))
    assert (tmp_path / "step-6.pt").read_bytes() == b"earlier"


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
