"""Folders given by URL: their files are copied in before a run and copied out while it runs.

`dataset_dir`, `output_dir` and `ckpt_dir` are plain paths or URLs that fsspec knows, such as `s3://bucket/folder`.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from tqdm import tqdm

from scripts.data.bids import needed_files
from scripts.errors import UNWRITABLE, InputError, reason_of, require_path
from scripts.files import UNFINISHED, is_hidden, whole_files

logger = logging.getLogger(__name__)

# what a run reads of earlier results: to resume, and to extend logs, tables and the description of a BIDS dataset
RESULT_FILES = (
    *("last.pt", "step-*.pt", "rank-*.log", "mlruns.db", "volumes.csv", "volumes.tsv", "volumes.json"),
    *("desc-skipdenseseg_dseg.tsv", "dataset_description.json", ".bidsignore"),
)
CHECKPOINT_FILES = ("model.pt",)
PATIENCE = 60.0  # seconds to retry a failing server
# errors that waiting doesn't mend
LASTING_ERRORS = (FileExistsError, IsADirectoryError, NotADirectoryError, ValueError, NotImplementedError)
LASTING_ERRNOS = {errno.EINVAL, *UNWRITABLE}
# servers where an upload appears whole or not at all, so it needs no temporary name
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "az", "oss", "oci", "tos"}
# the fields in which servers give the version of a file, the most reliable first; `fs.ukey` may hash access times
VERSION_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "modified", "updated", "created")
KEPT, RECORD, LOCK, ARRIVING = ".kept-", ".copied.json", ".lock", ".arriving"


class StorageError(InputError):
    """A folder given by URL can't be read or written. The message names the URL."""


class Folders:
    """The folders of a run as local paths. Files of folders given by URL are copied to folders in `cache_dir`.

    Attributes:
        dataset, output, checkpoints: local paths. Plain paths stay as they are.
        remote: the folders of checkpoints and results that are URLs, in the order to copy them out: `last.pt` in the
            results must not be newer than the `model.pt` it belongs to.

    Raises:
        StorageError: the dataset or a bucket doesn't exist, or files can't be copied.
    """

    def __init__(self, dataset: str | None, output: str, checkpoints: str | None, cache_dir: str) -> None:
        remote = {}
        self.checkpoints, self.output, self.dataset = checkpoints, output, dataset
        for name, files in (("checkpoints", CHECKPOINT_FILES), ("output", RESULT_FILES), ("dataset", None)):
            folder = getattr(self, name)
            if folder is None or not is_url(folder):
                continue
            stored = StoredFolder(folder, cache_dir, "results" if files else "dataset")
            stored.copy_in(files)
            setattr(self, name, str(stored.local))
            if files:
                remote[stored.url] = stored  # checkpoints and results may share one
        self.remote = tuple(remote.values())


def is_url(folder: str) -> bool:
    """Return whether a folder is a URL rather than a plain path; raise InputError if it is neither."""
    require_path(folder)
    return "://" in str(folder)


def without_credentials(text: str) -> str:
    """Return a URL, or a text with URLs, without user names and passwords."""
    return re.sub(r"://[^@]*:.*@|://[^/@]*@", "://", text)


