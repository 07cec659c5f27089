"""Which files make up a subject, and which subjects are for training, validation and segmentation.

A subject is a dict: `subject` (its id, a string), `image` ([T1 path, T2 path], of which one may be None if the setting
contrasts allows it) and, if it has one, `label` (a path).
For a subject in HDF5 in the published layout, all three paths are that of the file. Subjects of a BIDS dataset have no
label but more keys, see `scripts.data.bids.BidsSubject`.
"""

import logging
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePath, PurePosixPath
from typing import TypedDict

from fsspec.core import split_protocol
from monai.utils import ensure_tuple
from typing_extensions import NotRequired

from scripts.data import bids
from scripts.data.volumes import CONTRASTS, halves
from scripts.errors import InputError, require_path
from scripts.files import is_hidden

logger = logging.getLogger(__name__)

FILE_NAME = re.compile(r"(?is)subject-(?P<subject>.+)-(?P<kind>t1|t2|label)\.((hdr|img|nii)(\.gz)?|mgh|mgz)")
HDF5_NAME = re.compile(r"(?s)train_iseg_nocut_(?P<subject>.+)\.h5")
EXPECTED_NAMES = (
    "subject-<id>-T1, subject-<id>-T2 and subject-<id>-label, ending in .nii, .nii.gz, .hdr/.img or .mgz, "
    f"or train_iseg_nocut_<id>.h5, or BIDS: {bids.EXPECTED_NAMES}"
)
# words in folder names that state the kind of files in them; MONAI Label has labels/final
KIND_WORDS = re.compile(r"(?i)(?<![a-z0-9])(t[12]w?|(image|label)s?(tr|ts)?|final)(?![a-z0-9])")


# names of images that aren't a subject's but look like one's
NEAR_MISS = re.compile(
    r"(?is)(?P<before>.*?)(?<![a-z0-9])(?P<kind>t1|t2|labels?|seg|dseg)w?(?![a-z0-9])(?P<after>.*?)"
    r"(?P<suffix>\.(?:nii|nii\.gz|hdr|img|mgz|mgh|mha|mhd|nrrd|nii\.bz2|nii\.zst|hdr\.gz|img\.gz))"
)
# masks, probability maps and transformations, which lie beside scans in many datasets
OTHER_IMAGES = re.compile(r"(?i)mask|pve|prob|(?<![a-z])to(?![a-z])")
READ_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz", ".mgh", ".mgz")


# what a DICOM file has at this byte
DICOM_MARK = (b"DICM", 128)


class Subject(TypedDict):
    """The files of a subject; see the docstring of this module."""

    subject: str
    image: list[str | None]
    label: NotRequired[str]
    anat: NotRequired[str]
    mask: NotRequired[str]


# of train.json, by the convention of iSeg-2017; for a message
DEFAULT_VAL_SUBJECT = "9"

# values of the setting contrasts
CHOICES_OF_CONTRASTS = ("both", "any", *CONTRASTS)
CHOICES_OF_RUNS = ("apart", "average")

Ids = int | str | Collection[int | str]


