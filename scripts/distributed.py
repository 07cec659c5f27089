"""Several processes, one per device, on one or more machines; `torchrun` starts them."""

import io
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO, TypeVar

import ignite.distributed as idist
import torch.distributed
from torch import nn

from scripts.errors import OneLineErrorFilter

Item = TypeVar("Item")


def own_rank() -> int:
    """Return the number of this process among those that `torchrun` started; 0 without it."""
    return int(os.environ.get("RANK", 0))


class _Tee(io.TextIOBase):
    """A stream that writes to two streams."""

    def __init__(self, first: TextIO, second: TextIO) -> None:
        self.streams = (first, second)

    def write(self, text: str) -> int:
        for stream in self.streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()


def join(output_dir: str, device: torch.device | str) -> None:
    """Join the processes that `torchrun` started, if any; each logs and prints to `output_dir/rank-<n>.log`.

    The first process also prints to the terminal. A second call does nothing: MONAI Label initializes a config twice.

    Args:
        output_dir: the folder for the logs.
        device: that of this process; its kind decides the backend for communication.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or torch.distributed.is_initialized():
        return
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    store, rank, ranks = next(torch.distributed.rendezvous("env://"))
    # after a restart the store still has the addresses of the former processes
    store = torch.distributed.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = torch.distributed.get_default_backend_for_device(device)
    if device.type not in ("cpu", "cuda"):  # there, metrics are gathered on the CPU
        backend = f"cpu:gloo,{device.type}:{backend}"
    if "SLURM_JOB_ID" in os.environ:  # ignite would take the number of the Slurm task, and torchrun is one task
        os.environ["SLURM_LOCALID"] = os.environ["LOCAL_RANK"]
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    idist.get_rank()  # ignite's first call waits for all ranks, so all make it here
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    log = (Path(output_dir) / f"rank-{rank}.log").open("a", buffering=1)
    handler = logging.StreamHandler(log)
    handler.addFilter(OneLineErrorFilter())
    handler.setFormatter(logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))
    if rank == 0:
        sys.stdout = _Tee(sys.stdout, log)
    else:
        logging.getLogger().handlers.clear()
        sys.stdout = log
    logging.getLogger().addHandler(handler)


def leave() -> None:
    """Leave the group of processes that `join` joined."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parallel(network: nn.Module, device: torch.device | str) -> nn.Module:
    """Wrap a network so that all processes train it together, with gradients averaged at each step.

    On an accelerator the batch norms use the batches of all processes. Torch can't do so on a CPU: there each process
    uses its own batch, and the running statistics are those of the first process.

    Args:
        network: trained in place; its batch norms may be replaced, with the same parameters.
        device: the device of the network.
    """
    device = torch.device(device)
    if idist.get_world_size() == 1:
        return network
    if device.type == "cpu":
        return nn.parallel.DistributedDataParallel(network)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return nn.parallel.DistributedDataParallel(network, device_ids=[device.index])


def items_of_rank(items: Sequence[Item]) -> Sequence[Item]:
    """Return the items for this process: every nth of n processes, so that each item goes to one process.

    With more processes than items, surplus processes get an item that another has too: an engine needs at least one.
    """
    rank, ranks = idist.get_rank(), idist.get_world_size()
    return items[rank % len(items) :: ranks] if items else items


def gathered(items: Sequence[Item]) -> list[Item]:
    """Return the items of all processes, in the order before `items_of_rank`. All processes must call it."""
    if idist.get_world_size() == 1:
        return list(items)
    shares: list[list[Item] | None] = [None] * idist.get_world_size()
    torch.distributed.all_gather_object(shares, list(items))
    return [item for each in itertools.zip_longest(*shares) for item in each if item is not None]
