"""A training that is killed goes on as if it hadn't been."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import ROOT, refusal, same, save_subject, train_in_process
from processes import KILLED, assert_one_line, bundle, forked, training, two_threads

from scripts.network import SkipDenseSeg
from scripts.weights import read_checkpoint


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    """A training on two threads, as those that are compared with it."""
    output = tmp_path_factory.mktemp("uninterrupted")
    with two_threads():
        yield output, train_in_process(dataset, output)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["writing", "computing"])
def test_killed_training_goes_on_as_if_it_had_not_been(dataset, tmp_path, uninterrupted, moment, capsys):
    output = tmp_path / "out"
    result = forked(KILLED, moment, *training(dataset, output, "--epochs", "3", "--synthetic_share", "0.5"))
    assert result.returncode == -signal.SIGKILL
    complete = 1 if moment == "writing" else 2
    assert torch.load(output / "last.pt", weights_only=True)["progress"]["epoch"] == complete
    losses = train_in_process(dataset, output, resume=True)
    assert f"resumes after epoch {complete} of 3" in capsys.readouterr().out
    expected_output, expected_losses = uninterrupted
    assert losses == {step: loss for step, loss in expected_losses.items() if step > 2 * complete}
    for name in ("last.pt", "model.pt"):
        assert same(*(torch.load(folder / name, weights_only=True) for folder in (output, expected_output))), name


@pytest.mark.slow
def test_nothing_to_resume_starts_at_the_first_epoch(dataset, tmp_path, uninterrupted, capsys):
    assert train_in_process(dataset, tmp_path, resume=True) == uninterrupted[1]
    assert f"{tmp_path}/last.pt doesn't exist: training starts at the first epoch" in capsys.readouterr().out


def test_finished_training_has_nothing_left_to_do(dataset, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted[0], tmp_path / "out")
    assert train_in_process(dataset, tmp_path / "out", resume=True) == {}
    first, second = ((folder / "model.pt").read_bytes() for folder in (uninterrupted[0], tmp_path / "out"))
    assert first == second


def set_back_to_epoch_2(finished: Path, output: Path) -> Path:
    """A copy of a finished training that has its last epoch before it, and had its best, of 0.99, in the first."""
    shutil.copytree(finished, output)
    state = torch.load(output / "last.pt", weights_only=True)
    state["progress"] |= {"epoch": 2, "best_metric": 0.99, "best_metric_epoch": 1}
    state["lr_scheduler"] |= {"last_epoch": 4, "_step_count": 5}
    torch.save(state, output / "last.pt")
    return output


def test_worse_epoch_after_resuming_does_not_replace_the_best_network(dataset, tmp_path, uninterrupted):
    output = set_back_to_epoch_2(uninterrupted[0], tmp_path / "out")
    best = (output / "model.pt").read_bytes()
    assert set(train_in_process(dataset, output, resume=True)) == {5, 6}
    assert (output / "model.pt").read_bytes() == best
    assert torch.load(output / "last.pt", weights_only=True)["progress"]["best_metric"] == 0.99


def test_best_network_of_another_training_is_replaced_and_kept(dataset, tmp_path, uninterrupted, capsys):
    output = set_back_to_epoch_2(uninterrupted[0], tmp_path / "out")
    others = (ROOT / "models" / "model.pt").read_bytes()
    (output / "model.pt").write_bytes(others)
    train_in_process(dataset, output, resume=True)
    assert f"{output}/model.pt isn't the best network so far" in capsys.readouterr().out
    assert (output / "model.pt").read_bytes() != others
    assert others in [path.read_bytes() for path in output.glob("model-*.pt")]


def test_training_anew_keeps_the_state_of_the_former(dataset, tmp_path, uninterrupted):
    shutil.copy(uninterrupted[0] / "last.pt", tmp_path)
    former = (tmp_path / "last.pt").read_bytes()
    train_in_process(dataset, tmp_path, epochs=1)
    assert former in [path.read_bytes() for path in tmp_path.glob("last-*.pt")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 5}, "its training began with epochs 3, not 5"),
        ({"crops_per_epoch": 4}, "its training began with steps per epoch 2, not 4"),
        ({"optimizer#_target_": "torch.optim.Adam"}, "its training began with optimizer 'MuonAdamW', not 'Adam'"),
        ({"learning_rate": 0.1}, "its training began with learning_rate 0.006, not 0.1"),
        ({"network_def#growth_rate": 8}, "a checkpoint of another network"),
        ({"network_def#dropout_prob": 0.1}, "its training began with network_def "),
        ({"loss#include_background": True}, "its training began with loss _modules dice include_background False, "),
        ({"optimizer#weight_decay": 0.5}, "optimizer state param_groups 0 weight_decay 0.01, not 0.5"),
        ({"lr_scheduler#div_factor": 10}, "its training began with optimizer state param_groups 0 lr "),
        ({"train#augmentation#1#prob": 0.2}, "its training began with transforms transforms 15 prob 0.5, not 0.2"),
        ({"foreground_margin": 2}, "its training began with foreground_margin 16, not 2"),
        ({"precision": "bf16"}, "its training began with precision 'auto', not 'bf16'"),
        ({"val_interval": 2}, "its training began with val_interval 1, not 2"),
        ({"loss_scale": 128.0}, "its training began with loss_scale None, not 128.0"),
        ({"window_size": [64, 64, 64]}, "its training began with window_size 'auto', not [64, 64, 64]"),
        ({"val_subjects": [2]}, "its training began with subjects "),
        ({"resume": "false"}, "--resume false: must be True or False"),
    ],
)
def test_state_of_another_training(dataset, tmp_path, uninterrupted, settings, message):
    shutil.copy(uninterrupted[0] / "last.pt", tmp_path)
    state = (tmp_path / "last.pt").read_bytes()
    assert message in refusal(train_in_process, dataset, tmp_path, **{"resume": True} | settings)
    assert (tmp_path / "last.pt").read_bytes() == state
    assert not (tmp_path / "model.pt").exists()


def test_another_subject_among_those_that_train(dataset, tmp_path, uninterrupted):
    shutil.copytree(dataset, tmp_path / "data")
    for path in dataset.glob("subject-1-*"):
        shutil.copy(path, tmp_path / "data" / path.name.replace("-1-", "-77-"))
    shutil.copy(uninterrupted[0] / "last.pt", tmp_path)
    message = refusal(train_in_process, tmp_path / "data", tmp_path, resume=True)
    assert "its training began with subjects " in message


def test_same_settings_in_other_words(dataset, tmp_path, uninterrupted, capsys):
    shutil.copytree(uninterrupted[0], tmp_path / "out")
    assert train_in_process(dataset, tmp_path / "out", resume=True, val_subjects=["9"]) == {}
    assert "resumes after epoch 3 of 3" in capsys.readouterr().out


def test_training_that_replaced_what_it_started_from_goes_on(dataset, tmp_path, capsys):
    torch.save(SkipDenseSeg().state_dict(), tmp_path / "model.pt")
    started = {"start_from": str(tmp_path / "model.pt"), "epochs": 1}
    train_in_process(dataset, tmp_path, **started)
    # batch norms count their batches
    assert read_checkpoint(str(tmp_path / "model.pt"))["features.norm0.num_batches_tracked"] == 2
    assert train_in_process(dataset, tmp_path, resume=True, **started) == {}
    assert "resumes after epoch 1 of 1" in capsys.readouterr().out


def test_subjects_as_monai_label_hands_them_on(brains, tmp_path):
    """It tells images and labels, and no ids."""
    data = tmp_path / "data"
    save_subject(data, "1", brains[0])
    item = {"image": [str(data / f"subject-1-{kind}.hdr") for kind in ("T1", "T2")]}
    item["label"] = str(data / "subject-1-label.hdr")
    lists = {"train#dataset#data": [item], "validate#dataset#data": [item]}
    assert len(train_in_process(data, tmp_path / "out", epochs=1, **lists)) == 2
    assert train_in_process(data, tmp_path / "out", epochs=1, resume=True, **lists) == {}


def test_file_that_is_not_the_state_of_this_training(dataset, tmp_path, uninterrupted):
    """Weights alone; the state of a version that didn't have a setting; half a file, of which the command says so."""
    last = tmp_path / "last.pt"
    shutil.copy(uninterrupted[0] / "model.pt", last)
    message = refusal(train_in_process, dataset, tmp_path, resume=True)
    assert message.startswith(f"{last}: isn't the state of this training")
    state = torch.load(uninterrupted[0] / "last.pt", weights_only=True)
    del state["settings"]["synthetic_share"]
    torch.save(state, last)
    message = refusal(train_in_process, dataset, tmp_path, resume=True)
    assert "last.pt: has no record of synthetic_share, so another version" in message
    last.write_bytes((uninterrupted[0] / "last.pt").read_bytes()[:5000])
    assert_one_line(bundle(*training(dataset, tmp_path, "--resume", "True")), f"{last}: can't be read as a checkpoint")
