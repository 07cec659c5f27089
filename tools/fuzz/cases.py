"""The cases of `tools.fuzz`: each damages good files or settings at random, and uses them as a command would."""

import gzip
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import h5py
import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.networks import one_hot
from monai.transforms import Compose

from scripts.commands.import_weights import import_weights
from scripts.data.subjects import SubjectFolder
from scripts.network import SkipDenseSeg
from scripts.results.label_images import write_label
from scripts.settings import given_options, refuse_unknown_overrides
from scripts.weights import load_weights
from scripts.workflow import require_settings
from tests.bad_subjects import T1, big_endian, hdf5, save

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "configs" / "train.json"
EXTREMES = {
    "i": (0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 64, 256, 348, 512, 540, 1024, 1536, 2304, 5120, -(2**31), 2**31 - 1, 2**62),
    "f": (0, -0.0, 1, -1, 0.1, 10, 352, 1e-45, 1e-30, 1e30, 3.4e38, -3.4e38, np.nan, np.inf, -np.inf),
}
Rng = np.random.Generator


def pick(rng: Rng, items: Sequence) -> object:
    return items[rng.integers(len(items))]


def place(rng: Rng, length: int) -> int:
    """A position; that near the beginning or the end, where headers are, is as likely as one anywhere."""
    near = int(length ** rng.random()) - 1
    return max(0, min(length - 1, pick(rng, (int(rng.integers(length)), near, length - 1 - near))))


def damage(rng: Rng, content: bytes, other: bytes = b"", header: np.dtype | None = None) -> bytes:
    """Change one to four things in the content of a file.

    Args:
        content: to be changed.
        other: of another file, which may be continued with.
        header: its layout, if fields of it are to be set to extremes.
    """
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        start, second, size = place(rng, len(data)), place(rng, len(data)), int(2 ** (8 * rng.random()))
        ways = ["flip", "set", "cut", "extend", "swap", "repeat", "splice"] + ["field"] * (0 if header is None else 7)
        match pick(rng, ways):
            case "flip":
                data[start] ^= 1 << int(rng.integers(8))
            case "set":
                data[start : start + size] = bytes([pick(rng, (0, 1, 127, 128, 255))]) * len(data[start : start + size])
            case "cut":
                del data[start:]
            case "extend":
                data += pick(rng, (rng.bytes(size), bytes(size)))
            case "swap":
                first, then = data[start : start + size], data[second : second + size]
                data[start : start + size], data[second : second + size] = then, first
            case "repeat":
                data[start:start] = data[second : second + size]
            case "splice":
                data[start:] = other[place(rng, len(other)) if other else 0 :]
            case "field":
                dtype, offset = header.fields[pick(rng, header.names)][:2]
                base, shape = dtype.subdtype or (dtype, ())
                offset += base.itemsize * int(rng.integers(np.prod(shape, dtype=int)))
                extremes = np.array(pick(rng, EXTREMES.get(base.kind, (0, 1, 255))))
                value = extremes.astype(base).tobytes() if base.kind in "if" else rng.bytes(base.itemsize)
                data[offset : offset + len(value)] = value
    return bytes(data)


ANALYZE, NIFTI, NIFTI2 = (kind.template_dtype for kind in (nib.Spm2AnalyzeHeader, nib.Nifti1Header, nib.Nifti2Header))
GOOD = {
    "hdr": [
        (partial(save, suffix=".hdr"), ANALYZE),
        (partial(save, suffix=".hdr", kind=nib.Spm2AnalyzeImage), ANALYZE),  # with a .mat
        (partial(save, suffix=".hdr", kind=nib.Nifti1Pair), NIFTI),
        (partial(big_endian, suffix=".hdr"), ANALYZE.newbyteorder(">")),
    ],
    "nii": [
        (partial(save, suffix=".nii"), NIFTI),
        (save, NIFTI),
        (partial(save, suffix=".nii", t1=T1 / 7, t2=T1 * 1.0), NIFTI),
        (partial(big_endian, suffix=".nii"), NIFTI.newbyteorder(">")),
        (partial(save, suffix=".nii", kind=nib.Nifti2Image), NIFTI2),
    ],
    "h5": [
        (hdf5(), None),
        (hdf5(lambda file: restore(file, compression="gzip", shuffle=True)), None),
        (hdf5(lambda file: restore(file, chunks=(1, 1, 8, 8, 8), fletcher32=True)), None),
        (hdf5(lambda file: restore(file, dtype=np.float64)), None),
    ],
}


def restore(file: h5py.File, **how: object) -> None:
    """Store the datasets of an HDF5 file in another way."""
    for name in ("data", "label"):
        values = file[name][()]
        del file[name]
        file.create_dataset(name, data=values, **how)


