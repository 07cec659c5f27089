"""Folders given by URL: copied in before a run, copied out while it runs.

`dataset_dir`, `output_dir` and `ckpt_dir` are plain paths or URLs that fsspec knows, like `s3://bucket/folder`. For a
URL the run works on a folder under `cache_dir`; for a plain path nothing here does anything.
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
from collections.abc import Callable, Collection, Sequence
from concurrent import futures
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import fsspec
from filelock import FileLock
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from tqdm import tqdm

from scripts.bids import needed_files
from scripts.errors import InputError, require_path
from scripts.writers import UNFINISHED, BackgroundWriter, whole_files

PATIENCE = 60.0  # seconds for which a server that doesn't answer is asked again
# where an upload appears whole or not at all, so that it needs no temporary name
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "az", "oss", "oci", "tos"}
# what servers call the version of a file, the surest first
VERSION_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "modified", "updated", "created")
# errors that waiting doesn't mend
LASTING_ERRORS = (
    *(FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError),
    *(ValueError, NotImplementedError),
)
LASTING_ERRNOS = {errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG}
KEPT, RECORD, LOCK = ".kept-", ".copied.json", ".lock"
ARRIVING = f"{UNFINISHED}copy-"  # folders of what is being copied in

logger = logging.getLogger(__name__)


class StorageError(InputError):
    """What is given by URL can't be read or written. The message names the URL."""


def is_url(folder: str) -> bool:
    """Whether a folder is given by URL and not as a plain path; InputError where it is neither."""
    require_path(folder)
    return "://" in str(folder)


def local_dataset(folder: str, cache_dir: str) -> str:
    """A plain path as it is; for a URL a folder under `cache_dir`, made a copy of what subjects there are made of.

    Which files these are says `scripts.bids.needed_files`. Those that are whole and of the server's present version
    aren't fetched again. Hidden ones are passed over.

    Raises:
        StorageError: nothing is there, or it can't be copied.
    """
    if not is_url(folder):
        return folder
    stored = StoredFolder(folder, cache_dir, "dataset")
    stored.copy_in()
    return str(stored.local)


def local_results(folder: str, cache_dir: str, names: Sequence[str]) -> str:
    """A plain path as it is; for a URL a folder under `cache_dir`, into which files that fit `names` are copied.

    Raises:
        StorageError: no such bucket, or they can't be copied. The folder itself needn't exist.
    """
    if not is_url(folder):
        return folder
    stored = StoredFolder(folder, cache_dir, "results")
    stored.copy_in(names)
    return str(stored.local)


