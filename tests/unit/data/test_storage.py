"""Folders by URL: copied in and out of fsspec's file systems in memory and on this machine."""

import io
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.registry import _registry
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.handlers import StatsHandler

from scripts.data import storage
from scripts.data.storage import Folders, StorageError, StoredFolder
from scripts.errors import InputError
from scripts.files import whole_files
from scripts.results.copy_out import CopyOut
from scripts.results.writers import BackgroundWriter


def files(directory: str | Path) -> dict[str, bytes]:
    """Return the content of files that aren't hidden."""
    paths = [path for path in Path(directory).rglob("[!.]*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def files_on(server: fsspec.AbstractFileSystem, folder: str = "/results") -> dict[str, bytes]:
    return {path.removeprefix(f"{folder}/"): server.cat(path) for path in server.find(folder)}


@pytest.fixture
def memory(monkeypatch) -> fsspec.AbstractFileSystem:
    """An empty server in memory that records what is fetched and sent."""
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(type(fs), "store", {})
    monkeypatch.setattr(type(fs), "pseudo_dirs", [""])
    fs.fetched, fs.sent = [], []
    get_file, put_file = fs.get_file, fs.put_file
    monkeypatch.setattr(fs, "get_file", lambda *a, **k: (fs.fetched.append(a[0]), get_file(*a, **k)), raising=False)
    monkeypatch.setattr(fs, "put_file", lambda *a: (fs.sent.append(a[1]), put_file(*a)), raising=False)
    return fs


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 0.0)


def dataset(cache: Path, url: str = "memory://data") -> Path:
    return Path(Folders(url, "out", None, str(cache)).dataset)


def results(cache: Path) -> Path:
    return Path(Folders(None, "memory://results", None, str(cache)).output)


def send(cache: Path) -> None:
    """Copy out, as another process does: all it knows is in the cache."""
    StoredFolder("memory://results", str(cache), "results").copy_out()


def test_plain_paths_stay_and_nothing_is_made(tmp_path):
    folders = Folders("data", "../out/", Path("a:b"), str(tmp_path / "cache"))
    assert (folders.dataset, folders.output, folders.checkpoints) == ("data", "../out/", Path("a:b"))
    assert Folders(None, "", None, "").dataset is None
    engine = Engine(lambda engine, batch: None)
    CopyOut(folders).attach(engine)
    assert not any(engine._event_handlers.values())
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match=r"2024: isn't text"):
        Folders(2024, "out", None, "")


def test_folders_by_url(memory, tmp_path):
    """Checkpoints and results may share a folder; only files that a run needs are copied in."""
    for name in ("last.pt", "step-5.pt", "volumes.csv", ".bidsignore", "model.pt", "subject-9-label.nii.gz"):
        memory.pipe(f"/results/{name}", b"1")
        memory.pipe(f"/models/{name}", b"1")
    folders = Folders("data", "memory://results", "memory://models/", str(tmp_path))
    assert files(folders.output).keys() == {"last.pt", "step-5.pt", "volumes.csv"}
    assert (Path(folders.output) / ".bidsignore").exists()
    assert files(folders.checkpoints).keys() == {"model.pt"}
    # a last.pt never arrives before its model.pt
    assert [folder.url for folder in folders.remote] == ["memory://models", "memory://results"]
    folders = Folders("data", "memory://results", "memory://results/", str(tmp_path))
    assert folders.output == folders.checkpoints
    assert files(folders.output).keys() == {"last.pt", "step-5.pt", "volumes.csv", "model.pt"}
    assert len(folders.remote) == 1


