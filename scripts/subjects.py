"""Which files make up a subject, and which subjects train, validate and are segmented.

A subject is a dict: `subject` (its id, a string), `image` ([T1 path, T2 path]) and, if it has one, `label` (a path).
Where an HDF5 file in the published layout holds the subject, all three paths are that of the file. Subjects of a BIDS
dataset have no label, and more in their dict: see `scripts.bids.BidsSubject`.
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

from scripts import bids
from scripts.errors import InputError, require_path

FILE_NAME = re.compile(r"(?is)subject-(?P<subject>.+)-(?P<kind>t1|t2|label)\.(hdr|img|nii|nii\.gz)")
HDF5_NAME = re.compile(r"(?s)train_iseg_nocut_(?P<subject>.+)\.h5")
EXPECTED_NAMES = (
    "subject-<id>-T1, subject-<id>-T2 and subject-<id>-label, ending in .hdr/.img, .nii or .nii.gz, "
    f"or train_iseg_nocut_<id>.h5, or BIDS: {bids.EXPECTED_NAMES}"
)
# names of folders, or parts of these, into which a folder of subjects may be divided; MONAI Label has labels/final
OF_A_KIND = re.compile(r"(?i)(?<![a-z0-9])(t[12]w?|(image|label)s?(tr|ts)?|final)(?![a-z0-9])")

logger = logging.getLogger(__name__)


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


def find_subjects(dataset_dir: str) -> list[Subject]:
    """All subjects in a folder: a BIDS dataset, or in the naming of iSeg-2017, iSeg-2019 or the published HDF5.

    Args:
        dataset_dir: folder of a BIDS dataset, as `scripts.bids.find_bids_subjects` takes it; or one with
            `subject-<id>-T1`, `-T2` and `-label` files (capitals or not), there or below, each Analyze (`.hdr` and
            `.img`) or NIfTI, or with `train_iseg_nocut_<id>.h5` for a labelled subject. Hidden files, `__MACOSX` and
            the folder `derivatives` are passed over. It needn't exist.

    Returns:
        The subjects by ascending id; none where the folder holds none.

    Raises:
        InputError: a T1 without its T2 beside it or the reverse, a label without images or elsewhere than these, half
            of an Analyze pair, what is named so but isn't a file, two files for one volume, or images beside an HDF5
            file; both layouts in one folder; a folder that can't be read; or as `find_bids_subjects`.
    """
    subjects, bad, _ = _good_and_bad_subjects(dataset_dir)
    for error in bad.values():
        raise error
    return subjects


def _good_and_bad_subjects(dataset_dir: str) -> tuple[list[Subject], dict[str, InputError], bool]:
    """The subjects as `find_subjects` has them, why others can't be used, by id or folder, and whether it is BIDS."""
    of_bids, left_out = bids.find_bids_subjects(dataset_dir)
    if of_bids or left_out:
        for _, path in _named_files(dataset_dir, {}, but_in=("derivatives", "sourcedata", "code")):
            raise InputError(f"{path}: lies in a BIDS dataset, but isn't named so; keep one layout in a folder")
        bad = {subject: reason for subject, reason in left_out.items() if isinstance(reason, InputError)}
        return sorted(of_bids, key=lambda subject: natural_order(subject["subject"])), bad, True
    found, bad = _find_volumes(dataset_dir)
    subjects: list[Subject] = []
    for subject_id in sorted(found.keys() - bad.keys(), key=natural_order):
        try:
            subjects.append(_subject(subject_id, found[subject_id]))
        except InputError as error:
            bad[subject_id] = error
    return subjects, bad, False


def _place_of_subjects(folder: PurePath) -> list[str]:
    """The parts of a path without what in their names says what they hold."""
    return [name for part in folder.parts if (name := OF_A_KIND.sub("", part))]


def _subject(subject_id: str, files: dict[str, Path]) -> Subject:
    """The subject that files make up, given by kind; raises InputError where one is missing or too many."""
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
    """By what subjects can be told from others: their ids, or the images of those that MONAI Label gives without."""
    return [subject.get("subject", str(subject["image"])) for subject in subjects]


def _ids(setting: Ids) -> list[str]:
    """Ids as text, whether one or several were given: `--val_subjects 9` is `--val_subjects "[9]"`."""
    return [str(subject_id) for subject_id in ensure_tuple(setting)]


def _is_named(subject: str, name: str, in_bids: bool) -> bool:
    """Whether an id is meant by a name: its own, in BIDS with or without `sub-`, or the part it begins with."""
    if not in_bids:
        return subject == name
    return f"{subject}_".startswith(f"sub-{name.removeprefix('sub-')}_")


def _named(subjects: Iterable[str], name: str, in_bids: bool) -> list[str]:
    """Those of some ids that a name means."""
    return [subject for subject in subjects if _is_named(subject, name, in_bids)]


def _pick(subjects: list[Subject], ids: Ids, dataset_dir: str, setting: str) -> list[Subject]:
    """The subjects with these ids; an id that isn't there is an error, but for a folder with no subjects at all."""
    chosen: dict[str, Subject] = {}
    for name in _ids(ids) if subjects else ():
        named = [subject for subject in subjects if _is_named(subject["subject"], name, "anat" in subject)]
        if not named:
            there = ", ".join(subject["subject"] for subject in subjects)
            raise InputError(f"{dataset_dir}: {setting} names subject {name}, which isn't there; choose from {there}")
        chosen |= {subject["subject"]: subject for subject in named}
    return list(chosen.values())


