"""Analyze, NIfTI and FreeSurfer's volumes: read whole, and refused if they can't be a brain scan."""

import itertools
import logging
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder
from nibabel.openers import ImageOpener
from nibabel.spatialimages import SpatialImage

from scripts.errors import InputError, refuse_damaged

# limits of brain scans, so that a damaged or hostile file can't fill the memory
LONGEST_SIDE = 512  # mm; voxels in HDF5, whose voxels have 1 mm
VOXEL_SIZES = (0.1, 10)  # mm
MOST_VALUES = 2**28  # of all volumes in a file; 1 GB as float32
MOST_AFTER_VALUES = 2**24  # bytes
LARGEST_EXPANSION = {".nii": 1, ".img": 1, ".mgh": 1, ".gz": 1032, ".mgz": 1032}  # bytes read per byte of the file
# volume of a voxel as a share of the cuboid with its sides; resampling undoes a moderate shear
SMALLEST_SHARE_OF_CUBOID = 0.8
# voxels between corners of grids that differ only by rounding: in float32, sform and qform of a grid do by up to 0.4
LARGEST_OFFSET = 0.5
# mm in a unit of length of a NIfTI header, which nibabel leaves unheeded
MM_IN_UNIT = {"meter": 1000.0, "micron": 0.001}
# what Analyze's byte of orientation says of the slices, if they aren't transverse
SLICES = {1: "coronal", 2: "sagittal", 3: "transverse and flipped", 4: "coronal and flipped", 5: "sagittal and flipped"}
# by how much the square of a quaternion's length may exceed 1; nibabel's own limit refuses those of some tools
for header in (nib.Nifti1Header, nib.Nifti2Header):
    header.quaternion_threshold = 1e-4
# degrees between the axes of two descriptions of one grid that differ only by rounding
LARGEST_ANGLE = 2

# names of the channels, in their order
CONTRASTS = ("T1", "T2")

logger = logging.getLogger(__name__)


class Scan(NamedTuple):
    """A T1 or T2 as on disk.

    Attributes:
        values: float32 (X, Y, Z).
        affine: 4 x 4, from voxels to RAS mm.
        path: its name by `name_of`.
    """

    values: np.ndarray
    affine: np.ndarray
    path: str


def name_of(source: str | SpatialImage, kind: str = "image") -> str:
    """Return the name of an image for messages: its path, or its kind, such as 'T1', if it has no path."""
    return source if isinstance(source, str) else source.get_filename() or kind


def halves(path: Path) -> tuple[Path, Path] | None:
    """Return header and image of an Analyze pair, of which `path` is one; None if it isn't of a pair.

    The endings may differ in case. A half that doesn't exist is returned as one would expect it.
    """
    if not (name := re.fullmatch(r"(?is)(?P<stem>.+\.)(?P<half>hdr|img)(?P<packed>\.gz)?", path.name)):
        return None
    packed = name["packed"] or ""

    def half(ending: str) -> Path:
        alike = (str.upper, str.lower) if name["half"].isupper() else (str.lower, str.upper)
        names = [path.with_name(name["stem"] + of_case(ending) + packed) for of_case in alike]
        return next((each for each in names if each.exists()), names[0])

    return half("hdr"), half("img")


def open_image(path: str) -> SpatialImage:
    """Return a nibabel image, with its header read and its values not."""
    image = nib.load(path, mmap=False)
    if pair := halves(Path(path)):
        image.file_map["image"].filename = str(pair[1])
        image = type(image).from_file_map(image.file_map, mmap=False)
    return image


def affine_of(image: SpatialImage) -> np.ndarray:
    """Return the 4 x 4 affine of an image from voxels to RAS mm.

    A unit in the header counts if it makes the voxels those of a brain scan; many headers state a wrong one.
    """
    unit = image.header.get_xyzt_units()[0] if isinstance(image, nib.Nifti1Pair) else None
    scaled = np.diag([*[MM_IN_UNIT.get(unit, 1.0)] * 3, 1.0]) @ image.affine
    sizes = nib.affines.voxel_sizes(scaled)
    return scaled if VOXEL_SIZES[0] <= sizes.min() and sizes.max() <= VOXEL_SIZES[1] else image.affine