def natural_order(subject: str) -> list[tuple[bool, int, str]]:
    """Return a sort key by which subject 9 comes before subject 10."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", subject) if part
    ]


def _volume_file(path: Path) -> Path:
    """The file to open for a volume: for an Analyze pair its header, if both halves exist.

    Raises:
        InputError: a half is missing, the path isn't a file, or messages and tables can't show it in one line.
    """
    if not str(path).isprintable():
        raise InputError(f"{str(path)!r}: its name has a line break or another unprintable character; rename it")
    if not path.is_file():
        raise InputError(f"{path}: isn't a file, but a folder, a broken link or the like; put the image itself there")
    if (pair := halves(path)) is None:
        return path
    header, image = pair
    if not header.exists():
        raise InputError(f"{path}: its header {header.name} is missing; copy both files of the pair")
    if not image.exists():
        raise InputError(f"{path}: its image {image.name} is missing; copy both files of the pair")
    return header


def _named_files(
    directory: str,
    bad: dict[str, InputError],
    excluded: Collection[str] = ("derivatives",),
    others: list[Path] | None = None,
) -> Iterator[tuple[re.Match[str], Path]]:
    """Files at any depth of a folder that have a subject's name, except in `excluded` folders at its top.

    Folders that can't be read are added to `bad`, with the reason, and files without such a name to `others`.
    """
    root = Path(directory)
    for path in sorted(_walk(root, {root / name for name in excluded}, bad)):
        if name := FILE_NAME.fullmatch(path.name) or HDF5_NAME.fullmatch(path.name):
            yield name, path
        elif others is not None:
            others.append(path)


def _walk(root: Path, excluded: Collection[Path], bad: dict[str, InputError]) -> Iterator[Path]:
    """All files and folders at any depth that aren't hidden or in `excluded`. Links are followed once."""

    def note(error: OSError) -> None:
        remedy = "allow it, or remove the folder"
        bad[error.filename] = InputError(f"{error.filename}: can't be read ({error.strerror}); {remedy}")

    real_root = root.resolve()
    # folders not to enter: the root again, those above it by a link, and the excluded
    entered = {real_root, *real_root.parents, *(path.resolve() for path in excluded)}
    # a folder that doesn't exist has no files
    for folder, folders, files in os.walk(root, onerror=note, followlinks=True) if root.is_dir() else ():
        visible = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(folder, name) for name in (*visible, *files) if not is_hidden(name))
        folders.clear()
        for name in visible:
            if (real := Path(folder, name).resolve()) not in entered:
                entered.add(real)
                folders.append(name)


def _dicom_file(folder: str) -> Path | None:
    """The first DICOM file in a folder, at any depth; their names have any suffix or none."""
    for path in _walk(Path(folder), (), {}):
        # a file that can't be read isn't known to be one
        with suppress(OSError):
            if not path.is_file():
                continue
            with path.open("rb") as file:
                file.seek(DICOM_MARK[1])
                if file.read(len(DICOM_MARK[0])) == DICOM_MARK[0]:
                    return path
    return None