def _fits(name: str, patterns: Collection[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_hidden(name: str) -> bool:
    """Whether a file or folder stays where it is; `.bidsignore` belongs to a BIDS dataset."""
    return name.startswith(".") and name != ".bidsignore"


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _version(info: dict[str, Any]) -> list[Any]:
    """What tells one content of a file on the server from another: its size, and an ETag or a time."""
    stamp = next((info[key] for key in VERSION_KEYS if info.get(key)), "")
    return [info["size"], str(stamp.timestamp() if isinstance(stamp, datetime) else stamp)]


def without_credentials(text: str) -> str:
    """A URL, or a text that has some, without user names and passwords."""
    return re.sub(r"://[^@]*:.*@|://[^/@]*@", "://", text)


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the folder's path on it."""
    if re.search(r"://[^@]*:[^@]*@", url):
        raise StorageError(
            f"{without_credentials(url)}: has a password in it, which logs would show; "
            f"give it by the environment or fsspec's settings"
        )
    try:
        fs, root = url_to_fs(url)
    except ImportError as error:
        raise StorageError(f"{url}: a package is missing; {error}, by pip install") from error
    except Exception as error:
        raise StorageError(f"{url}: can't be opened ({_text(error)}); give a folder or another kind of URL") from error
    return fs, root.rstrip("/")


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _lasting(error: Exception) -> bool:
    return (
        isinstance(error, LASTING_ERRORS)
        or getattr(error, "errno", None) in LASTING_ERRNOS
        or _is_refusal(error)
        or type(error).__name__ == "ParamValidationError"  # of botocore, which needn't be there
    )


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or "Credential" in type(error).__name__


class StoredFolder:
    """A folder on a server and its copy here.

    Beside the copy a record is kept of what was copied: for each file the version that the server named, and an MD5.
    Processes take turns at a copy, so that those of one machine share it.

    Args:
        url: the folder on the server.
        cache_dir: the copy is made in a folder below this one, named after the URL.
        purpose: 'dataset' or 'results', which are copied to different places.

    Raises:
        StorageError: a kind of URL that isn't known or needs a package, or one with a password in it.
    """

    def __init__(self, url: str, cache_dir: str, purpose: str) -> None:
        self.url = url.rstrip("/")
        self.fs, self.root = _open(url)
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", self.url.split("://", 1)[1])[-60:].strip("-")
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        self.local = Path(cache_dir) / f"{purpose}-{readable}-{digest}"
        self.seen: dict[str, tuple[int, int]] = {}  # size and time of files known to be on the server
        # a name of this folder's own, which it writes over after it was killed, and others don't
        own = hashlib.sha256(f"{platform.node()}:{self.local.resolve()}".encode()).hexdigest()[:16]
        self.leaving = f"{UNFINISHED}{own}-"
        try:
            self.local.mkdir(mode=0o700, parents=True, exist_ok=True)  # scans are for nobody else to see
        except OSError as error:
            raise StorageError(f"{self.local}: can't be made ({_text(error)}); choose another --cache_dir") from error

    def copy_in(self, names: Collection[str] | None = None) -> None:
        """Bring the copy to what is on the server: files of subjects, or those whose names fit a pattern of `names`.

        Files that aren't on the server are removed here as well, and so are other results that were copied out and that
        the server has no more, or in another version: made again they would count as copied. One of `names` that was
        changed here and never reached the server stays; if the server's was changed too, that one is taken, and the one
        here is kept under a hidden name, with a warning.

        Raises:
            StorageError: all files are asked for and there are none, there is no room for them, or as `_try`.
        """
        with self._turn():
            for left_by_killed in self.local.glob(f"{ARRIVING}*"):
                shutil.rmtree(left_by_killed, ignore_errors=True)
            there = self._try(self._list)
            record = self._read_record()
            if names is None and not there:
                raise StorageError(f"{self.url}: no such folder, or nothing in it; check the name")
            chosen = needed_files(there) if names is None else there
            wanted = {name: info for name, info in there.items() if name in chosen and _fits(name, names)}
            here = {name for name in self._local_names() if _fits(name, names)}
            unsent = {name for name in here if names is not None and self._is_unsent(name, wanted.get(name), record)}
            outdated = {
                name: info
                for name, info in wanted.items()
                if name not in unsent and not self._is_copied(name, info, record)
            }
            replaced = {*outdated, *here} - unsent - (set(wanted) - set(outdated))
            others = set(self._local_names()) - here
            replaced |= {name for name in others if self._is_lost(name, there.get(name), record)}
            total = sum(info["size"] for info in outdated.values())
            self._require_room(total, [self.local / name for name in replaced])
            for name in sorted(replaced):
                if names is not None:
                    self._keep_unsent(name, record)
                (self.local / name).unlink(missing_ok=True)
            if forgotten := replaced & set(record):
                record = {name: entry for name, entry in record.items() if name not in forgotten}
                self._write_record(record)
            with (
                tqdm(
                    total=total, desc=f"copying {self.url}", unit="B", unit_scale=True, disable=not outdated
                ) as progress,
                TemporaryDirectory(prefix=ARRIVING, dir=self.local) as arriving,
            ):
                for name, info in outdated.items():
                    digest = self._try(self._fetch, name, info, Path(arriving) / "file")
                    record[name] = {"version": _version(info), "md5": digest}
                    self._write_record(record)
                    progress.update(info["size"])

    def copy_out(self) -> None:
        """Bring new and changed files to the server; hidden ones stay here.

        Raises:
            StorageError: as `_try`; files that couldn't be copied are still here.
        """
        with self._turn():
            record = self._read_record()
            for name in sorted(self._local_names(), reverse=True):  # an .img before the .hdr that speaks of it
                path = self.local / name
                try:
                    state = self._state(path)
                    if self.seen.get(name) == state:
                        continue
                    digest = _md5(path)
                except FileNotFoundError:  # a checkpoint that is no longer kept
                    continue
                if record.get(name, {}).get("md5") != digest:
                    try:
                        info = self._try(self._send, name, state, digest)
                    except StorageError as error:
                        raise StorageError(f"{error}; what wasn't copied lies in {self.local}") from error
                    record[name] = {"version": _version(info), "md5": digest}
                    self._write_record(record)
                self.seen[name] = state

    def _turn(self) -> FileLock:
        return FileLock(self.local / LOCK)

    def _try(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """Do something with the server; where it fails for now, again with growing waits, for `PATIENCE` seconds.

        Raises:
            StorageError: it still fails, or for a reason that waiting doesn't mend.
        """
        end, wait = time.monotonic() + PATIENCE, 1.0
        while True:
            try:
                return operation(*arguments)
            except (InputError, TypeError, AttributeError):
                raise
            except Exception as error:  # what a server's package raises is its own
                if _lasting(error) or time.monotonic() + wait > end:
                    self._give_up(error)
                logger.warning("%s: %s; trying again in %.0f s", self.url, _text(error), wait)
            time.sleep(wait)
            wait = min(2 * wait, PATIENCE / 4)

    def _give_up(self, error: Exception) -> NoReturn:
        if isinstance(error, FileNotFoundError):
            reason, remedy = "no such bucket or folder", "check the name"
        elif _is_refusal(error):
            reason = "access is refused"
            remedy = "check the credentials, for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they allow"
        elif _lasting(error):
            reason, remedy = "can't be used", "mend this and run again"
        else:
            reason = "the server can't be reached or fails"
            remedy = "check the network and the address, for s3:// AWS_ENDPOINT_URL, and run again"
        raise StorageError(f"{self.url}: {reason} ({_text(error)}); {remedy}") from error

    def _list(self) -> dict[str, dict[str, Any]]:
        """What the server says of each file, by its path from the folder. None where the folder isn't there.

        Raises:
            StorageError: a name would lead out of the folder, or the URL is that of a file.
        """
        self.fs.invalidate_cache()
        found = {}
        for path, info in self.fs.find(self.root, detail=True).items():
            if path == self.root:
                raise StorageError(f"{self.url}: is a file; name its folder")
            if path.endswith("/") or info["type"] == "directory":  # object stores keep empty files in place of folders
                continue
            if info["size"] is None:
                raise StorageError(f"{self.url}: the server doesn't say how large {path} is; use another kind of URL")
            name = path.removeprefix(f"{self.root}/" if self.root else "")
            parts = name.split("/")
            if (self.root and name == path) or "\\" in name or not {"", ".", ".."}.isdisjoint(parts):
                raise StorageError(f"{self.url}: a file named {name!r} there may lead out of the folder; rename it")
            if not any(_is_hidden(part) for part in parts):
                found[name] = info
        return found

    def _local_names(self) -> list[str]:
        names = []
        for folder, folders, files in os.walk(self.local):  # which bears with what others remove meanwhile
            folders[:] = [name for name in folders if not _is_hidden(name)]
            inside = Path(folder).relative_to(self.local)
            names += [(inside / name).as_posix() for name in files if not _is_hidden(name)]
        return names

    def _state(self, path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_size, status.st_mtime_ns

    def _is_copied(self, name: str, info: dict[str, Any], record: dict[str, Any]) -> bool:
        """Whether the file is here, undamaged, in the server's present version."""
        path, entry = self.local / name, record.get(name)
        return bool(entry) and entry["version"] == _version(info) and path.is_file() and entry["md5"] == _md5(path)

    def _is_unsent(self, name: str, info: dict[str, Any] | None, record: dict[str, Any]) -> bool:
        """Whether the file was changed here while the server's is still the one that was copied last, or none."""
        entry = record.get(name, {"version": None, "md5": None})
        unchanged = entry["version"] == (None if info is None else _version(info))
        return unchanged and entry["md5"] != _md5(self.local / name)

    def _is_lost(self, name: str, info: dict[str, Any] | None, record: dict[str, Any]) -> bool:
        """Whether the file is as it was copied last, and the server has another or none."""
        entry = record.get(name)
        has_another = bool(entry) and (info is None or entry["version"] != _version(info))
        return has_another and entry["md5"] == _md5(self.local / name)

    def _keep_unsent(self, name: str, record: dict[str, Any]) -> None:
        path = self.local / name
        if path.is_file() and (digest := _md5(path)) != record.get(name, {}).get("md5"):
            kept = path.replace(path.with_name(f"{KEPT}{digest[:8]}-{path.name}"))
            logger.warning("%s: was never copied to %s, which has another; kept as %s", path, self.url, kept.name)

    def _require_room(self, total: int, replaced: Collection[Path]) -> None:
        """Refuse, by StorageError, to copy in so many bytes where the disk has no room for them."""
        try:
            disk = shutil.disk_usage(self.local)
        except OSError:
            return
        free = disk.free + sum(path.stat().st_size for path in replaced if path.is_file())
        if disk.free and total > free:  # some file systems don't say, by 0, what is free
            raise StorageError(
                f"{self.url}: {total / 1e6:,.1f} MB are to be copied, and {self.local} has room for {free / 1e6:,.1f} "
                f"MB; make room or choose another --cache_dir"
            )

    def _fetch(self, name: str, info: dict[str, Any], arriving: Path) -> str:
        """Copy a file in, which has its name only when it is whole, and return its MD5.

        Raises:
            StorageError: it is larger than it was when it was listed.
        """

        def require_not_more(announced: int | None, arrived: int) -> None:
            if max(announced or 0, arrived) > info["size"]:
                raise StorageError(
                    f"{self.url}: {name} has more than the {info['size']:,} bytes that the server said; if it was "
                    f"replaced meanwhile, run again"
                )

        path = self.local / name
        self.fs.get_file(f"{self.root}/{name}", str(arriving), callback=Callback(hooks={"size": require_not_more}))
        require_not_more(None, arriving.stat().st_size)  # not all protocols tell meanwhile
        digest = _md5(arriving)
        self._require_same(name, info, arriving.stat().st_size, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        arriving.replace(path)
        return digest

    def _send(self, name: str, state: tuple[int, int], digest: str) -> dict[str, Any]:
        """Copy a file out and return what the server says of it."""
        path, target = self.local / name, f"{self.root}/{name}"
        if OBJECT_STORES.isdisjoint([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol):
            parent, own_name = target.rsplit("/", 1)
            unfinished = f"{parent}/{self.leaving}{own_name}"
            self.fs.makedirs(parent, exist_ok=True)
            self.fs.put_file(str(path), unfinished)
            self.fs.mv(unfinished, target)
        else:
            self.fs.put_file(str(path), target)
        self.fs.invalidate_cache()
        info = self.fs.info(target)
        if self._state(path) == state:  # a log may have grown meanwhile
            self._require_same(name, info, state[0], digest)
        return info

    def _require_same(self, name: str, info: dict[str, Any], size: int, digest: str) -> None:
        """Refuse a copy that differs from what the server has: by size, and by MD5 where S3 tells it.

        Raises:
            OSError: they differ.
        """
        etag = info.get("ETag", "").strip('"')
        is_md5 = "s3" in self.fs.protocol and re.fullmatch("[0-9a-f]{32}", etag)
        if size != info["size"] or (is_md5 and digest != etag and not self._is_etag_of_encrypted(name)):
            raise OSError(f"{name} was damaged on the way")

    def _is_etag_of_encrypted(self, name: str) -> bool:
        """Whether S3 encrypts the file with a key of its owner, whose ETag only looks like an MD5."""
        bucket, key, _ = self.fs.split_path(f"{self.root}/{name}")
        head = self.fs.call_s3("head_object", Bucket=bucket, Key=key)
        return head.get("ServerSideEncryption", "").startswith("aws:kms") or "SSECustomerAlgorithm" in head

    def _read_record(self) -> dict[str, Any]:
        try:
            return json.loads((self.local / RECORD).read_text())
        except (FileNotFoundError, ValueError):  # without it all is copied again
            return {}

    def _write_record(self, record: dict[str, Any]) -> None:
        with whole_files(self.local) as temporary:
            (temporary / RECORD).write_text(json.dumps(record))


class CopyOut:
    """Handler that copies new and changed files to the folders that are given by URL. It stands last.

    It copies when the engine starts, after each epoch of a trainer or each subject of an evaluator, and at the end,
    also where an exception is the end that no handler before this one has let out; else the next start copies. In
    between, a server that fails is worth a warning, and the next time it is tried again.

    Args:
        folders: settings such as `output_dir`; plain paths among them are passed over.
        cache_dir: as for `local_results`.

    Raises:
        StorageError: when the engine starts or ends well, if something can't be copied.
    """

    def __init__(self, folders: Sequence[str], cache_dir: str) -> None:
        urls = dict.fromkeys(folder.rstrip("/") for folder in folders if is_url(folder))
        self.folders = [StoredFolder(url, cache_dir, "results") for url in urls]

    def attach(self, engine: Engine) -> None:
        # of several processes on a machine, which share the copy, one speaks for all
        if not self.folders or int(os.environ.get("LOCAL_RANK", 0)) > 0:
            return
        each = Events.ITERATION_COMPLETED if isinstance(engine, Evaluator) else Events.EPOCH_COMPLETED
        engine.add_event_handler(Events.STARTED, self.copy)
        engine.add_event_handler(each, self.copy_if_possible)
        engine.add_event_handler(Events.COMPLETED, self.finish)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.copy_and_raise)

    def copy(self) -> None:
        for folder in self.folders:
            folder.copy_out()

    def copy_if_possible(self) -> None:
        try:
            self.copy()
        except StorageError as error:
            logger.warning("%s; it will be tried again", error)

    def finish(self) -> None:
        self.copy()
        print(f"copied to {' and '.join(folder.url for folder in self.folders)}")

    def copy_and_raise(self, error: Exception) -> NoReturn:
        if not isinstance(error, StorageError):
            futures.wait(BackgroundWriter.writing)
            self.copy_if_possible()
        raise error
