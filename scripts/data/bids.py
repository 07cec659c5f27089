"""BIDS datasets: which files make up a subject.

Each T1w with its T2w is a subject, so each session and each run in it is one. The id is the name of the T1w without
`desc`, suffix and extension, such as `sub-01_ses-02_run-1`.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypedDict

from typing_extensions import NotRequired

from scripts.data.volumes import CONTRASTS
from scripts.errors import InputError

FILE_NAME = re.compile(
    r"(?P<entities>sub-[0-9a-zA-Z+]+(_[0-9a-zA-Z]+-[0-9a-zA-Z+]+)*)_(?P<suffix>T1w|T2w|mask|dseg)\.nii(\.gz)?"
)
EXPECTED_NAMES = "sub-<label>/[ses-<label>/]anat/*_T1w.nii.gz with *_T2w.nii.gz"
# the `desc` of versions of a scan, the preferred first; any other `desc` comes last
VERSIONS = ("brain", "preproc", None)
# spaces of the subject itself; scans warped to a template come last, those turned and moved to its axes don't
OWN_SPACES = (None, "orig", "T1w", "T2w")
RIGID = "acpc"
# the `desc` of label images that are taken for the truth, the preferred first; others come from tools, ours among them
TRUE_LABELS = ("aseg", "manual", None)
LONGEST_RUN = 9  # characters; shorter numbers of runs are padded to it, so that 10 comes after 2
LARGEST_JSON = 10 * 2**20  # bytes; the file beside a scan has a few thousand


class BidsSubject(TypedDict):
    """The files of a subject as in `scripts.data.subjects.Subject`, and their folder.

    `anat` is the folder relative to the dataset, such as `sub-01/ses-02/anat`; `mask` is a brain mask and `label` a
    segmentation, see `TRUE_LABELS`, if there is one; `runs` are further runs of T1w and T2w, to be averaged.
    """

    subject: str
    image: list[str | None]
    anat: str
    mask: NotRequired[str]
    runs: NotRequired[list[list[str]]]
    label: NotRequired[str]


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
    def is_in_own_space(self) -> bool:
        space = self.entities.get("space")
        return space in OWN_SPACES or space.lower().endswith(RIGID)

    @property
    def space(self) -> str:
        """What `space-` says; without it, the scan's own."""
        return self.entities.get("space", self.suffix)

    @property
    def key(self) -> tuple[tuple[str, str], ...]:
        """The entities in which a T1w, its T2w and its mask agree; run-01 is run-1."""
        entities = {name: value for name, value in self.entities.items() if name not in ("desc", "space", "part")}
        if "run" in entities:
            entities["run"] = self.run
        return tuple(sorted(entities.items()))

    @property
    def run(self) -> str | None:
        run = self.entities.get("run")
        return run.lstrip("0") if run and run.isdecimal() else run

    @property
    def rank(self) -> tuple[int, bool]:
        """Smaller for the preferred version."""
        desc = self.entities.get("desc")
        return VERSIONS.index(desc) if desc in VERSIONS else len(VERSIONS), self.space != self.suffix

    @property
    def subject(self) -> str:
        return "_".join(part for part in self.name.split("_") if not part.startswith("desc-"))