def _near_misses(others: Iterable[Path], found: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Images that look like a subject's by their name but aren't used, with the name that they should have.

    Args:
        others: files without a subject's name.
        found: the kinds of files that each subject has; an image that would be one of these is something else.
    """
    result = {}
    for path in others:
        name = NEAR_MISS.fullmatch(path.name)
        if not name or OTHER_IMAGES.search(path.name) or not path.name.isprintable() or path.is_dir():
            continue
        kind = name["kind"].upper() if name["kind"].lower() in ("t1", "t2") else "label"
        subject = re.sub(r"(?i)^(subject|sub)[-_ ]", "", name["before"]).strip("-_. ") or "<id>"
        if kind.upper() in found.get(subject, ()) or ((pair := halves(path)) and path == pair[1] and pair[0].exists()):
            continue
        read = name["suffix"].lower() in READ_SUFFIXES
        suffix = name["suffix"] if read else ".nii.gz"
        result[str(path)] = f"{'rename' if read else 'convert'} it to subject-{subject}-{kind}{suffix} to use it"
    return result


def _names_not_of_bids(paths: Iterable[Path]) -> dict[str, str]:
    """Of images in a BIDS dataset without a BIDS name, what to do with those of a scan that isn't there otherwise."""
    result = {}
    for path in paths:
        name = NEAR_MISS.fullmatch(path.name)
        if not name or name["kind"].lower() not in ("t1", "t2") or OTHER_IMAGES.search(path.name) or path.is_dir():
            continue
        kind = f"{name['kind'].upper()}w"
        if (
            is_hidden(path.name)
            or not path.name.isprintable()
            or any(bids.FILE_NAME.fullmatch(other.name) for other in path.parent.glob(f"*_{kind}.nii*"))
        ):
            continue
        result[str(path)] = (
            f"give it a BIDS name, such as sub-01_{kind}.nii.gz in sub-01/anat; labels have only letters and digits"
        )
    return result


def _find_volumes(directory: str) -> tuple[dict[str, dict[str, Path]], dict[str, InputError], list[Path]]:
    """Files by subject and kind (T1, T2, LABEL, HDF5), errors by subject or folder, and other files."""
    found: dict[str, dict[str, Path]] = {}
    bad: dict[str, InputError] = {}
    others: list[Path] = []
    for name, path in _named_files(directory, bad, others=others):
        subject = name["subject"]
        files = found.setdefault(subject, {})
        try:
            path = _volume_file(path)
            other = files.setdefault("HDF5" if name.re is HDF5_NAME else name["kind"].upper(), path)
            if other != path:
                raise InputError(f"{path}: subject {subject} has {other} as well; keep one of the two")
        except InputError as error:
            bad.setdefault(subject, error)
    return found, bad, others


def find_labels(directory: str) -> dict[str, str]:
    """Return the label files at any depth of a folder, by subject.

    Raises:
        InputError: half of an Analyze pair is missing, a name isn't a file, or a volume has two files.
    """
    found, bad, _ = _find_volumes(directory)
    for error in bad.values():
        raise error
    return {subject: str(files["LABEL"]) for subject, files in found.items() if "LABEL" in files}


def _without_kind_words(folder: PurePath) -> list[str]:
    """The parts of a path without KIND_WORDS, so that T1/, T2/ and label/ in one folder are equal."""
    return [name for part in folder.parts if (name := KIND_WORDS.sub("", part))]


def first_image(subject: Subject) -> str:
    """Return the path of a subject's T1, or of its T2 if it has no T1."""
    return next(path for path in subject["image"] if path)


def _is_hdf5(subject: Subject) -> bool:
    return first_image(subject).endswith(".h5")


def _subject(subject_id: str, files: dict[str, Path], contrasts: str) -> Subject:
    """Make a subject of its files by kind; raise InputError if a file is missing or redundant."""
    if hdf5 := files.pop("HDF5", None):
        if contrasts in CONTRASTS:
            raise InputError(f"{hdf5}: holds T1 and T2 as one; for --contrasts {contrasts} give the images")
        for other in files.values():
            raise InputError(f"{hdf5}: subject {subject_id} has {other} as well; keep the HDF5 file or the images")
        return {"subject": subject_id, "image": [str(hdf5), str(hdf5)], "label": str(hdf5)}
    wanted = [contrasts] if contrasts in CONTRASTS else CONTRASTS
    present = [name for name in wanted if name in files]
    if not present or (contrasts == "both" and len(present) < len(wanted)):
        missing = next(name for name in wanted if name not in files)
        way_out = ", or segment and score what is there by --contrasts any" if contrasts == "both" and present else ""
        raise InputError(
            f"{next(iter(files.values()))}: subject {subject_id} has no {missing}; "
            f"put subject-{subject_id}-{missing} beside it{way_out}"
        )
    first = files[present[0]]
    for kind, path in files.items():
        if kind in (*present, "LABEL") and _without_kind_words(path.parent) != _without_kind_words(first.parent):
            risk = "a segmentation" if kind == "LABEL" else "another child's"
            raise InputError(
                f"{path}: lies elsewhere than {first}, and may be {risk}; put T1, T2 and label of a subject "
                f"into one folder, or into T1/, T2/ and label/ in it, and give each subject a unique id"
            )
    subject: Subject = {
        "subject": subject_id,
        "image": [str(files[name]) if name in present else None for name in CONTRASTS],
    }
    if "LABEL" in files:
        subject["label"] = str(files["LABEL"])
    return subject


def _without_label(subject: Subject) -> Subject:
    return {key: value for key, value in subject.items() if key != "label"}


def names_of(subjects: Iterable[Subject]) -> list[str]:
    """Return the ids of subjects; for those without an id, as from MONAI Label, the paths of their images."""
    return [subject.get("subject", str(subject["image"])) for subject in subjects]


def _ids(setting: Ids) -> list[str]:
    """Ids as text, from one or several: `--val_subjects 9` equals `--val_subjects "[9]"`."""
    return [str(subject_id) for subject_id in ensure_tuple(setting)]


class SubjectFolder:
    """The subjects in a folder, which is scanned once, when the object is made.

    The folder is a BIDS dataset, see `scripts.data.bids.find_bids_subjects`, or has files at any depth: Analyze (`.hdr`
    and `.img`) or NIfTI named `subject-<id>-T1`, `-T2` and `-label` in small or capital letters, or
    `train_iseg_nocut_<id>.h5` for a labelled subject. Hidden files, `__MACOSX` and the folder `derivatives` are
    skipped. A folder that doesn't exist has no subjects.

    Args:
        folder: the folder to scan.
        contrasts: which scans a subject needs: `both`; `any`, so one suffices; or `T1` or `T2`, and the other is left
            out.
        runs: `apart`: each run in a session of a BIDS dataset is a subject; or `average`: they are averaged.

    Attributes:
        subjects: usable subjects, by ascending id.
        bad: errors of unusable subjects, by id or folder: T1 or T2 is missing, a label has no images or lies elsewhere,
            half of an Analyze pair is missing, a name isn't a file, a volume has two files, images are beside an HDF5
            file, or a folder can't be read.
        left_out: why scans of a BIDS dataset aren't subjects, by id; these aren't errors.
        unused: images that look like a subject's by their name but aren't used, with the name that they should have.
        in_bids: whether the folder is a BIDS dataset.

    Raises:
        InputError: the folder mixes both layouts, or `contrasts` or `runs` is something else.
    """

    def __init__(self, folder: str, contrasts: str = "both", runs: str = "apart") -> None:
        if contrasts not in CHOICES_OF_CONTRASTS:
            raise InputError(f"--contrasts {contrasts}: must be one of {', '.join(CHOICES_OF_CONTRASTS)}")
        if runs not in CHOICES_OF_RUNS:
            raise InputError(f"--runs {runs}: must be one of {', '.join(CHOICES_OF_RUNS)}")
        self.folder = folder
        self.subjects: list[Subject] = []
        self.bad: dict[str, InputError] = {}
        self.left_out: dict[str, str] = {}
        self.unused: dict[str, str] = {}
        of_bids, reasons = bids.find_bids_subjects(folder, contrasts, runs)
        self.in_bids = bool(of_bids or reasons)
        if self.in_bids:
            for _, path in _named_files(folder, {}, excluded=("derivatives", "sourcedata", "code")):
                raise InputError(f"{path}: has no BIDS name, but lies in a BIDS dataset; keep one layout per folder")
            self.unused = _names_not_of_bids(bids.unused_images(folder))
            for subject, reason in reasons.items():
                if isinstance(reason, InputError):
                    self.bad[subject] = reason
                else:
                    self.left_out[subject] = reason
            self.subjects = sorted(of_bids, key=lambda subject: natural_order(subject["subject"]))
            return
        found, self.bad, others = _find_volumes(folder)
        self.unused = _near_misses(others, found)
        for subject_id in sorted(found.keys() - self.bad.keys(), key=natural_order):
            try:
                self.subjects.append(_subject(subject_id, found[subject_id], contrasts))
            except InputError as error:
                self.bad[subject_id] = error

    def require_good(self) -> list[Subject]:
        """Return all subjects; raise the first InputError of `bad`, if any."""
        for error in self.bad.values():
            raise error
        return self.subjects

    def training(self, val_subjects: Ids) -> list[Subject]:
        """Return all labelled subjects except `val_subjects`.

        Raises:
            InputError: as `require_good`.
        """
        held_out = self._select([subject["subject"] for subject in self.require_good()], val_subjects)
        return [s for s in self.subjects if "label" in s and s["subject"] not in held_out]

    def validation(self, val_subjects: Ids) -> list[Subject]:
        """Return the subjects named by `val_subjects`; none if the folder has no subjects.

        Raises:
            InputError: one doesn't exist or has no label, or as `training`.
        """
        chosen = self._pick(self.require_good(), val_subjects, "val_subjects")
        for subject in chosen:
            if "label" not in subject:
                raise InputError(
                    f"{first_image(subject)}: val_subjects names subject {subject['subject']}, which has no label; "
                    f"add subject-{subject['subject']}-label or choose another"
                )
        return chosen

    def to_segment(self, subjects: Ids | None = None, stop_at_bad_subject: bool = True) -> list[Subject]:
        """Return the subjects to segment, without labels, and log those that are left out.

        Args:
            subjects: ids, or None for all without a label, in a BIDS dataset for all. There, `sub-01` or `01` means all
                sessions and runs of a participant, and `sub-01_ses-02` one session with its runs.
            stop_at_bad_subject: whether a bad subject is an error now; `reasons_bad` returns it in any case.

        Raises:
            InputError: a subject doesn't exist, is left out or is an HDF5 file; or as `require_good`.
        """
        if stop_at_bad_subject:
            self.require_good()
        left_out = self.reasons_left_out(subjects)
        for subject, reason in left_out.items():
            logger.warning("%s: skipped (%s)", subject, reason)
        if subjects is None:
            chosen = [subject for subject in self.subjects if self.in_bids or "label" not in subject]
            return [_without_label(subject) for subject in chosen]
        good = [subject["subject"] for subject in self.subjects]
        # names that match only bad subjects are reported at the end of the run
        names = [name for name in _ids(subjects) if self._matches(good, name) or not self._matches(self.bad, name)]
        for name in names:
            for subject in self._matches(left_out, name) if not self._matches(good, name) else ():
                raise InputError(f"{self.folder}: subjects names {name}, but {subject} {left_out[subject]}")
        chosen = self._pick(self.subjects, names, "subjects")
        for subject in chosen:
            if _is_hdf5(subject):
                raise InputError(
                    f"{first_image(subject)}: lacks the scan and its grid, so subject {subject['subject']} can't be "
                    f"segmented; give its T1 and T2 images"
                )
        return [_without_label(subject) for subject in chosen]

    def reasons_bad(self, subjects: Ids | None) -> list[str]:
        """Return why bad subjects can't be used: those named, or all if `subjects` is None."""
        return [str(self.bad[subject]) for subject in self._select(self.bad, subjects)]

    def reasons_left_out(self, subjects: Ids | None) -> dict[str, str]:
        """Return why scans of a BIDS dataset are left out, by id: those named, or all if `subjects` is None."""
        return {subject: self.left_out[subject] for subject in self._select(self.left_out, subjects)}

    def require(self, chosen: Collection[Subject], purpose: str) -> None:
        """Raise InputError if no subject was chosen.

        Args:
            chosen: the subjects chosen for the purpose.
            purpose: 'train', 'validate', 'segment' or 'measure', for the message.
        """
        if chosen:
            return
        if not Path(self.folder).is_dir():
            raise InputError(f"{self.folder}: no such folder; give the folder of the subjects as --dataset_dir")
        if not self.require_good():
            for subject, reason in self.left_out.items():
                raise InputError(f"{self.folder}: no subject of this BIDS dataset is complete; {subject} {reason}")
            if dicom := _dicom_file(self.folder):
                raise InputError(
                    f"{dicom}: is DICOM, which isn't read; convert each series to NIfTI with dcm2niix, such as "
                    f"`dcm2niix -z y -f subject-1-T1 -o scans <folder of the T1>`"
                )
            raise InputError(f"{self.folder}: no subjects found; looked for {EXPECTED_NAMES}; is --dataset_dir right?")
        labeled = sum("label" in subject for subject in self.subjects)
        images = [subject["subject"] for subject in self.subjects if not _is_hdf5(subject)]
        remedy = {
            "train": "training uses labelled subjects that val_subjects doesn't name; add some or name fewer",
            "validate": "val_subjects names none; name at least one labelled subject",
            "measure": "the first labelled subject is used; give a folder with one",
            "segment": f'by default subjects without a label are segmented; name others by --subjects "{images[:1]}"'
            if images
            else "HDF5 files lack the scan and its grid; give T1 and T2 images",
        }[purpose]
        raise InputError(
            f"{self.folder}: no subject left to {purpose} among {len(self.subjects)}, {labeled} of them labelled; "
            f"{remedy}"
        )

    def _matches(self, subjects: Iterable[str], name: str) -> list[str]:
        """The ids that match a name: the equal one; in BIDS all that start with it, with or without `sub-`."""
        if not self.in_bids:
            return [subject for subject in subjects if subject == name]
        beginning = f"sub-{name.removeprefix('sub-')}_"
        return [subject for subject in subjects if f"{subject}_".startswith(beginning)]

    def _select(self, subjects: Iterable[str], names: Ids | None) -> list[str]:
        """The ids that match one of the names, or all if `names` is None."""
        if names is None:
            return list(subjects)
        matches = {subject for name in _ids(names) for subject in self._matches(subjects, name)}
        return [subject for subject in subjects if subject in matches]

    def _pick(self, subjects: list[Subject], ids: Ids, setting: str) -> list[Subject]:
        """The subjects with these ids. An unknown id is an error, except in a folder without subjects."""
        by_id = {subject["subject"]: subject for subject in subjects}
        chosen: dict[str, Subject] = {}
        for name in _ids(ids) if subjects else ():
            if not (matches := self._matches(by_id, name)):
                known = [
                    each
                    for each, subject in by_id.items()
                    if ("label" in subject if setting == "val_subjects" else not _is_hdf5(subject))
                ]
                choice = f"choose from {', '.join(known)}" if known else "no subject has a label; add some"
                default = " (the default)" if (setting, name) == ("val_subjects", DEFAULT_VAL_SUBJECT) else ""
                raise InputError(f"{self.folder}: {setting} names subject {name}{default}, which isn't there; {choice}")
            chosen |= {subject: by_id[subject] for subject in matches}
        return list(chosen.values())


def location(folder: str) -> tuple[str, PurePath]:
    """Return protocol and path of a folder, equal for all names of one folder; a plain path has protocol `file`."""
    require_path(folder)
    protocol, path = split_protocol(folder)
    if protocol in (None, "file", "local"):
        return "file", Path(path).resolve()
    return {"s3a": "s3", "gcs": "gs"}.get(protocol, protocol), PurePosixPath(posixpath.normpath(path.strip("/")))


def require_apart(dataset_dir: str, output_dir: str) -> None:
    """Refuse to write label images among the subjects, where the next run would take them for true labels.

    Args:
        dataset_dir, output_dir: paths or URLs.

    Raises:
        InputError: `output_dir` is `dataset_dir` or in it, except in a folder of its `derivatives`, which is never
            searched for subjects; or it is a folder for labels, as `labels` is beside `images`.
    """
    (protocol, dataset), (output_protocol, output) = location(dataset_dir), location(output_dir)
    if output_protocol != protocol:
        return
    if not output.is_relative_to(dataset):
        if _without_kind_words(output) == _without_kind_words(dataset):
            raise InputError(
                f"{output_dir}: is a folder for true labels of {dataset_dir}, and segmentations would be taken for "
                f"them; choose an --output_dir with another name"
            )
        return
    inside = output.relative_to(dataset).parts
    if inside[:1] != ("derivatives",) or len(inside) < 2:
        raise InputError(
            f"{output_dir}: lies in the dataset, where results would be taken for scans or true labels; "
            f"choose an --output_dir outside {dataset_dir}, or {str(dataset_dir).rstrip('/')}/derivatives/<name>"
        )
