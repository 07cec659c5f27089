"""BIDS datasets: which files make up a subject, and what its results are called in a derivative dataset.

Each T1w with its T2w is a subject of its own, so each session is one, and in it each run. Its id is the name of the T1w
without `desc`, suffix and extension, such as `sub-01_ses-02_run-1`.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypedDict

from typing_extensions import NotRequired

from scripts.errors import InputError

FILE_NAME = re.compile(
    r"(?P<entities>sub-[0-9a-zA-Z+]+(_[0-9a-zA-Z]+-[0-9a-zA-Z+]+)*)_(?P<suffix>T1w|T2w|mask)\.nii(\.gz)?"
)
EXPECTED_NAMES = "sub-<label>/[ses-<label>/]anat/*_T1w.nii.gz with *_T2w.nii.gz"
# of several versions of a scan the first that is there; any other `desc` comes last
VERSIONS = ("brain", "preproc", None)
# grids of the subject's own; scans that were warped to a template are passed over
OWN_SPACES = (None, "orig", "T1w", "T2w")
LARGEST_JSON = 10 * 2**20  # bytes; what stands beside a scan has some thousand


class BidsSubject(TypedDict):
    """The files of a subject as `scripts.data.subjects.Subject` has them, and where they lie.

    `anat` is their folder from the dataset on, such as `sub-01/ses-02/anat`; `mask` is a brain mask, if there is one.
    """

    subject: str
    image: list[str]
    anat: str
    mask: NotRequired[str]


@dataclass(frozen=True)
class _Scan:
    """A file in an `anat` folder."""

    path: Path
    name: str  # up to the suffix
    suffix: str

    @property
    def entities(self) -> dict[str, str]:
        return dict(part.split("-", 1) for part in self.name.split("_"))

    @property
    def is_usable(self) -> bool:
        entities = self.entities
        return entities.get("space") in OWN_SPACES and entities.get("part", "mag") == "mag"

    @property
    def key(self) -> tuple[tuple[str, str], ...]:
        """By which the T1w, the T2w and the mask that belong together are alike."""
        return tuple(sorted(pair for pair in self.entities.items() if pair[0] not in ("desc", "space", "part")))

    @property
    def version(self) -> int:
        desc = self.entities.get("desc")
        return VERSIONS.index(desc) if desc in VERSIONS else len(VERSIONS)

    @property
    def subject(self) -> str:
        return "_".join(part for part in self.name.split("_") if not part.startswith("desc-"))


def find_bids_subjects(dataset_dir: str) -> tuple[list[BidsSubject], dict[str, str | InputError]]:
    """All subjects in the `anat` folders of a BIDS dataset, raw or derivative.

    Nothing else is looked into, so `derivatives`, `sourcedata`, `code` and files named otherwise are passed over.

    Args:
        dataset_dir: the folder of the dataset. It needn't exist.

    Returns:
        The subjects, and by id the reason why others that have a T1w or a T2w aren't among them. It is an InputError
            where a folder or a JSON file can't be read, and, of a whole session, where a file is another subject's or
            session's, or is there both as `.nii` and as `.nii.gz`.
    """
    root = Path(dataset_dir)
    subjects: list[BidsSubject] = []
    left_out: dict[str, str | InputError] = {}
    anats = sorted([*root.glob("sub-*/anat/"), *root.glob("sub-*/ses-*/anat/")])
    for folder in (*root.glob("sub-*/"), *root.glob("sub-*/ses-*/"), *anats):
        if not _can_be_read(folder):
            session = "_".join(part for part in folder.relative_to(root).parts if part != "anat")
            left_out[session] = InputError(f"{folder}: can't be read; allow it, or take the folder away")
    for anat in anats:
        session = "_".join(anat.relative_to(root).parts[:-1])
        if session in left_out:
            continue
        try:
            scans = [scan for scan in _scans(anat, session) if scan.is_usable]
        except InputError as error:
            left_out[session] = error
            continue
        masks = [scan for scan in scans if scan.suffix == "mask" and scan.entities.get("desc") == "brain"]
        t1s, t2s = (_best_versions([scan for scan in scans if scan.suffix == suffix]) for suffix in ("T1w", "T2w"))
        if t2s and not t1s:
            left_out[session] = "has no T1w"
        for t1 in t1s:
            t2 = _partner(t1, t1s, t2s)
            own_masks = _masks_of(t1, masks)
            mask = own_masks[0] if own_masks else None
            try:
                stripped = mask or not any(_says_not_skull_stripped(scan.path) for scan in (t1, t2) if scan)
            except InputError as error:
                left_out[t1.subject] = error
                continue
            if t2 is None:
                names = ", ".join(scan.path.name for scan in (*t1s, *t2s))
                left_out[t1.subject] = (
                    f"has no T2w that is clearly its own in {names}; name the two alike" if t2s else "has no T2w"
                )
            elif len(own_masks) > 1:
                left_out[t1.subject] = (
                    f"has {' and '.join(scan.path.name for scan in own_masks)}; keep the one on the grid of "
                    f"{t1.path.name}, or name it as that: with its space-, or without one"
                )
            elif not mask and (t1.entities.get("desc") == "brain") != (t2.entities.get("desc") == "brain"):
                left_out[t1.subject] = (
                    f"has only one of {t1.path.name} and {t2.path.name} as desc-brain; strip both scans, or put a mask "
                    "beside them, named as the T1w but desc-brain_mask"
                )
            elif not stripped:
                left_out[t1.subject] = (
                    "isn't skull-stripped, as its .json says; put a mask beside it, named as the T1w but "
                    "desc-brain_mask, or a skull-stripped T1w and T2w named desc-brain"
                )
            else:
                subject: BidsSubject = {
                    "subject": t1.subject,
                    "image": [str(t1.path), str(t2.path)],
                    "anat": anat.relative_to(root).as_posix(),
                }
                if mask:
                    subject["mask"] = str(mask.path)
                subjects.append(subject)
    return subjects, left_out


def _can_be_read(folder: Path) -> bool:
    try:
        for path in folder.iterdir():
            path.lstat()
    except OSError:
        return False
    return True


def _scans(anat: Path, session: str) -> Iterator[_Scan]:
    """T1w, T2w and masks in the folder of a session, such as `sub-01_ses-02`; InputError where one can't be there."""
    found: dict[str, Path] = {}
    for path in sorted(anat.iterdir()):
        name = FILE_NAME.fullmatch(path.name)
        if name is None:
            continue
        named = "_".join(part for part in name["entities"].split("_") if part.startswith(("sub-", "ses-")))
        if named != session:
            raise InputError(f"{path}: its name says {named}, its folder {session}; move or rename it")
        if other := found.get(path.name.removesuffix(".gz")):
            raise InputError(f"{path}: {other} is there as well; keep one of the two")
        found[path.name.removesuffix(".gz")] = path
        yield _Scan(path, name["entities"], name["suffix"])


