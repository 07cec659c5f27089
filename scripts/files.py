"""Files that are written whole or not at all, and folders that one run has to itself."""

import errno
import logging
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import ignite.distributed as idist
import nibabel as nib
from filelock import FileLock, Timeout
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from scripts.errors import UNWRITABLE, InputError

logger = logging.getLogger(__name__)

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
        with TemporaryDirectory(prefix=UNFINISHED + _kind_of_run, dir=directory) as temporary:
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


_kind_of_run = ""  # of the run in this process, in the names of its temporary folders


@contextmanager
def alone(kind: str, folders: Iterable[str]) -> Iterator[None]:
    """A block in which no other run of this kind writes to the folders; what killed ones left unfinished is removed.

    The system frees a folder when its process ends, however it does. Of processes that `torchrun` started the first one
    speaks for all, and the others wait for it at the beginning. Where a folder can't be locked, as on some network file
    systems, the block goes on without, and removes nothing there.

    Args:
        kind: 'training', or 'results' of scoring and segmenting. A training writes other files than those two, so the
            best network so far may be scored meanwhile.
        folders: are made if need be.

    Raises:
        InputError: another run of this kind is in one of them, or nothing can be written there.
    """
    global _kind_of_run
    with ExitStack() as stack:
        for folder in dict.fromkeys(Path(folder).resolve() for folder in folders) if idist.get_rank() == 0 else ():
            with whole_files(folder):
                pass  # tells what can't be written before anything is computed
            path = folder / f".{kind}.lock"
            try:
                # another one that looks whether it is alone has it for a moment
                stack.enter_context(FileLock(path, timeout=1, fallback_to_soft=False))
            except Timeout:
                raise InputError(
                    f"{folder}: another run ({kind}) is writing here; wait until it ends, or choose another folder by "
                    f"--output_dir{', --ckpt_dir' if kind == 'training' else ''}"
                ) from None
            except OSError as error:  # a network file system may have none
                logger.warning("%s can't be locked (%s): start no second run there", folder, error)
                continue
            stack.callback(path.unlink, missing_ok=True)
            for below in ("", "sub-*/**/"):  # where the results of a BIDS dataset lie
                for unfinished in folder.glob(f"{below}{UNFINISHED}{kind}-*"):
                    shutil.rmtree(unfinished, ignore_errors=True)
        idist.barrier()  # before others write
        _kind_of_run = f"{kind}-"
        try:
            yield
        finally:
            _kind_of_run = ""


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
