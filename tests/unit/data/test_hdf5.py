"""HDF5 files are read as the images that they were made of; damaged ones are refused."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import ROOT, read_subject, refusal
from monai.bundle import ConfigParser
from monai.transforms import Compose

from scripts.data.hdf5 import read_hdf5
from scripts.data.subjects import SubjectFolder
from scripts.errors import InputError

TRAIN = str(ROOT / "configs" / "train.json")


@pytest.fixture
def own_file(hdf5_prepared, tmp_path) -> Path:
    """The file of subject 1 in a folder of the test's own, to be damaged."""
    return Path(shutil.copy(hdf5_prepared / "data_train_no_cut" / "train_iseg_nocut_1.h5", tmp_path))


def subject_in(directory: Path, subject: str = "1") -> dict:
    return next(s for s in SubjectFolder(str(directory)).require_good() if s["subject"] == subject)


def replace(path: Path, name: str, values: np.ndarray | None = None, **how) -> None:
    """Store a dataset anew, in another way."""
    with h5py.File(path, "r+") as file:
        values = file[name][()] if values is None else values
        del file[name]
        file.create_dataset(name, data=values, **how)


def pipeline(part: str, **settings) -> Compose:
    """Transforms of train.json that are done once."""
    parser = ConfigParser(ConfigParser.load_config_file(TRAIN))
    parser.update({"bundle_root": str(ROOT), **settings})
    transforms = parser.get_parsed_content(part)
    return transforms if isinstance(transforms, Compose) else Compose(transforms)


@pytest.mark.parametrize(
    ("part", "patch"),
    [("train#deterministic_transforms", 64), ("train#deterministic_transforms", 144), ("validate#preprocessing", 64)],
)
@pytest.mark.parametrize("subject", ["1", "2", "9"])
def test_network_gets_the_same_array_as_from_the_images(hdf5_scans, hdf5_prepared, part, subject, patch):
    """Also where the patch is larger than the volume, and from a subject on another grid."""
    prepare = pipeline(part, patch_size=[patch] * 3)
    of_images, of_hdf5 = (prepare(subject_in(folder, subject)) for folder in (hdf5_scans, hdf5_prepared))
    torch.testing.assert_close(of_hdf5["image"].as_tensor(), of_images["image"].as_tensor(), rtol=0, atol=1e-5)
    if part.startswith("train"):
        assert torch.equal(of_hdf5["label"].as_tensor(), of_images["label"].as_tensor())


def test_volume_lies_on_the_axes_of_iseg(hdf5_prepared, brains):
    loaded = read_subject(subject_in(hdf5_prepared, "9"))
    assert loaded["image"].affine.tolist() == np.diag([-1.0, 1, 1, 1]).tolist()
    brain = brains[1]["T1"] > 0
    low, high = (np.argwhere(brain).min(0), np.argwhere(brain).max(0) + 1)
    part = tuple(slice(max(a - 32, 0), b + 32) for a, b in zip(low, high, strict=True))
    np.testing.assert_array_equal(loaded["t1"][0] > 0, brain[part])
    np.testing.assert_array_equal(loaded["label"][0], brains[1]["label"][part])


@pytest.mark.parametrize(
    ("data", "label"),
    [
        ({"chunks": True}, {"chunks": (1, 1, 16, 16, 16)}),
        ({"compression": "gzip", "shuffle": True}, {"compression": "lzf"}),
        ({"compression": "lzf", "dtype": np.float64}, {"dtype": np.int64}),
        ({"dtype": ">f8"}, {"dtype": np.float32}),
        ({"fletcher32": True}, {"dtype": "iseg"}),
    ],
)
def test_files_of_other_people(own_file, data, label):
    image, labels = read_hdf5(str(own_file))
    replace(own_file, "data", **data)
    if label.get("dtype") == "iseg":
        with h5py.File(own_file) as file:
            values = np.array([0, 10, 150, 250], np.int16)[file["label"][()]]
        replace(own_file, "label", values)
    else:
        replace(own_file, "label", **label)
    other_image, other_labels = read_hdf5(str(own_file))
    np.testing.assert_array_equal(other_image, image)
    np.testing.assert_array_equal(other_labels, labels)
    assert (other_image.dtype, other_labels.dtype) == (np.float32, np.uint8)


def no_hdf5(path: Path) -> str:
    path.write_text("data")
    return r"can't be read \(.*file signature not found.*\); copy or prepare the file again"


def damaged_chunk(path: Path) -> str:
    replace(path, "data", compression="gzip", chunks=(1, 2, 32, 32, 32))
    with h5py.File(path) as file:
        chunk = file["data"].id.get_chunk_info(0)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(bytes(chunk.size))
    return r"can't be read \(.*\); copy"


def missing(name: str) -> Callable[[Path], str]:
    def damage(path: Path) -> str:
        with h5py.File(path, "r+") as file:
            del file[name]
        return f"has no dataset '{name}'; give a file with 'data' and 'label'"

    return damage


def group(path: Path) -> str:
    missing("label")(path)
    with h5py.File(path, "r+") as file:
        file.create_group("label")
    return "'label' isn't a dataset of numbers"


def text(path: Path) -> str:
    replace(path, "label", np.full((1, 1, 4, 4, 4), "CSF", object), dtype=h5py.string_dtype())
    return "'label' isn't a dataset of numbers"


def references(path: Path) -> str:
    with h5py.File(path, "r+") as file:
        reference = file["data"].ref
    replace(path, "label", np.full((1, 1, 4, 4, 4), reference, object), dtype=h5py.ref_dtype)
    return "'label' isn't a dataset of numbers"


def soft_link(path: Path) -> str:
    missing("data")(path)
    with h5py.File(path, "r+") as file:
        file["data"] = h5py.SoftLink("/label")
    return "'data' is a link to elsewhere"


