"""A corpus of subjects as they come from clinics and challenges: damaged, odd, and odd but right.

Each case writes one subject in iSeg's layout into a folder. `python -m tests.bad_subjects FOLDER` writes them all.
"""

import gzip
import itertools
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff
from scipy.io import savemat

from scripts.results.label_images import write_analyze
from scripts.tissues import ISEG_VALUES

LAS = np.diag([-1.0, 1, 1, 1])
# offsets in the headers of Analyze and NIfTI-1
DIM, DATATYPE, PIXDIM, SCL_SLOPE, SCL_INTER = 40, 70, 76, 112, 116
QFORM_CODE, SROW_Y, SROW_Z = 252, 296, 312

Write = Callable[[Path, str], None]


@dataclass(frozen=True)
class Case:
    """A subject.

    Attributes:
        subject: its id, which says what is special about it.
        write: writes it, labelled, into a folder under an id.
        message: pattern of the one line by which it is refused; None where it is accepted.
        of_label: the fault is of the label, so it can be segmented.
        t1_scale: the T1 that is read is so many times `T1`; 0 where it is another.
        resampled: its grid isn't one that is only turned for the network.
    """

    subject: str
    write: Write
    message: str | None = None
    of_label: bool = False
    t1_scale: float = 1
    resampled: bool = False

    @property
    def is_hdf5(self) -> bool:
        return self.subject.startswith("h5-") and self.subject != "h5-beside-images"


