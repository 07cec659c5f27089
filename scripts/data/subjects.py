"""Which files make up a subject, and which subjects train, validate and are segmented.

A subject is a dict: `subject` (its id, a string), `image` ([T1 path, T2 path]) and, if it has one, `label` (a path).
Where an HDF5 file in the published layout holds the subject, all three paths are that of the file. Subjects of a BIDS
dataset have no label, and more in their dict: see `scripts.data.bids.BidsSubject`.
"""

import logging
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import TypedDict

from fsspec.core import split_protocol
from monai.utils import ensure_tuple
from typing_extensions import NotRequired

from scripts.data import bids
from scripts.errors import InputError, require_path

logger = logging.getLogger(__name__)

FILE_NAME = re.compile(r"(?is)subject-(?P<subject>.+)-(?P<kind>t1|t2|label)\.(hdr|img|nii|nii\.gz)")
HDF5_NAME = re.compile(r"(?s)train_iseg_nocut_(?P<subject>.+)\.h5")
EXPECTED_NAMES = (
    "subject-<id>-T1, subject-<id>-T2 and subject-<id>-label, ending in .hdr/.img, .nii or .nii.gz, "
    f"or train_iseg_nocut_<id>.h5, or BIDS: {bids.EXPECTED_NAMES}"
)
# names of folders, or parts of these, into which a folder of subjects may be divided; MONAI Label has labels/final
OF_A_KIND = re.compile(r"(?i)(?<![a-z0-9])(t[12]w?|(image|label)s?(tr|ts)?|final)(?![a-z0-9])")


class Subject(TypedDict):
    """The files of a subject; see the head of this module."""

    subject: str
    image: list[str]
    label: NotRequired[str]
    anat: NotRequired[str]
    mask: NotRequired[str]


Ids = int | str | Collection[int | str]


def natural_order(subject: str) -> list[tuple[bool, int, str]]:
    """Sort key by which subject 9 comes before subject 10."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", subject) if part
    ]


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is none of a person's: by a dot, or as systems name their own."""
    return name.startswith(".") or name in ("__MACOSX", "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN")


def _volume_file(path: Path) -> Path:
    """The file by which a volume is opened: the header of an Analyze pair, of which both halves must be there.

    Raises:
        InputError: one isn't, or is no file, or the path can't be shown in one line or written into a table.
    """
    if not str(path).isprintable():
        raise InputError(f"{str(path)!r}: its name has a line break or the like in it; rename it")
    if not path.is_file():
        raise InputError(f"{path}: is no file, but a folder, a link to nowhere or the like; put the image itself there")
    header, image = (_with_suffix_like(path, suffix) for suffix in (".hdr", ".img"))
    if path.suffix.lower() not in (".hdr", ".img"):
        return path
    if not header.exists():
        raise InputError(f"{path}: its header {header.name} is missing; copy both files of the pair")
    if not image.exists():
        raise InputError(f"{path}: its image {image.name} is missing; copy both files of the pair")
    return header


def _with_suffix_like(path: Path, suffix: str) -> Path:
    """`path` with another suffix, in capitals if its own is."""
    return path.with_suffix(suffix.upper() if path.suffix.isupper() else suffix)


def _named_files(
    directory: str, bad: dict[str, InputError], but_in: Collection[str] = ("derivatives",)
) -> Iterator[tuple[re.Match[str], Path]]:
    """Files in a folder and those below it that are named as a subject's; those in a folder of `but_in` aren't.

    What folders can't be read, and why, is put into `bad`.
    """
    root = Path(directory)
    for path in sorted(_below(root, {root / name for name in but_in}, bad)):
        if name := FILE_NAME.fullmatch(path.name) or HDF5_NAME.fullmatch(path.name):
            yield name, path


def _below(root: Path, but: Collection[Path], bad: dict[str, InputError]) -> Iterator[Path]:
    """All that isn't hidden in a folder and those below it, but for some; what links lead to is entered once."""

    def note(error: OSError) -> None:
        remedy = "allow it, or take the folder away"
        bad[error.filename] = InputError(f"{error.filename}: can't be read ({error.strerror}); {remedy}")

    real_root = root.resolve()
    # neither again, nor by a link that leads up
    entered, but = {real_root, *real_root.parents}, {path.resolve() for path in but}
    # a folder that isn't there holds nothing
    for folder, folders, files in os.walk(root, onerror=note, followlinks=True) if root.is_dir() else ():
        shown = sorted(name for name in folders if not _is_hidden(name))
        yield from (Path(folder, name) for name in (*shown, *files) if not _is_hidden(name))
        folders.clear()
        for name in shown:
            if (real := Path(folder, name).resolve()) not in entered and real not in but:
                entered.add(real)
                folders.append(name)


