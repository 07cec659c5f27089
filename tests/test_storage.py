"""Folders by URL: on fsspec's own file systems, and on an S3 server on this machine, whole, failing and refusing."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, bundle, last_line, s3_server, server_environment
from fsspec.registry import _registry
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.engines import SupervisedEvaluator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.data import storage
from scripts.data.storage import StorageError, StoredFolder, local_dataset, local_results
from scripts.errors import InputError
from scripts.files import whole_files
from scripts.network import SkipDenseSeg
from scripts.results.copy_out import CopyOut
from scripts.results.tables import read_csv
from scripts.results.writers import BackgroundWriter

EVALUATE = "['configs/train.json','configs/evaluate.json']"


def files(directory: str | Path) -> dict[str, bytes]:
    """What a copy holds, but for hidden files."""
    directory = Path(directory)
    paths = [path for path in directory.rglob("*") if path.is_file()]
    names = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
    return {name: content for name, content in names.items() if not re.search(r"(^|/)\.", name)}


@pytest.fixture
def memory(monkeypatch) -> fsspec.AbstractFileSystem:
    """A server in memory, empty, that counts what is fetched and sent."""
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


@pytest.mark.parametrize("folder", ["data", "/nowhere/data", "../data/", "", "a:b", Path("data")])
def test_plain_path_stays_as_it_is_and_nothing_is_made(tmp_path, folder):
    cache = tmp_path / "cache"
    assert local_dataset(folder, str(cache)) == folder
    assert local_results(folder, str(cache), ["model.pt"]) == folder
    engine = Engine(lambda engine, batch: None)
    CopyOut([folder, folder], str(cache)).attach(engine)
    assert not any(engine.has_event_handler(CopyOut.copy, event) for event in Events)
    assert not cache.exists()


def test_dataset_is_copied_once_with_its_subfolders(memory, tmp_path):
    content = {"subject-1-T1.hdr": b"1", "site a/subject-2-T1.img": b"22", "site a/notes [1].txt": b""}
    for name, value in content.items():
        memory.pipe(f"/bucket/data/{name}", value)
    memory.pipe("/bucket/data/.hidden/x", b"3")
    memory.pipe("/bucket/database", b"4")
    local = local_dataset("memory://bucket/data/", str(tmp_path))
    assert re.fullmatch(r"dataset-bucket-data-[0-9a-f]{8}", Path(local).relative_to(tmp_path).as_posix())
    assert files(local) == content
    assert len(memory.fetched) == 3
    assert local_dataset("memory://bucket/data", str(tmp_path)) == local
    assert len(memory.fetched) == 3


def test_what_changed_on_the_server_or_was_damaged_here_is_fetched_again(memory, tmp_path):
    for name in "abcd":
        memory.pipe(f"/data/{name}", name.encode() * 10)
    local = Path(local_dataset("memory://data", str(tmp_path)))
    time.sleep(0.01)
    memory.pipe("/data/a", b"A" * 10)
    memory.rm("/data/b")
    status = (local / "c").stat()
    (local / "c").write_bytes(b"x" * 10)
    os.utime(local / "c", ns=(status.st_atime_ns, status.st_mtime_ns))
    memory.fetched.clear()
    local_dataset("memory://data", str(tmp_path))
    assert sorted(memory.fetched) == ["/data/a", "/data/c"]
    assert files(local) == {"a": b"A" * 10, "c": b"c" * 10, "d": b"d" * 10}
    (local / storage.RECORD).write_text("{")
    memory.fetched.clear()
    local_dataset("memory://data", str(tmp_path))
    assert len(memory.fetched) == 3


def test_interrupted_copy_goes_on_where_it_stopped(memory, tmp_path, monkeypatch):
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
        local_dataset("memory://data", str(tmp_path))
    (local,) = tmp_path.iterdir()
    assert files(local) == {"a": b"a" * 100}
    assert files(local_dataset("memory://data", str(tmp_path))) == {name: name.encode() * 100 for name in "abc"}
    assert memory.fetched == ["/data/a", "/data/b", "/data/c"]
    assert {path.name for path in local.iterdir()} == {"a", "b", "c", storage.RECORD, storage.LOCK}


def test_file_that_comes_short_is_never_taken(memory, tmp_path, monkeypatch, impatient):
    memory.pipe("/data/a", b"a" * 100)
    monkeypatch.setattr(memory, "get_file", lambda source, target, **_: Path(target).write_bytes(b"a" * 99))
    with pytest.raises(StorageError, match=r"memory://data: .*a was damaged on the way"):
        local_dataset("memory://data", str(tmp_path))
    (local,) = tmp_path.iterdir()
    assert files(local) == {}


def test_more_than_there_is_room_for_is_not_begun(memory, tmp_path, monkeypatch):
    listed = {f"/data/{name}": {"size": 10**18, "type": "file"} for name in "ab"}
    monkeypatch.setattr(memory, "find", lambda path, detail: listed)
    with pytest.raises(
        StorageError, match=r"^memory://data: 2,000,000,000,000.0 MB are to be copied, and .*; make roo"
    ):
        local_dataset("memory://data", str(tmp_path))
    assert memory.fetched == []


class Endless(io.RawIOBase):
    """A file of which more comes than was said."""

    def __init__(self) -> None:
        self.given = 0

    def read(self, number: int) -> bytes:
        self.given += number
        return bytes(number) if self.given < 100 * number else b""


def test_file_that_does_not_end_is_cut_off(memory, tmp_path, monkeypatch):
    memory.pipe("/data/a", b"a" * 100)
    file = Endless()
    monkeypatch.setattr(memory, "open", lambda *a, **k: file, raising=False)
    with pytest.raises(StorageError, match=r"^memory://data: a has more than the 100 bytes that the server said; "):
        local_dataset("memory://data", str(tmp_path))
    assert file.given == memory.blocksize
    (local,) = tmp_path.iterdir()
    assert {path.name for path in local.iterdir()} <= {storage.LOCK}


def test_links_in_the_cache_are_not_written_through(memory, tmp_path):
    memory.pipe("/data/a", b"a")
    (tmp_path / "others").write_bytes(b"mine")
    local = Path(local_dataset("memory://data", str(tmp_path / "cache")))
    for name in ("a", ".unfinished-a"):
        (local / name).unlink(missing_ok=True)
        (local / name).symlink_to(tmp_path / "others")
    local_dataset("memory://data", str(tmp_path / "cache"))
    assert (tmp_path / "others").read_bytes() == b"mine"
    assert files(local) == {"a": b"a"}
    assert not (local / "a").is_symlink()


def test_links_in_a_folder_of_results_are_not_written_through(tmp_path):
    (tmp_path / "others").write_bytes(b"mine")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / ".unfinished-last.pt").symlink_to(tmp_path / "others")
    folder = StoredFolder(f"file://{tmp_path}/results", str(tmp_path / "cache"), "results")
    (folder.local / "last.pt").write_bytes(b"1")
    folder.copy_out()
    assert (tmp_path / "others").read_bytes() == b"mine"
    assert not (tmp_path / "results" / "last.pt").is_symlink()


def test_copies_are_for_nobody_else_to_read(memory, tmp_path):
    memory.pipe("/data/a", b"a")
    for local in (local_dataset("memory://data", str(tmp_path)), local_results("memory://data", str(tmp_path), ["a"])):
        assert Path(local).stat().st_mode & 0o777 == 0o700


def test_what_a_killed_copy_left_is_removed(memory, tmp_path):
    memory.pipe("/data/a", b"a")
    local = Path(local_dataset("memory://data", str(tmp_path)))
    (local / ".unfinished-copy-x").mkdir()
    (local / ".unfinished-copy-x" / "file").write_bytes(b"half")
    local_dataset("memory://data", str(tmp_path))
    assert {path.name for path in local.iterdir()} == {"a", storage.RECORD, storage.LOCK}


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/outside", "a//b", "..", "..\\outside", "./a"])
def test_names_that_lead_out_of_the_folder(memory, tmp_path, monkeypatch, name):
    info = {"name": f"/data/{name}", "size": 1, "type": "file"}
    monkeypatch.setattr(memory, "find", lambda path, detail: {info["name"]: info})
    with pytest.raises(StorageError, match="may lead out of the folder"):
        local_dataset("memory://data", str(tmp_path / "cache"))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert memory.fetched == []


def test_name_that_is_not_below_the_folder(memory, tmp_path, monkeypatch):
    info = {"name": "/etc/passwd", "size": 1, "type": "file"}
    monkeypatch.setattr(memory, "find", lambda path, detail: {info["name"]: info})
    with pytest.raises(StorageError, match="may lead out of the folder"):
        local_dataset("memory://data", str(tmp_path / "cache"))


def test_folder_of_this_machine_by_url(tmp_path):
    server = tmp_path / "server"
    (server / "data" / "sub").mkdir(parents=True)
    (server / "data" / "sub" / "x").write_bytes(b"1")
    local = local_dataset(f"file://{server}/data", str(tmp_path / "cache"))
    assert files(local) == {"sub/x": b"1"}
    results = StoredFolder(f"file://{server}/results", str(tmp_path / "cache"), "results")
    (results.local / "a" / "b").mkdir(parents=True)
    (results.local / "a" / "b" / "y").write_bytes(b"2")
    results.copy_out()
    assert files(server / "results") == {"a/b/y": b"2"}
    assert [path.name for path in (server / "results").rglob("*") if path.is_file()] == ["y"]


def test_results_go_out_when_new_or_changed_and_never_hidden_ones(memory, tmp_path):
    folder = StoredFolder("memory://results", str(tmp_path), "results")
    for name in ("last.pt", ".unfinished-1/last.pt", ".cache-2/x", ".secret"):
        (folder.local / name).parent.mkdir(exist_ok=True)
        (folder.local / name).write_bytes(b"1")
    folder.copy_out()
    assert memory.find("/results") == ["/results/last.pt"]
    assert re.fullmatch(r"/results/\.unfinished-[0-9a-f]{16}-last\.pt", memory.sent[0])  # moved when it was whole
    folder.copy_out()
    (folder.local / "last.pt").touch()
    folder.copy_out()
    # another process knows from the record
    StoredFolder("memory://results", str(tmp_path), "results").copy_out()
    assert len(memory.sent) == 1
    (folder.local / "last.pt").write_bytes(b"2")
    folder.copy_out()
    assert memory.cat("/results/last.pt") == b"2"


def test_results_of_an_earlier_run_are_taken_from_the_server(memory, tmp_path):
    """What a run left here and couldn't send stays, unless the server has something newer; then it is kept aside."""
    names = ["last.pt", "volumes.csv"]
    memory.pipe("/results/last.pt", b"epoch 1")
    memory.pipe("/results/subject-9-label.nii.gz", b"not needed")
    local = Path(local_results("memory://results", str(tmp_path), names))
    assert files(local) == {"last.pt": b"epoch 1"}
    (local / "last.pt").write_bytes(b"epoch 2, never copied out")
    local_results("memory://results", str(tmp_path), names)
    assert files(local) == {"last.pt": b"epoch 2, never copied out"}
    memory.pipe("/results/last.pt", b"epoch 3 of another machine")
    local_results("memory://results", str(tmp_path), names)
    assert files(local) == {"last.pt": b"epoch 3 of another machine"}
    (kept,) = local.glob(".kept-*-last.pt")
    assert kept.read_bytes() == b"epoch 2, never copied out"
    memory.rm("/results/last.pt")
    local_results("memory://results", str(tmp_path), names)
    assert files(local) == {}
    assert len(list(local.glob(".kept-*"))) == 1