def _brain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label (0 to 3), T1 and T2 of a ball with no symmetry, in a volume smaller than a patch and with unequal sides."""
    rng = np.random.default_rng(5)
    x, y, z = np.ogrid[:20, :22, :18]
    distance = np.sqrt((x - 9) ** 2 + ((y - 12) * 0.9) ** 2 + ((z - 8) * 1.2) ** 2)
    label = np.digitize(-distance, [-8, -6, -4]).astype(np.uint8)
    label[14:17, 4:9, 12:15] = 1
    noise = rng.integers(0, 40, (2, *label.shape))
    t1 = np.where(label > 0, np.array([0, 20, 60, 80])[label] + noise[0], 0)
    t2 = np.where(label > 0, np.array([0, 80, 40, 30])[label] + noise[1], 0)
    return label, t1.astype(np.int16), t2.astype(np.int16)


LABEL, T1, T2 = _brain()
ISEG_LABEL = np.array(ISEG_VALUES, np.uint8)[LABEL]


def save(
    folder: Path,
    subject: str,
    t1: np.ndarray = T1,
    t2: np.ndarray = T2,
    label: np.ndarray = ISEG_LABEL,
    suffix: str = ".nii.gz",
    affine: np.ndarray = LAS,
    kind: type[nib.spatialimages.SpatialImage] = nib.Nifti1Image,
) -> None:
    """Write a subject; `.hdr` as iSeg has it, unless `kind` says otherwise."""
    for name, values in (("T1", t1), ("T2", t2), ("label", label)):
        path = folder / f"subject-{subject}-{name}{suffix}"
        if suffix == ".hdr" and kind is nib.Nifti1Image:
            write_analyze(path, values)
        else:
            nib.save(kind(values, affine), path)


def with_values(**volumes: np.ndarray) -> Write:
    return partial(save, **volumes)


def damaged(kind: str, change: Callable[[Path], None], suffix: str = ".nii.gz", file: str | None = None) -> Write:
    """A good subject, one of whose files is changed; `file` is the suffix of the half of a pair that is meant."""

    def write(folder: Path, subject: str) -> None:
        save(folder, subject, suffix=suffix)
        change(folder / f"subject-{subject}-{kind}{file or suffix}")

    return write


def header_of(kinds: str, *edits: tuple[int, str, tuple[float, ...]], suffix: str = ".nii") -> Write:
    """A good subject with values (offset, format, values) put into headers."""

    def write(folder: Path, subject: str) -> None:
        save(folder, subject, suffix=suffix)
        for kind in kinds.split():
            path = folder / f"subject-{subject}-{kind}{suffix}"
            content = bytearray(gzip.decompress(path.read_bytes()) if suffix.endswith(".gz") else path.read_bytes())
            for offset, form, values in edits:
                struct.pack_into(f"<{form}", content, offset, *values)
            path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)

    return write


def without_affines(kinds: str, *edits: tuple[int, str, tuple[float, ...]]) -> Write:
    """As `header_of`, where the voxel size alone tells the grid."""
    return header_of(kinds, (QFORM_CODE, "2h", (0, 0)), *edits)


def with_mat(matrix: np.ndarray) -> Write:
    """A good subject of Analyze pairs, with `.mat` files that say another affine."""

    def write(folder: Path, subject: str) -> None:
        save(folder, subject, suffix=".hdr", kind=nib.Spm2AnalyzeImage)
        for path in folder.glob("*.mat"):
            savemat(path, {"mat": matrix, "M": matrix}, format="4")

    return write


def claims(suffix: str) -> Write:
    """A good subject whose T1 says that it holds 2 GB, in a size that a scan may have."""
    fine = ((QFORM_CODE, "2h", (0, 0)),) if suffix != ".hdr" else ()
    sides, float64, tenths = (3, 5000, 5000, 10, 1, 1, 1, 1), (64, 64), (0.1, 0.1, 0.1)
    return header_of(
        "T1", *fine, (DIM, "8h", sides), (DATATYPE, "2h", float64), (PIXDIM + 4, "3f", tenths), suffix=suffix
    )


def replaced(kind: str, image: nib.spatialimages.SpatialImage) -> Write:
    """A good subject with one volume, or by 'all' T1 and T2, replaced by an image."""

    def write(folder: Path, subject: str) -> None:
        save(folder, subject)
        for name in ("T1", "T2") if kind == "all" else (kind,):
            nib.save(image, folder / f"subject-{subject}-{name}.nii.gz")

    return write


def nifti(values: np.ndarray, affine: np.ndarray = LAS) -> nib.Nifti1Image:
    return nib.Nifti1Image(values, affine)


def marked(values: np.ndarray, value: float, dtype: type = np.float32) -> np.ndarray:
    """Values, one of them another."""
    values = values.astype(dtype)
    values[9, 12, 8] = value
    return values


def empty(path: Path) -> None:
    path.write_bytes(b"")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("gone"))


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def unreadable(path: Path) -> None:
    path.chmod(0)


def text(path: Path) -> None:
    path.write_text("The file you asked for is no longer here.\n" * 20)


def cut(number: int) -> Callable[[Path], None]:
    """Leave out the last bytes."""
    return lambda path: path.write_bytes(path.read_bytes()[:-number])


def wrong_checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


def unpacked(path: Path) -> None:
    path.write_bytes(gzip.decompress(path.read_bytes()))


def packed(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def big_endian(folder: Path, subject: str, suffix: str = ".nii.gz") -> None:
    for name, values in (("T1", T1), ("T2", T2), ("label", ISEG_LABEL)):
        if suffix == ".hdr":
            header = nib.Spm2AnalyzeHeader(endianness=">")
            header["origin"][:3] = 1
            image = nib.Spm2AnalyzeImage(values, None, header)
        else:
            image = nib.Nifti1Image(values, LAS, nib.Nifti1Header(endianness=">"))
        nib.save(image, folder / f"subject-{subject}-{name}{suffix}")


def twice(folder: Path, subject: str) -> None:
    save(folder, subject)
    save(folder, subject, suffix=".hdr")


def turned(order: np.ndarray) -> Write:
    """Stored in another order of axes; in the world it is where it was."""

    def write(folder: Path, subject: str) -> None:
        affine = LAS @ inv_ornt_aff(order, T1.shape)
        save(folder, subject, *(nib.apply_orientation(v, order) for v in (T1, T2, ISEG_LABEL)), affine=affine)

    return write


def rotation(degrees: float, axis: int) -> np.ndarray:
    a, b = (i for i in range(3) if i != axis)
    matrix = np.eye(4)
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix[[a, a, b, b], [a, b, a, b]] = cosine, -sine, sine, cosine
    return matrix


def sheared(shear: float) -> np.ndarray:
    matrix = LAS.copy()
    matrix[0, 1] = shear
    return matrix


def rgb() -> nib.Nifti1Image:
    values = np.zeros(T1.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    values["R"] = T1
    return nifti(values)


def hdf5(change: Callable[[h5py.File], None] = lambda file: None) -> Write:
    """A subject in the published layout, changed."""

    def write(folder: Path, subject: str) -> None:
        scans = np.stack([T1, T2]).astype(np.float64)
        brain = scans[:, T1 > 0]
        data = (scans - brain.mean(1)[:, None, None, None]) / brain.std(1)[:, None, None, None]
        with h5py.File(folder / f"train_iseg_nocut_{subject}.h5", "w") as file:
            file["data"] = np.moveaxis(data, -1, 1)[None].astype(np.float32)
            file["label"] = np.moveaxis(LABEL, -1, 0)[None, None]
            change(file)

    return write


def without_label(file: h5py.File) -> None:
    del file["label"]


def one_channel(file: h5py.File) -> None:
    data = file["data"][:, :1]
    del file["data"]
    file["data"] = data


def external_link(file: h5py.File) -> None:
    del file["data"]
    file["data"] = h5py.ExternalLink("/etc/hostname", "/data")


def chunk_without_room_for_its_checksum(file: h5py.File) -> None:
    data = file["data"][()]
    del file["data"]
    file.create_dataset("data", data=data, chunks=(1, 1, 8, 8, 8), fletcher32=True)
    file["data"].id.write_direct_chunk((0, 0, 8, 8, 8), b"abc")


def empty_label(file: h5py.File) -> None:
    file["label"][...] = 0


def truncated_hdf5(folder: Path, subject: str) -> None:
    hdf5()(folder, subject)
    cut(2000)(folder / f"train_iseg_nocut_{subject}.h5")


def hdf5_beside_images(folder: Path, subject: str) -> None:
    save(folder, subject)
    hdf5()(folder, subject)


CANT_READ = r"can't be read \(.+\); copy or convert the file again$"
NO_FILE = r"isn't a file, but a folder, a broken link or the like; put the image itself there$"
OTHER_PLACE = r"its affine differs from that of .*-T1.nii.gz; register and resample it to T1$"
NOT_ONE = r"isn't a 3-D volume; give one volume per file$"
NOT_FINITE = r"has NaN or infinite values; replace them, outside the brain by 0$"
UNPRINTABLE = r": its name has a line break or another unprintable character; rename it$"
TOO_LARGE = r"is larger than a brain scan; copy or convert it again$"
WRONG_VOXELS = r"mm isn't that of a brain scan; correct its header or convert it again$"
NOT_SQUARE = r"its affine is sheared, far from right angles; resample it to a grid without shear$"
CONSTANT = r"of this subject is constant inside the brain; give the scan itself, not a mask$"
UNKNOWN_LABEL = r"isn't known; use \(0, 10, 150, 250\) or 0, 1, 2, 3 for background, CSF, GM, WM$"
OUTSIDE = r"-label.nii.gz: \d+% of the label lies outside the brain of the scan; check that the two belong together$"
HUGE = (DIM, "8h", (3, 32767, 32767, 32767, 1, 1, 1, 1))

FILES = [
    Case("empty-nii-gz", damaged("T1", empty), f"-T1.nii.gz: {CANT_READ}"),
    Case("empty-nii", damaged("T2", empty, ".nii"), f"-T2.nii: {CANT_READ}"),
    Case("empty-hdr", damaged("T1", empty, ".hdr"), f"-T1.hdr: {CANT_READ}"),
    Case("empty-img", damaged("T1", empty, ".hdr", ".img"), f"-T1.hdr: {CANT_READ}"),
    Case("empty-label", damaged("label", empty), f"-label.nii.gz: {CANT_READ}", of_label=True),
    Case("folder-named-like-an-image", damaged("T1", folder_instead), f"-T1.nii.gz: {NO_FILE}"),
    Case("folder-named-like-half-a-pair", damaged("T2", folder_instead, ".hdr", ".img"), f"-T2.img: {NO_FILE}"),
    Case("unreadable", damaged("T1", unreadable), f"-T1.nii.gz: {CANT_READ}"),
    Case("link-to-nowhere", damaged("T2", link_to_nowhere), f"-T2.nii.gz: {NO_FILE}"),
    Case("link-to-itself", damaged("T1", link_to_itself), f"-T1.nii.gz: {NO_FILE}"),
    Case("header-link-to-nowhere", damaged("T1", link_to_nowhere, ".hdr"), f"-T1.hdr: {NO_FILE}"),
    Case("pipe", damaged("T1", pipe, ".hdr", ".img"), f"-T1.img: {NO_FILE}"),
    Case("text", damaged("T1", text, ".nii"), f"-T1.nii: {CANT_READ}"),
    Case("text-as-header", damaged("T2", text, ".hdr"), f"-T2.hdr: {CANT_READ}"),
    Case("both-hdr-and-nii-gz", twice, r"subject both-hdr-and-nii-gz has .* as well; keep one of the two$"),
    Case(
        "no-t2",
        damaged("T2", Path.unlink),
        "has no T2; put subject-no-t2-T2 beside it, or segment and score what is there by --contrasts any$",
    ),
    Case(
        "no-t1",
        damaged("T1", Path.unlink),
        "has no T1; put subject-no-t1-T1 beside it, or segment and score what is there by --contrasts any$",
    ),
    Case("t1-given-twice", with_values(t2=T1), r"T1 and T2 of this subject are the same scan; give the T2 itself$"),
    Case("no-img", damaged("T1", Path.unlink, ".hdr", ".img"), r"its image .*-T1.img is missing; copy both"),
    Case("no-hdr", damaged("T2", Path.unlink, ".hdr"), r"its header .*-T2.hdr is missing; copy both"),
    Case("truncated-img", damaged("T1", cut(100), ".hdr", ".img"), f"-T1.hdr: {CANT_READ}"),
    Case("truncated-hdr", damaged("T1", cut(100), ".hdr"), f"-T1.hdr: {CANT_READ}"),
    Case("truncated-nii", damaged("T2", cut(1), ".nii"), f"-T2.nii: {CANT_READ}"),
    Case("truncated-nii-gz", damaged("T1", cut(500)), f"-T1.nii.gz: {CANT_READ}"),
    Case("truncated-in-the-checksum", damaged("T1", cut(3)), f"-T1.nii.gz: {CANT_READ}"),
    Case("wrong-checksum", damaged("T2", wrong_checksum), f"-T2.nii.gz: {CANT_READ}"),
    Case("truncated-label", damaged("label", cut(200)), f"-label.nii.gz: {CANT_READ}", of_label=True),
    Case("gz-that-is-none", damaged("T1", unpacked), f"-T1.nii.gz: {CANT_READ}"),
    Case("nii-that-is-gz", damaged("T1", packed, ".nii"), f"-T1.nii: {CANT_READ}"),
]

NAMES = [
    Case("with space", save),
    Case("1\N{SUPERSCRIPT TWO}", save),  # digits that are no number
    Case("it's", save),
    Case('say-"hello"', save),
    Case("naïve-赤ちゃん", save),
    Case("-dash", save),
    Case("$(id)-@x-%d-{y}-#1", save),
    Case("a,b;c&d<e>", save),
    Case("new\nline", save, f"-T1.nii.gz'{UNPRINTABLE}"),
    Case("tab\tulator", save, f"-T1.nii.gz'{UNPRINTABLE}"),
    Case(os.fsdecode(b"not-utf-8-\xff"), save, f"-T1.nii.gz'{UNPRINTABLE}"),
]

GRIDS = [
    Case("t2-of-other-shape", with_values(t2=T2[:-1]), r"-T2.*: shape \(19, 22, 18\) differs from .*; resample it"),
    Case("t2-shifted", replaced("T2", nifti(T2, LAS + np.eye(4, k=3) * 2)), f"-T2.nii.gz: {OTHER_PLACE}"),
    Case("t2-mirrored", replaced("T2", nifti(T2, np.eye(4))), f"-T2.nii.gz: {OTHER_PLACE}"),
    Case("t2-of-other-voxels", replaced("T2", nifti(T2, np.diag([-1, 1, 1.05, 1]))), f"-T2.nii.gz: {OTHER_PLACE}"),
    Case("t2-rounded", replaced("T2", nifti(T2, LAS + 1e-4))),
    Case("label-of-other-shape", with_values(label=ISEG_LABEL[1:]), "-label.*differs.*; resample it", of_label=True),
    Case("label-elsewhere", replaced("label", nifti(ISEG_LABEL, np.diag([-2, 1, 1, 1]))), OTHER_PLACE, of_label=True),
    Case("two-axes", with_values(t1=T1[:, :, 8], t2=T2[:, :, 8]), rf"-T1.nii.gz: shape \(20, 22\) {NOT_ONE}"),
    Case("no-voxels", header_of("T1", (DIM, "8h", (3, 20, 0, 18, 1, 1, 1, 1))), rf"-T1.nii: .*{NOT_ONE}"),
    Case("four-axes", with_values(t1=np.stack([T1, T1], -1)), rf"-T1.nii.gz: shape \(20, 22, 18, 2\) {NOT_ONE}"),
    Case("five-axes", with_values(t2=np.stack([T2] * 3, -1)[..., None, :]), rf"-T2.nii.gz: shape .* {NOT_ONE}"),
    Case("five-axes-of-one-volume", with_values(t1=T1[..., None, None], t2=T2[..., None, None])),
    Case("voxel-size-0", without_affines("T1 T2 label", (PIXDIM + 12, "f", (0,))), r"-T1.nii: .* mm can't be; correct"),
    Case("voxel-size-negative", without_affines("T1 T2 label", (PIXDIM + 8, "f", (-1,)))),
    Case("voxel-size-nan", without_affines("T1 T2 label", (PIXDIM + 4, "f", (np.nan,))), "-T1.nii: .*; correct its"),
    Case("metres", with_values(affine=np.diag([-1e-3, 1e-3, 1e-3, 1])), rf"-T1.*0.001 x 0.001 x 0.001 {WRONG_VOXELS}"),
    Case("voxels-of-20-mm", with_values(affine=np.diag([-1, 1, 20, 1])), rf"-T1.*1 x 1 x 20 {WRONG_VOXELS}"),
    Case("singular", header_of("T1 T2", (SROW_Z, "4f", (0, 0, 0, 0))), f"-T1.nii: .*{WRONG_VOXELS}"),
    Case("two-axes-alike", header_of("T1 T2", (SROW_Y, "8f", (0, 1, 1, 0) + (0,) * 4)), f"-T1.nii: {NOT_SQUARE}"),
    Case("affine-nan", header_of("T1 T2", (SROW_Z, "4f", (0, 0, np.nan, 0))), "-T1.*its affine has NaN .*; correct"),
    Case("last-row-of-affine-0", with_mat(np.diag([-1, 1, 1, 0])), "-T1.hdr: .* isn't 0 0 0 1; correct its .mat file"),
    Case("negative-fourth-length", header_of("T1 T2 label", (PIXDIM + 16, "f", (-1,)), suffix=".hdr")),
    Case("sheared", with_values(affine=sheared(1)), f"-T1.nii.gz: {NOT_SQUARE}"),
    Case("sheared-a-little", with_values(affine=sheared(0.3)), resampled=True),
    Case("voxels-of-1.3-mm", with_values(affine=LAS @ np.diag([1.3, 1, 1, 1])), resampled=True),
    Case("oblique", with_values(affine=rotation(25, 2) @ rotation(15, 0) @ LAS)),
    Case("oblique-by-45-degrees", with_values(affine=rotation(44, 1) @ LAS)),
    Case("far-from-the-origin", with_values(affine=LAS + np.eye(4, k=3) * 900)),
    Case("huge-nii", header_of("T1", HUGE), f"-T1.nii: .*{TOO_LARGE}"),
    Case("huge-nii-gz", header_of("T2", HUGE, suffix=".nii.gz"), f"-T2.nii.gz: .*{TOO_LARGE}"),
    Case("huge-hdr", header_of("T1", HUGE, suffix=".hdr"), f"-T1.hdr: .*{TOO_LARGE}"),
    Case("huge-label", header_of("label", HUGE), f"-label.nii: .*{TOO_LARGE}", of_label=True),
    Case("many-volumes", header_of("T1", (DIM, "8h", (5, 20, 22, 18, 32767, 999, 1, 1))), f"-T1.nii: .*{TOO_LARGE}"),
    Case("too-short-nii", claims(".nii"), f"-T1.nii: {CANT_READ}"),
    Case("too-short-nii-gz", claims(".nii.gz"), f"-T1.nii.gz: {CANT_READ}"),
    Case("too-short-hdr", claims(".hdr"), f"-T1.hdr: {CANT_READ}"),
    Case("negative-sides", header_of("T1", (DIM, "8h", (3, -20, -22, 18, 1, 1, 1, 1))), f"-T1.nii: {CANT_READ}"),
]

VALUES = [
    Case("iseg", partial(save, suffix=".hdr")),
    Case("nifti-pair", partial(save, suffix=".hdr", kind=nib.Nifti1Pair)),
    Case("nifti-2", partial(save, kind=nib.Nifti2Image)),
    Case("big-endian", big_endian),
    Case("big-endian-analyze", partial(big_endian, suffix=".hdr")),
    *(
        Case(np.dtype(dtype).name, with_values(t1=T1.astype(dtype), t2=T2.astype(dtype)))
        for dtype in (np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.float32, np.float64)
    ),
    Case("scaled", header_of("T1", (SCL_SLOPE, "f", (0.5,))), t1_scale=0.5),
    Case("scaled-analyze", header_of("T1", (SCL_SLOPE, "f", (0.5,)), suffix=".hdr"), t1_scale=0.5),
    Case("slope-nan", header_of("T1", (SCL_SLOPE, "f", (np.nan,)))),
    Case("slope-inf", header_of("T1", (SCL_SLOPE, "f", (np.inf,)))),
    Case("slope-0", header_of("T1", (SCL_SLOPE, "f", (0,)))),
    Case("intercept-nan", header_of("T1", (SCL_SLOPE, "2f", (1, np.nan))), f"-T1.nii: {CANT_READ}"),
    Case("nan", with_values(t1=marked(T1, np.nan)), f"-T1.nii.gz: {NOT_FINITE}"),
    Case("inf", with_values(t2=marked(T2, np.inf)), f"-T2.nii.gz: {NOT_FINITE}"),
    Case(
        "beyond-float32",
        with_values(t2=np.where(T1, T2 * 1e-3, 3e38).astype(np.float32)),
        "-T1.nii.gz: T1 or T2 of this subject has values too large for float32 at the scale of its brain; give the",
    ),
    Case("rgb", replaced("T1", rgb()), "-T1.nii.gz: has colours or complex numbers; give the scan, with one"),
    Case("complex", with_values(t2=T2 * (1 + 1j)), "-T2.nii.gz: has colours or complex numbers; give the scan"),
    Case("unknown-datatype", header_of("T1", (DATATYPE, "h", (999,))), f"-T1.nii: {CANT_READ}"),
    Case("mask-as-t1", with_values(t1=T1.astype(bool).astype(np.int16)), f"-T1.nii.gz: the T1 {CONSTANT}"),
    Case("mask-as-t2", with_values(t2=T1.astype(bool).astype(np.int16)), f"-T1.nii.gz: the T2 {CONSTANT}"),
    Case(
        "mask-of-2-mm",
        with_values(t1=T1.astype(bool).astype(np.int16), affine=LAS @ np.diag([2, 2, 2, 1])),
        f"-T1.nii.gz: the T1 {CONSTANT}",
    ),
    Case("t2-all-0", with_values(t2=T2 * 0), f"-T1.nii.gz: the T2 {CONSTANT}"),
    Case("t1-all-0", with_values(t1=T1 * 0), "-T1.nii.gz: T1 is nowhere above 0, .*; give a skull-stripped T1$"),
    Case("t1-all-negative", with_values(t1=-T1), "-T1.nii.gz: T1 is nowhere above 0, .*; give a skull-stripped T1$"),
    Case("one-voxel", with_values(t1=marked(T1 * 0, 50, np.int16)), f"-T1.nii.gz: the T1 {CONSTANT}"),
    Case("t1-normalised", with_values(t1=np.where(T1, T1 - 80.0, 0)), "-T1.nii.gz: T1 is below 0 in .*; give a"),
    Case("air-below-0", with_values(t1=np.where(T1, T1, -1024)), "-T1.nii.gz: T1 is below 0 in .*; give a"),
    Case("a-voxel-below-0", with_values(t1=marked(T1, -1, np.int16)), t1_scale=0),
    Case("t2-moved", with_values(t2=np.roll(T2, (2, 2), (0, 2))), "-T2.nii.gz: T2 shows nothing in .*; register it"),
    Case("t1-above-0-everywhere", with_values(t1=T1 + 5), "-T1.nii.gz: T1 is above 0 everywhere, .*; give a skull-"),
    Case("t2-normalised", with_values(t2=np.where(T1, T2 - 50.0, -3))),
    Case(
        "whole-head",
        with_values(t1=T1 + np.int16(5), affine=LAS @ np.diag([8, 8, 8, 1])),
        "-T1.nii.gz: isn't skull-stripped, and its voxels of 8 mm are too large to find the brain; give it",
    ),
]

LABELS = [
    Case("label-1-to-3", with_values(label=LABEL)),
    Case("label-of-floats", with_values(label=ISEG_LABEL.astype(np.float64))),
    Case("label-without-wm", with_values(label=np.where(LABEL == 3, 2, LABEL))),
    Case("label-a-voxel-outside", with_values(label=marked(ISEG_LABEL * (T1 > 40), 150, np.uint8))),
    Case("label-fraction", with_values(label=marked(LABEL, 1.5)), f"-label.*label value 1.5 {UNKNOWN_LABEL}", True),
    Case("label-unknown", with_values(label=marked(LABEL, 7)), f"-label.*label value 7 {UNKNOWN_LABEL}", True),
    Case("label-negative", with_values(label=marked(LABEL, -1)), f"-label.*label value -1 {UNKNOWN_LABEL}", True),
    Case("label-nan", with_values(label=marked(LABEL, np.nan)), f"-label.nii.gz: {NOT_FINITE}", True),
    Case("label-mixed", with_values(label=marked(ISEG_LABEL, 2)), "-label.*: mixes iSeg's label values .*; use", True),
    Case("label-where-t1-is-0", with_values(label=np.where(T1, 0, np.uint8(150))), OUTSIDE, True),
    Case("label-moved", with_values(label=np.roll(ISEG_LABEL, (4, 4), (0, 1))), OUTSIDE, True),
    Case("label-of-another", with_values(label=np.roll(ISEG_LABEL, (9, 9, 9), (0, 1, 2))), OUTSIDE, True),
    Case("label-all-0", with_values(label=LABEL * 0), "-label.nii.gz: the label is 0 everywhere; give one with", True),
    Case("label-complex", with_values(label=LABEL * (1 + 1j)), "-label.nii.gz: has colours or complex numbers; ", True),
]

HDF5 = [
    Case("h5-fine", hdf5(), t1_scale=0),
    Case("h5-without-label", hdf5(without_label), r"has no dataset 'label'; give a file with"),
    Case(
        "h5-of-one-channel",
        hdf5(one_channel),
        r"'data' has shape \(1, 1, 18, 20, 22\), not .*; prepare the file again$",
    ),
    Case(
        "h5-external-link",
        hdf5(external_link),
        r"'data' is a link to elsewhere; copy the dataset itself",
    ),
    Case("h5-truncated", truncated_hdf5, r"can't be read \(.+\); copy or prepare the file again$"),
    Case("h5-chunk", hdf5(chunk_without_room_for_its_checksum), "'data' has a chunk without values; copy or prepare"),
    Case("h5-label-all-0", hdf5(empty_label), r"the label is 0 everywhere; give one with"),
    Case("h5-beside-images", hdf5_beside_images, r"has .* as well; keep the HDF5 file or the images$"),
]

AXIS_ORDERS = [
    Case(f"axes-{''.join(map(str, axes))}{''.join('+-'[flip < 0] for flip in flips)}", turned(np.c_[axes, flips]))
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]

CASES = FILES + NAMES + GRIDS + VALUES + LABELS + HDF5 + AXIS_ORDERS


def write_corpus(folder: Path) -> None:
    """Write all cases, and `expected.tsv`, which says what is to become of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        case.write(folder, case.subject)
    lines = [f"{case.subject!r}\t{case.message or 'accepted'}\n" for case in CASES]
    (folder / "expected.tsv").write_text("subject\tmessage\n" + "".join(lines))


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