@cache
def transforms() -> tuple[Compose, Compose]:
    """Those of inference before and after the network."""
    config = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "inference.json"))
    config["bundle_root"] = str(ROOT)
    return config.get_parsed_content("preprocessing"), config.get_parsed_content("postprocessing")


def use_subject(kind: str, rng: Rng, folder: Path) -> None:
    """Load a subject of which one or two files are damaged, and write its label as inference writes what it finds."""
    write, header = pick(rng, GOOD[kind])
    write(folder, "1")
    paths = sorted(folder.iterdir())
    contents = [gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in paths]
    for index in rng.permutation(len(paths))[: rng.integers(1, 3)]:
        path, other = paths[index], pick(rng, contents)
        layout = None if path.suffix in (".img", ".mat") else header
        if path.suffix == ".gz" and rng.random() < 0.3:
            path.write_bytes(damage(rng, path.read_bytes(), other))
        else:
            content = damage(rng, contents[index], other, layout)
            path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)

    before, after = transforms()
    loaded = before(SubjectFolder(str(folder)).require_good()[0])
    assert loaded["image"].isfinite().all(), "the image isn't finite"
    assert set(loaded["label"].unique().tolist()) <= {0, 1, 2, 3}, "the label isn't 0 to 3"
    found = after(loaded | {"pred": MetaTensor(one_hot(loaded["label"].as_tensor()[None], 4)[0])})["pred"][0].numpy()
    assert found.shape == loaded["t1"].shape[1:], "the label isn't on the grid of T1"
    if kind == "h5":
        return
    for suffix in (".nii.gz", ".hdr"):
        write_label(folder / f"found{suffix}", found, loaded["t1"].meta["filename_or_obj"])
        written = nib.load(folder / f"found{suffix}")
        values = np.asarray(written.dataobj).reshape(found.shape)
        assert np.array_equal(values, np.array([0, 10, 150, 250])[found] if suffix == ".hdr" else found), "other values"
        affine = loaded["t1"].affine.numpy()
        assert np.allclose(written.affine, affine, rtol=1e-5, atol=1e-3), f"another affine: {written.affine}, {affine}"


ODD_VALUES: list[Callable[[torch.Tensor], object]] = [
    *(lambda tensor, value=value: value for value in (None, 3, "text", [], {"weight": torch.ones(2)})),
    *(lambda tensor, dtype=dtype: tensor.to(dtype) for dtype in (torch.float64, torch.int8, torch.complex64)),
    lambda tensor: tensor[None],
    lambda tensor: tensor.to("meta"),
    lambda tensor: tensor.to_sparse() if tensor.ndim else tensor,
    lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    lambda tensor: tensor * torch.nan,
    lambda tensor: tensor.double() * 1e300,
]
SMALL = {"init_features": 2, "growth_rate": 2, "block_config": (1, 1)}


@cache
def networks() -> tuple[SkipDenseSeg, SkipDenseSeg]:
    """A small one, of whose file the names are a larger share, and the compact variant, which can be imported."""
    torch.manual_seed(0)
    return SkipDenseSeg(**SMALL), SkipDenseSeg()


