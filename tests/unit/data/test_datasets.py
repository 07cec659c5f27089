import os
import threading
import time
from pathlib import Path

import pytest
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.transforms import Compose, RandomizableTransform, ToTensor, Transform
from processes import two_threads

from scripts.data import datasets
from scripts.data.datasets import CropSampler, LenientDataLoader, ReadAheadDataLoader, cached_dataset, feeding_processes
from scripts.errors import InputError


class Reader(Transform):
    """Gives a tensor of 1 MB for each number, says when, and can't read some numbers."""

    def __init__(self, unreadable=()):
        self.unreadable, self.times, self.threads = unreadable, [], []

    def __call__(self, number):
        if number in self.unreadable:
            raise InputError(f"{number}: can't be read")
        self.times.append(time.monotonic())
        self.threads.append(threading.current_thread())
        return {"image": torch.full((250_000,), float(number))}


class RandomNothing(RandomizableTransform):
    def __call__(self, item):
        return item


def numbers(batches) -> list[float]:
    return [batch["image"][0, 0].item() for batch in batches]


def test_next_batch_is_made_while_this_one_is_in_use():
    reader = Reader()
    used = []
    for _ in ReadAheadDataLoader(Dataset(range(4), reader), device="cpu", batch_size=1):
        time.sleep(0.05)
        used.append(time.monotonic())
    assert all(made < finished for made, finished in zip(reader.times[1:], used[:-1], strict=True))
    assert threading.main_thread() not in reader.threads


@pytest.mark.parametrize(("device", "expected"), [("cpu", 1), ("cuda", 2)])
def test_only_the_reader_computes_on_one_core(device, expected):
    class CoresTransform(Transform):
        def __call__(self, number):
            return torch.rand(2**20).exp().sum() * 0 + torch.get_num_threads()

    with two_threads():
        for cores in ReadAheadDataLoader(Dataset(range(3), CoresTransform()), device=device, batch_size=1):
            assert cores.item() == expected
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2


def test_all_batches_in_order_and_again():
    loader = ReadAheadDataLoader(Dataset(range(5), Reader()), device="cpu", batch_size=1)
    assert numbers(loader) == numbers(loader) == [0, 1, 2, 3, 4]
    assert numbers(ReadAheadDataLoader(Dataset([], Reader()), device="cpu", batch_size=1)) == []


def test_bad_subjects_are_passed_over_only_without_processes():
    with pytest.raises(InputError, match="--dataloader#num_workers 2: must be 0"):
        LenientDataLoader(Dataset([1], Reader()), device="cpu", num_workers=2)


def test_number_of_processes_that_feed(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    assert feeding_processes("cpu") == 0
    assert feeding_processes("cuda:0") == 11
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert feeding_processes(torch.device("cuda", 3)) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert feeding_processes("cuda") == 1


def test_error_comes_after_the_batches_before_it_and_names_its_cause():
    seen = []
    with pytest.raises(RuntimeError) as caught:
        seen += numbers(
            ReadAheadDataLoader(Dataset([1, 2], Compose([Reader(unreadable=[1])])), device="cpu", batch_size=1)
        )
    assert isinstance(caught.value.__cause__, InputError)
    with pytest.raises(RuntimeError):
        for batch in ReadAheadDataLoader(
            Dataset([1, 2, 3, 4], Compose([Reader(unreadable=[3])])), device="cpu", batch_size=1
        ):
            seen += numbers([batch])
    assert seen == [1, 2]


@pytest.mark.parametrize(("megabytes", "kind"), [(100, CacheDataset), (15, PersistentDataset)])
def test_subjects_beyond_half_the_memory_are_kept_on_disk(tmp_path, monkeypatch, megabytes, kind):
    monkeypatch.setattr(datasets, "available_memory", lambda device: megabytes * 1_000_000)
    reader = Reader()
    dataset = cached_dataset(range(10), Compose([reader, RandomNothing()]), str(tmp_path / "cache"))
    assert isinstance(dataset, kind)
    assert len(reader.times) == 11  # before anything is asked of it: processes may share it
    for _ in range(2):
        assert [item["image"][0].item() for item in dataset] == list(range(10))
    # once to measure, once to keep
    assert len(reader.times) == 11


def test_no_subjects_no_measuring(tmp_path):
    assert len(cached_dataset([], Compose([ToTensor()]), str(tmp_path / "cache"))) == 0


def test_cache_of_a_killed_process_goes_with_the_next_and_those_of_the_living_stay(tmp_path):
    def cache() -> set[Path]:
        there = set(tmp_path.iterdir())
        cached_dataset([1.0], Compose([ToTensor()]), str(tmp_path), in_memory=False)
        return set(tmp_path.iterdir()) - there

    first = cache()
    left = tmp_path / ".cache-left"
    left.mkdir()
    (left / ".lock").touch()  # which nobody holds
    mine = tmp_path / ".cache-mine"  # a person's own
    mine.mkdir()
    second = cache()
    assert set(tmp_path.iterdir()) == first | second | {mine}
    assert len(first | second) == 2


def test_subjects_in_memory_are_cut_from_uncopied_and_unchanged():
    given = []

    class RandomCrop(RandomizableTransform):
        def __call__(self, item):
            given.append(item["image"])
            return {"image": item["image"][: int(torch.randint(1, 9, ()))]}

    cached = cached_dataset([3], Compose([Reader(), RandomCrop()]), "unused", in_memory=True)
    assert {len(cached[0]["image"]) for _ in range(50)} > {1, 8}
    assert len({image.data_ptr() for image in given}) == 1
    assert torch.equal(given[0], torch.full((250_000,), 3.0))


def test_every_subject_gives_as_many_patches_in_an_order_of_each_epoch():
    sampler = CropSampler(Dataset(range(9)), num_crops=36, seed=3)
    epochs = []
    for epoch in (1, 2, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert len(sampler) == 36
    assert epochs[0] == epochs[2] != epochs[1]
    assert all(order.count(subject) == 4 for order in epochs for subject in range(9))
    assert epochs[0] != list(CropSampler(Dataset(range(9)), num_crops=36, seed=4))


def test_processes_share_out_the_patches_of_one(monkeypatch):
    whole = list(CropSampler(Dataset(range(3)), num_crops=8, seed=0))
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr("ignite.distributed.get_rank", lambda rank=rank: rank)
        sampler = CropSampler(Dataset(range(3)), num_crops=8, seed=0)
        shares.append(list(sampler))
        assert len(sampler) == 4
    # a batch of two on each has what one process has in a batch of four
    assert [shares[rank][i] for i in range(4) for rank in range(2)] == whole


def test_others_stand_in_where_there_are_no_subjects(tmp_path, caplog):
    dataset = cached_dataset([], Compose([Reader()]), str(tmp_path), fallback=[5, 6])
    assert [item["image"][0].item() for item in dataset] == [5, 6]
    assert "no subject is left to validate: the training subjects (2) are used" in caplog.text
    assert len(cached_dataset([1], Compose([Reader()]), str(tmp_path), fallback=[5, 6])) == 1
    assert len(cached_dataset([], Compose([Reader()]), str(tmp_path))) == 0
