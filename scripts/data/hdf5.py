"""Subjects in the published HDF5 layout."""

import h5py
import numpy as np

from scripts.data.checks import require_found_brain
from scripts.data.volumes import LONGEST_SIDE
from scripts.errors import InputError, refuse_damaged
from scripts.tissues import tissue_labels


def _hdf5_values(file: h5py.File, name: str, channels: int) -> np.ndarray:
    """The values (channels, Z, X, Y) of a dataset (1, channels, Z, X, Y) stored in the file itself."""
    links = file.id.links  # `name in file` would follow a link to another file
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
    # HDF5 crashes the process if a chunk is too short for its checksum of 4 bytes
    least = 5 if dataset.fletcher32 else 1
    if dataset.chunks and dataset.id.chunk_iter(lambda chunk: chunk.size < least or None):
        raise InputError(f"{file.filename}: '{name}' has a chunk without values; copy or prepare the file again")
    return dataset[0]


def read_hdf5(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a subject from an HDF5 file in the published layout.

    The file has two datasets with the axes of an iSeg file (LAS, 1 mm): `data`, (1, 2, Z, X, Y), the normalised T1 and
    T2, and `label`, (1, 1, Z, X, Y). They may have any number type, chunking and compression that h5py reads.

    Returns:
        T1 and T2 as float32 (2, X, Y, Z), in units of the scan's standard deviation and each shifted so that the
        background is 0; and labels 0 to 3 as uint8 (X, Y, Z).

    Raises:
        InputError: the file can't be read whole, has another layout, refers to other files, has NaN or infinite values,
            or as `tissue_labels` and `require_found_brain`.
    """
    with refuse_damaged(path, "copy or prepare the file again"), h5py.File(path, "r") as file:
        data, label = _hdf5_values(file, "data", channels=2), _hdf5_values(file, "label", channels=1)
    if label.shape[1:] != data.shape[1:]:
        raise InputError(f"{path}: shape {label.shape} of 'label' doesn't fit {data.shape} of 'data'; prepare it again")
    with np.errstate(over="ignore", invalid="ignore"):  # values too large for float32 are refused below
        data = np.moveaxis(data.astype(np.float32), 1, -1)
        image = np.ascontiguousarray(data - data[:, :1, :1, :1])  # the first corner is background
    if not np.isfinite(image).all():
        raise InputError(f"{path}: has NaN or infinite values; prepare the file again from the scans")
    labels = np.ascontiguousarray(np.moveaxis(tissue_labels(label[0], path), 0, -1))
    require_found_brain(image[0], labels, path)
    return image, labels
