"""Results that go to folders given by URL."""

import logging
import os
from collections.abc import Sequence
from concurrent import futures
from typing import NoReturn

from ignite.engine import Engine, Events
from monai.engines import Evaluator

from scripts.data.storage import StorageError, StoredFolder, is_url
from scripts.results.writers import BackgroundWriter

logger = logging.getLogger(__name__)


class CopyOut:
    """Handler that copies new and changed files to the folders that are given by URL. It stands last.

    It copies when the engine starts, after each epoch of a trainer or each subject of an evaluator, and at the end,
    also where an exception is the end that no handler before this one has let out; else the next start copies. In
    between, a server that fails is worth a warning, and the next time it is tried again.

    Args:
        folders: settings such as `output_dir`; plain paths among them are passed over.
        cache_dir: as for `local_results`.

    Raises:
        StorageError: when the engine starts or ends well, if something can't be copied.
    """

    def __init__(self, folders: Sequence[str], cache_dir: str) -> None:
        urls = dict.fromkeys(folder.rstrip("/") for folder in folders if is_url(folder))
        self.folders = [StoredFolder(url, cache_dir, "results") for url in urls]

    def attach(self, engine: Engine) -> None:
        # of several processes on a machine, which share the copy, one speaks for all
        if not self.folders or int(os.environ.get("LOCAL_RANK", 0)) > 0:
            return
        each = Events.ITERATION_COMPLETED if isinstance(engine, Evaluator) else Events.EPOCH_COMPLETED
        engine.add_event_handler(Events.STARTED, self.copy)
        engine.add_event_handler(each, self.copy_if_possible)
        engine.add_event_handler(Events.COMPLETED, self.finish)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.copy_and_raise)

    def copy(self) -> None:
        for folder in self.folders:
            folder.copy_out()

    def copy_if_possible(self) -> None:
        try:
            self.copy()
        except StorageError as error:
            logger.warning("%s; it will be tried again", error)

    def finish(self) -> None:
        self.copy()
        print(f"copied to {' and '.join(folder.url for folder in self.folders)}")

    def copy_and_raise(self, error: Exception) -> NoReturn:
        if not isinstance(error, StorageError):
            futures.wait(BackgroundWriter.writing)
            self.copy_if_possible()
        raise error