def test_dataset_is_copied_once_with_its_subfolders(memory, tmp_path):
    content = {"subject-1-T1.hdr": b"1", "site a/subject-2-T1.img": b"22", "site a/notes [1].txt": b""}
    for name, value in content.items():
        memory.pipe(f"/bucket/data/{name}", value)
    for name in ("data/.hidden/x", "database", "data/derivatives/x"):
        memory.pipe(f"/bucket/{name}", b"3")
    local = dataset(tmp_path, "memory://bucket/data/")
    assert re.fullmatch(r"dataset-bucket-data-[0-9a-f]{8}", local.relative_to(tmp_path).as_posix())
    assert files(local) == content
    assert dataset(tmp_path, "memory://bucket/data") == local
    assert len(memory.fetched) == 3
    assert local.stat().st_mode & 0o777 == results(tmp_path).stat().st_mode & 0o777 == 0o700


def test_what_changed_on_the_server_or_was_damaged_here_is_fetched_again(memory, tmp_path):
    for name in "abcd":
        memory.pipe(f"/data/{name}", name.encode() * 10)
    local = dataset(tmp_path)
    time.sleep(0.01)
    memory.pipe("/data/a", b"A" * 10)
    memory.rm("/data/b")
    status = (local / "c").stat()
    (local / "c").write_bytes(b"x" * 10)
    os.utime(local / "c", ns=(status.st_atime_ns, status.st_mtime_ns))
    (local / "other").touch()
    memory.fetched.clear()
    dataset(tmp_path)
    assert memory.fetched == ["/data/a", "/data/c"]
    assert files(local) == {"a": b"A" * 10, "c": b"c" * 10, "d": b"d" * 10}
    (local / storage.RECORD).write_text("{")
    memory.fetched.clear()
    dataset(tmp_path)
    assert len(memory.fetched) == 3


