"""Datasets that are prepared once, and batches that are made ahead."""

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
    """Place of the first random transform; those before it are done once."""
    return transform.get_index_of_first(lambda t: isinstance(t, RandomizableTrait))


def _prepared_bytes(item: Any, transform: Compose) -> int:
    """Memory of a subject after the transforms that aren't random."""
    prepared = transform(item, end=_first_random(transform))
    return sum(value.nbytes for value in prepared.values() if isinstance(value, torch.Tensor))


class Draw(int):
    """The index of a subject, and the seed of what is random in a patch of it."""

    def __new__(cls, subject: int, seed: int) -> Self:
        draw = super().__new__(cls, subject)
        draw.seed = seed
        return draw

    def __getnewargs__(self) -> tuple[int, int]:
        return int(self), self.seed


class _SeededDraws:
    """Of a dataset: a `Draw` gives the same patch whichever worker or process cuts it, and whatever was cut before."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Draw):
            self.transform.set_random_state(index.seed)
        return super().__getitem__(index)


class _InMemory(_SeededDraws, CacheDataset):
    pass


class _OnDisk(_SeededDraws, PersistentDataset):
    pass


def cached_dataset(
    data: Sequence[Any],
    transform: Compose,
    cache_dir: str,
    num_workers: int = 2,
    in_memory: bool | None = None,
    fallback: Sequence[Any] = (),
) -> Dataset:
    """Subjects that are loaded and prepared once: kept in memory if half of what is available holds them, else on disk.

    Args:
        data: the subjects.
        transform: what prepares them; from its first random transform on it is applied anew each time, and these
            transforms must leave what they are given unchanged, as MONAI's do: in memory they get it uncopied.
        cache_dir: folder for the cache on disk, which is made for this process and removed when it ends; those of
            killed processes are removed first.
        num_workers: threads that prepare.
        in_memory: whether to keep them in memory; None decides by the first subject's size.
        fallback: the subjects that are taken where `data` has none: those of training, where none is left to validate.
    """
    if not data and fallback:
        logger.warning("none is left to validate: those that train (%d) do, so scores are too high", len(fallback))
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
    # here and now: processes that prepared one subject at the same time would read what another has half written
    for index in trange(len(dataset), desc="Loading dataset"):
        dataset[index]
    return dataset


def _cache_folder(parent: str) -> str:
    """A folder of this process's own; those of processes that were killed are removed.

    Each is locked while its process lives, and has its name once it is. Where there are no locks none is removed.
    """
    Path(parent).mkdir(parents=True, exist_ok=True)
    for lock in Path(parent).glob(f".cache-*/{LOCK}"):  # others of that name are somebody else's
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
    """Keep the present thread to one core; the caller has to set the number again that the others shall have."""
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes the number when it first asks for it, and keeps it


def feeding_processes(device: torch.device | str) -> int:
    """Processes that cut patches for the network of this process.

    None where it is on the CPU, whose cores it needs itself: a thread is enough. For a GPU, which would wait for one,
    all cores but one, up to 16; the processes that `torchrun` starts on a machine share them. None on other systems
    than Linux: there each process would have a copy of the subjects.
    """
    if torch.device(device).type == "cpu" or not hasattr(os, "sched_getaffinity"):
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(16, cores - 1))


class ReadAheadDataLoader(DataLoader):
    """MONAI's DataLoader, but the next batch is made while the present one is in use: in a thread, or in processes.

    Where the network is on the CPU that thread computes on one core: with threads of its own for a computation there
    would be more of them than cores, and then OpenMP lets all of them sleep at each step of the network, which takes a
    quarter longer.

    MONAI's ThreadDataLoader does so too, but an error in its thread only ends the iteration, and the subjects from
    there on would be missing without a word. Here it is raised where it would be without a thread.

    Args:
        dataset: as MONAI's.
        device: where the network is.
        num_workers: processes that prepare batches; they are kept from epoch to epoch.
        settings: others of MONAI's DataLoader.
    """

    def __init__(self, dataset: Dataset, device: torch.device | str, num_workers: int = 0, **settings: Any) -> None:
        super().__init__(dataset, num_workers=num_workers, persistent_workers=num_workers > 0, **settings)
        self.device = torch.device(device)

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()
        # processes read ahead themselves; those that an executor's thread had started didn't end when they should
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
        """The next of the batches, or None after the last one."""
        return next(batches, None)


class LenientDataLoader(ReadAheadDataLoader):
    """ReadAheadDataLoader that passes over subjects that can't be used, and has the reasons in `refused`.

    Its length counts them too, so an evaluator needs `BadSubjects` beside it.

    Args:
        dataset: the subjects.
        stop_at_bad_subject: raise the first InputError instead.
        num_workers: 0; from processes no InputError comes as it is.
        settings: others of the DataLoader.

    Raises:
        InputError: `num_workers` is another.
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
    """Handler for an evaluator with a `LenientDataLoader`: it fails at the end if subjects were bad, and lists them.

    It stands before the handlers that write: they need a subject.

    Args:
        unread: why other subjects never reached the loader.
    """

    def __init__(self, unread: Sequence[str]) -> None:
        self.unread = unread

    def attach(self, engine: Engine) -> None:
        # else ignite would start over to reach the number of subjects
        engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda engine: engine.terminate_epoch())
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.end)

    def end(self, engine: Engine) -> None:
        """Refuse at once if no process segmented anything, else when all other handlers are done."""
        if not any(gathered([engine.state.iteration])):
            self.refuse(engine)
        if not engine.has_event_handler(self.refuse, Events.COMPLETED):
            engine.add_event_handler(Events.COMPLETED, self.refuse)

    def refuse(self, engine: Engine) -> None:
        """List the bad subjects of all processes, if there are any.

        Raises:
            InputError: there are; if there is one, its reason.
        """
        reasons = list(dict.fromkeys(gathered([*self.unread, *engine.data_loader.refused])))
        if len(reasons) == 1:
            raise InputError(reasons[0])
        for reason in reasons:
            print(f"not segmented: {reason}")
        if reasons:
            raise InputError(f"{len(reasons)} subjects are not segmented, see above; mend or remove them")


def epoch_seed(*numbers: int) -> int:
    """A seed of 32 bits from several numbers, such as a training's own, the epoch and the rank."""
    return int(np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(1)[0])


class CropSampler(DistributedSampler):
    """Which subjects the patches of an epoch are cut from: every subject as often as any other, in random order.

    The order and each patch depend on the seed and the epoch only. Of several processes each draws the same and takes
    its share, so that a batch of all together has the patches that one process would give it.

    Args:
        dataset: the subjects.
        num_crops: patches an epoch, of all processes together.
        seed: for another order.
    """

    def __init__(self, dataset: Dataset, num_crops: int, seed: int) -> None:
        ranks = idist.get_world_size()
        super().__init__(dataset, num_replicas=ranks, rank=idist.get_rank(), seed=seed)
        self.num_samples = -(-num_crops // ranks)
        self.total_size = self.num_samples * ranks

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        order = RandomSampler(self.dataset, num_samples=self.total_size, generator=generator)
        for position, subject in itertools.islice(enumerate(order), self.rank, None, self.num_replicas):
            yield Draw(subject, epoch_seed(self.seed, self.epoch, position))