def virtual(path: Path) -> str:
    elsewhere = shutil.copy(path, path.with_name("elsewhere"))
    with h5py.File(elsewhere) as file:
        layout = h5py.VirtualLayout(file["label"].shape, np.uint8)
        layout[:] = h5py.VirtualSource(file["label"])
    missing("label")(path)
    with h5py.File(path, "r+") as file:
        file.create_virtual_dataset("label", layout)
    return "'label' keeps its values in other files"


def external_storage(path: Path) -> str:
    raw = path.with_name("elsewhere")
    raw.write_bytes(bytes(64))
    missing("label")(path)
    with h5py.File(path, "r+") as file:
        file.create_dataset("label", (1, 1, 4, 4, 4), np.uint8, external=[(str(raw), 0, 64)])
    return "'label' keeps its values in other files"


def shape_of(name: str, shape: tuple[int, ...]) -> Callable[[Path], str]:
    def damage(path: Path) -> str:
        replace(path, name, np.zeros(shape, np.float32))
        return rf"'{name}' has shape \({', '.join(map(str, shape))},?\), not \(1, "

    return damage


def boundless(path: Path) -> str:
    """40 TB that take no room in the file."""
    missing("data")(path)
    with h5py.File(path, "r+") as file:
        file.create_dataset("data", (1, 2, 10**4, 10**4, 10**5), np.float32, chunks=(1, 1, 64, 64, 64))
    return "'data' has shape .* with sides of 1 to 512"


def nothing(path: Path) -> str:
    missing("data")(path)
    with h5py.File(path, "r+") as file:
        file["data"] = h5py.Empty("f4")
    return r"'data' has shape \(\), not"


def other_label_shape(path: Path) -> str:
    replace(path, "label", np.zeros((1, 1, 4, 5, 6), np.uint8))
    return r"shape \(1, 4, 5, 6\) of 'label' doesn't fit"


def change(name: str, edit: Callable[[np.ndarray], None], message: str) -> Callable[[Path], str]:
    def damage(path: Path) -> str:
        with h5py.File(path, "r+") as file:
            values = file[name][()].astype(np.float32)
        edit(values)
        replace(path, name, values)
        return message

    return damage


def put(place: tuple, value: float) -> Callable[[np.ndarray], None]:
    return lambda values: values.__setitem__(place, value)


def too_far_apart(values: np.ndarray) -> None:
    """Each is a float32, their differences are none."""
    values[0, 1] = np.where(values[0, 0] > values[0, 0].min(), 3e38, -3e38)


def no_background(values: np.ndarray) -> None:
    """As scans that aren't skull-stripped."""
    values[0, 0] = np.random.default_rng(0).normal(size=values.shape[2:])


def background_zeroed(values: np.ndarray) -> None:
    """As where normalisation left the background out."""
    values[0][:, values[0, 0] == values[0, 0].min()] = 0


def constant_in_the_brain(channel: int) -> Callable[[np.ndarray], None]:
    def edit(values: np.ndarray) -> None:
        values[0, channel] = np.where(values[0, 0] > values[0, 0].min(), 1.2345678, -2.3456789)

    return edit


def upside_down(values: np.ndarray) -> None:
    labeled = values > 0
    values[...] = ~labeled


# more of them, and each for every purpose: tests/bad_subjects.py
DAMAGES = {
    "no HDF5": no_hdf5,
    "damaged chunk": damaged_chunk,
    "no data": missing("data"),
    "group": group,
    "text": text,
    "references": references,
    "soft link": soft_link,
    "virtual": virtual,
    "external storage": external_storage,
    "rank of data": shape_of("data", (2, 4, 4, 4)),
    "two subjects": shape_of("data", (2, 2, 4, 4, 4)),
    "rank of label": shape_of("label", (4, 4, 4)),
    "no voxels": shape_of("data", (1, 2, 0, 4, 4)),
    "boundless": boundless,
    "nothing": nothing,
    "shape of label": other_label_shape,
    "not a number": change("data", put((0, 1, 3, 4, 5), np.nan), "has NaN or infinite values"),
    "too far apart": change("data", too_far_apart, "has NaN or infinite values"),
    "label value": change("label", put((0, 0, 3, 4, 5), 7), "label value 7 isn't known"),
    "broken label": change("label", put((0, 0, 3, 4, 5), 0.5), "label value 0.5 isn't known"),
    "label not a number": change("label", put((0, 0, 3, 4, 5), np.nan), "label value nan isn't known"),
    "no background": change("data", no_background, "T1 isn't lowest, and the same, in all corners"),
    "background zeroed": change("data", background_zeroed, "T1 isn't lowest, and the same, in all corners"),
    "label elsewhere": change("label", upside_down, "100% of the label lies outside the brain of the scan"),
    "constant T1": change("data", put((0, 0), 1.5), "100% of the label lies outside the brain of the scan"),
    "mask as T1": change("data", constant_in_the_brain(0), "the T1 of this subject is constant inside the brain"),
    "mask as T2": change("data", constant_in_the_brain(1), "the T2 of this subject is constant inside the brain"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_file(own_file, damage):
    message = damage(own_file)
    told = refusal(pipeline("train#deterministic_transforms"), subject_in(own_file.parent))
    assert re.match(f"{own_file}: .*{message}", told), told
    assert "\n" not in told


def test_volume_without_a_brain(own_file):
    replace(own_file, "label", np.zeros((1, 1, 4, 4, 4), np.uint8))
    replace(own_file, "data", np.zeros((1, 2, 4, 4, 4), np.float32))
    with pytest.raises(InputError, match="T1 is nowhere above 0"):
        read_subject(subject_in(own_file.parent))