def test_interrupted_copy_resumes(memory, tmp_path, monkeypatch):
    for name in "abc":
        memory.pipe(f"/data/{name}", name.encode() * 100)
    get_file = memory.get_file

    def killed(source, target, **options):
        if source.endswith("b"):
            Path(target).write_bytes(b"b" * 50)
            raise KeyboardInterrupt
        get_file(source, target, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(memory, "get_file", killed)
        dataset(tmp_path)
    (local,) = tmp_path.iterdir()
    assert files(local) == {"a": b"a" * 100}
    assert files(dataset(tmp_path)) == {name: name.encode() * 100 for name in "abc"}
    assert memory.fetched == ["/data/a", "/data/b", "/data/c"]
    (local / storage.ARRIVING).write_bytes(b"half")  # as SIGKILL leaves it
    dataset(tmp_path)
    assert {path.name for path in local.iterdir()} == {"a", "b", "c", storage.RECORD, storage.LOCK}


def test_file_that_comes_short_is_not_taken(memory, tmp_path, monkeypatch, impatient):
    memory.pipe("/data/a", b"a" * 100)
    monkeypatch.setattr(memory, "get_file", lambda source, target, **_: Path(target).write_bytes(b"a" * 99))
    with pytest.raises(StorageError, match=r"memory://data: .*a was damaged on the way"):
        dataset(tmp_path)
    (local,) = tmp_path.iterdir()
    assert {path.name for path in local.iterdir()} == {storage.LOCK, storage.RECORD}


def test_file_that_does_not_end_is_cut_off(memory, tmp_path, monkeypatch):
    memory.pipe("/data/a", b"a" * 100)
    file = io.BytesIO(bytes(3 * memory.blocksize))
    monkeypatch.setattr(memory, "open", lambda *a, **k: nullcontext(file), raising=False)
    with pytest.raises(StorageError, match=r"^memory://data: a has more than the 100 bytes that the server listed; "):
        dataset(tmp_path)
    assert file.tell() == memory.blocksize
    (local,) = tmp_path.iterdir()
    assert {path.name for path in local.iterdir()} == {storage.LOCK, storage.RECORD}


def test_links_are_not_written_through(memory, tmp_path):
    memory.pipe("/data/a", b"a")
    (tmp_path / "others").write_bytes(b"mine")
    local = dataset(tmp_path / "cache")
    for name in ("a", storage.ARRIVING):
        (local / name).unlink(missing_ok=True)
        (local / name).symlink_to(tmp_path / "others")
    dataset(tmp_path / "cache")
    assert files(local) == {"a": b"a"}
    assert not (local / "a").is_symlink()
    server = tmp_path / "server"
    server.mkdir()
    (server / ".unfinished-last.pt").symlink_to(tmp_path / "others")
    folder = StoredFolder(f"file://{server}", str(tmp_path / "cache"), "results")
    for name in ("last.pt", "a/b/y"):
        (folder.local / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.local / name).write_bytes(b"1")
    folder.copy_out()
    assert not (server / "last.pt").is_symlink()
    left = {path.relative_to(server).as_posix() for path in server.rglob("*") if path.is_file()}
    assert left == {".unfinished-last.pt", "last.pt", "a/b/y"}
    assert (tmp_path / "others").read_bytes() == b"mine"


OUTSIDE = "may lead out of the folder"


@pytest.mark.parametrize(
    ("path", "size", "message"),
    [
        (
            "/data/a",
            10**18,
            r"1,000,000,000,000.0 MB don't fit into .* free in .*; make room or choose another --cache",
        ),
        ("/data/a", None, "the server doesn't give the size of /data/a"),
        ("/data", 1, "is a file; give its folder"),
        *((f"/data/{name}", 1, OUTSIDE) for name in ("../x", "a/../../x", "/x", "a//b", "..", "..\\x", "./a")),
        ("/etc/passwd", 1, OUTSIDE),
    ],
)
def test_listing_that_is_refused(memory, tmp_path, monkeypatch, path, size, message):
    monkeypatch.setattr(memory, "find", lambda *_, detail: {path: {"size": size, "type": "file"}})
    with pytest.raises(StorageError, match=f"^memory://data: .*{message}"):
        dataset(tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert memory.fetched == []


def test_results_go_out_when_new_or_changed_except_hidden_ones(memory, tmp_path):
    folder = StoredFolder("memory://results", str(tmp_path), "results")
    for name in ("last.pt", ".unfinished-1/last.pt", ".cache-2/x", ".secret"):
        (folder.local / name).parent.mkdir(exist_ok=True)
        (folder.local / name).write_bytes(b"1")
    folder.copy_out()
    assert memory.find("/results") == ["/results/last.pt"]
    assert re.fullmatch(r"/results/\.unfinished-[0-9a-f]{16}-last\.pt", memory.sent[0])  # renamed when it is whole
    folder.copy_out()
    send(tmp_path)
    results(tmp_path)
    assert (len(memory.sent), memory.fetched) == (1, [])
    (folder.local / "last.pt").write_bytes(b"2")
    folder.copy_out()
    assert memory.cat("/results/last.pt") == b"2"


def test_results_of_an_earlier_run(memory, tmp_path):
    """Results that a run couldn't send stay here. If the server has newer ones, ours are kept under another name."""
    memory.pipe("/results/last.pt", b"epoch 1")
    local = results(tmp_path)
    assert files(local) == {"last.pt": b"epoch 1"}
    for name in ("last.pt", "step-5.pt"):
        (local / name).write_bytes(b"epoch 2, while the server was away")
    results(tmp_path)
    assert set(files(local).values()) == {b"epoch 2, while the server was away"}
    memory.pipe("/results/last.pt", b"epoch 3 of another machine")
    results(tmp_path)
    assert files(local)["last.pt"] == b"epoch 3 of another machine"
    (kept,) = local.glob(".kept-*-last.pt")
    assert kept.read_bytes() == b"epoch 2, while the server was away"
    send(tmp_path)
    assert memory.cat("/results/last.pt") == b"epoch 3 of another machine"
    assert memory.cat("/results/step-5.pt") == b"epoch 2, while the server was away"
    memory.rm("/results/last.pt")
    results(tmp_path)
    assert files(local).keys() == {"step-5.pt"}
    assert kept.exists()


@pytest.mark.parametrize("on_server", [None, b"of other weights"])
def test_results_that_the_server_lost_or_got_from_elsewhere(memory, tmp_path, on_server):
    """What is sent at a start is nothing old that replaces what is new, and what is made again is sent again."""

    def run() -> Path:
        """Segment the same subject with the same weights."""
        local = results(tmp_path)
        for name in ("subject-1-label.nii.gz", "volumes.csv"):
            (local / name).write_bytes(b"the same")
        send(tmp_path)
        return local

    local = run()
    (local / "subject-2-label.nii.gz").write_bytes(b"never sent")
    memory.rm("/results", recursive=True)
    if on_server:
        memory.pipe("/results/subject-1-label.nii.gz", on_server)
    results(tmp_path)
    assert files(local) == {"subject-2-label.nii.gz": b"never sent"}
    run()
    expected = {"subject-1-label.nii.gz": b"the same", "subject-2-label.nii.gz": b"never sent"}
    assert files_on(memory) == {**expected, "volumes.csv": b"the same"}


def test_unsent_results_never_replace_newer_ones_of_another_machine(memory, tmp_path):
    """This holds also for results that a run doesn't read."""
    local = results(tmp_path)
    (local / "subject-1-label.nii.gz").write_bytes(b"old, never sent")
    memory.pipe("/results/subject-1-label.nii.gz", b"new")
    results(tmp_path)
    send(tmp_path)
    assert memory.cat("/results/subject-1-label.nii.gz") == b"new"
    assert [path.read_bytes() for path in local.glob(".kept-*")] == [b"old, never sent"]


def test_files_that_come_and_go_while_results_are_copied_out(memory, tmp_path):
    folder = StoredFolder("memory://results", str(tmp_path), "results")
    done = threading.Event()

    def write(number: int) -> None:
        while not done.is_set():
            with whole_files(folder.local) as temporary:
                (temporary / "label").write_bytes(b"whole")
            with whole_files(folder.local) as temporary:
                (temporary / f"step-{number}.pt").write_bytes(b"whole")
            (folder.local / f"step-{number}.pt").unlink()

    with ThreadPoolExecutor() as threads:
        for number in range(2):
            threads.submit(write, number)
        try:
            for _ in range(100):
                folder.copy_out()
        finally:
            done.set()
    assert set(files_on(memory).values()) == {b"whole"}


class SlowWriter(BackgroundWriter):
    def write(self, item) -> None:
        time.sleep(0.3)
        (self.output_dir / f"label-{item['subject']}").write_text("label")


def copy_out_to_memory(tmp_path: Path) -> tuple[Path, CopyOut]:
    folders = Folders(None, "memory://results", None, str(tmp_path))
    return Path(folders.output), CopyOut(folders)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("subjects", [["1", "2"], ["1", "bad"]])
def test_labels_arrive_wherever_the_handler_stands(memory, tmp_path, monkeypatch, capsys, subjects, order):
    """Labels are written in the background, and an error of a later subject doesn't keep the earlier ones back."""

    def step(engine, batch):
        if batch["subject"] == "bad":
            raise InputError("bad subject")
        return [batch]

    monkeypatch.setattr("scripts.results.writers.segmented_subjects", lambda engine: iter([engine.state.batch]))
    local, copy_out = copy_out_to_memory(tmp_path)
    engine = SupervisedEvaluator(
        torch.device("cpu"), [{"subject": subject} for subject in subjects], torch.nn.Identity(), iteration_update=step,
        val_handlers=[StatsHandler(False, False), SlowWriter(local), copy_out][::order],
    )  # fmt: skip
    engine.add_event_handler(Events.ITERATION_STARTED, lambda e: setattr(e.state, "output", None))
    if subjects == ["1", "2"]:
        engine.run()
        assert memory.find("/results") == ["/results/label-1", "/results/label-2"]
        assert capsys.readouterr().out == "copied to memory://results\n"
    else:
        with pytest.raises(InputError, match="bad subject"):
            engine.run()
        assert memory.find("/results") == ["/results/label-1"]


def trainer(local: Path, copy_out: CopyOut) -> Engine:
    engine = Engine(lambda engine, batch: None)
    copy_out.attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: (local / "last.pt").write_text(str(e.state.epoch)))
    return engine


def test_training_continues_if_an_epoch_can_not_be_copied_out(memory, tmp_path, monkeypatch, caplog, impatient):
    local, copy_out = copy_out_to_memory(tmp_path)
    engine = trainer(local, copy_out)
    put_file, there = memory.put_file, []

    def flaky(source, target):
        if engine.state.epoch == 2:
            raise ConnectionError("down")
        put_file(source, target)

    monkeypatch.setattr(memory, "put_file", flaky)
    engine.add_event_handler(Events.EPOCH_STARTED(every=1), lambda: there.append(files_on(memory)))
    engine.run([0], max_epochs=4)
    assert there == [{}, {"last.pt": b"1"}, {"last.pt": b"1"}, {"last.pt": b"3"}]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(r"memory://results: .*down.*; the next copy tries again", warning)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("down"), r"can't be read or written \(down\); check the address .*AWS_ENDPOINT_URL"),
        (PermissionError("Access Denied"), r"access denied \(Access Denied\); check the credentials"),
    ],
)
@pytest.mark.parametrize("at_start", [True, False])
def test_server_that_takes_nothing(memory, tmp_path, monkeypatch, impatient, error, message, at_start):
    """The error comes before training if there is something to send, else at its end; it says where the results are."""

    def refuse(source, target):
        raise error

    monkeypatch.setattr(memory, "put_file", refuse)
    local, copy_out = copy_out_to_memory(tmp_path)
    if at_start:
        (local / "events.out.tfevents.0").touch()
    engine = trainer(local, copy_out)
    with pytest.raises(StorageError, match=rf"^memory://results: {message}.*copied are in {local}$"):
        engine.run([0], max_epochs=2)
    assert files(local) == ({"events.out.tfevents.0": b""} if at_start else {"last.pt": b"2"})


