import errno

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from monai.engines import SupervisedEvaluator

from scripts.errors import InputError
from scripts.network import SkipDenseSeg
from scripts.training.checkpoints import (
    BestWeightsSaver,
    DivergenceStopper,
    EarlierWeightsKeeper,
    FoundWeightsValidator,
    StepWeightsSaver,
)


@pytest.fixture
def checkpoint(tmp_path):
    network = SkipDenseSeg()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt", network


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


@pytest.mark.parametrize("kind", ["DivergenceStopper", "StepWeightsSaver"])
@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_network_that_is_not_finite_is_not_written(tmp_path, kind, name):
    network = torch.nn.BatchNorm3d(2)

    def step(engine, batch):
        if engine.state.iteration == 3:
            getattr(network, name).data[1] = torch.nan

    engine = Engine(step)
    handler = (
        DivergenceStopper(network) if kind == "DivergenceStopper" else StepWeightsSaver(tmp_path, network, 1, 9, False)
    )
    handler.attach(engine)
    where = "epoch 2" if kind == "DivergenceStopper" else "step 3"
    with pytest.raises(InputError, match=f"^{where}: the training diverged, weights are NaN or infinite; give a lower"):
        engine.run([0, 0], max_epochs=3)
    assert {path.name for path in tmp_path.iterdir()} <= {"step-1.pt", "step-2.pt"}