def read_volumes(source: str | SpatialImage, kind: str = "image") -> tuple[np.ndarray, np.ndarray]:
    """Read the volumes of one Analyze, NIfTI or FreeSurfer image.

    Args:
        source: path of a `.hdr`, `.nii` or `.mgz`, or of a `.hdr.gz` or `.nii.gz`, or a nibabel image in memory.
            Several volumes are along the axes after the third.
        kind: name for messages of an image without a path.

    Returns:
        Scaled values as float32 (volumes, X, Y, Z) with the axes as on disk, and the 4 x 4 affine to RAS mm.

    Raises:
        InputError: the file can't be read whole, has NaN or infinite values, or as `require_brain_scan`.
    """
    path = name_of(source, kind)
    with refuse_damaged(path, "copy or convert the file again"):
        image, values = _image_and_values(source, path)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: has NaN or infinite values; replace them, outside the brain by 0")
    # a view, since values on disk are in Fortran's order
    volumes = values.reshape(*values.shape[:3], -1, order="F")
    return np.moveaxis(volumes, -1, 0), affine_of(image)


def _image_and_values(source: str | SpatialImage, path: str) -> tuple[SpatialImage, np.ndarray]:
    """The image, once its header has passed `require_brain_scan`, and its values as float32."""
    image = open_image(source) if isinstance(source, str) else source
    require_brain_scan(path, image)
    if not isinstance(source, str):
        return image, image.get_fdata(dtype=np.float32, caching="unchanged")
    _require_room(image)
    if isinstance(image, nib.Nifti1Image) and image.dataobj.offset < image.header.sizeof_hdr:
        raise InputError(f"{path}: its values begin inside its header (vox_offset); convert it again")
    _require_voxel_sizes(path, image)
    data_path = image.file_map["image"].filename
    if not data_path.lower().endswith((".gz", ".mgz")):
        return image, image.get_fdata(dtype=np.float32, caching="unchanged")
    with ImageOpener(data_path) as file:
        files = image.file_map | {"image": FileHolder(data_path, file)}
        values = type(image).from_file_map(files, mmap=False).get_fdata(dtype=np.float32, caching="unchanged")
        after = 0
        while read := file.read(2**20):  # the checksum is verified at the end of the file
            after += len(read)
            if after > MOST_AFTER_VALUES:
                raise InputError(f"{path}: continues long after its last value; copy or convert the file again")
    return image, values


def _require_voxel_sizes(path: str, image: SpatialImage) -> None:
    """Raise InputError if the affine of an image rests on voxel sizes of 0, for which nibabel assumes 1 mm."""
    if not isinstance(image, nib.AnalyzeImage) or (isinstance(image, nib.Nifti1Pair) and image.header["sform_code"]):
        return
    with ImageOpener(image.file_map.get("header", image.file_map["image"]).filename) as file:
        stored_sizes = type(image.header).from_fileobj(file, check=False)["pixdim"][1:4]
    if not stored_sizes.all():
        raise InputError(f"{path}: {_voxels(stored_sizes)} can't be; correct its header or convert it again")