def _find_volumes(directory: str) -> tuple[dict[str, dict[str, Path]], dict[str, InputError]]:
    """Files by subject and by kind (T1, T2, LABEL, HDF5), and by subject or folder what is wrong with it."""
    found: dict[str, dict[str, Path]] = {}
    bad: dict[str, InputError] = {}
    for name, path in _named_files(directory, bad):
        subject = name["subject"]
        files = found.setdefault(subject, {})
        try:
            path = _volume_file(path)
            other = files.setdefault("HDF5" if name.re is HDF5_NAME else name["kind"].upper(), path)
            if other != path:
                raise InputError(f"{path}: subject {subject} has {other} as well; keep one of the two")
        except InputError as error:
            bad.setdefault(subject, error)
    return found, bad


def find_labels(directory: str) -> dict[str, str]:
    """The label files in a folder and the folders below it, by subject.

    Raises:
        InputError: half of an Analyze pair, what is named so but isn't a file, or two files for one volume.
    """
    found, bad = _find_volumes(directory)
    for error in bad.values():
        raise error
    return {subject: str(files["LABEL"]) for subject, files in found.items() if "LABEL" in files}


def _place_of_subjects(folder: PurePath) -> list[str]:
    """The parts of a path, without the words in them that say what kind of file they hold."""
    return [name for part in folder.parts if (name := OF_A_KIND.sub("", part))]


def _subject(subject_id: str, files: dict[str, Path]) -> Subject:
    """Make a subject of its files by kind; raise InputError where a file is missing or redundant."""
    if hdf5 := files.pop("HDF5", None):
        for other in files.values():
            raise InputError(f"{hdf5}: subject {subject_id} has {other} as well; keep the HDF5 file or the images")
        return {"subject": subject_id, "image": [str(hdf5), str(hdf5)], "label": str(hdf5)}
    for modality in ("T1", "T2"):
        if modality not in files:
            raise InputError(
                f"{next(iter(files.values()))}: subject {subject_id} has no {modality}; "
                f"put subject-{subject_id}-{modality} beside it"
            )
    for kind, path in files.items():
        if _place_of_subjects(path.parent) != _place_of_subjects(files["T1"].parent):
            risk = "a segmentation" if kind == "LABEL" else "another child's"
            raise InputError(
                f"{path}: lies elsewhere than {files['T1']}, and may be {risk}; put T1, T2 and label of a subject "
                f"into one folder, or into T1/, T2/ and label/ in it, and give each subject an id of its own"
            )
    subject: Subject = {"subject": subject_id, "image": [str(files["T1"]), str(files["T2"])]}
    if "LABEL" in files:
        subject["label"] = str(files["LABEL"])
    return subject


def names_of(subjects: Iterable[Subject]) -> list[str]:
    """Ids of subjects; of those without one, as MONAI Label gives them, the paths of their images."""
    return [subject.get("subject", str(subject["image"])) for subject in subjects]


def _ids(setting: Ids) -> list[str]:
    """Ids as text, for one or several: `--val_subjects 9` equals `--val_subjects "[9]"`."""
    return [str(subject_id) for subject_id in ensure_tuple(setting)]