def test_waits_grow_until_the_server_is_back(memory, tmp_path, monkeypatch):
    memory.pipe("/data/a", b"a")
    get_file, waits, failures = memory.get_file, [], [ConnectionResetError("reset"), TimeoutError(), OSError(5, "io")]
    monkeypatch.setattr(time, "sleep", waits.append)

    def flaky(source, target, **options):
        if failures:
            raise failures.pop()
        get_file(source, target, **options)

    monkeypatch.setattr(memory, "get_file", flaky)
    assert files(dataset(tmp_path)) == {"a": b"a"}
    assert waits == [1, 2, 4]


def test_processes_take_turns_at_a_copy(tmp_path):
    (tmp_path / "server").mkdir()
    for number in range(20):
        (tmp_path / "server" / str(number)).write_bytes(b"x" * 1000)
    with ThreadPoolExecutor(4) as threads:
        copies = set(threads.map(dataset, [tmp_path / "cache"] * 4, [f"file://{tmp_path}/server"] * 4))
    (copy,) = copies
    assert files(copy) == files(tmp_path / "server")


def test_folders_that_can_not_be_used(memory, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    for url, message in {
        "memory://absent": "no such folder, or no dataset in it; check the name",
        "s4://bucket": r"can't be opened \(Protocol not known: s4\); give another kind of URL",
        "s3://bucket/data": r"can't be opened \(Install s3fs .*\); install it with pip",
    }.items():
        with pytest.raises(StorageError, match=f"^{url}: {message}$"):
            dataset(tmp_path, url)
    (tmp_path / "cache").touch()
    with pytest.raises(InputError, match=r"cache: can't be written .*choose another folder$"):
        dataset(tmp_path / "cache")


@pytest.mark.parametrize(
    "url", ["sftp://me:secret@host/data", "filecache::ftp://me:sec@ret@host/data", "s3://ME:sec/ret@b"]
)
def test_password_in_a_url_is_refused_and_not_repeated(tmp_path, url):
    with pytest.raises(StorageError, match="has a password, which logs would show") as caught:
        dataset(tmp_path, url)
    assert not any(part in str(caught.value) for part in ("sec", "ret@"))
    assert list(tmp_path.iterdir()) == []