def test_results_that_were_never_sent_go_out_at_the_next_start(memory, tmp_path):
    local = Path(local_results("memory://results", str(tmp_path), ["*.pt"]))
    (local / "step-5.pt").write_bytes(b"while the server was away")
    local_results("memory://results", str(tmp_path), ["*.pt"])
    StoredFolder("memory://results", str(tmp_path), "results").copy_out()
    assert memory.cat("/results/step-5.pt") == b"while the server was away"


@pytest.mark.parametrize("on_server", [None, b"of other weights"])
def test_results_that_the_server_lost_or_got_from_elsewhere_go_out_when_they_are_made_again(
    memory, tmp_path, on_server
):
    def run() -> Path:
        """Segments the same subject with the same weights."""
        local = Path(local_results("memory://results", str(tmp_path), ["volumes.csv"]))
        for name in ("subject-1-label.nii.gz", "volumes.csv"):
            (local / name).write_bytes(b"the same")
        StoredFolder("memory://results", str(tmp_path), "results").copy_out()
        return local

    local = run()
    (local / "subject-2-label.nii.gz").write_bytes(b"never copied out")
    memory.rm("/results", recursive=True)
    if on_server:
        memory.pipe("/results/subject-1-label.nii.gz", on_server)
    local_results("memory://results", str(tmp_path), ["volumes.csv"])
    # what is sent when a run starts is nothing old that replaces what is new
    assert files(local) == {"subject-2-label.nii.gz": b"never copied out"}
    run()
    expected = {"subject-1-label.nii.gz", "subject-2-label.nii.gz", "volumes.csv"}
    assert {path.removeprefix("/results/") for path in memory.find("/results")} == expected
    assert memory.cat("/results/subject-1-label.nii.gz") == memory.cat("/results/volumes.csv") == b"the same"


