"""The base of the handlers that write something per subject."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

from ignite.engine import Engine, Events


def segmented_subjects(engine: Engine) -> Iterator[dict[str, Any]]:
    """Yield what an evaluator has of each subject of the current batch, for handlers at ITERATION_COMPLETED.

    Yields:
        A dict with `subject` (id), `t1` (intensities), `pred` and `label` (0 background, 1 CSF, 2 GM, 3 WM), the three
        as MetaTensor (1, X, Y, Z) on the grid of the T1 file. Without a label, `label` is None or missing. On request
        also `probabilities` (4, X, Y, Z) and `uncertainty` (1, X, Y, Z), see `scripts.results.probabilities`.
    """
    for batch, output in zip(engine.state.batch, engine.state.output, strict=True):
        yield {**batch, **output}


class BackgroundWriter(ABC):
    """Handler that writes something per subject in a thread while the network computes the next subject.

    At most one subject waits to be written. An error in the thread is raised at the next subject or at the end.

    Args:
        output_dir: the folder to write to.
    """

    writing: ClassVar[WeakSet[Future[None]]] = WeakSet()  # of all handlers of this kind
    what: ClassVar[str] = ""  # what was written, printed at the end unless empty

    def __init__(self, output_dir: str) -> None:
        self.output_dir = Path(output_dir)
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.unfinished: list[Future[None]] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.begin)
        engine.add_event_handler(Events.COMPLETED, self.finish)
        if self.what:
            engine.add_event_handler(Events.COMPLETED, lambda: print(f"{self.what}: {self.output_dir}"))

    def begin(self, engine: Engine) -> None:
        self.finish()
        self.unfinished = [self.thread.submit(self.write, item) for item in segmented_subjects(engine)]
        self.writing.update(self.unfinished)

    def finish(self) -> None:
        for written in self.unfinished:
            written.result()

    @abstractmethod
    def write(self, item: dict[str, Any]) -> None:
        """Write the results of one subject, see `segmented_subjects`."""
