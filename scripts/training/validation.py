"""Validation during training."""

from ignite.engine import Engine, Events
from monai.engines import Evaluator

from scripts.tissues import TISSUES


class TissueDice:
    """Handler that adds the Dice of each tissue, from the details of MONAI's `MeanDice`, to an evaluator's metrics.

    Args:
        mean_dice: name of the `MeanDice` metric; the handler adds `<mean_dice>_csf`, `_gm` and `_wm`.
    """

    def __init__(self, mean_dice: str) -> None:
        self.mean_dice = mean_dice

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.add)

    def add(self, engine: Engine) -> None:
        by_tissue = engine.state.metric_details[self.mean_dice].nanmean(dim=0).tolist()
        for tissue, value in zip(TISSUES, by_tissue, strict=True):
            engine.state.metrics[f"{self.mean_dice}_{tissue}"] = value


class Validation:
    """Handler of a trainer that validates at an interval of epochs, and always after the last one.

    MONAI's ValidationHandler doesn't validate the last epochs, which have the lowest learning rate. With fewer epochs
    than the interval it validates none, so no network would be saved.

    Args:
        validator: the evaluator.
        interval: epochs from one validation to the next.
    """

    def __init__(self, validator: Evaluator, interval: int) -> None:
        self.validator = validator
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self.validate)
        engine.add_event_handler(Events.COMPLETED, self.validate_last)

    def validate(self, engine: Engine) -> None:
        self.validator.run(engine.state.epoch)

    def validate_last(self, engine: Engine) -> None:
        if engine.state.epoch % self.interval:
            self.validate(engine)
