"""Folders by URL: on fsspec's own file systems, and on an S3 server on this machine, whole, failing and refusing."""

import io
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.registry import _registry
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator

from scripts.data import storage
from scripts.data.storage import StorageError, StoredFolder, local_dataset, local_results
from scripts.errors import InputError
from scripts.files import whole_files
from scripts.results.copy_out import CopyOut
from scripts.results.writers import BackgroundWriter


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