def find_bids_subjects(
    dataset_dir: str, contrasts: str = "both", runs: str = "apart"
) -> tuple[list[BidsSubject], dict[str, str | InputError]]:
    """Return all subjects in the `anat` folders of a BIDS dataset, raw or derivative.

    Other folders, such as `derivatives`, `sourcedata` and `code`, and files with other names are skipped.

    Args:
        dataset_dir: the folder of the dataset, which needn't exist.
        contrasts, runs: see `scripts.data.subjects.SubjectFolder`.

    Returns:
        The subjects, and by id the reasons why others with a T1w or T2w are left out. A reason is an InputError if a
        folder can't be read. It is one for a whole session if a file belongs to another subject or
        session, or exists both as `.nii` and as `.nii.gz`.
    """
    root = Path(dataset_dir)
    subjects: list[BidsSubject] = []
    left_out: dict[str, str | InputError] = {}
    anats = sorted([*root.glob("sub-*/anat/"), *root.glob("sub-*/ses-*/anat/")])
    for folder in (*root.glob("sub-*/"), *root.glob("sub-*/ses-*/"), *anats):
        if not _can_be_read(folder):
            session = "_".join(part for part in folder.relative_to(root).parts if part != "anat")
            left_out[session] = InputError(f"{folder}: can't be read; allow it, or remove the folder")
    for anat in anats:
        session = "_".join(anat.relative_to(root).parts[:-1])
        if session in left_out:
            continue
        try:
            scans = [scan for scan in _scans(anat, session) if scan.entities.get("part", "mag") == "mag"]
        except InputError as error:
            left_out[session] = error
            continue
        scans = _in_one_space(scans, session, left_out)
        if contrasts in CONTRASTS:
            wanted = [scan for scan in scans if scan.suffix in (f"{contrasts}w", "mask", "dseg")]
            if len(wanted) < len(scans) and all(scan.suffix in ("mask", "dseg") for scan in wanted):
                left_out[session] = f"has no {contrasts}w"
            scans = wanted
        masks = [scan for scan in scans if scan.suffix == "mask" and scan.entities.get("desc") == "brain"]
        t1s, t2s = ([scan for scan in scans if scan.suffix == suffix] for suffix in ("T1w", "T2w"))
        t1s, t2s = _best_versions(t1s), _best_versions(t2s, spaces_apart=bool(t1s) and runs == "apart")
        further: dict[_Scan, list[_Scan]] = {}
        if runs == "average":
            (t1s, more_t1s), (t2s, more_t2s) = map(_first_runs, (t1s, t2s))
            further = more_t1s | more_t2s
        alone = contrasts != "both" and not (t1s and t2s)
        if t2s and not t1s and not alone:
            left_out[session] = "has no T1w; --contrasts any segments its T2w alone"
            continue
        for first in t1s or t2s:
            second, own_masks = None if alone else _partner(first, t1s, t2s), _masks_of(first, masks)
            if reason := _reason_to_leave_out(first, second, own_masks, (*t1s, *t2s), alone):
                left_out[first.subject] = reason
                continue
            pair = {scan.suffix: str(scan.path) for scan in (first, second) if scan}
            subject: BidsSubject = {
                "subject": first.subject,
                "image": [pair.get(f"{name}w") for name in CONTRASTS],
                "anat": anat.relative_to(root).as_posix(),
            }
            others = [[str(scan.path) for scan in further.get(each, ())] for each in (first, second) if each]
            if any(others):
                subject["runs"] = others
            if own_masks:
                subject["mask"] = str(own_masks[0].path)
            if label := _label_of(first, scans):
                subject["label"] = str(label.path)
            subjects.append(subject)
    return subjects, left_out


def _reason_to_leave_out(
    t1: _Scan, t2: _Scan | None, masks: Collection[_Scan], scans: Collection[_Scan], alone: bool
) -> str | None:
    """Why a T1w with its T2w and masks isn't a subject.

    `scans` are all T1w and T2w of the session. If `alone`, a T1w or T2w is a subject by itself.
    """
    if t2 is None and not alone and all(scan.suffix == "T1w" for scan in scans):
        return "has no T2w; --contrasts any segments its T1w alone"
    if t2 is None and not alone:
        names = ", ".join(scan.path.name for scan in scans)
        return f"has no T2w that is clearly its own in {names}; name the two alike"
    if len(masks) > 1:
        return (
            f"has {' and '.join(scan.path.name for scan in masks)}; keep the one on the grid of {t1.path.name}, or "
            "name it like that scan: with its space-, or without one"
        )
    return None


def _in_one_space(scans: Collection[_Scan], session: str, left_out: dict[str, str | InputError]) -> list[_Scan]:
    """The scans in the subject's own spaces or, without any, in the only space that has the most of T1w and T2w.

    If several have as many, the session is added to `left_out`.
    """
    own = [scan for scan in scans if scan.is_in_own_space]
    kinds: dict[str, set[str]] = {}
    for scan in scans:
        if scan.suffix in ("T1w", "T2w"):
            kinds.setdefault(scan.space, set()).add(scan.suffix)
    if not kinds or any(scan.suffix in ("T1w", "T2w") for scan in own):
        return own
    most = max(map(len, kinds.values()))
    spaces = sorted(space for space, there in kinds.items() if len(there) == most)
    if len(spaces) > 1:
        left_out[session] = f"has scans in {' and '.join(f'space-{space}' for space in spaces)} alone; keep one of them"
    return [scan for scan in scans if [scan.space] == spaces]


def _can_be_read(folder: Path) -> bool:
    try:
        for path in folder.iterdir():
            path.lstat()
    except OSError:
        return False
    return True


def _scans(anat: Path, session: str) -> Iterator[_Scan]:
    """T1w, T2w and masks in the folder of a session, such as `sub-01_ses-02`; InputError if one is misplaced."""
    found: dict[str, Path] = {}
    for path in sorted(anat.iterdir()):
        name = FILE_NAME.fullmatch(path.name)
        if name is None:
            continue
        named = "_".join(part for part in name["entities"].split("_") if part.startswith(("sub-", "ses-")))
        if named != session:
            raise InputError(f"{path}: its name says {named}, its folder {session}; move or rename it")
        if other := found.get(path.name.removesuffix(".gz")):
            raise InputError(f"{path}: {other} exists as well; keep one of the two")
        found[path.name.removesuffix(".gz")] = path
        yield _Scan(path, name["entities"], name["suffix"])