def doubt_of_orientation(image: SpatialImage) -> str | None:
    """Return a warning if an image doesn't say how it lies in the scanner, or says it in two ways that differ."""
    if not isinstance(image, nib.Nifti1Pair):
        stored = image.header["orient"].item() if isinstance(image, nib.AnalyzeImage) else b""
        slices = SLICES.get(int.from_bytes(stored[:1]))
        return slices and f"its header calls its slices {slices}, which few tools heed; here they are transverse"
    s_code, q_code = (int(image.header[name]) for name in ("sform_code", "qform_code"))
    if not s_code and not q_code:
        axes = "".join(nib.aff2axcodes(image.affine))
        return f"its header doesn't state the orientation; {axes} is assumed, so left and right may be exchanged"
    if not s_code or not q_code:
        return None
    try:
        both = image.get_sform(), image.get_qform()
    except (nib.spatialimages.HeaderDataError, ValueError):  # a quaternion that can't be; the sform is used anyway
        return None
    first, second = (each[:3, :3] / np.linalg.norm(each[:3, :3], axis=0) for each in both)
    angle = np.degrees(np.arccos(np.clip((first * second).sum(axis=0), -1, 1))).max()
    if not angle > LARGEST_ANGLE:  # NaN too
        return None
    return f"its sform and qform differ by {angle:.0f} degrees; the sform is used, as most tools do"


def _require_room(image: SpatialImage) -> None:
    """Raise EOFError if a file is too short for its values: nibabel allocates memory for all before it reads."""
    path = Path(image.file_map["image"].filename)
    needed = math.prod(image.shape) * image.get_data_dtype().itemsize
    size = path.stat().st_size
    if size * LARGEST_EXPANSION.get(path.suffix.lower(), math.inf) < needed:
        raise EOFError(f"{size:,} bytes can't hold {needed:,} of shape {image.shape}")


def _voxels(sizes: Iterable[float]) -> str:
    return f"its voxel size of {' x '.join(f'{size:.4g}' for size in sizes)} mm"


def require_brain_scan(path: str, image: SpatialImage) -> None:
    """Refuse an image that can't be a brain scan, before its values are read.

    Raises:
        InputError: it has fewer than three axes, values that aren't real numbers, or more voxels, a longer side or
            another voxel size than a brain scan; or its affine isn't finite, isn't affine or is far from right angles.
    """
    if len(image.shape) < 3 or 0 in image.shape:
        raise InputError(f"{path}: shape {image.shape} isn't a 3-D volume; give one volume per file")
    if image.get_data_dtype().kind not in "biuf":
        raise InputError(f"{path}: has colours or complex numbers; give the scan, with one number per voxel")
    affine = affine_of(image)
    axes = affine[:3, :3]
    sizes = nib.affines.voxel_sizes(affine)
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: its affine has NaN or infinite values; correct its header or convert it again")
    if not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise InputError(f"{path}: the last row of its affine isn't 0 0 0 1; correct its .mat file or convert it again")
    if sizes.min() < VOXEL_SIZES[0] or sizes.max() > VOXEL_SIZES[1]:
        raise InputError(f"{path}: {_voxels(sizes)} isn't that of a brain scan; correct its header or convert it again")
    if (sizes * image.shape[:3]).max() > LONGEST_SIDE or math.prod(image.shape) > MOST_VALUES:
        raise InputError(
            f"{path}: shape {image.shape} with {_voxels(sizes)} is larger than a brain scan; copy or convert it again"
        )
    if abs(np.linalg.det(axes / sizes)) < SMALLEST_SHARE_OF_CUBOID:
        raise InputError(f"{path}: its affine is sheared, far from right angles; resample it to a grid without shear")


def read_volume(source: str | SpatialImage, kind: str = "image") -> tuple[np.ndarray, np.ndarray]:
    """Read an Analyze or NIfTI image of one volume.

    Args:
        source, kind: see `read_volumes`; axes after the third must have length 1.

    Returns:
        Scaled values as float32 (X, Y, Z) with the axes as on disk, and the 4 x 4 affine to RAS mm.

    Raises:
        InputError: as `read_volumes`, or the file has several volumes.
    """
    volumes, affine = read_volumes(source, kind)
    if len(volumes) != 1:
        shape = (*volumes.shape[1:], len(volumes))
        raise InputError(f"{name_of(source, kind)}: shape {shape} isn't a 3-D volume; give one volume per file")
    return volumes[0], affine


