"""Memory and devices of the machine, container or job that this process runs on."""

import ctypes
import os
import platform
from pathlib import Path

import psutil
import torch

from scripts.errors import InputError

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# by the kind of a control group, none in version 2: files of its limit and of what is used of it, and the entry of
# memory.stat that tells what of this files take that weren't read lately
CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def left_by_groups(mount: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[int]:
    """Bytes that Linux's control groups leave to this process: that of its container or job and those above it.

    None where there are no groups or no limits. What they hold of files that were read counts as free, for it is given
    up when memory is needed.

    Args:
        mount: where the groups lie, of version 1 or 2.
        own: tells which ones are this process's.
    """
    left = []
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kind, path = line.split(":", 2)
        if kind not in CGROUP_FILES:
            continue
        limit, used, cache = CGROUP_FILES[kind]
        top = mount / kind
        group = top / path.lstrip("/")
        for each in (group, *group.parents):
            # in a container its own group may lie at the top, and none where it is told to be
            if not each.is_relative_to(top) or not (each / limit).is_file():
                continue
            if (allowed := (each / limit).read_text().strip()) == "max":
                continue
            stat = each / "memory.stat"
            held = dict(row.split() for row in stat.read_text().splitlines()) if stat.is_file() else {}
            left.append(int(allowed) - int((each / used).read_text()) + int(held.get(cache, 0)))
    return left


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device: what is free on a GPU; else what system, container and user leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [psutil.virtual_memory().available, *left_by_groups()]
    process = psutil.Process()
    if hasattr(process, "rlimit"):  # Linux
        allowed = process.rlimit(psutil.RLIMIT_AS)[0]
        if allowed != psutil.RLIM_INFINITY:
            limits.append(allowed - process.memory_info().vms)
    return max(0, min(limits))


def keep_freed_memory() -> None:
    """Let the C library keep large blocks for the next step instead of giving them back and clearing new ones.

    Activations are tens of MB and come and go each step; a training step on a CPU gets 1.1 to 1.4 times as fast, for
    about a quarter more memory. Only glibc can be told so; elsewhere nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # from malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)  # never


def own_device() -> torch.device:
    """The accelerator that PyTorch finds, of several the one of this process's rank on its machine; else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator().type
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))


def require_device(device: torch.device | str) -> None:
    """Refuse, by InputError, a device that torch doesn't know, that this machine hasn't or that can't be used."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # each kind of device has its own
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: can't be used ({reason}); give one like cpu or cuda:0") from error
