"""Validation during training."""

from ignite.engine import Engine, Events
from monai.engines import Evaluator

from scripts.tissues import TISSUES


class TissueDice:
    """Handler that adds the Dice of each tissue to the metrics of an evaluator, from the details of its mean Dice.

    Args:
        mean_dice: name of the MONAI `MeanDice` metric; `<mean_dice>_csf`, `_gm` and `_wm` are added.
    """

    def __init__(self, mean_dice: str) -> None:
        self.mean_dice = mean_dice

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.add)

    def add(self, engine: Engine) -> None:
        by_tissue = engine.state.metric_details[self.mean_dice].nanmean(dim=0).tolist()
        for tissue, value in zip(TISSUES, by_tissue, strict=True):
            engine.state.metrics[f"{self.mean_dice}_{tissue}"] = value


class LastEpochValidator:
    """Handler that validates when training ends, unless its last epoch was validated at the interval.

    Without it a training of fewer epochs than the interval would save no network, and the last epochs of any other,
    which have the lowest learning rate, might never be tried.

    Args:
        validator: the evaluator.
        interval: the epochs between two validations, as MONAI's ValidationHandler has it.
    """

    def __init__(self, validator: Evaluator, interval: int) -> None:
        self.validator = validator
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self.validate)

    def validate(self, engine: Engine) -> None:
        if engine.state.epoch % self.interval:
            self.validator.run(engine.state.epoch)