def require_same_grid(
    path: str, values: np.ndarray, affine: np.ndarray, t1_path: str, t1: np.ndarray, t1_affine: np.ndarray
) -> None:
    """Raise InputError if a volume (X, Y, Z) differs from the T1 in shape or, by its 4 x 4 affine, in position."""
    if values.shape != t1.shape:
        raise InputError(
            f"{path}: shape {values.shape} differs from {t1.shape} of {t1_path}; resample it to the grid of T1"
        )
    if not on_same_grid(values, affine, t1, t1_affine):
        raise InputError(f"{path}: its affine differs from that of {t1_path}; register and resample it to T1")


def on_same_grid(values: np.ndarray, affine: np.ndarray, t1: np.ndarray, t1_affine: np.ndarray) -> bool:
    """Return whether two volumes (X, Y, Z) agree in shape and, by their 4 x 4 affines, in position."""
    if values.shape != t1.shape:
        return False
    corners = list(itertools.product(*((0, side - 1) for side in t1.shape)))
    offsets = nib.affines.apply_affine(affine, corners) - nib.affines.apply_affine(t1_affine, corners)
    return bool(np.linalg.norm(offsets, axis=1).max() <= LARGEST_OFFSET * nib.affines.voxel_sizes(t1_affine).min())


def t2_beside(t1_path: str) -> str:
    """Return the path of the T2 beside a T1, such as `subject-9-T2.nii.gz` for `subject-9-T1.nii.gz`.

    Args:
        t1_path: its name ends in T1 or t1, after - or _ and before the suffix; T2 or t2 replaces it.

    Raises:
        InputError: the name has no such ending, or the T2 doesn't exist.
    """
    name = Path(t1_path).name
    t2_name, replaced = re.subn(r"(?<![^-_])([Tt])1(?=\.(?i:hdr|img|nii|nii\.gz)$)", r"\g<1>2", name)
    if not replaced:
        raise InputError(
            f"{t1_path}: has one volume, and its name doesn't end in -T1, so its T2 can't be found; "
            f"give one 4-D file of T1 and T2, or two files named subject-<id>-T1 and subject-<id>-T2"
        )
    t2_path = Path(t1_path).with_name(t2_name)
    if not t2_path.is_file():
        raise InputError(f"{t2_path}: not found, and {t1_path} has only T1; put the T2 there, or both in a 4-D file")
    return str(t2_path)


def contrasts_of(image: str | Sequence[str | SpatialImage | None]) -> tuple[str, ...]:
    """Return which of T1 and T2 a subject has; `image` is as in `read_scans`."""
    if isinstance(image, str):
        return CONTRASTS
    return tuple(name for name, source in zip(CONTRASTS, image, strict=True) if source is not None)


def read_scans(image: str | Sequence[str | SpatialImage | None]) -> list[Scan]:
    """Read T1 and T2 of a subject, or the one that it has.

    A doubt about the orientation of the first is logged.

    Args:
        image: paths or nibabel images of T1 and T2, of which one may be None; or one path of a 4-D file with both, or
            of a T1 with its T2 beside it.

    Raises:
        InputError: a single file has more than two volumes, or as `read_volumes` and `t2_beside`.
    """
    if isinstance(image, str):
        volumes, affine = read_volumes(image)
        if len(volumes) > 2:
            raise InputError(f"{image}: has {len(volumes)} volumes, not two; give T1 and T2, in this order")
        scans = [Scan(values, affine, image) for values in volumes]
        return scans if len(scans) == 2 else [*scans, _read_scan(t2_beside(image), "T2")]
    sources = {name: source for name, source in zip(CONTRASTS, image, strict=True) if source is not None}
    scans = [_read_scan(source, name) for name, source in sources.items()]
    first = next(iter(sources.values()))
    if doubt := doubt_of_orientation(open_image(first) if isinstance(first, str) else first):
        logger.warning("%s: %s", scans[0].path, doubt)
    return scans


def _read_scan(source: str | SpatialImage, name: str) -> Scan:
    return Scan(*read_volume(source, name), name_of(source, name))
