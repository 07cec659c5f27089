"""The progress bar for scoring and segmenting."""

from typing import Any

from ignite.engine import Engine
from ignite.handlers.tqdm_logger import ProgressBar

from scripts.distributed import own_rank


class SubjectProgress(ProgressBar):
    """Ignite's ProgressBar, shown only by the first of several processes."""

    def attach(self, engine: Engine, *args: Any, **kwargs: Any) -> None:
        if own_rank() == 0:
            super().attach(engine, *args, **kwargs)
