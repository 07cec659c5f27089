"""Data and results on a server that speaks S3, and one that fails."""

import os
import re
import shutil
import socket
import socketserver
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
from scripts.data.storage import Folders, StorageError, StoredFolder
from scripts.network import SkipDenseSeg
from scripts.results.tables import read_csv

EVALUATE = "['configs/train.json','configs/evaluate.json']"
TRAIN = ("training", "--config_file", "configs/train.json")
INFER = ("--config_file", "configs/inference.json")


def copied_in(cache: Path, url: str = "s3://brains/data") -> dict[str, bytes]:
    """Copy a dataset in, and return the content of its copy."""
    local = Path(Folders(url, "out", None, str(cache)).dataset)
    return {path.relative_to(local).as_posix(): path.read_bytes() for path in local.rglob("[!.]*") if path.is_file()}


def send(cache: Path, content: bytes) -> None:
    folder = StoredFolder("s3://brains/out", str(cache), "results")
    (folder.local / "last.pt").write_bytes(content)
    folder.copy_out()


def connect(monkeypatch, port: int) -> fsspec.AbstractFileSystem:
    """Point `s3://` of this process to a port; as an argument too, or fsspec would take an earlier connection."""
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


def pump(source: socket.socket, sink: socket.socket, limit: int = sys.maxsize) -> None:
    """Pass on at most `limit` bytes, then end both connections."""
    with suppress(OSError):
        while limit > 0 and (data := source.recv(min(2**16, limit))):
            sink.sendall(data)
            limit -= len(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def failing_proxy(port: int, failures: int, reply_bytes: int = 0) -> Iterator[tuple[int, list[int]]]:
    """Put before a server a port that drops its first `failures` connections after so many bytes of the reply.

    Yield the port and a list that grows with each dropped connection.
    """
    dropped: list[int] = []
    lock = threading.Lock()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with lock:
                fails = len(dropped) < failures
                dropped.extend([1] * fails)
            if fails and not reply_bytes:
                return
            with socket.create_connection(("127.0.0.1", port)) as server:
                there = threading.Thread(target=pump, args=(self.request, server), daemon=True)
                there.start()
                pump(server, self.request, reply_bytes if fails else sys.maxsize)
                there.join(30)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy.server_address[1], dropped
        proxy.shutdown()


def test_s3_folder_in_and_out(s3, tmp_path):
    large = os.urandom(11 * 2**20)
    (tmp_path / "large").write_bytes(large)
    s3.put_file(str(tmp_path / "large"), "brains/data/large", chunksize=5 * 2**20)
    assert "-" in s3.info("brains/data/large")["ETag"]  # which is no MD5
    s3.pipe("brains/data/sub/a", b"a" * 10)
    s3.pipe("brains/data/", b"")  # as consoles make folders
    s3.pipe("brains/data/sub/", b"")
    assert copied_in(tmp_path) == {"large": large, "sub/a": b"a" * 10}
    before = {path: path.stat().st_ino for path in tmp_path.glob("dataset-*/large")}
    copied_in(tmp_path)
    assert {path: path.stat().st_ino for path in before} == before  # nothing was copied again
    send(tmp_path, b"1")
    assert s3.find("brains/out") == ["brains/out/last.pt"]
    assert s3.cat("brains/out/last.pt") == b"1"


def test_s3_etag_is_checked(s3, tmp_path, monkeypatch):
    s3.pipe("brains/data/a", b"a" * 10)
    get_file = s3.get_file

    def damaging(source, target, **options):
        get_file(source, target, **options)
        Path(target).write_bytes(b"b" * 10)

    monkeypatch.setattr(s3, "get_file", damaging)
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    with pytest.raises(StorageError, match="a was damaged on the way"):
        copied_in(tmp_path)
    # the ETag is no MD5 if S3 encrypts the file with its owner's key
    options = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "key"}
    s3.call_s3("put_object", Bucket="brains", Key="data/a", Body=b"c" * 10, **options)
    assert copied_in(tmp_path) == {"a": b"b" * 10}


def test_s3_missing_bucket(s3, tmp_path):
    absent = "s3://absent/data"
    for folders in ((absent, "out", None), (None, absent, None), (None, "out", absent)):
        with pytest.raises(StorageError, match=f"^{absent}: no such bucket or folder .*; check the name"):
            Folders(*folders, str(tmp_path))
    assert not s3.exists("absent")
    assert Folders(None, "s3://brains/new/folder", None, str(tmp_path)).remote  # will be made