def saved(content: object, **how: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def with_other_records(rng: Rng, content: bytes) -> bytes:
    """A zip archive, whole in itself, of whose records one or two are damaged, missing or under another's name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for name in rng.choice(list(records), rng.integers(1, 3), replace=False):
        way = rng.integers(3)
        if way == 0:
            del records[name]
        else:
            records[name] = damage(rng, records[name]) if way == 1 else records[pick(rng, list(records))]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return file.getvalue()


def use_checkpoint(rng: Rng, folder: Path) -> None:
    """Load or import a damaged checkpoint."""
    small, compact = networks()
    network = pick(rng, (small, compact))
    state: dict = dict(network.state_dict())
    way = rng.integers(4)
    if way == 0:
        for name in rng.choice(list(state), rng.integers(1, 3)):
            state[name] = pick(rng, ODD_VALUES)(network.state_dict()[name])
    whole = pick(rng, (state, {"model": state, "epoch": 3}, {"state_dict": state}))
    if way == 0 and rng.random() < 0.2:
        whole = pick(rng, ([], 3, "text", *({name: pick(rng, ODD_VALUES)(torch.ones(2))} for name in ("model", "x"))))
    content = saved(whole, _use_new_zipfile_serialization=way == 3 or rng.random() < 0.7)
    if way in (1, 2):
        content = damage(rng, content, content)
    elif way == 3:
        content = with_other_records(rng, content)
    path = folder / "model.pt"
    path.write_bytes(content)
    if network is compact and rng.random() < 0.7:
        import_weights(str(path), str(folder / "imported.pt"))
        path = folder / "imported.pt"
    loaded = SkipDenseSeg(**(SMALL if network is small else {}))
    load_weights(loaded, str(path))
    assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values()), "weights aren't finite"


ODD_ARRAYS: list[Callable[[np.ndarray], np.ndarray]] = [
    *(lambda array, kind=kind: array.astype(kind) for kind in ("f2", "f8", "i2", "u2", "c8", "U", "O")),
    lambda array: array[None],
    lambda array: array[None][:0],
    lambda array: np.ones(1),
    lambda array: array * np.nan,
]
NAME_PARTS = ["0", "1", "2", "99", "cells_list", "0.cells_list.0", "features", "weight", "bn2d.gamma", "", ".", "²"]


def use_mindspore_checkpoint(rng: Rng, folder: Path) -> None:
    """Import what begins as a MindSpore file does; a stand-in for MindSpore, if there, gives odd entries for it."""
    entries: dict[str, SimpleNamespace | str] = {}
    for name, tensor in networks()[1].state_dict().items():
        array = tensor.numpy()
        if rng.random() < 0.01:
            parts = name.split(".")
            parts[rng.integers(len(parts))] = pick(rng, NAME_PARTS)
            name = ".".join(parts)
        if rng.random() < 0.01:
            array = pick(rng, ODD_ARRAYS)(array)
        if rng.random() > 0.01:
            entry = SimpleNamespace(size=array.size, asnumpy=lambda array=array: array)
            entries[name] = "text" if rng.random() < 0.005 else entry
    there = rng.random() < 0.9
    sys.modules["mindspore"] = SimpleNamespace(load_checkpoint=lambda path: entries) if there else None
    content = b"\n\x20" + rng.bytes(100)
    (folder / "weights.ckpt").write_bytes(damage(rng, content) if rng.random() < 0.2 else content)
    try:
        import_weights(str(folder / "weights.ckpt"), str(folder / "model.pt"))
    finally:
        del sys.modules["mindspore"]
    load_weights(SkipDenseSeg(), str(folder / "model.pt"))


VALUES = [
    *("0", "1", "-1", "3", "64", "2.5", "1e999", "nan", "True", "None", "", " ", "9" * 400, "0x1F", "1_000", "[]"),
    *(
        "[64,64,64]",
        "[32,32]",
        "[32,32,32,32]",
        "(64,)",
        "[64,true,64]",
        "[[64]]",
        "{64}",
        "{'a': 1}",
        "[9,'A07']",
        "{[1]: 2}",
    ),
    *("model.pt", "model.ts", "a" * 300, "../..", "two words", "two\nlines", "赤ちゃん", "-" * 50 + "1", "(" * 300),
]
SETTINGS = ("patch_size", "val_subjects", "start_from", "epochs", "crops_per_epoch", "batch_size", "val_interval")


def as_text(content: bytes) -> str:
    """What a command line can hold of it."""
    return os.fsdecode(content.replace(b"\0", b""))


def use_settings(rng: Rng, folder: Path) -> None:
    """Check damaged overrides, given on the command line or by a damaged --args_file, to a config, damaged or not."""
    train = TRAIN.read_bytes()
    names = [name for name in json.loads(train) if not name.startswith("_")] + list(SETTINGS)
    names += ["train#trainer#max_epochs", "train#handlers#1", "network_def::growth_rate", "loss#_target_", "run_id"]

    def name_and_value() -> tuple[str, str]:
        name, value = (pick(rng, items).encode() for items in (names, VALUES))
        changed = (damage(rng, part) if rng.random() < share else part for part, share in ((name, 0.2), (value, 0.3)))
        return tuple(as_text(part) for part in changed)

    (folder / "train.json").write_bytes(damage(rng, train, train) if rng.random() < 0.3 else train)
    arguments = ["run", "training", "--config_file", str(folder / "train.json")]
    for _ in range(rng.integers(1, 5)):
        name, value = name_and_value()
        arguments += [f"--{name}={value}"] if rng.random() < 0.3 else [f"--{name}", value]
    if rng.random() < 0.4:
        content = json.dumps(dict(name_and_value() for _ in range(3))).encode()
        (folder / "args.json").write_bytes(damage(rng, content, train) if rng.random() < 0.7 else content)
        arguments += ["--args_file", str(folder / "args.json")]
    (folder / "arguments.txt").write_text(repr(arguments))
    given = given_options(arguments)
    settings = {"network_def": networks()[0], "patch_size": 64, "val_subjects": 9, "learning_rate": 0.1}
    settings |= {"start_from": None, **{name: given[name] for name in SETTINGS if name in given}}
    require_settings("train", settings)
    patch = settings["patch_size"]
    assert isinstance(patch, int) or len(patch) == 3, f"patch_size {patch} has not three sides"
    refuse_unknown_overrides(arguments)


CASES: dict[str, Callable[[Rng, Path], None]] = {
    "hdr": partial(use_subject, "hdr"),
    "nii": partial(use_subject, "nii"),
    "h5": partial(use_subject, "h5"),
    "pt": use_checkpoint,
    "ckpt": use_mindspore_checkpoint,
    "json": use_settings,
}