def test_files_that_come_and_go_while_results_are_copied_out(memory, tmp_path):
    folder = StoredFolder("memory://results", str(tmp_path), "results")
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            with whole_files(folder.local) as temporary:
                (temporary / "label").write_bytes(b"whole")

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(300):
            folder.copy_out()
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert memory.cat("/results/label") == b"whole"


def test_server_that_does_not_tell_sizes(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "find", lambda *a, **k: {"/data/a": {"size": None, "type": "file"}}, raising=False)
    with pytest.raises(StorageError, match="memory://data: the server doesn't say how large /data/a is"):
        local_dataset("memory://data", str(tmp_path))


def test_own_results_are_not_fetched_back(memory, tmp_path):
    folder = StoredFolder("memory://results", str(tmp_path), "results")
    (folder.local / "model.pt").write_bytes(b"weights")
    folder.copy_out()
    assert files(local_results("memory://results/", str(tmp_path), ["model.pt"])) == {"model.pt": b"weights"}
    assert memory.fetched == []


class SlowWriter(BackgroundWriter):
    def write(self, item) -> None:
        time.sleep(0.3)
        (self.output_dir / f"label-{item['subject']}").write_text("label")


def evaluator(subjects, *handlers) -> SupervisedEvaluator:
    def step(engine, batch):
        if batch["subject"] == "bad":
            raise InputError("bad subject")
        return [batch]

    loader = [{"subject": subject} for subject in subjects]
    engine = SupervisedEvaluator(
        torch.device("cpu"), loader, torch.nn.Identity(), iteration_update=step, val_handlers=handlers
    )
    engine.add_event_handler(Events.ITERATION_STARTED, lambda e: setattr(e.state, "output", None))
    return engine


