"""From the files of a subject to what the network takes: load, check, normalise; and from its logits to labels."""

import itertools
import logging
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import MetaKeys, SpaceKeys, convert_to_dst_type
from nibabel.fileholders import FileHolder
from nibabel.openers import ImageOpener

from scripts.errors import InputError, ran_out_of_memory
from scripts.registration import LARGEST_NEGATIVE_SHARE, has_values, not_registered
from scripts.tissues import ISEG_AFFINE, tissue_labels

logger = logging.getLogger(__name__)


class VolumeInMemory(str):
    """A nibabel image in place of a path; as text it is what messages call it, such as 'T1'."""

    image: nib.spatialimages.SpatialImage


# ml, CSF included; a scan that wasn't skull-stripped has more above 0: the head, and noise in the air around it
LARGEST_BRAIN = 2000
# what is beyond these is no brain scan, and a damaged or hostile file must not fill the memory
LONGEST_SIDE = 512  # mm; in HDF5, which is of 1 mm, voxels
VOXEL_SIZES = (0.1, 10)  # mm
MOST_VALUES = 2**28  # of all volumes in a file; 1 GB as float32
MOST_AFTER_VALUES = 2**24  # bytes
LARGEST_EXPANSION = {".nii": 1, ".img": 1, ".gz": 1032}  # bytes that a byte of such a file may become when read
# volume of a voxel as a share of what it would be with right angles; resampling undoes a shear, within reason
SMALLEST_SHARE_OF_CUBOID = 0.8
# mm between the corners of two grids that are the same but for rounding
LARGEST_OFFSET = 0.1
# share of the brain that may be without T2, where a label would be a guess: more than two masks of one brain differ by;
# the report warns of less
LARGEST_SHARE_WITHOUT_T2 = 0.25
# share of a label that may lie outside the brain; of more than a fifth of this a warning is given
LARGEST_SHARE_OUTSIDE = 0.25