class StoredFolder:
    """A folder on a server and its local copy.

    A record beside the copy holds the server's version of each copied file and the copy's MD5, size and time, so a
    change on either side is noticed. (`fsspec.generic.rsync` compares one field; it knows neither which side changed
    nor whether a copy is whole.) The processes of a machine share the copy and take turns by a lock.

    Args:
        url: the folder on the server.
        cache_dir: the copy is made in a folder in this one, named after the URL.
        purpose: 'dataset' or 'results', which have separate copies.

    Raises:
        StorageError: the kind of URL is unknown or needs a package, or the URL has a password in it.
    """

    def __init__(self, url: str, cache_dir: str, purpose: str) -> None:
        if re.search(r"://[^@]*:[^@]*@", url):
            raise StorageError(
                f"{without_credentials(url)}: has a password, which logs would show; give it by the environment or in "
                f"fsspec's settings"
            )
        try:
            self.fs, root = url_to_fs(url)
        except Exception as error:  # each package has errors of its own
            remedy = "install it with pip" if isinstance(error, ImportError) else "give another kind of URL"
            raise StorageError(f"{url}: can't be opened ({_text(error)}); {remedy}") from error
        self.url = url.rstrip("/")
        self.root = root.rstrip("/")
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", self.url.split("://", 1)[1])[-60:].strip("-")
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        self.local = Path(cache_dir).absolute() / f"{purpose}-{readable}-{digest}"
        self.has_sent = False
        with whole_files(cache_dir):  # raises InputError if nothing can be written there
            self.local.mkdir(mode=0o700, exist_ok=True)  # scans are private

    def copy_in(self, patterns: Collection[str] | None = None) -> None:
        """Copy in a dataset if there are no `patterns`, else the results whose names fit one.

        The copy of a dataset becomes equal to its `needed_files` on the server. Results that changed or vanished on the
        server are removed here, so that the server gets them if this run makes them again. Results that changed here
        stay. If one changed on both sides, the server's counts, and ours gets a hidden name.

        Raises:
            StorageError: there is no dataset, the disk has no room, or as `_try`.
        """
        with FileLock(self.local / LOCK):
            (self.local / ARRIVING).unlink(missing_ok=True)  # of a killed process
            there = self._try(self._list)
            if patterns is not None:
                wanted = {name for name in there if any(fnmatchcase(name, pattern) for pattern in patterns)}
            elif not (wanted := needed_files(there)):
                raise StorageError(f"{self.url}: no such folder, or no dataset in it; check the name")
            record, kept = self._read_record(), {}
            for name, state in self._local_files().items():
                path, entry = self.local / name, record.get(name, {})
                same_there = entry.get("version") == _version(there.get(name))
                if same_there and (patterns is not None or (name in wanted and entry["md5"] == _md5(path))):
                    kept[name] = entry
                elif patterns is None or entry.get("state") == state:
                    path.unlink(missing_ok=True)
                else:
                    aside = path.replace(path.with_name(f"{KEPT}{_md5(path)[:8]}-{path.name}"))
                    logger.warning("%s: never reached %s, which has another; kept as %s", path, self.url, aside.name)
            self._write_record(kept)
            missing = sorted(wanted - kept.keys())
            total, free = sum(there[name]["size"] for name in missing), shutil.disk_usage(self.local).free
            if 0 < free < total:  # some file systems report 0
                raise StorageError(
                    f"{self.url}: {total / 1e6:,.1f} MB don't fit into the {free / 1e6:,.1f} MB free in {self.local}; "
                    f"make room or choose another --cache_dir"
                )
            with tqdm(total=total, desc=self.url, unit="B", unit_scale=True, disable=not missing) as progress:
                for name in missing:
                    kept[name] = self._try(self._fetch, name, there[name])
                    self._write_record(kept)
                    progress.update(there[name]["size"])

    def copy_out(self) -> None:
        """Send new and changed files to the server, except hidden ones; raise StorageError as `_try`."""
        with FileLock(self.local / LOCK):
            record = self._read_record()
            for name, state in sorted(self._local_files().items(), reverse=True):  # an .img before its .hdr
                if record.get(name, {}).get("state") == state:
                    continue
                try:
                    record[name] = self._try(self._send, name)
                except StorageError as error:
                    # an old checkpoint, removed meanwhile
                    if getattr(error.__cause__, "filename", None) == str(self.local / name):
                        continue
                    raise StorageError(f"{error}; files that weren't copied are in {self.local}") from error
                self._write_record(record)
                self.has_sent = True

    def _try(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """Do something on the server, and retry for `PATIENCE` seconds unless waiting can't help; else StorageError."""
        end, wait = time.monotonic() + PATIENCE, 1.0
        while True:
            try:
                return operation(*arguments)
            except (InputError, TypeError, AttributeError):
                raise
            except Exception as error:  # each package has errors of its own
                kind = type(error).__name__
                lasting = getattr(error, "errno", None) in LASTING_ERRNOS or isinstance(error, LASTING_ERRORS)
                if isinstance(error, FileNotFoundError):
                    reason, remedy = "no such bucket or folder", "check the name"
                elif isinstance(error, PermissionError) or "Credential" in kind:
                    reason = "access denied"
                    remedy = "check the credentials (for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
                elif lasting or "ParamValidation" in kind or time.monotonic() + wait > end:
                    reason = "can't be read or written"
                    remedy = "check the address (for s3:// AWS_ENDPOINT_URL) and the network, and run again"
                else:
                    logger.warning("%s: %s; retrying in %.0f s", self.url, _text(error), wait)
                    time.sleep(wait)
                    wait = min(2 * wait, PATIENCE / 4)
                    continue
                raise StorageError(f"{self.url}: {reason} ({_text(error)}); {remedy}") from error

    def _list(self) -> dict[str, dict[str, Any]]:
        """Return what the server says of each file that isn't hidden, by its path in the folder."""
        self.fs.invalidate_cache()
        found = {}
        for path, info in self.fs.find(self.root, detail=True).items():
            if path.endswith("/") or info["type"] == "directory":  # object stores represent folders by empty files
                continue
            if path == self.root:
                raise StorageError(f"{self.url}: is a file; give its folder")
            if info["size"] is None:
                raise StorageError(f"{self.url}: the server doesn't give the size of {path}; use another kind of URL")
            name = path.removeprefix(f"{self.root}/" if self.root else "")
            parts = name.split("/")
            if (self.root and name == path) or "\\" in name or not {"", ".", ".."}.isdisjoint(parts):
                raise StorageError(f"{self.url}: the name {name!r} on it may lead out of the folder; rename the file")
            if not any(map(is_hidden, parts)):
                found[name] = info
        return found

    def _local_files(self) -> dict[str, list[int]]:
        """Return the state of each local file that isn't hidden, by its path in the folder."""
        states = {}
        for folder, folders, names in os.walk(self.local):
            folders[:] = [name for name in folders if not is_hidden(name)]
            for path in (Path(folder, name) for name in names if not is_hidden(name)):
                with suppress(FileNotFoundError):  # others may remove files meanwhile
                    states[path.relative_to(self.local).as_posix()] = _state(path)
        return states

    def _fetch(self, name: str, info: dict[str, Any]) -> dict[str, Any]:
        """Copy a file in, name it when it is whole, and return its entry in the record."""

        def require_listed_size(announced: int | None, arrived: int) -> None:
            if max(announced or 0, arrived) > info["size"]:
                raise StorageError(
                    f"{self.url}: {name} has more than the {info['size']:,} bytes that the server listed; if it was "
                    f"replaced meanwhile, run again"
                )

        path, arriving = self.local / name, self.local / ARRIVING
        try:
            callback = Callback(hooks={"size": require_listed_size})
            self.fs.get_file(f"{self.root}/{name}", str(arriving), callback=callback)
            require_listed_size(None, arriving.stat().st_size)  # not all protocols call back
            entry = self._checked_entry(name, info, _state(arriving), _md5(arriving))
            path.parent.mkdir(parents=True, exist_ok=True)
            arriving.replace(path)
        finally:
            arriving.unlink(missing_ok=True)
        return entry

    def _send(self, name: str) -> dict[str, Any]:
        """Copy a file out, and return its entry in the record."""
        path, target = self.local / name, f"{self.root}/{name}"
        state, digest = _state(path), _md5(path)
        if OBJECT_STORES.isdisjoint([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol):
            # `fs.transaction` doesn't cover `put_file` of local folders and SFTP. The name is this copy's own: after a
            # kill it is overwritten, and other machines don't use it
            own = hashlib.sha256(f"{platform.node()}:{self.local.resolve()}".encode()).hexdigest()[:16]
            parent, own_name = target.rsplit("/", 1)
            unfinished = f"{parent}/{UNFINISHED}{own}-{own_name}"
            self.fs.makedirs(parent, exist_ok=True)
            self.fs.put_file(str(path), unfinished)
            self.fs.mv(unfinished, target)
        else:
            self.fs.put_file(str(path), target)
        self.fs.invalidate_cache()
        info = self.fs.info(target)
        if _state(path) != state:  # a log grew meanwhile: the next time it is sent again
            return {"version": _version(info), "md5": digest, "state": state}
        return self._checked_entry(name, info, state, digest)

    def _checked_entry(self, name: str, info: dict[str, Any], state: list[int], digest: str) -> dict[str, Any]:
        """Return an entry for the record; raise OSError if a copy differs in size, or in the MD5 that S3 gives."""
        same, etag = state[0] == info["size"], info.get("ETag", "").strip('"')
        if same and "s3" in self.fs.protocol and re.fullmatch("[0-9a-f]{32}", etag) and etag != digest:
            # the ETag is no MD5 if S3 encrypts the file with its owner's key
            bucket, key, _ = self.fs.split_path(f"{self.root}/{name}")
            head = self.fs.call_s3("head_object", Bucket=bucket, Key=key)
            same = head.get("ServerSideEncryption", "").startswith("aws:kms") or "SSECustomerAlgorithm" in head
        if not same:
            raise OSError(f"{name} was damaged on the way")
        return {"version": _version(info), "md5": digest, "state": state}

    def _read_record(self) -> dict[str, Any]:
        try:
            return json.loads((self.local / RECORD).read_text())
        except (FileNotFoundError, ValueError):  # without it everything is copied again
            return {}

    def _write_record(self, record: dict[str, Any]) -> None:
        with whole_files(self.local) as temporary:
            (temporary / RECORD).write_text(json.dumps(record))


def _text(error: Exception) -> str:
    return reason_of(error) or type(error).__name__


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _state(path: Path) -> list[int]:
    """Return size and time of a local file, which change when it is written again."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _version(info: dict[str, Any] | None) -> list[Any] | None:
    """Return what identifies the content of a file on the server: its size, and an ETag or a time; None if absent."""
    if info is None:
        return None
    stamp = next((info[key] for key in VERSION_KEYS if info.get(key)), "")
    return [info["size"], str(stamp.timestamp() if isinstance(stamp, datetime) else stamp)]