def segmented(engine) -> Iterator[dict]:
    yield engine.state.batch


def test_labels_written_in_the_background_are_copied_out_at_the_end(memory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scripts.results.writers.segmented_subjects", segmented)
    copy_out = CopyOut(["memory://out", "memory://out/", "plain"], str(tmp_path))
    evaluator("12", SlowWriter(copy_out.folders[0].local), copy_out).run()
    assert memory.find("/out") == ["/out/label-1", "/out/label-2"]
    assert capsys.readouterr().out == "copied to memory://out\n"


def test_finished_subjects_are_copied_out_when_a_later_one_is_bad(memory, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.results.writers.segmented_subjects", segmented)
    copy_out = CopyOut(["memory://out"], str(tmp_path))
    with pytest.raises(InputError, match="bad subject"):
        evaluator(["1", "bad"], SlowWriter(copy_out.folders[0].local), copy_out).run()
    assert memory.find("/out") == ["/out/label-1"]


def trainer(folder: Path, copy_out: CopyOut, epochs: int = 3) -> Engine:
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: (folder / "last.pt").write_text(str(e.state.epoch)))
    copy_out.attach(engine)
    return engine


def test_training_goes_on_where_an_epoch_can_not_be_copied_out(memory, tmp_path, monkeypatch, caplog, impatient):
    copy_out = CopyOut(["memory://out"], str(tmp_path))
    engine = trainer(copy_out.folders[0].local, copy_out)
    put_file, there = memory.put_file, []

    def flaky(source, target):
        if engine.state.epoch == 2:
            raise ConnectionError("down")
        put_file(source, target)

    monkeypatch.setattr(memory, "put_file", flaky)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: there.append(memory.cat("/out/last.pt")))
    engine.run([0], max_epochs=3)
    assert there == [b"1", b"1", b"3"]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "memory://out" in warning
    assert "down" in warning
    assert "tried again" in warning


def test_results_that_never_reach_the_server_are_an_error_that_says_where_they_are(
    memory, tmp_path, monkeypatch, impatient
):
    def down(source, target):
        raise ConnectionError("down")

    monkeypatch.setattr(memory, "put_file", down)
    copy_out = CopyOut(["memory://out"], str(tmp_path))
    local = copy_out.folders[0].local
    with pytest.raises(StorageError, match=rf"memory://out: .*down.*lies in {local}"):
        trainer(local, copy_out).run([0], max_epochs=2)
    assert files(local) == {"last.pt": b"2"}


def test_place_that_can_not_be_written_is_refused_before_training(memory, tmp_path, monkeypatch):
    def forbidden(source, target):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(memory, "put_file", forbidden)
    copy_out = CopyOut(["memory://out"], str(tmp_path))
    (copy_out.folders[0].local / "events.out.tfevents.0").touch()
    epochs = []
    engine = Engine(lambda engine, batch: epochs.append(1))
    copy_out.attach(engine)
    with pytest.raises(StorageError, match=r"access is refused \(Access Denied\); check the credentials"):
        engine.run([0], max_epochs=1)
    assert epochs == []