def _best_versions(scans: Collection[_Scan]) -> list[_Scan]:
    """Of scans that differ in `desc` the one of the preferred; all of them where two are equally good."""
    return [scan for scan in scans if scan.version == min(other.version for other in scans if other.key == scan.key)]


def _masks_of(t1: _Scan, masks: Collection[_Scan]) -> list[_Scan]:
    """The brain masks of a T1w: the one in its space, else all, of which several can't be told apart."""
    own = [mask for mask in masks if mask.key == t1.key]
    for unnamed in (None, "T1w"):  # a T1w is in its own space, whether its name says so or not
        space = t1.entities.get("space", unnamed)
        if in_its_space := [mask for mask in own if mask.entities.get("space", unnamed) == space]:
            return in_its_space
    return own


def _partner(t1: _Scan, t1s: Collection[_Scan], t2s: Collection[_Scan]) -> _Scan | None:
    """The T2w of a T1w: with equal entities, else the only one of the only T1w of this run, else of the session."""
    ways: tuple[Callable[[_Scan], Any], ...] = (
        lambda scan: scan.key,
        lambda scan: scan.entities.get("run"),
        lambda scan: None,
    )
    for way in ways:
        rivals, partners = ([scan for scan in scans if way(scan) == way(t1)] for scans in (t1s, t2s))
        if len(rivals) == len(partners) == 1:
            return partners[0]
    return None


def _says_not_skull_stripped(path: Path) -> bool:
    """Whether the JSON file beside an image says so; derivative datasets must."""
    sidecar = read_json(path.parent / f"{path.name.split('.')[0]}.json")
    return isinstance(sidecar, dict) and sidecar.get("SkullStripped") is False


def read_json(path: Path) -> Any:
    """What a JSON file of a dataset holds; None where it isn't there, isn't JSON or is far too large.

    Raises:
        InputError: it is there and may not be read.
    """
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_JSON:  # reading a pipe would never end
            return None
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # it may be nested too deep
        return None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); allow it, or take the file away") from error


def needed_files(names: Collection[str]) -> set[str]:
    """Of the files of a dataset, by their paths from its folder, those that subjects are made of.

    Of a BIDS dataset these are T1w, T2w and masks with their JSON files, and what lies at the top, which describes the
    dataset; of another one all that aren't in `derivatives`.
    """
    paths = {name: PurePath(name) for name in names}
    anat = {name for name, path in paths.items() if path.parts[0].startswith("sub-") and path.parent.name == "anat"}
    images = {name for name in anat if FILE_NAME.fullmatch(paths[name].name)}
    if images:
        return images | {name for name in anat if name.endswith(".json")} | {n for n in names if "/" not in n}
    return {name for name, path in paths.items() if path.parts[0] != "derivatives"}