def _best_versions(scans: Collection[_Scan], spaces_apart: bool = False) -> list[_Scan]:
    """Of scans that differ only in `desc` and `space`, the preferred version; several if they are equally good.

    With `spaces_apart`, one in each space.
    """

    def rivals(scan: _Scan) -> Iterator[_Scan]:
        return (each for each in scans if each.key == scan.key and (not spaces_apart or each.space == scan.space))

    return [scan for scan in scans if scan.rank == min(other.rank for other in rivals(scan))]


def unused_images(dataset_dir: str) -> list[Path]:
    """Return files in the `anat` folders of a dataset whose names aren't those of BIDS, where no scan has that name."""
    root = Path(dataset_dir)
    return [
        path
        for pattern in ("sub-*/anat/*", "sub-*/ses-*/anat/*")
        for path in sorted(root.glob(pattern))
        if not FILE_NAME.fullmatch(path.name)
    ]


def _first_runs(scans: Collection[_Scan]) -> tuple[list[_Scan], dict[_Scan, list[_Scan]]]:
    """The first run of each scan, and by it the others, which differ from it in `run-` alone."""
    by_key: dict[tuple[tuple[str, str], ...], list[_Scan]] = {}
    for scan in sorted(scans, key=lambda scan: ((scan.run or "").zfill(LONGEST_RUN), scan.name)):
        by_key.setdefault(tuple(pair for pair in scan.key if pair[0] != "run"), []).append(scan)
    return [first for first, *_ in by_key.values()], {first: others for first, *others in by_key.values()}


def _masks_of(t1: _Scan, masks: Collection[_Scan]) -> list[_Scan]:
    """The brain masks of a T1w: those in its space, else all. More than one is ambiguous."""
    own = [mask for mask in masks if mask.key == t1.key]
    for unnamed in (None, "T1w"):  # a T1w without space- is in space-T1w
        space = t1.entities.get("space", unnamed)
        if in_its_space := [mask for mask in own if mask.entities.get("space", unnamed) == space]:
            return in_its_space
    return own


def _label_of(t1: _Scan, scans: Collection[_Scan]) -> _Scan | None:
    """The segmentation of a T1w, in its space."""
    own = {
        scan.entities.get("desc"): scan
        for scan in scans
        if scan.suffix == "dseg"
        and scan.key == t1.key
        and scan.entities.get("space", "T1w") == t1.entities.get("space", "T1w")
    }
    return next((own[desc] for desc in TRUE_LABELS if desc in own), None)


def _partner(t1: _Scan, t1s: Collection[_Scan], t2s: Collection[_Scan]) -> _Scan | None:
    """The T2w of a T1w: with equal entities, else the only pair of this run, else the only pair of the session."""
    criteria: tuple[Callable[[_Scan], Any], ...] = (lambda scan: scan.key, lambda scan: scan.run, lambda scan: None)
    for criterion in criteria:
        rivals, partners = ([scan for scan in scans if criterion(scan) == criterion(t1)] for scans in (t1s, t2s))
        if len({scan.key for scan in partners}) == 1:  # one scan, in several spaces
            partners = [scan for scan in partners if scan.space == t1.space] or _best_versions(partners)
        if len(rivals) == len(partners) == 1:
            return partners[0]
    return None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a dataset; None if it doesn't exist, isn't JSON or is far too large.

    Raises:
        InputError: it exists and reading isn't allowed.
    """
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_JSON:  # reading a pipe would never end
            return None
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # RecursionError: nested too deep
        return None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); allow it, or remove the file") from error


def needed_files(names: Collection[str]) -> set[str]:
    """Return the files that make up the subjects of a dataset.

    Args:
        names: all files of the dataset, as paths relative to it.

    Returns:
        In a BIDS dataset, T1w, T2w and masks with their JSON files, and the files at the top, which describe the
        dataset. In any other, all files outside `derivatives`.
    """
    paths = {name: PurePath(name) for name in names}
    anat = {name for name, path in paths.items() if path.parts[0].startswith("sub-") and path.parent.name == "anat"}
    images = {name for name in anat if FILE_NAME.fullmatch(paths[name].name)}
    if images:
        return images | {name for name in anat if name.endswith(".json")} | {n for n in names if "/" not in n}
    return {name for name, path in paths.items() if path.parts[0] != "derivatives"}
