"""Data and results on a server that speaks S3, and one that fails."""

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
from helpers import ROOT
from monai.bundle import ConfigWorkflow
from processes import QUICK, bundle, last_line, s3_server, server_environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.data import storage
from scripts.data.storage import StorageError, StoredFolder, local_dataset, local_results
from scripts.network import SkipDenseSeg
from scripts.results.tables import read_csv

EVALUATE = "['configs/train.json','configs/evaluate.json']"


def files(directory: str | Path) -> dict[str, bytes]:
    """What a copy holds, but for hidden files."""
    directory = Path(directory)
    paths = [path for path in directory.rglob("*") if path.is_file()]
    names = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
    return {name: content for name, content in names.items() if not re.search(r"(^|/)\.", name)}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 0.0)


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