def test_waits_grow_until_the_server_is_back(memory, tmp_path, monkeypatch):
    memory.pipe("/data/a", b"a")
    get_file, waits, failures = memory.get_file, [], [ConnectionResetError("reset"), TimeoutError(), OSError(5, "io")]
    monkeypatch.setattr(time, "sleep", waits.append)

    def flaky(source, target, **options):
        if failures:
            raise failures.pop()
        get_file(source, target, **options)

    monkeypatch.setattr(memory, "get_file", flaky)
    assert files(local_dataset("memory://data", str(tmp_path))) == {"a": b"a"}
    assert waits == [1, 2, 4]


def test_processes_take_turns_at_a_copy(tmp_path):
    for number in range(20):
        (tmp_path / "server").mkdir(exist_ok=True)
        (tmp_path / "server" / str(number)).write_bytes(b"x" * 1000)
    copies = []
    threads = [
        threading.Thread(target=lambda: copies.append(local_dataset(f"file://{tmp_path}/server", f"{tmp_path}/cache")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(copies) == 4
    assert len(set(copies)) == 1
    assert files(copies[0]) == files(tmp_path / "server")


def test_dataset_that_is_not_there(memory, tmp_path):
    with pytest.raises(StorageError, match="memory://absent: no such folder, or nothing in it"):
        local_dataset("memory://absent", str(tmp_path))
    memory.pipe("/data/file", b"1")
    with pytest.raises(StorageError, match="memory://data/file: is a file; name its folder"):
        local_dataset("memory://data/file", str(tmp_path))


def test_unknown_kind_of_url(tmp_path):
    with pytest.raises(StorageError, match=r"s4://bucket: can't be opened \(Protocol not known: s4\)"):
        local_dataset("s4://bucket", str(tmp_path))


def test_absent_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(StorageError, match=r"^s3://bucket/data: a package is missing; Install s3fs .*pip install$"):
        local_dataset("s3://bucket/data", str(tmp_path))


@pytest.mark.parametrize(
    "url", ["sftp://me:secret@host/data", "filecache::ftp://me:sec@ret@host/data", "s3://ME:sec/ret@b"]
)
def test_password_in_a_url_is_refused_and_not_repeated(tmp_path, url):
    with pytest.raises(StorageError, match="has a password in it") as caught:
        local_dataset(url, str(tmp_path))
    assert not any(part in str(caught.value) for part in ("sec", "ret@"))
    assert list(tmp_path.iterdir()) == []


def test_cache_that_can_not_be_made(memory, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(StorageError, match="choose another --cache_dir"):
        local_dataset("memory://data", str(tmp_path / "cache"))


# an S3 server, and one that stands before it and fails


def connect(monkeypatch, port: int) -> fsspec.AbstractFileSystem:
    """Point `s3://` of this process to a port; an argument besides, or fsspec would take an earlier connection."""
    for name, value in server_environment(port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://127.0.0.1:{port}"})
    return fsspec.filesystem("s3")


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def s3(s3_port, monkeypatch) -> fsspec.AbstractFileSystem:
    """The server, with an empty bucket named `brains`, also for commands that the test runs."""
    fs = connect(monkeypatch, s3_port)
    if fs.exists("brains"):
        fs.rm("brains", recursive=True)
    fs.mkdir("brains")
    return fs


@contextmanager
def failing_proxy(port: int, failures: int, reply_bytes: int = 0) -> Iterator[tuple[int, list[int]]]:
    """Before a server, a port whose first `failures` connections are dropped after so many bytes of the reply.

    Gives the port and a list that grows with each dropped connection.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    dropped: list[int] = []
    lock = threading.Lock()

    def pump(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        try:
            while data := source.recv(2**16 if limit is None else min(2**16, limit)):
                sink.sendall(data)
                if limit is not None and (limit := limit - len(data)) <= 0:
                    break
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(client: socket.socket) -> None:
        with lock:
            fails = len(dropped) < failures
            if fails:
                dropped.append(1)
        with client:
            if fails and not reply_bytes:
                return
            with socket.create_connection(("127.0.0.1", port)) as server:
                there = threading.Thread(target=pump, args=(client, server, None), daemon=True)
                there.start()
                pump(server, client, reply_bytes if fails else None)
                there.join(30)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # closed at the end
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield listener.getsockname()[1], dropped
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join(30)


def test_s3_folder_in_and_out(s3, tmp_path):
    s3.pipe("brains/data/sub/a", b"a" * 10)
    s3.pipe("brains/data/", b"")  # as consoles make folders
    s3.pipe("brains/data/sub/", b"")
    local = local_dataset("s3://brains/data", str(tmp_path))
    assert files(local) == {"sub/a": b"a" * 10}
    results = StoredFolder("s3://brains/out", str(tmp_path), "results")
    (results.local / "last.pt").write_bytes(b"1")
    results.copy_out()
    assert s3.find("brains/out") == ["brains/out/last.pt"]
    assert s3.cat("brains/out/last.pt") == b"1"


def test_s3_etag_is_checked(s3, tmp_path, monkeypatch, impatient):
    s3.pipe("brains/data/a", b"a" * 10)
    get_file = s3.get_file

    def damaging(source, target, **options):
        get_file(source, target, **options)
        Path(target).write_bytes(b"b" * 10)

    monkeypatch.setattr(s3, "get_file", damaging)
    with pytest.raises(StorageError, match="a was damaged on the way"):
        local_dataset("s3://brains/data", str(tmp_path))
    # the ETag of a file that is encrypted with a key of its owner isn't held to be an MD5
    s3.call_s3(
        "put_object", Bucket="brains", Key="data/a", Body=b"c" * 10, ServerSideEncryption="aws:kms", SSEKMSKeyId="key"
    )
    assert files(local_dataset("s3://brains/data", str(tmp_path))) == {"a": b"b" * 10}


def test_s3_file_that_grew_since_it_was_listed(s3, tmp_path, monkeypatch):
    s3.pipe("brains/data/a", b"a" * 10)
    find = s3.find

    def find_then_grow(*a, **k):
        listed = find(*a, **k)
        s3.pipe("brains/data/a", b"a" * 11)
        return listed

    monkeypatch.setattr(s3, "find", find_then_grow)
    with pytest.raises(StorageError, match=r"s3://brains/data: a has more than the 10 bytes .*, run again"):
        local_dataset("s3://brains/data", str(tmp_path))


def test_s3_upload_in_parts_has_no_md5_and_is_copied_once(s3, tmp_path, monkeypatch):
    content = os.urandom(11 * 2**20)
    (tmp_path / "large").write_bytes(content)
    s3.put_file(str(tmp_path / "large"), "brains/data/large", chunksize=5 * 2**20)
    assert "-" in s3.info("brains/data/large")["ETag"]
    local = local_dataset("s3://brains/data", str(tmp_path / "cache"))
    assert files(local) == {"large": content}

    def unexpected(source, target, **_):
        raise AssertionError

    monkeypatch.setattr(s3, "get_file", unexpected)
    local_dataset("s3://brains/data", str(tmp_path / "cache"))


def test_s3_missing_bucket(s3, tmp_path):
    for give in (local_dataset, lambda *a: local_results(*a, ["model.pt"])):
        with pytest.raises(StorageError, match="s3://absent/data: no such bucket or folder"):
            give("s3://absent/data", str(tmp_path))
    assert not s3.exists("absent")
    # a folder that isn't there yet will be made
    assert files(local_results("s3://brains/new/folder", str(tmp_path), ["model.pt"])) == {}


def test_s3_wrong_credentials(tmp_path, monkeypatch):
    with s3_server(INITIAL_NO_AUTH_ACTION_COUNT="0") as port:
        connect(monkeypatch, port)
        with pytest.raises(StorageError, match=r"s3://brains/data: access is refused .*AWS_ACCESS_KEY_ID") as caught:
            local_dataset("s3://brains/data", str(tmp_path))
        assert "not-a-real-secret" not in str(caught.value)


def test_s3_without_credentials(s3, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setitem(fsspec.config.conf["s3"], "use_listings_cache", True)  # else the earlier connection serves
    with pytest.raises(StorageError, match=r"access is refused \(Unable to locate credentials\)"):
        local_dataset("s3://brains/data", str(tmp_path))


@pytest.mark.parametrize("reply_bytes", [0, 300_000])
def test_s3_server_that_drops_connections_for_a_while(s3, s3_port, tmp_path, monkeypatch, reply_bytes):
    content = {f"subject-{number}-T1.img": os.urandom(500_000) for number in range(3)}
    for name, value in content.items():
        s3.pipe(f"brains/data/{name}", value)
    failures = 4
    with failing_proxy(s3_port, failures, reply_bytes) as (port, dropped):
        connect(monkeypatch, port)
        assert files(local_dataset("s3://brains/data", str(tmp_path))) == content
        assert len(dropped) == failures
    with failing_proxy(s3_port, failures, min(reply_bytes, 100)) as (port, dropped):
        connect(monkeypatch, port)
        folder = StoredFolder("s3://brains/out", str(tmp_path), "results")
        (folder.local / "last.pt").write_bytes(content["subject-1-T1.img"])
        folder.copy_out()
        assert len(dropped) == failures
    assert s3.cat("brains/out/last.pt") == content["subject-1-T1.img"]


def test_s3_server_that_is_away_longer_than_its_client_tries(s3, s3_port, tmp_path, monkeypatch, caplog):
    """More failures than the client's own tries: here the waits of this module carry on."""
    s3.pipe("brains/data/a", b"a")
    with failing_proxy(s3_port, 3) as (port, dropped):
        connect(monkeypatch, port)
        fs = fsspec.filesystem("s3")
        monkeypatch.setattr(fs, "retries", 1)
        monkeypatch.setattr(fs, "config_kwargs", {"retries": {"max_attempts": 0}})
        assert files(local_dataset("s3://brains/data", str(tmp_path))) == {"a": b"a"}
        assert len(dropped) == 3
    assert any("trying again in 1 s" in record.getMessage() for record in caplog.records)


def test_s3_server_that_is_not_there(tmp_path, monkeypatch, impatient):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        fs = connect(monkeypatch, free.getsockname()[1])
        monkeypatch.setattr(fs, "config_kwargs", {"retries": {"max_attempts": 0}})
        with pytest.raises(StorageError, match=r"s3://brains/data: the server can't be reached .*AWS_ENDPOINT_URL"):
            local_dataset("s3://brains/data", str(tmp_path))


# the commands as a person runs them


def by_url(*arguments: str, cache: Path) -> tuple[str, ...]:
    return (*arguments, "--dataset_dir", "s3://brains/data", "--cache_dir", str(cache))


TRAIN = ("run", "training", "--config_file", "configs/train.json")


def run_by_path(configs: list[str], run_id: str, dataset: Path, ckpt_dir: Path, output: Path) -> None:
    """The same in this process with plain paths."""
    workflow = ConfigWorkflow(
        [str(ROOT / "configs" / f"{name}.json") for name in configs], run_id=run_id, workflow_type="infer",
        bundle_root=str(ROOT), dataset_dir=str(dataset), ckpt_dir=str(ckpt_dir), output_dir=str(output),
    )  # fmt: skip
    workflow.initialize()
    workflow.run()


def put_dataset(s3: fsspec.AbstractFileSystem, dataset: Path) -> None:
    for path in dataset.iterdir():
        s3.put_file(str(path), f"brains/data/{path.name}")


@pytest.fixture
def no_copy_of_the_bundle_written():
    """Nothing lands in the bundle's own folders."""
    before = {name: (ROOT / name).exists() for name in ("cache", "eval")}
    yield
    assert {name: (ROOT / name).exists() for name in before} == before


@pytest.mark.slow
def test_all_commands_by_url_give_what_they_give_by_path(s3, dataset, tmp_path, no_copy_of_the_bundle_written):
    put_dataset(s3, dataset)
    cache = tmp_path / "cache"
    results = ("--output_dir", "s3://brains/eval", "--ckpt_dir", "s3://brains/models/")
    trained = bundle(*by_url(*TRAIN, *results, *QUICK, cache=cache))
    assert trained.returncode == 0, trained.stderr
    assert "best network: s3://brains/models//model.pt" in trained.stdout
    assert "copied to s3://brains/models and s3://brains/eval" in trained.stdout
    assert s3.find("brains/models") == ["brains/models/model.pt"]
    *logs, last, provenance = s3.find("brains/eval")
    assert (last, provenance) == ("brains/eval/last.pt", "brains/eval/training-provenance.json")
    assert all(log.startswith("brains/eval/events.out.tfevents") for log in logs)
    copy = tmp_path / "copy"
    s3.get("brains/eval/", str(copy), recursive=True)
    s3.get("brains/models/", str(copy), recursive=True)
    SkipDenseSeg().load_state_dict(torch.load(copy / "model.pt", weights_only=True))
    assert torch.load(copy / "last.pt", weights_only=True)["lr_scheduler"]["last_epoch"] == 2
    scalars = [EventAccumulator(str(log)).Reload().Tags()["scalars"] for log in copy.glob("events*")]
    assert {"train_loss", "val_mean_dice"} <= set().union(*scalars)

    # another machine has an empty cache
    cache = tmp_path / "another cache"
    evaluate = ("run", "evaluating", "--config_file", EVALUATE)
    evaluated = bundle(*by_url(*evaluate, *results, cache=cache))
    assert evaluated.returncode == 0, evaluated.stderr
    assert last_line_of_output(evaluated) == "copied to s3://brains/eval"
    fetched = [path.name for path in cache.glob("results-*/*.pt")]
    assert sorted(fetched) == ["last.pt", "model.pt"]
    infer = ("run", "--config_file", "configs/inference.json")
    out = ("--output_dir", "s3://brains/labels", "--ckpt_dir", "s3://brains/models")
    inferred = bundle(*by_url(*infer, *out, cache=cache))
    assert inferred.returncode == 0, inferred.stderr
    assert last_line_of_output(inferred) == "copied to s3://brains/labels"
    names = [
        "inference-provenance.json",
        "report.html",
        "subject-11-label.nii.gz",
        "subject-11-label.png",
        "volumes.csv",
    ]
    assert s3.find("brains/labels") == [f"brains/labels/{name}" for name in names]

    run_by_path(["train", "evaluate"], "evaluating", dataset, copy, tmp_path / "eval")
    run_by_path(["inference"], "run", dataset, copy, tmp_path / "labels")
    s3.get("brains/eval/metrics.csv", str(copy / "metrics.csv"))
    s3.get("brains/labels/", str(copy), recursive=True)
    assert read_csv(copy / "metrics.csv") == read_csv(tmp_path / "eval" / "metrics.csv")
    assert read_csv(copy / "volumes.csv") == read_csv(tmp_path / "labels" / "volumes.csv")
    labels = [np.asarray(nib.load(folder / names[2]).dataobj) for folder in (copy, tmp_path / "labels")]
    np.testing.assert_array_equal(*labels)


def last_line_of_output(result: subprocess.CompletedProcess) -> str:
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_killed_training_leaves_its_last_epoch_in_the_bucket(s3, dataset, tmp_path):
    put_dataset(s3, dataset)
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle"]
    command += by_url(*TRAIN, "--output_dir", "s3://brains/out", "--ckpt_dir", "s3://brains/out", cache=tmp_path)
    command += [*QUICK, "--epochs", "1000", "--val_interval", "1000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            s3.invalidate_cache()
            if s3.exists("brains/out/last.pt"):
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    s3.get_file("brains/out/last.pt", str(tmp_path / "last.pt"))
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    SkipDenseSeg().load_state_dict(last["model"])
    assert last["lr_scheduler"]["last_epoch"] >= 2
    # and on the same machine the next run begins with it
    assert (Path(local_results("s3://brains/out", str(tmp_path), ["last.pt"])) / "last.pt").exists()


@pytest.mark.slow
def test_url_that_can_not_be_used_ends_in_one_line(s3, tmp_path):
    options = by_url("--output_dir", "s3://absent/out", cache=tmp_path)
    result = bundle("run", "--config_file", "configs/inference.json", *options)
    assert result.returncode != 0
    assert last_line(result).startswith("error: s3://")
    assert "no such" in last_line(result)
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["dataset_dir"], ["output_dir"], ["ckpt_dir"]])
def test_paths_and_urls_mixed(s3, dataset, tmp_path, settings):
    put_dataset(s3, dataset)
    shutil.copy(ROOT / "models" / "model.pt", tmp_path)
    s3.put_file(str(ROOT / "models" / "model.pt"), "brains/models/model.pt")
    places = {"dataset_dir": str(dataset), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path)}
    urls = {"dataset_dir": "s3://brains/data", "output_dir": "s3://brains/out", "ckpt_dir": "s3://brains/models"}
    places |= {name: urls[name] for name in settings} | {"cache_dir": str(tmp_path / "cache")}
    options = [word for name, value in places.items() for word in (f"--{name}", value)]
    result = bundle("run", "--config_file", "configs/inference.json", *options)
    assert result.returncode == 0, result.stderr
    if "output_dir" in settings:
        assert s3.exists("brains/out/subject-11-label.nii.gz")
    else:
        assert (tmp_path / "out" / "subject-11-label.nii.gz").exists()
        assert s3.find("brains/out") == []


@pytest.mark.slow
def test_training_while_the_server_drops_connections(s3, s3_port, dataset, tmp_path, monkeypatch):
    put_dataset(s3, dataset)
    with failing_proxy(s3_port, 20) as (port, dropped):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        results = ("--output_dir", "s3://brains/out", "--ckpt_dir", "s3://brains/out")
        result = bundle(*by_url(*TRAIN, *results, *QUICK, cache=tmp_path))
        assert result.returncode == 0, result.stderr
        assert len(dropped) == 20
    assert {"last.pt", "model.pt"} <= {name.rsplit("/")[-1] for name in s3.find("brains/out")}