def read_volumes(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the volumes of one Analyze or NIfTI file.

    Args:
        path: `.hdr`, `.nii` or `.nii.gz`; several volumes lie along the axes after the third.

    Returns:
        Scaled values as float32 (volumes, X, Y, Z) in the order of the axes on disk, and the 4 x 4 affine to RAS mm.

    Raises:
        InputError: the file can't be read whole, has NaN or infinite values, or as `require_brain_scan`.
    """
    try:
        image, values = _image_and_values(path)
    except InputError:
        raise
    except Exception as error:  # what nibabel raises for a damaged file depends on where the damage is
        if ran_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: can't be read ({reason}); copy or convert the file again") from error
    if not np.isfinite(values).all():
        raise InputError(f"{path}: has NaN or infinite values; replace them, outside the brain by 0")
    # by Fortran's order, which is that on disk, a view of it
    volumes = values.reshape(*values.shape[:3], -1, order="F")
    return np.moveaxis(volumes, -1, 0), image.affine


def _image_and_values(path: str) -> tuple[nib.spatialimages.SpatialImage, np.ndarray]:
    """The image of a file, once its header has passed `require_brain_scan`, and its values as float32."""
    if isinstance(path, VolumeInMemory):
        require_brain_scan(path, path.image)
        return path.image, path.image.get_fdata(dtype=np.float32, caching="unchanged")
    image = nib.load(path, mmap=False)
    require_brain_scan(path, image)
    _require_room(image)
    with ImageOpener(image.file_map.get("header", image.file_map["image"]).filename) as file:
        stored_sizes = type(image.header).from_fileobj(file, check=False)["pixdim"][1:4]
        if not stored_sizes.all():  # nibabel takes 1 mm then
            raise InputError(f"{path}: {_voxels(stored_sizes)} can't be; correct its header or convert it again")
        if not path.lower().endswith(".gz"):
            return image, image.get_fdata(dtype=np.float32, caching="unchanged")
        image = type(image).from_file_map({"image": FileHolder(path, file)}, mmap=False)
        values = image.get_fdata(dtype=np.float32, caching="unchanged")
        after = 0
        while read := file.read(2**20):  # only at the end of the file its checksum is compared
            after += len(read)
            if after > MOST_AFTER_VALUES:
                raise InputError(f"{path}: goes on long after its last value; copy or convert the file again")
    return image, values


def _require_room(image: nib.spatialimages.SpatialImage) -> None:
    """Raise EOFError where a file is too short for its values: nibabel takes memory for all of them before it reads."""
    path = Path(image.file_map["image"].filename)
    needed = math.prod(image.shape) * image.get_data_dtype().itemsize
    size = path.stat().st_size
    if size * LARGEST_EXPANSION.get(path.suffix.lower(), math.inf) < needed:
        raise EOFError(f"{size:,} bytes can't hold {needed:,} of shape {image.shape}")


def _voxels(sizes: Iterable[float]) -> str:
    return f"its voxel size of {' x '.join(f'{size:.4g}' for size in sizes)} mm"


def require_brain_scan(path: str, image: nib.spatialimages.SpatialImage) -> None:
    """Refuse an image that can't be a brain scan, before its values are read.

    Raises:
        InputError: it has fewer than three axes, values other than numbers, more of them or another size than a brain
            scan has, or its affine isn't finite, isn't an affine at all or has its axes far from right angles.
    """
    if len(image.shape) < 3 or 0 in image.shape:
        raise InputError(f"{path}: shape {image.shape} isn't a 3-D volume; give one volume a file")
    if image.get_data_dtype().kind not in "biuf":
        raise InputError(f"{path}: has colours or complex numbers; give the scan, with one number a voxel")
    axes = image.affine[:3, :3]
    sizes = np.linalg.norm(axes, axis=0)
    if not np.isfinite(image.affine).all():
        raise InputError(f"{path}: its affine has NaN or infinite values; correct its header or convert it again")
    if not np.array_equal(image.affine[3], [0, 0, 0, 1]):
        raise InputError(f"{path}: the last row of its affine isn't 0 0 0 1; correct its .mat file or convert it again")
    if sizes.min() < VOXEL_SIZES[0] or sizes.max() > VOXEL_SIZES[1]:
        raise InputError(f"{path}: {_voxels(sizes)} isn't that of a brain scan; correct its header or convert it again")
    if (sizes * image.shape[:3]).max() > LONGEST_SIDE or math.prod(image.shape) > MOST_VALUES:
        raise InputError(
            f"{path}: shape {image.shape} with {_voxels(sizes)} is larger than a brain scan; copy or convert it again"
        )
    if abs(np.linalg.det(axes / sizes)) < SMALLEST_SHARE_OF_CUBOID:
        raise InputError(f"{path}: its affine is sheared, far from right angles; resample it to a grid without shear")


def read_volume(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read an Analyze or NIfTI file of one volume.

    Args:
        path: as `read_volumes` takes it; axes after the third must have length 1.

    Returns:
        Scaled values as float32 (X, Y, Z) in the order of the axes on disk, and the 4 x 4 affine to RAS mm.

    Raises:
        InputError: as `read_volumes`, or the file has several volumes.
    """
    volumes, affine = read_volumes(path)
    if len(volumes) != 1:
        shape = (*volumes.shape[1:], len(volumes))
        raise InputError(f"{path}: shape {shape} isn't a 3-D volume; give one volume a file")
    return volumes[0], affine


def require_same_grid(
    path: str, values: np.ndarray, affine: np.ndarray, t1_path: str, t1: np.ndarray, t1_affine: np.ndarray
) -> None:
    """Refuse a volume (X, Y, Z) that differs from the T1 in shape or, by its 4 x 4 affine, in place, by InputError."""
    if values.shape != t1.shape:
        raise InputError(
            f"{path}: shape {values.shape} differs from {t1.shape} of {t1_path}; resample it to the grid of T1"
        )
    corners = list(itertools.product(*((0, side - 1) for side in t1.shape)))
    offsets = nib.affines.apply_affine(affine, corners) - nib.affines.apply_affine(t1_affine, corners)
    if np.linalg.norm(offsets, axis=1).max() > LARGEST_OFFSET:
        raise InputError(f"{path}: its affine differs from that of {t1_path}; register and resample it to T1")


def t2_beside(t1_path: str) -> str:
    """The path of the T2 that belongs to a T1 by its name: `subject-9-T1.nii.gz` has `subject-9-T2.nii.gz` beside it.

    Args:
        t1_path: a name that ends, before its suffix, in T1 or t1 as a part of its own; T2 or t2 takes its place.

    Raises:
        InputError: the name isn't so, or there is no such T2.
    """
    name = Path(t1_path).name
    t2_name, replaced = re.subn(r"(?<![^-_])([Tt])1(?=\.(?i:hdr|img|nii|nii\.gz)$)", r"\g<1>2", name)
    if not replaced:
        raise InputError(
            f"{t1_path}: holds one volume, and its name doesn't end in -T1, so no T2 can be looked for beside it; "
            f"give one 4-D file of T1 and T2, or two files named subject-<id>-T1 and subject-<id>-T2"
        )
    t2_path = Path(t1_path).with_name(t2_name)
    if not t2_path.is_file():
        raise InputError(f"{t2_path}: not found, and {t1_path} holds T1 alone; put the T2 there, or both in a 4-D file")
    return str(t2_path)


def read_t1_and_t2(image: str | Sequence[str]) -> tuple[np.ndarray, np.ndarray, str, str]:
    """Read T1 and T2 of a subject.

    Args:
        image: paths of T1 and T2; or one path, of a 4-D file of the two, or of a T1 that has its T2 beside it.

    Returns:
        T1 and T2 as float32 (2, X, Y, Z), the 4 x 4 affine of T1, and the paths of the files that T1 and T2 are from.

    Raises:
        InputError: as `read_volumes`, `t2_beside` and `require_same_grid`, or a single file has more than two volumes.
    """
    if isinstance(image, str):
        t1_path = image
        volumes, affine = read_volumes(image)
        if len(volumes) == 2:
            return _by_channel(*volumes), affine, t1_path, t1_path
        if len(volumes) != 1:
            raise InputError(f"{image}: holds {len(volumes)} volumes, not two; give T1 and T2, in this order")
        t1, t2_path = volumes[0], t2_beside(image)
    else:
        t1_path, t2_path = image
        t1, affine = read_volume(t1_path)
    t2, t2_affine = read_volume(t2_path)
    require_same_grid(t2_path, t2, t2_affine, t1_path, t1, affine)
    return _by_channel(t1, t2), affine, t1_path, t2_path


def _by_channel(t1: np.ndarray, t2: np.ndarray) -> np.ndarray:
    """T1 and T2 in one array, in C order: in that of the disk it takes 4 to 9 times as long to select voxels."""
    return np.stack([t1, t2], out=np.empty((2, *t1.shape), np.float32))


def require_found_brain(t1: np.ndarray, label: np.ndarray, path: str) -> None:
    """Refuse a subject whose brain the published HDF5 layout can't convey: there T1's lowest value is background.

    Args:
        t1: (X, Y, Z), with background 0.
        label: labels 0 to 3 on the same grid.
        path: for the message.

    Raises:
        InputError: T1 is below 0 somewhere or isn't 0 in all corners, or as `require_label_of_brain`.
    """
    if t1.min() < 0 or t1[np.ix_([0, -1], [0, -1], [0, -1])].any():
        raise InputError(
            f"{path}: T1 isn't lowest, and the same, in all corners of the volume, so the brain can't be told from "
            f"its background; give a skull-stripped T1 without negative values, as HDF5 in the published layout"
        )
    require_label_of_brain(label, t1, path)


def require_label_of_brain(label: np.ndarray, t1: np.ndarray, path: str) -> None:
    """Refuse a label (X, Y, Z) with much of its tissues outside the brain of T1, by InputError; warn of some."""
    outside = np.count_nonzero(label[t1 <= 0]) / max(1, np.count_nonzero(label))
    told = f"{path}: {outside:.0%} of the label lies outside the brain of T1; check that the two belong together"
    if outside > LARGEST_SHARE_OUTSIDE:
        raise InputError(told)
    if outside > LARGEST_SHARE_OUTSIDE / 5:
        logger.warning(told)


def require_brain_only(t1: np.ndarray, affine: np.ndarray, path: str) -> None:
    """Refuse a T1 (X, Y, Z) that is above 0 nowhere, everywhere or in a whole head, or below 0 in many voxels.

    Raises:
        InputError: it is so.
    """
    brain = np.count_nonzero(t1 > 0)
    if not brain:
        raise InputError(f"{path}: T1 is nowhere above 0, so there is no brain in it; give a skull-stripped T1")
    volume = brain * abs(np.linalg.det(affine[:3, :3])) / 1000
    if volume > LARGEST_BRAIN:
        raise InputError(
            f"{path}: T1 is above 0 in {volume:,.0f} ml, more than any brain has; give a skull-stripped T1, which is 0 "
            f"outside the brain"
        )
    if brain == t1.size:
        raise InputError(
            f"{path}: T1 is above 0 everywhere, so the brain can't be told from its background; give a skull-stripped "
            f"T1, which is 0 outside the brain"
        )
    below = np.count_nonzero(t1 < 0)
    if below > LARGEST_NEGATIVE_SHARE * brain:
        raise InputError(
            f"{path}: T1 is below 0 in {below:,} voxels and above it in {brain:,}, so it doesn't show the brain; give "
            f"a skull-stripped T1, which is above 0 in the brain and 0 outside"
        )


def require_t2_of_brain(t1: np.ndarray, t2: np.ndarray, path: str) -> None:
    """Refuse a T2 (X, Y, Z) that shows little of the brain of T1, by InputError.

    Args:
        t1: (X, Y, Z), 0 outside the brain.
        t2: likewise, stripped or not.
        path: of T2, for the message.
    """
    missing = np.mean(~has_values(t1, t2))
    if missing > LARGEST_SHARE_WITHOUT_T2:
        raise InputError(
            f"{path}: T2 shows nothing in {missing:.0%} of the brain of T1; register it to T1, and give both one mask"
        )


def _require_contrast(spreads: Iterable[float], t1_path: str) -> None:
    """Refuse a subject whose T1 or T2 doesn't vary inside the brain, by InputError; NaN counts as no spread."""
    for name, spread in zip(("T1", "T2"), spreads, strict=True):
        if not spread > 0:
            raise InputError(
                f"{t1_path}: the {name} of this subject is constant inside the brain; give the scan itself, not a mask"
            )


def _hdf5_values(file: h5py.File, name: str, channels: int) -> np.ndarray:
    """Numbers (channels, Z, X, Y) of a dataset (1, channels, Z, X, Y) that the file holds itself."""
    links = file.id.links  # asking by way of `name in file` would follow a link to another file
    if not links.exists(name.encode()):
        raise InputError(f"{file.filename}: has no dataset '{name}'; give a file with 'data' and 'label'")
    if links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise InputError(f"{file.filename}: '{name}' is a link to elsewhere; copy the dataset itself into the file")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "fiu":
        raise InputError(f"{file.filename}: '{name}' isn't a dataset of numbers; prepare the file again")
    if dataset.is_virtual or dataset.external:
        raise InputError(f"{file.filename}: '{name}' keeps its values in other files; copy them into the file")
    shape = dataset.shape or ()
    if shape[:2] != (1, channels) or len(shape) != 5 or not all(1 <= side <= LONGEST_SIDE for side in shape[2:]):
        raise InputError(
            f"{file.filename}: '{name}' has shape {shape}, not (1, {channels}, Z, X, Y) with sides of 1 to "
            f"{LONGEST_SIDE}; prepare the file again"
        )
    # HDF5 crashes the process where a chunk has no room for its checksum of 4 bytes
    least = 5 if dataset.fletcher32 else 1
    if dataset.chunks and dataset.id.chunk_iter(lambda chunk: chunk.size < least or None):
        raise InputError(f"{file.filename}: '{name}' has a chunk without values; copy or prepare the file again")
    return dataset[0]


def read_hdf5(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a subject from an HDF5 file in the published layout.

    The file has the datasets `data`, (1, 2, Z, X, Y), T1 and T2 after normalisation, and `label`, (1, 1, Z, X, Y), in
    any number type, chunking and compression that h5py reads, on the axes of an iSeg file (LAS, 1 mm).

    Returns:
        T1 and T2 as float32 (2, X, Y, Z), each shifted so that the background is 0 as in the scan, but in units of the
        scan's standard deviation, and labels 0 to 3 as uint8 (X, Y, Z).

    Raises:
        InputError: the file can't be read whole, holds something else, keeps its values elsewhere, has NaN or infinite
            values, or as `tissue_labels` and `require_found_brain`.
    """
    try:
        with h5py.File(path, "r") as file:
            data, label = _hdf5_values(file, "data", channels=2), _hdf5_values(file, "label", channels=1)
    except InputError:
        raise
    except Exception as error:  # what h5py raises for a damaged file depends on where the damage is
        if ran_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: can't be read ({reason}); copy or prepare the file again") from error
    if label.shape[1:] != data.shape[1:]:
        raise InputError(f"{path}: shape {label.shape} of 'label' doesn't fit {data.shape} of 'data'; prepare it again")
    with np.errstate(over="ignore", invalid="ignore"):  # what has no place in float32 is found below
        data = np.moveaxis(data.astype(np.float32), 1, -1)
        image = np.ascontiguousarray(data - data[:, :1, :1, :1])  # the first corner is background
    if not np.isfinite(image).all():
        raise InputError(f"{path}: has NaN or infinite values; prepare the file again from the scans")
    labels = np.ascontiguousarray(np.moveaxis(tissue_labels(label[0], path), 0, -1))
    require_found_brain(image[0], labels, path)
    return image, labels


def _meta_tensor(values: np.ndarray, affine: np.ndarray, path: str) -> MetaTensor:
    meta = {
        MetaKeys.ORIGINAL_AFFINE: affine,
        MetaKeys.SPATIAL_SHAPE: np.array(values.shape[1:]),
        MetaKeys.SPACE: SpaceKeys.RAS,
        "filename_or_obj": str(path),
    }
    return MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(affine), meta=meta)


class LoadSubjectd(Transform):
    """Load the T1, T2 and label of a subject and check that they belong together.

    Takes a dict with `image` (as `read_t1_and_t2` has it) and, where there is one, `label` (a path); `image` is the
    path of the `.h5` twice, and `label` the same, where that holds the subject. Where there is a `mask` (a path), T1
    and T2 become 0 where it isn't above 0. Gives, on the grid of the T1 file and with its affine, a copy with:

    - `image`: float32 (2, X, Y, Z), T1 and T2 as on disk, or from HDF5 as `read_hdf5` gives them
    - `t1`, `t2`: float32 (1, X, Y, Z), the channels once more, to be kept on their own grid; the meta data of `t2` have
      under `not_registered` the warning of `scripts.registration`, which is logged as well, or an empty text
    - `label`: uint8 (1, X, Y, Z), 0 background, 1 CSF, 2 GM, 3 WM, if there is one

    Each file is read by a call of its own that shares no state, so any number of workers may load at a time.

    Raises:
        InputError: as `read_t1_and_t2`, `read_volume`, `tissue_labels`, `require_label_of_brain`, `read_hdf5`,
            `require_brain_only` and `require_t2_of_brain`, mask or label differ in grid, T1 or T2 is constant inside
            the brain, the two are the same, or the label is 0 everywhere.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        label = None
        t1_path = t2_path = data["image"] if isinstance(data["image"], str) else data["image"][0]
        if t1_path.endswith(".h5"):
            image, label = read_hdf5(t1_path)
            affine = ISEG_AFFINE.copy()
        else:
            image, affine, t1_path, t2_path = read_t1_and_t2(data["image"])
            if "mask" in data:
                mask, mask_affine = read_volume(data["mask"])
                require_same_grid(data["mask"], mask, mask_affine, t1_path, image[0], affine)
                image *= mask > 0
            if "label" in data:
                values, label_affine = read_volume(data["label"])
                require_same_grid(data["label"], values, label_affine, t1_path, image[0], affine)
                label = tissue_labels(values, data["label"])
        require_brain_only(image[0], affine, t1_path)
        # before resampling, which blurs the edge of a mask
        brain = image[0] > 0
        _require_contrast([np.ptp(channel[brain]) for channel in image], t1_path)
        if np.array_equal(*image):
            raise InputError(f"{t1_path}: T1 and T2 of this subject are the same scan; give the T2 itself")
        require_t2_of_brain(*image, t2_path)
        if warning := not_registered(*image, nib.affines.voxel_sizes(affine)):
            logger.warning("%s: %s", t2_path, warning)
        if label is not None:
            if not label.any():
                raise InputError(f"{data['label']}: the label is 0 everywhere; give one with tissues, or take it away")
            require_label_of_brain(label, image[0], data["label"])
        loaded = dict(data)
        loaded["image"] = _meta_tensor(image, affine, t1_path)
        loaded["image"].meta["t1_path"] = t1_path
        if any(str(key).startswith("image_") for key in data):
            # where an image has a NIfTI file's name, Spacingd takes any `image_...` beside it, such as the `image_path`
            # of MONAI Label, for a dict of its meta data
            del loaded["image"].meta["filename_or_obj"]
        for name, channel, path in (("t1", image[:1], t1_path), ("t2", image[1:], t2_path)):
            loaded[name] = _meta_tensor(channel.copy(), affine, path)
        loaded["t2"].meta["not_registered"] = warning or ""
        if label is not None:
            loaded["label"] = _meta_tensor(label[None], affine, data["label"])
        return loaded


class NormalizeByT1Maskd(MapTransform):
    """Bring T1 and T2 to mean 0 and (population) standard deviation 1 over the voxels where T1 > 0.

    Both channels are measured with the mask of T1, and every voxel is transformed, background included, as in both
    published pipelines. Shapes: (2, X, Y, Z) -> (2, X, Y, Z), T1 first; no scale goes in, none comes out.

    Raises:
        InputError: a channel is constant where T1 > 0, T1 is nowhere above 0, or a value comes out that isn't finite.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            channels = torch.as_tensor(image)
            brain = channels[:, channels[0] > 0].double()
            deviation, mean = torch.std_mean(brain, dim=1, correction=0)
            if not (deviation > 0).all():
                _require_contrast(deviation.tolist(), image.meta["t1_path"])
            scale = tuple(value.to(channels.dtype)[:, None, None, None] for value in (mean, deviation))
            result[key] = (image - scale[0]) / scale[1]
            if not torch.as_tensor(result[key]).isfinite().all():
                raise InputError(
                    f"{image.meta['t1_path']}: T1 or T2 of this subject has values that float32 can't hold at the "
                    f"scale of its brain; give the scan itself, with values of a usual size"
                )
        return result


class MostLikelyTissued(MapTransform):
    """Labels from logits: the class of the largest logit, of equal ones the first.

    As MONAI's AsDiscreted by argmax, in an eighth of the time: torch's argmax over the channels of a subject takes
    1.4 s on 2 cores. Shapes: (classes, X, Y, Z) -> (1, X, Y, Z), of the type of the logits, as MONAI's
    MaskIntensityd would bring a mask to a smaller one and lose what doesn't fit.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            labels = torch.as_tensor(result[key]).max(dim=0, keepdim=True).indices
            result[key] = convert_to_dst_type(labels, result[key])[0]
        return result
