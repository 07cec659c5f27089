"""Data sets and the processes that read them."""

import gc
import os
import signal
import threading
import time

import pytest
from monai.data import Dataset
from monai.transforms import Transform
from processes import forked

from scripts.data.datasets import ReadAheadDataLoader
from scripts.errors import one_line_of


def test_processes_that_feed_a_gpu():
    class Process(Transform):
        def __call__(self, number):
            return {"number": number, "process": os.getpid()}

    before = threading.active_count()
    loader = ReadAheadDataLoader(Dataset(range(6), Process()), device="cuda", batch_size=1, num_workers=2)
    epochs = [list(loader) for _ in range(2)]
    assert [[batch["number"].item() for batch in epoch] for epoch in epochs] == [[0, 1, 2, 3, 4, 5]] * 2
    processes = [{batch["process"].item() for batch in epoch} for epoch in epochs]
    assert processes[0] == processes[1]
    assert len(processes[0] - {os.getpid()}) == 2
    began = time.monotonic()
    del loader
    gc.collect()
    # waiting for each in vain takes 5 seconds
    assert time.monotonic() - began < 4
    assert threading.active_count() <= before


def test_processes_that_are_killed_are_told_of():
    class Dying(Transform):
        def __call__(self, number):
            os.kill(os.getpid(), signal.SIGKILL)

    loader = ReadAheadDataLoader(Dataset([1], Dying()), device="cuda", batch_size=1, num_workers=1)
    with pytest.raises(RuntimeError) as caught:
        list(loader)
    assert "killed (DataLoader worker" in one_line_of(caught.value)
    assert "--train#dataloader#num_workers 0" in one_line_of(caught.value)


def test_cache_on_disk_ends_with_the_process(tmp_path):
    code = (
        "from monai.transforms import Compose, ToTensor; from scripts.data.datasets import cached_dataset;"
        "import pathlib;"
        f"d = cached_dataset([1.0, 2.0], Compose([ToTensor()]), '{tmp_path}', in_memory=False);"
        f"print(d[0].item(), d[1].item(), len(list(pathlib.Path('{tmp_path}').glob('.cache-*/*.pt'))))"
    )
    result = forked(code)
    assert result.stdout == "1.0 2.0 2\n", result.stderr
    assert not list(tmp_path.iterdir())