class Dataset:
    """The subjects in a folder, which is scanned once, when the object is made.

    The folder is a BIDS dataset, as `scripts.data.bids.find_bids_subjects` takes it; or it holds, at any depth, files
    `subject-<id>-T1`, `-T2` and `-label` (capitals or not), each Analyze (`.hdr` and `.img`) or NIfTI, or
    `train_iseg_nocut_<id>.h5` for a labelled subject. Hidden files, `__MACOSX` and the folder `derivatives` are
    skipped. A folder that doesn't exist holds no subjects.

    Args:
        folder: the folder to scan.

    Attributes:
        subjects: usable subjects by ascending id.
        bad: why others can't be used, by id or folder: a T1 without its T2 or the reverse, a label without images or
            in another place, half of an Analyze pair, a name that isn't a file, two files for one volume, images
            beside an HDF5 file, or a folder that can't be read.
        left_out: why scans of a BIDS dataset aren't subjects, by id; these are no errors.
        in_bids: whether the folder is a BIDS dataset.

    Raises:
        InputError: the folder mixes both layouts.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.subjects: list[Subject] = []
        self.bad: dict[str, InputError] = {}
        self.left_out: dict[str, str] = {}
        of_bids, reasons = bids.find_bids_subjects(folder)
        self.in_bids = bool(of_bids or reasons)
        if self.in_bids:
            for _, path in _named_files(folder, {}, but_in=("derivatives", "sourcedata", "code")):
                raise InputError(f"{path}: lies in a BIDS dataset, but isn't named so; keep one layout in a folder")
            for subject, reason in reasons.items():
                if isinstance(reason, InputError):
                    self.bad[subject] = reason
                else:
                    self.left_out[subject] = reason
            self.subjects = sorted(of_bids, key=lambda subject: natural_order(subject["subject"]))
            return
        found, self.bad = _find_volumes(folder)
        for subject_id in sorted(found.keys() - self.bad.keys(), key=natural_order):
            try:
                self.subjects.append(_subject(subject_id, found[subject_id]))
            except InputError as error:
                self.bad[subject_id] = error

    def require_good(self) -> list[Subject]:
        """Return all subjects; raise the first InputError of `bad`, if there is any."""
        for error in self.bad.values():
            raise error
        return self.subjects

    def training(self, val_subjects: Ids) -> list[Subject]:
        """Return all labelled subjects except `val_subjects`.

        Raises:
            InputError: as `require_good`, or the dataset is BIDS.
        """
        held_out = _ids(val_subjects)
        return [s for s in self._labelable() if "label" in s and s["subject"] not in held_out]

    def validation(self, val_subjects: Ids) -> list[Subject]:
        """Return the subjects named by `val_subjects`; none where the folder holds none.

        Raises:
            InputError: one of them isn't there or has no label, or as `training`.
        """
        chosen = self._pick(self._labelable(), val_subjects, "val_subjects")
        for subject in chosen:
            if "label" not in subject:
                raise InputError(
                    f"{subject['image'][0]}: val_subjects names subject {subject['subject']}, which has no label; "
                    f"add subject-{subject['subject']}-label or choose another"
                )
        return chosen

    def to_segment(self, subjects: Ids | None = None, stop_at_bad_subject: bool = True) -> list[Subject]:
        """Return the subjects to segment, without their labels, and log those that are left out.

        Args:
            subjects: ids, or None for all that have no label. In a BIDS dataset `sub-01` or `01` means all sessions
                and runs of a participant, and `sub-01_ses-02` one session with its runs.
            stop_at_bad_subject: whether a bad subject is an error; else `reasons_bad` has it.

        Raises:
            InputError: a subject isn't there, is left out or is an HDF5 file; or as `require_good`.
        """
        if stop_at_bad_subject:
            self.require_good()
        left_out = self.reasons_left_out(subjects)
        for subject, reason in left_out.items():
            logger.warning("%s: skipped (%s)", subject, reason)
        if subjects is None:
            return [subject for subject in self.subjects if "label" not in subject]
        good = [subject["subject"] for subject in self.subjects]
        # names that mean bad subjects alone are reported at the end
        names = [name for name in _ids(subjects) if self._named(good, name) or not self._named(self.bad, name)]
        for name in names:
            for subject in self._named(left_out, name) if not self._named(good, name) else ():
                raise InputError(f"{self.folder}: subjects names {name}, but {subject} {left_out[subject]}")
        chosen = self._pick(self.subjects, names, "subjects")
        for subject in chosen:
            if subject["image"][0].endswith(".h5"):
                raise InputError(
                    f"{subject['image'][0]}: lacks the scan and its grid, on which subject {subject['subject']} would "
                    f"be segmented; give its T1 and T2 images"
                )
        return [{key: value for key, value in subject.items() if key != "label"} for subject in chosen]

    def reasons_bad(self, subjects: Ids | None) -> list[str]:
        """Return why bad subjects can't be used: those named, or all when `subjects` is None."""
        return [str(self.bad[subject]) for subject in self._meant(self.bad, subjects)]

    def reasons_left_out(self, subjects: Ids | None) -> dict[str, str]:
        """Return why scans of a BIDS dataset are left out, by id: those named, or all when `subjects` is None."""
        return {subject: self.left_out[subject] for subject in self._meant(self.left_out, subjects)}

    def require(self, chosen: Collection[Subject], purpose: str) -> None:
        """Raise InputError if no subject was chosen.

        Args:
            chosen: the subjects chosen for the purpose.
            purpose: 'train', 'validate', 'segment' or 'measure', for the message.
        """
        if chosen:
            return
        if not Path(self.folder).is_dir():
            raise InputError(f"{self.folder}: no such folder; name the folder of the subjects by --dataset_dir")
        if not self.require_good():
            for subject, reason in self.left_out.items():
                raise InputError(f"{self.folder}: no subject of this BIDS dataset is complete; {subject} {reason}")
            raise InputError(f"{self.folder}: no subjects found; looked for {EXPECTED_NAMES}; is --dataset_dir right?")
        labeled = sum("label" in subject for subject in self.subjects)
        remedy = {
            "train": "training takes the labelled ones that val_subjects doesn't name; add some or name fewer",
            "validate": "val_subjects names none; name at least one labelled subject",
            "measure": "the first labelled one is taken; name a folder with one",
            "segment": "by default those without a label are segmented; name others by --subjects \"['9']\"",
        }[purpose]
        raise InputError(
            f"{self.folder}: no subject left to {purpose} among {len(self.subjects)}, {labeled} of them labelled; "
            f"{remedy}"
        )

    def _labelable(self) -> list[Subject]:
        if self.in_bids and self.require_good():
            raise InputError(
                f"{self.folder}: is a BIDS dataset, which can only be segmented; for training and scoring give "
                f"labelled subjects as subject-<id>-T1, -T2 and -label"
            )
        return self.require_good()

    def _named(self, subjects: Iterable[str], name: str) -> list[str]:
        """Ids that a name means: the id itself; in BIDS, with or without `sub-`, also all ids that begin with it."""
        if not self.in_bids:
            return [subject for subject in subjects if subject == name]
        beginning = f"sub-{name.removeprefix('sub-')}_"
        return [subject for subject in subjects if f"{subject}_".startswith(beginning)]

    def _meant(self, subjects: Iterable[str], names: Ids | None) -> list[str]:
        """Ids that one of the names means, or all ids where `names` is None."""
        if names is None:
            return list(subjects)
        meant = {subject for name in _ids(names) for subject in self._named(subjects, name)}
        return [subject for subject in subjects if subject in meant]

    def _pick(self, subjects: list[Subject], ids: Ids, setting: str) -> list[Subject]:
        """Subjects with these ids. An id that isn't there is an error, except in a folder without subjects."""
        by_id = {subject["subject"]: subject for subject in subjects}
        chosen: dict[str, Subject] = {}
        for name in _ids(ids) if subjects else ():
            if not (named := self._named(by_id, name)):
                raise InputError(
                    f"{self.folder}: {setting} names subject {name}, which isn't there; choose from {', '.join(by_id)}"
                )
            chosen |= {subject: by_id[subject] for subject in named}
        return list(chosen.values())


