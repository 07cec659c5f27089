"""Datasets that are prepared once, and loaders that prepare batches ahead."""

import atexit
import contextlib
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from filelock import FileLock, Timeout
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset
from monai.transforms import Compose, RandomizableTrait
from torch.utils.data import DistributedSampler, RandomSampler
from tqdm import trange
from typing_extensions import Self

from scripts.distributed import gathered
from scripts.errors import InputError, input_error_in
from scripts.files import UNFINISHED
from scripts.machine import available_memory

logger = logging.getLogger(__name__)

LOCK = ".lock"

_locks: list[FileLock] = []  # of the caches of this process


def _first_random(transform: Compose) -> int | None:
    """Index of the first random transform; those before it run once per subject."""
    return transform.get_index_of_first(lambda t: isinstance(t, RandomizableTrait))


def _prepared_bytes(item: Any, transform: Compose) -> int:
    """Memory of a subject after the transforms before the first random one."""
    prepared = transform(item, end=_first_random(transform))
    return sum(value.nbytes for value in prepared.values() if isinstance(value, torch.Tensor))


class PatchDraw(int):
    """The index of a subject, with the seed for the random transforms of one patch."""

    def __new__(cls, subject: int, seed: int) -> Self:
        draw = super().__new__(cls, subject)
        draw.seed = seed
        return draw

    def __getnewargs__(self) -> tuple[int, int]:
        return int(self), self.seed


