"""Files: written whole or not at all, described in their header, hidden."""

import errno
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from scripts.errors import UNWRITABLE, InputError, reason_of

ROOT = Path(__file__).parents[1]  # the folder of the bundle
UNFINISHED = ".unfinished-"
SYSTEM_FOLDERS = {"__MACOSX", "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN"}


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden or a system's own; `.bidsignore` belongs to a BIDS dataset."""
    return name in SYSTEM_FOLDERS or (name.startswith(".") and name != ".bidsignore")


@contextmanager
def whole_files(directory: str | Path) -> Iterator[Path]:
    """Give a temporary folder whose files move into `directory` when the block ends, and are deleted when it fails.

    Files of the same names are replaced. `directory` is created if it is missing.

    Raises:
        InputError: the disk is full or read-only.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=_prefix, dir=directory) as temporary:
            yield Path(temporary)
            for path in sorted(Path(temporary).iterdir(), reverse=True):  # an .img before its .hdr
                path.replace(directory / path.name)
    except (OSError, RuntimeError) as error:
        # a folder may have the name of a file to write, or the reverse
        expected = {*UNWRITABLE, errno.EISDIR, errno.EEXIST}
        if getattr(error, "errno", None) in expected or "inline_container" in str(error):  # torch's own file writer
            raise InputError(
                f"{directory}: can't be written ({reason_of(error)}); make room or allow it, or choose another folder"
            ) from error
        raise


_prefix = UNFINISHED  # of this process's temporary folders


@contextmanager
def unfinished_named(kind: str) -> Iterator[None]:
    """Name temporary folders after a kind of run within the block, so that a later run of this kind cleans them up."""
    global _prefix
    before, _prefix = _prefix, f"{UNFINISHED}{kind}-"
    try:
        yield
    finally:
        _prefix = before


def already_written(paths: Iterable[Path], description: str) -> bool:
    """Return whether all these Analyze or NIfTI files exist.

    Raises:
        InputError: one exists and has another description in its header.
    """
    paths = list(paths)
    existing = [path for path in paths if path.exists()]
    for path in existing:
        try:
            found = nib.load(path).header["descrip"].item().decode(errors="replace")
        except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error):
            found = None
        if found != description:
            raise InputError(f"{path}: already exists and isn't {description}; choose another --output_dir")
    return len(existing) == len(paths)


def add_to_zip(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add a file without time, owner or system, so that equal content gives equal bytes."""
    entry = zipfile.ZipInfo(name)  # ZipInfo.from_file would record them
    entry.create_system = 3  # Unix, on any system
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content, archive.compression)
