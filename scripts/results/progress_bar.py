"""The progress bar for scoring and segmenting."""

import logging

from ignite.engine import Engine, Events
from tqdm import tqdm

from scripts.distributed import own_rank

logger = logging.getLogger(__name__)


class SubjectProgress:
    """Handler that shows how many subjects are done: a bar in a terminal, lines elsewhere, such as in a log file.

    Of several processes only the first shows it. (Ignite's ProgressBar counts a subject when it begins.)

    Args:
        desc: what is done to the subjects.
    """

    def __init__(self, desc: str) -> None:
        self.desc = desc
        self.bar = tqdm(disable=True)

    def attach(self, engine: Engine) -> None:
        if own_rank() == 0:
            engine.add_event_handler(Events.STARTED, self.start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.step)
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda _: self.bar.close())

    def start(self, engine: Engine) -> None:
        self.bar = tqdm(desc=self.desc, total=engine.state.epoch_length, unit="subject", leave=False, disable=None)

    def step(self, engine: Engine) -> None:
        self.bar.update()
        if self.bar.disable:
            logger.info("%s: %d of %d subjects done", self.desc, engine.state.iteration, engine.state.epoch_length)