def place(folder: str) -> tuple[str, PurePath]:
    """Protocol and path of a folder, so that two names of one place are alike; a plain path is a `file`."""
    require_path(folder)
    protocol, path = split_protocol(folder)
    if protocol in (None, "file", "local"):
        return "file", Path(path).resolve()
    return {"s3a": "s3", "gcs": "gs"}.get(protocol, protocol), PurePosixPath(posixpath.normpath(path.strip("/")))


def require_apart(dataset_dir: str, output_dir: str) -> None:
    """Refuse to write label images among the subjects, where they would count as true labels the next time.

    Raises:
        InputError: `output_dir` is `dataset_dir` or lies below it, but for the folders in its `derivatives`, which are
            passed over when subjects are looked for, or is the folder of its labels, as `labels` is beside `images`.
            Either may be a URL.
    """
    (protocol, dataset), (output_protocol, output) = place(dataset_dir), place(output_dir)
    if output_protocol != protocol:
        return
    if not output.is_relative_to(dataset):
        if _place_of_subjects(output) == _place_of_subjects(dataset):
            raise InputError(
                f"{output_dir}: is where true labels of {dataset_dir} would lie, and segmentations would be taken for "
                f"these; choose an --output_dir of another name"
            )
        return
    inside = output.relative_to(dataset).parts
    if inside[:1] != ("derivatives",) or len(inside) < 2:
        raise InputError(
            f"{output_dir}: lies in the dataset, where segmentations would be taken for true labels; "
            f"choose an --output_dir outside {dataset_dir}, or {str(dataset_dir).rstrip('/')}/derivatives/<name>"
        )
