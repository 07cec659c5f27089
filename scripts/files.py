"""Files that are written whole or not at all."""

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

from scripts.errors import UNWRITABLE, InputError

ROOT = Path(__file__).parents[1]  # the folder of the bundle
UNFINISHED = ".unfinished-"


@contextmanager
def whole_files(directory: str | Path) -> Iterator[Path]:
    """A temporary folder whose files move into `directory` when the block ends well, and vanish when it fails.

    Files of those names that are there already are replaced. `directory` is made if need be.

    Raises:
        InputError: the disk is full or may not be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=_prefix, dir=directory) as temporary:
            yield Path(temporary)
            for path in sorted(Path(temporary).iterdir(), reverse=True):  # an .img before the .hdr that speaks of it
                path.replace(directory / path.name)
    except (OSError, RuntimeError) as error:
        # there may be a folder where a file is to go, or the reverse
        expected = {*UNWRITABLE, errno.EISDIR, errno.EEXIST}
        if getattr(error, "errno", None) in expected or "inline_container" in str(error):  # torch's own file writer
            reason = " ".join(str(error).split())
            raise InputError(
                f"{directory}: can't be written ({reason}); make room or allow it, or choose another folder"
            ) from error
        raise


_prefix = UNFINISHED  # of temporary folders that this process makes


@contextmanager
def unfinished_named(kind: str) -> Iterator[None]:
    """Name temporary folders after a kind of run within the block, so that only its own are cleaned up later."""
    global _prefix
    before, _prefix = _prefix, f"{UNFINISHED}{kind}-"
    try:
        yield
    finally:
        _prefix = before


def made_already(paths: Iterable[Path], description: str) -> bool:
    """Whether all these Analyze or NIfTI files are there and describe themselves so.

    Raises:
        InputError: one is there and is something else.
    """
    paths = list(paths)
    existing = [path for path in paths if path.exists()]
    for path in existing:
        try:
            found = nib.load(path).header["descrip"].item().decode(errors="replace")
        except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error):
            found = None
        if found != description:
            raise InputError(f"{path}: is there already and isn't {description}; choose another --output_dir")
    return len(existing) == len(paths)


def add_to_zip(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add a file that bears no time of day, owner or system, so that like content gives the same bytes."""
    entry = zipfile.ZipInfo(name)  # made by hand, for made from a file it would bear them
    entry.create_system = 3  # Unix, wherever it is made
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content, archive.compression)