def _refuse_bids(subjects: list[Subject], dataset_dir: str) -> None:
    if any("anat" in subject for subject in subjects):
        raise InputError(
            f"{dataset_dir}: is a BIDS dataset, which can only be segmented; for training and scoring give labelled "
            f"subjects as subject-<id>-T1, -T2 and -label"
        )


def validation_subjects(dataset_dir: str, val_subjects: Ids) -> list[Subject]:
    """The subjects named by `val_subjects`; none where the folder holds none.

    Raises:
        InputError: one of them isn't there or has no label, the dataset is BIDS, or as `find_subjects`.
    """
    found = find_subjects(dataset_dir)
    _refuse_bids(found, dataset_dir)
    chosen = _pick(found, val_subjects, dataset_dir, "val_subjects")
    for subject in chosen:
        if "label" not in subject:
            raise InputError(
                f"{subject['image'][0]}: val_subjects names subject {subject['subject']}, which has no label; "
                f"add subject-{subject['subject']}-label or choose another"
            )
    return chosen


def training_subjects(dataset_dir: str, val_subjects: Ids) -> list[Subject]:
    """All labelled subjects but those of `val_subjects`; raises as `find_subjects`, or if the dataset is BIDS."""
    found = find_subjects(dataset_dir)
    _refuse_bids(found, dataset_dir)
    held_out = _ids(val_subjects)
    return [s for s in found if "label" in s and s["subject"] not in held_out]


def subjects_to_segment(dataset_dir: str, subjects: Ids | None, stop_at_bad_subject: bool = True) -> list[Subject]:
    """The subjects with these ids, or all that have no label when `subjects` is None, without their labels.

    None where the folder holds none. In a BIDS dataset `sub-01` or `01` means all sessions and runs of a participant,
    and `sub-01_ses-02` one session with its runs. A warning names those that are left out. Without
    `stop_at_bad_subject` those of `bad_subjects` aren't among them.

    Raises:
        InputError: one of them isn't there, is left out or is an HDF5 file, or as `find_subjects`.
    """
    found, bad, in_bids = _good_and_bad_subjects(dataset_dir)
    if stop_at_bad_subject:
        for error in bad.values():
            raise error
    left_out = left_out_subjects(dataset_dir, subjects)
    for subject, reason in left_out.items():
        logger.warning("%s: left out, for it %s", subject, reason)
    if subjects is None:
        return [subject for subject in found if "label" not in subject]
    good = [subject["subject"] for subject in found]
    # what names bad ones alone is told at the end
    names = [name for name in _ids(subjects) if _named(good, name, in_bids) or not _named(bad, name, in_bids)]
    for name in names:
        if _named(good, name, in_bids):
            continue
        for subject, reason in left_out.items():
            if _is_named(subject, name, in_bids=True):
                raise InputError(f"{dataset_dir}: subjects names {name}, but {subject} {reason}")
    chosen = _pick(found, names, dataset_dir, "subjects")
    for subject in chosen:
        if subject["image"][0].endswith(".h5"):
            raise InputError(
                f"{subject['image'][0]}: lacks the scan and its grid, on which subject {subject['subject']} would be "
                f"segmented; give its T1 and T2 images"
            )
    return [{key: value for key, value in subject.items() if key != "label"} for subject in chosen]


def bad_subjects(dataset_dir: str, subjects: Ids | None) -> list[str]:
    """Why subjects, all of a folder or those with these ids, lack a file or have one too many."""
    _, bad, in_bids = _good_and_bad_subjects(dataset_dir)
    if subjects is None:
        return [str(error) for error in bad.values()]
    meant = {subject for name in _ids(subjects) for subject in _named(bad, name, in_bids)}
    return [str(error) for subject, error in bad.items() if subject in meant]


def left_out_subjects(dataset_dir: str, subjects: Ids | None) -> dict[str, str]:
    """What of a BIDS dataset can't be segmented, of all of it or of what `subjects` names: the reason by id."""
    _, left_out = bids.find_bids_subjects(dataset_dir)
    return {
        subject: reason
        for subject, reason in left_out.items()
        if not isinstance(reason, InputError)
        and (subjects is None or any(_is_named(subject, name, in_bids=True) for name in _ids(subjects)))
    }


def require_subjects(chosen: list[Subject], dataset_dir: str, purpose: str) -> None:
    """Refuse to go on without a subject.

    Args:
        chosen: the subjects chosen for the purpose.
        dataset_dir: where they were looked for.
        purpose: 'train', 'validate', 'segment' or 'measure', for the message.

    Raises:
        InputError: `chosen` is empty.
    """
    if chosen:
        return
    if not Path(dataset_dir).is_dir():
        raise InputError(f"{dataset_dir}: no such folder; name the folder of the subjects by --dataset_dir")
    found = find_subjects(dataset_dir)
    if not found:
        for subject, reason in left_out_subjects(dataset_dir, None).items():
            raise InputError(f"{dataset_dir}: no subject of this BIDS dataset is complete; {subject} {reason}")
        raise InputError(f"{dataset_dir}: no subjects found; looked for {EXPECTED_NAMES}; is --dataset_dir right?")
    labeled = sum("label" in subject for subject in found)
    remedy = {
        "train": "training takes the labelled ones that val_subjects doesn't name; add some or name fewer",
        "validate": "val_subjects names none; name at least one labelled subject",
        "measure": "the first labelled one is taken; name a folder with one",
        "segment": "by default those without a label are segmented; name others by --subjects \"['9']\"",
    }[purpose]
    raise InputError(
        f"{dataset_dir}: no subject left to {purpose} among {len(found)}, {labeled} of them labelled; {remedy}"
    )


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
