from types import SimpleNamespace

import pytest
import torch

from scripts.machine import cgroup_memory_left, keep_freed_memory, own_device


def test_memory_setting_tells_glibc(monkeypatch):
    told = {}
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mallopt=told.__setitem__))
    keep_freed_memory()
    # M_MMAP_MAX: no block is mapped on its own; M_TRIM_THRESHOLD: none goes back
    assert told == {-4: 0, -1: -1}


def test_memory_setting_is_harmless_elsewhere(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("there is no glibc to tell"))
    keep_freed_memory()


@pytest.mark.parametrize(
    ("kind", "limit", "used", "cache"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_memory_that_containers_and_jobs_leave(tmp_path, kind, limit, used, cache):
    job = tmp_path / kind / "slurm" / "job"
    job.mkdir(parents=True)
    for folder, allowed in ((job, 900), (job.parent, 1000), (job.parent.parent, "max")):
        (folder / limit).write_text(f"{allowed}\n")
        (folder / used).write_text("700\n")
        (folder / "memory.stat").write_text(f"anon 100\n{cache} 500\n")
    own = tmp_path / "own"
    own.write_text(f"1:name=systemd:/x\n2:{kind}:/slurm/job/step\n")
    assert cgroup_memory_left(tmp_path, own) == [700, 800]
    assert cgroup_memory_left(tmp_path, tmp_path / "absent") == []
    (job / "memory.stat").unlink()
    assert cgroup_memory_left(tmp_path, own) == [200, 800]
    own.write_text("1:cpu:/slurm/job\n")
    assert cgroup_memory_left(tmp_path, own) == []


def test_the_device_is_that_of_the_rank_on_its_machine(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device() == torch.device("cpu")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("xpu"))
    assert own_device() == torch.device("xpu", 3)
    monkeypatch.delenv("LOCAL_RANK")
    assert own_device() == torch.device("xpu", 0)