class _SeededPatches:
    """Mixin of a dataset: a `PatchDraw` gives the same patch in any worker or process, whatever was cut before."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, PatchDraw):
            self.transform.set_random_state(index.seed)
        return super().__getitem__(index)


class _InMemory(_SeededPatches, CacheDataset):
    pass


class _OnDisk(_SeededPatches, PersistentDataset):
    pass


def cached_dataset(
    data: Sequence[Any],
    transform: Compose,
    cache_dir: str,
    num_workers: int = 2,
    in_memory: bool | None = None,
    fallback: Sequence[Any] = (),
) -> Dataset:
    """Return a dataset that loads and prepares each subject once, and keeps it in memory or on disk.

    Args:
        data: the subjects.
        transform: prepares a subject. Its first random transform and those after it run each time. They must not
            change their input, as MONAI's don't: in memory they get it uncopied.
        cache_dir: the folder for a cache on disk. The cache is this process's own and is removed when it ends; those of
            killed processes are removed first.
        num_workers: threads that prepare subjects.
        in_memory: whether to keep subjects in memory; None does if half of the available memory is enough, judged by
            the first subject.
        fallback: used if `data` is empty: the training subjects, if none is left to validate.
    """
    if not data and fallback:
        logger.warning(
            "no subject is left to validate: the training subjects (%d) are used, so scores are too high", len(fallback)
        )
        data = fallback
    if in_memory is None:
        needed = len(data) * _prepared_bytes(data[0], transform) if data else 0
        available = available_memory(torch.device("cpu"))
        in_memory = needed <= available / 2
        if not in_memory:
            logger.info("%d subjects need %.1f GB of %.1f GB available", len(data), needed / 1e9, available / 1e9)
    if in_memory:
        # copying a volume takes longer than cutting a crop from it
        return _InMemory(data, transform, num_workers=num_workers, copy_cache=_first_random(transform) is None)
    folder = _cache_folder(cache_dir)
    logger.info("prepared subjects are kept in %s until the end", folder)
    dataset = _OnDisk(data, transform, cache_dir=folder)
    # now and in one process: another could read a file that is half written
    for index in trange(len(dataset), desc="Loading dataset"):
        dataset[index]
    return dataset


def _cache_folder(parent: str) -> str:
    """Create a folder for this process, and remove those of killed processes.

    A folder is locked before it gets its name and while its process lives. On a file system without locks no folder is
    removed.
    """
    Path(parent).mkdir(parents=True, exist_ok=True)
    for lock in Path(parent).glob(f".cache-*/{LOCK}"):  # without a lock file, it is another program's
        with contextlib.suppress(Timeout, OSError), FileLock(lock, timeout=0, fallback_to_soft=False):
            shutil.rmtree(lock.parent, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))
    with contextlib.suppress(OSError):
        _locks.append(lock := FileLock(made / LOCK, fallback_to_soft=False))
        lock.acquire()
    folder = made.rename(made.with_name(made.name.replace(UNFINISHED, ".cache-")))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)


def _compute_on_one_core() -> None:
    """Limit the present thread to one core; the caller must then reset the number for other threads."""
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread keeps the number that it first reads


def feeding_processes(device: torch.device | str) -> int:
    """Return how many processes should cut patches for the network of this process.

    0 on a CPU: the network needs its cores, and a thread is enough. For a GPU, all cores but one, up to 16, divided
    among the processes that `torchrun` starts on a machine. 0 on systems other than Linux, where each process would
    copy the subjects.
    """
    if torch.device(device).type == "cpu" or not hasattr(os, "sched_getaffinity"):
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(16, cores - 1))


class ReadAheadDataLoader(DataLoader):
    """MONAI's DataLoader, preparing the next batch in a thread or in processes while the present one is in use.

    If the network is on the CPU, the thread computes on one core. With more threads than cores, OpenMP would let all
    of them sleep at each step of the network, and training would take a quarter longer.

    In MONAI's ThreadDataLoader, an error in the thread silently ends the iteration, so the remaining subjects are lost.
    Here the error is raised to the caller.

    Args:
        dataset: the subjects.
        device: the device of the network.
        num_workers: processes that prepare batches; they persist over epochs.
        settings: further arguments of MONAI's DataLoader.
    """

    def __init__(self, dataset: Dataset, device: torch.device | str, num_workers: int = 0, **settings: Any) -> None:
        super().__init__(dataset, num_workers=num_workers, persistent_workers=num_workers > 0, **settings)
        self.device = torch.device(device)

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()
        # processes read ahead by themselves, and don't end in time if an executor's thread started them
        if self.num_workers > 0:
            yield from batches
            return
        with ThreadPoolExecutor(max_workers=1) as reader:
            if self.device.type == "cpu":
                cores = torch.get_num_threads()
                reader.submit(_compute_on_one_core).result()
                torch.set_num_threads(cores)
            ahead = reader.submit(self.next_batch, batches)
            while (batch := ahead.result()) is not None:
                ahead = reader.submit(self.next_batch, batches)
                yield batch

    def next_batch(self, batches: Iterator[Any]) -> Any | None:
        """Return the next batch, or None after the last one."""
        return next(batches, None)


class LenientDataLoader(ReadAheadDataLoader):
    """ReadAheadDataLoader that skips subjects that can't be used, and keeps the reasons in `refused`.

    Its length counts skipped subjects, so its evaluator needs the handler `BadSubjects`.

    Args:
        dataset: the subjects.
        stop_at_bad_subject: raise the first InputError instead.
        num_workers: must be 0: processes don't pass on an InputError unchanged.
        settings: further arguments of the DataLoader.

    Raises:
        InputError: `num_workers` isn't 0.
    """

    def __init__(
        self, dataset: Dataset, stop_at_bad_subject: bool = False, num_workers: int = 0, **settings: Any
    ) -> None:
        if num_workers != 0:
            raise InputError(f"--dataloader#num_workers {num_workers}: must be 0, or a bad subject would end the run")
        super().__init__(dataset, **settings)
        self.stop_at_bad_subject = stop_at_bad_subject
        self.refused: list[str] = []

    def next_batch(self, batches: Iterator[Any]) -> Any | None:
        while True:
            try:
                return super().next_batch(batches)
            except Exception as error:
                input_error = input_error_in(error)
                if input_error is None or self.stop_at_bad_subject:
                    raise
                self.refused.append(str(input_error))


class BadSubjects:
    """Handler for an evaluator with a `LenientDataLoader` that lists bad subjects and then fails, at the end.

    It must precede the handlers that write, which need at least one subject.

    Args:
        unread: reasons why other subjects never reached the loader.
    """

    def __init__(self, unread: Sequence[str]) -> None:
        self.unread = unread

    def attach(self, engine: Engine) -> None:
        # else ignite would start again to reach the number of subjects
        engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda engine: engine.terminate_epoch())
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.end)

    def end(self, engine: Engine) -> None:
        """Fail at once if no process segmented a subject, else after all other handlers."""
        if not any(gathered([engine.state.iteration])):
            self.refuse(engine)
        if not engine.has_event_handler(self.refuse, Events.COMPLETED):
            engine.add_event_handler(Events.COMPLETED, self.refuse)

    def refuse(self, engine: Engine) -> None:
        """Raise InputError if any process had bad subjects: with the reason of a single one, else after a list."""
        reasons = list(dict.fromkeys(gathered([*self.unread, *engine.data_loader.refused])))
        if len(reasons) == 1:
            raise InputError(reasons[0])
        for reason in reasons:
            print(f"not segmented: {reason}")
        if reasons:
            raise InputError(f"{len(reasons)} subjects are not segmented, see above; fix or remove them")


def epoch_seed(*numbers: int) -> int:
    """Return a 32-bit seed from several numbers, such as a training's seed, the epoch and the rank."""
    return int(np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(1)[0])


class CropSampler(DistributedSampler):
    """Sampler that draws the subject of each patch of an epoch: all equally often, in random order.

    Order and patches depend only on seed and epoch. Each of several processes draws the same order and takes its share,
    so that their batches together have the patches of a single process.

    Args:
        dataset: the subjects.
        num_crops: patches per epoch, over all processes.
        seed: of order and patches.
    """

    def __init__(self, dataset: Dataset, num_crops: int, seed: int) -> None:
        ranks = idist.get_world_size()
        super().__init__(dataset, num_replicas=ranks, rank=idist.get_rank(), seed=seed)
        self.num_samples = -(-num_crops // ranks)
        self.total_size = self.num_samples * ranks

    def __iter__(self) -> Iterator[PatchDraw]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        order = RandomSampler(self.dataset, num_samples=self.total_size, generator=generator)
        for position, subject in itertools.islice(enumerate(order), self.rank, None, self.num_replicas):
            yield PatchDraw(subject, epoch_seed(self.seed, self.epoch, position))
