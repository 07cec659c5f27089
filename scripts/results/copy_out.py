"""Results that go to folders given by URL."""

import logging
import os
from concurrent import futures

from ignite.engine import Engine, Events
from monai.engines import Evaluator

from scripts.data.storage import Folders, StorageError
from scripts.results.writers import BackgroundWriter

logger = logging.getLogger(__name__)


class CopyOut:
    """Handler that copies new and changed files to the folders given by URL. It may stand anywhere among the handlers.

    It copies when the engine starts, after each epoch of a trainer or each subject of an evaluator, at the end, and
    when an exception ends the run. A server that fails in between causes a warning; the next copy tries again.

    Args:
        folders: the folders of the run; plain paths among them are skipped.

    Raises:
        StorageError: files can't be copied when the engine starts or ends.
    """

    def __init__(self, folders: Folders) -> None:
        self.folders = folders.remote

    def attach(self, engine: Engine) -> None:
        # the processes on a machine share the copy, so one of them copies
        if self.folders and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            engine.add_event_handler(Events.STARTED, self.start)

    def start(self, engine: Engine) -> None:
        """Copy, and attach the rest, which must follow the handlers that write files: by now these are attached."""
        self.copy()
        if engine.has_event_handler(self.finish):  # of an earlier run
            return
        each = Events.ITERATION_COMPLETED if isinstance(engine, Evaluator) else Events.EPOCH_COMPLETED
        engine.add_event_handler(each, self.copy_if_possible)
        engine.add_event_handler(Events.COMPLETED, self.finish)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.copy_after_error)
        # first, since another handler of exceptions may raise
        on_error = engine._event_handlers[Events.EXCEPTION_RAISED]
        on_error.insert(0, on_error.pop())
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.raise_error)

    def copy(self) -> None:
        for folder in self.folders:
            folder.copy_out()

    def copy_if_possible(self) -> None:
        try:
            self.copy()
        except StorageError as error:
            logger.warning("%s; the next copy tries again", error)

    def finish(self) -> None:
        self.copy()
        if sent := [folder.url for folder in self.folders if folder.has_sent]:
            print(f"copied to {' and '.join(sent)}")

    def copy_after_error(self, error: Exception) -> None:
        if not isinstance(error, StorageError):
            futures.wait(BackgroundWriter.writing)
            self.copy_if_possible()

    def raise_error(self, error: Exception) -> None:
        raise error