def test_s3_credentials(s3, tmp_path, monkeypatch):
    with s3_server(INITIAL_NO_AUTH_ACTION_COUNT="0") as port, monkeypatch.context() as patch:
        connect(patch, port)
        with pytest.raises(StorageError, match=r"brains/data: access denied .*AWS_ACCESS_KEY_ID") as caught:
            copied_in(tmp_path)
        assert "not-a-real-secret" not in str(caught.value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setitem(fsspec.config.conf["s3"], "use_listings_cache", True)  # or the earlier connection serves
    with pytest.raises(StorageError, match=r"access denied \(Unable to locate credentials\)"):
        copied_in(tmp_path)


@pytest.mark.parametrize("reply_bytes", [0, 300_000])
def test_s3_server_that_drops_connections_for_a_while(s3, s3_port, tmp_path, monkeypatch, reply_bytes):
    content = {f"subject-{number}-T1.img": os.urandom(500_000) for number in range(3)}
    for name, value in content.items():
        s3.pipe(f"brains/data/{name}", value)
    with failing_proxy(s3_port, 4, reply_bytes) as (port, dropped):
        connect(monkeypatch, port)
        assert copied_in(tmp_path) == content
        assert len(dropped) == 4
    with failing_proxy(s3_port, 4, min(reply_bytes, 100)) as (port, dropped):
        connect(monkeypatch, port)
        send(tmp_path, content["subject-1-T1.img"])
        assert len(dropped) == 4
    assert s3.cat("brains/out/last.pt") == content["subject-1-T1.img"]


def test_s3_server_that_is_away_longer_than_its_client_tries(s3, s3_port, tmp_path, monkeypatch, caplog):
    """Here the waits of `scripts.data.storage` take over; a server that stays away is an error."""
    s3.pipe("brains/data/a", b"a")
    with failing_proxy(s3_port, 3) as (port, dropped):
        fs = connect(monkeypatch, port)
        monkeypatch.setattr(fs, "retries", 1)
        monkeypatch.setattr(fs, "config_kwargs", {"retries": {"max_attempts": 0}})
        assert copied_in(tmp_path) == {"a": b"a"}
        assert len(dropped) == 3
    assert any("retrying in 1 s" in record.getMessage() for record in caplog.records)
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    with pytest.raises(StorageError, match=r"s3://brains/data: can't be read or written .*AWS_ENDPOINT_URL"):
        copied_in(tmp_path)


# the commands as a person runs them


def run(s3: fsspec.AbstractFileSystem, cache: Path, *arguments: str, **folders: str) -> subprocess.CompletedProcess:
    """Run a command on folders on the server, or those given."""
    folders = {
        "dataset_dir": "s3://brains/data",
        "output_dir": "s3://brains/out",
        "ckpt_dir": "s3://brains/out",
    } | folders
    options = [word for name, value in folders.items() for word in (f"--{name}", value)]
    result = bundle("run", *arguments, *options, "--cache_dir", str(cache))
    s3.invalidate_cache()
    return result


@pytest.fixture
def stored_dataset(s3, dataset) -> Path:
    """The small dataset, which is on the server too."""
    for path in dataset.iterdir():
        s3.put_file(str(path), f"brains/data/{path.name}")
    return dataset


@pytest.mark.slow
def test_all_commands_by_url_give_what_they_give_by_path(s3, stored_dataset, tmp_path):
    in_the_bundle = {name: (ROOT / name).exists() for name in ("cache", "eval")}
    cache, copy = tmp_path / "cache", tmp_path / "copy"
    folders = {"output_dir": "s3://brains/eval", "ckpt_dir": "s3://brains/models/"}
    trained = run(s3, cache, *TRAIN, *QUICK, **folders)
    assert trained.returncode == 0, trained.stderr
    assert "best network: s3://brains/models//model.pt" in trained.stdout
    assert "copied to s3://brains/models and s3://brains/eval" in trained.stdout
    assert s3.find("brains/models") == ["brains/models/model.pt"]
    *logs, last, provenance = s3.find("brains/eval")
    assert (last, provenance) == ("brains/eval/last.pt", "brains/eval/training-provenance.json")
    assert all(log.startswith("brains/eval/events.out.tfevents") for log in logs)
    for name in ("eval", "models"):
        s3.get(f"brains/{name}/", str(copy), recursive=True)
    SkipDenseSeg().load_state_dict(torch.load(copy / "model.pt", weights_only=True))
    assert torch.load(copy / "last.pt", weights_only=True)["lr_scheduler"]["last_epoch"] == 2
    scalars = [EventAccumulator(str(log)).Reload().Tags()["scalars"] for log in copy.glob("events*")]
    assert {"train_loss", "val_mean_dice"} <= set().union(*scalars)

    cache = tmp_path / "another cache"  # of another machine
    evaluated = run(s3, cache, "evaluating", "--config_file", EVALUATE, **folders)
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout.endswith("copied to s3://brains/eval\n")
    assert sorted(path.name for path in cache.glob("results-*/*.pt")) == ["last.pt", "model.pt"]
    inferred = run(s3, cache, *INFER, output_dir="s3://brains/labels", ckpt_dir="s3://brains/models")
    assert inferred.returncode == 0, inferred.stderr
    assert inferred.stdout.endswith("copied to s3://brains/labels\n")
    s3.get("brains/eval/metrics.csv", str(copy / "metrics.csv"))
    s3.get("brains/labels/", str(tmp_path / "labels"), recursive=True)
    assert {path.name for path in (tmp_path / "labels").iterdir()} == {
        *("inference-provenance.json", "report.html", "volumes.csv"),
        *("subject-11-label.nii.gz", "subject-11-label.png"),
    }
    assert {name: (ROOT / name).exists() for name in in_the_bundle} == in_the_bundle

    by_url, by_path = tmp_path / "labels", tmp_path / "out"
    for configs, run_id in ((["train", "evaluate"], "evaluating"), (["inference"], "run")):
        workflow = ConfigWorkflow(
            [str(ROOT / "configs" / f"{name}.json") for name in configs], run_id=run_id, workflow_type="infer",
            bundle_root=str(ROOT), dataset_dir=str(stored_dataset), ckpt_dir=str(copy), output_dir=str(by_path),
        )  # fmt: skip
        workflow.initialize()
        workflow.run()
    assert read_csv(copy / "metrics.csv") == read_csv(by_path / "metrics.csv")
    assert read_csv(by_url / "volumes.csv") == read_csv(by_path / "volumes.csv")
    labels = [np.asarray(nib.load(folder / "subject-11-label.nii.gz").dataobj) for folder in (by_url, by_path)]
    np.testing.assert_array_equal(*labels)


@pytest.mark.slow
def test_killed_training_leaves_its_last_epoch_in_the_bucket(s3, stored_dataset, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", *TRAIN, *QUICK]
    command += ["--epochs", "1000", "--val_interval", "1000", "--cache_dir", str(tmp_path)]
    command += ["--dataset_dir", "s3://brains/data", "--output_dir", "s3://brains/out", "--ckpt_dir", "s3://brains/out"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            s3.invalidate_cache()
            if s3.exists("brains/out/last.pt"):
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
    finally:
        process.kill()
        process.communicate()
    s3.get_file("brains/out/last.pt", str(tmp_path / "last.pt"))
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    SkipDenseSeg().load_state_dict(last["model"])
    assert last["lr_scheduler"]["last_epoch"] >= 2
    # the next run on this machine starts from it
    assert (Path(Folders(None, "s3://brains/out", None, str(tmp_path)).output) / "last.pt").exists()


@pytest.mark.slow
def test_url_that_can_not_be_used_ends_in_one_line(s3, tmp_path):
    result = run(s3, tmp_path, *INFER, output_dir="s3://absent/out")
    assert result.returncode != 0
    assert re.match(r"error: s3://.*no such", last_line(result))
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("by_url", ["dataset_dir", "output_dir", "ckpt_dir"])
def test_paths_and_urls_mixed(s3, stored_dataset, tmp_path, by_url):
    shutil.copy(ROOT / "models" / "model.pt", tmp_path)
    s3.put_file(str(ROOT / "models" / "model.pt"), "brains/out/model.pt")
    paths = {"dataset_dir": str(stored_dataset), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path)}
    del paths[by_url]
    result = run(s3, tmp_path / "cache", *INFER, **paths)
    assert result.returncode == 0, result.stderr
    assert s3.exists("brains/out/subject-11-label.nii.gz") == (by_url == "output_dir")
    assert (tmp_path / "out" / "subject-11-label.nii.gz").exists() == (by_url != "output_dir")


@pytest.mark.slow
def test_training_while_the_server_drops_connections(s3, s3_port, stored_dataset, tmp_path, monkeypatch):
    with failing_proxy(s3_port, 20) as (port, dropped):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        result = run(s3, tmp_path, *TRAIN, *QUICK)
        assert result.returncode == 0, result.stderr
        assert len(dropped) == 20
    assert {"last.pt", "model.pt"} <= {name.rsplit("/")[-1] for name in s3.find("brains/out")}
