"""Learning curves: all of the last training."""

import io

from helpers import write_log

from scripts.report import plots
from scripts.report.plots import training_history


def test_history_of_a_resumed_training_and_of_a_new_one(tmp_path):
    assert training_history(tmp_path) == {}
    write_log(tmp_path, range(1, 5), 1)
    write_log(tmp_path, range(3, 7), 2)  # stopped within epoch 3
    history = training_history(tmp_path)
    assert history["train_loss"] == {1: 1, 2: 1, 3: 2, 4: 2, 5: 2, 6: 2}
    assert list(history["val_mean_dice"]) == [6]
    assert set(history) == {"train_loss", "val_mean_dice"}
    write_log(tmp_path, range(1, 3), 3)
    assert training_history(tmp_path)["train_loss"] == {1: 3, 2: 3}


def test_history_of_a_training_that_validates_what_it_resumes(tmp_path):
    """This validation counts as epoch 1; a training that is stopped at once has nothing else."""
    write_log(tmp_path, range(1, 5), 1)
    write_log(tmp_path, range(5, 7), 2, validated_first=True)
    write_log(tmp_path, range(0), 3, validated_first=True)
    history = training_history(tmp_path)
    assert history["train_loss"] == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2}
    assert history["val_mean_dice"] == {4: 0.5, 6: 0.5}


def test_curves_show_the_log():
    history = {"train_loss": {1: 0.9, 2: 0.5}, **{tag: {2: 0.8} for tag in plots.VALIDATION_DICE}}
    loss, dice = plots.learning_curves(history).axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 0.9], [2, 0.5]]
    assert [line.get_label() for line in dice.lines] == ["mean", "CSF", "GM", "WM"]
    assert dice.lines[0].get_xydata().tolist() == [[2, 80]]


def test_loss_of_a_single_epoch_is_visible():
    figure = plots.learning_curves({"train_loss": {1: 0.9}})
    figure.savefig(drawn := io.BytesIO(), format="png")
    figure.axes[0].lines[0].set_visible(False)
    figure.savefig(without := io.BytesIO(), format="png")
    assert drawn.getvalue() != without.getvalue()
