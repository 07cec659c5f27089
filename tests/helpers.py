"""Small data sets in iSeg's layout, the bundle's pages, and what several tests compare."""

import hashlib
import inspect
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.distributed.run
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from PIL import Image
from scipy.ndimage import affine_transform, binary_dilation, distance_transform_edt, zoom
from scipy.spatial.transform import Rotation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from scripts.data.transforms import CheckSubjectd, LoadSubjectd
from scripts.errors import input_error_in
from scripts.preparation.transforms import FindBraind, RegisterScansd
from scripts.results.label_images import write_analyze
from scripts.results.tables import read_csv
from scripts.synthesis.contrast import T1_CONTRAST, T2_CONTRAST, six_month_image
from scripts.synthesis.phantom_brains import label_map
from scripts.tissues import ISEG_VALUES, TISSUES

ROOT = Path(__file__).parents[1]


def configured(dataset: Path, output: Path, *configs: str, **settings: Any) -> ConfigWorkflow:
    """A command in this process, ready to run; without configs that of inference."""
    names = configs or ("inference.json",)
    folders = {"bundle_root": str(ROOT), "dataset_dir": str(dataset), "output_dir": str(output)}
    if "train.json" in names and "evaluate.json" not in names:
        folders["ckpt_dir"] = str(output)
    workflow = ConfigWorkflow(
        [str(ROOT / "configs" / name) for name in names],
        workflow_type="train" if "train.json" in names else "inference",
        **folders | settings,
    )
    workflow.initialize()
    return workflow


def refusal(call: Callable[..., object], *arguments: Any, **named: Any) -> str:
    """The message of the InputError by which a call ends, however MONAI wraps it; what else goes wrong is raised."""
    try:
        call(*arguments, **named)
    except Exception as error:
        if input_error := input_error_in(error):
            return str(input_error)
        raise
    return pytest.fail("it was accepted")


def read_subject(subject: dict[str, Any], prepare: str | list[str] = "auto") -> dict[str, Any]:
    """A subject after the first steps of the configs, up to its own grid."""
    for transform in (LoadSubjectd(), FindBraind(prepare), RegisterScansd(prepare), CheckSubjectd()):
        subject = transform(subject)
    return subject


def refused_run(dataset: Path, output: Path, *configs: str, **settings: Any) -> str:
    """The message by which a command in this process is refused."""
    return refusal(lambda: configured(dataset, output, *configs, **settings).run())


def voxels(path: Path) -> np.ndarray:
    """The values of an image, without axes of length 1."""
    return np.squeeze(np.asarray(nib.load(path).dataobj))


def copy_bundle(directory: Path) -> Path:
    for name in ("configs", "docs", "models", "requirements", "scripts", "tools"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, directory)
    return directory


def save_volume(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write int16 or uint8 values in the format that the suffix names; Analyze as iSeg has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".hdr":
        write_analyze(path, values)
    else:
        nib.save(nib.Nifti1Image(values, np.diag([-1.0, 1, 1, 1]) if affine is None else affine), path)


@cache
def small_brain(number: int) -> dict[str, np.ndarray]:
    """Label (0 to 3), T1 and T2 of a phantom shrunk to 0.4: 60 x 72 x 64 voxels; kept for later runs of the tests."""
    makers = [path.read_text() for path in sorted((ROOT / "scripts" / "synthesis").glob("*.py"))]
    version = hashlib.sha256("".join([*makers, inspect.getsource(shrunken_phantom)]).encode()).hexdigest()[:16]
    path = ROOT / ".pytest_cache" / "brains" / f"{number}-{version}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(unfinished := path.with_name(f"{os.getpid()}-{path.name}"), **shrunken_phantom(number))
        unfinished.rename(path)
    with np.load(path) as brain:
        return dict(brain)


def shrunken_phantom(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([7, number])
    # the middle of the volume, where the brain lies
    label = zoom(label_map(rng)[:, 8:-8, 60:-60], 0.4, order=0)
    label = np.pad(label, [(0, max(0, size - n)) for size, n in zip((60, 72, 64), label.shape, strict=True)])
    return {
        "label": label,
        "T1": six_month_image(label, T1_CONTRAST, rng),
        "T2": six_month_image(label, T2_CONTRAST, rng),
    }


def head_of(label: np.ndarray) -> np.ndarray:
    """FreeSurfer's numbers from tissues 0 to 3: ventricles within, a brain stem below, a skull around."""
    head = np.array([0, 24, 3, 2], dtype=np.int16)[label]
    x, y, z = np.indices(label.shape)
    middle = [np.mean(axis[label > 0]) for axis in (x, y, z)]
    radius = np.sqrt(sum((axis - centre) ** 2 for axis, centre in zip((x, y, z), middle, strict=True)))
    head[(label > 0) & (radius < 5)] = 4
    head[(label == 3) & (z < middle[2] - 8)] = 16
    head[(label == 2) & (z < middle[2] - 16)] = 8
    head[binary_dilation(label > 0, iterations=3) & (label == 0)] = 515
    return head


def save_subject(
    directory: Path, subject: str, brain: dict[str, np.ndarray], labeled: bool = True, suffix: str = ".hdr"
) -> None:
    """Write a subject as iSeg names it."""
    for kind in ("T1", "T2"):
        save_volume(directory / f"subject-{subject}-{kind}{suffix}", brain[kind])
    if labeled:
        label = np.array(ISEG_VALUES, dtype=np.uint8)[brain["label"]]
        save_volume(directory / f"subject-{subject}-label{suffix}", label)


def displaced(
    values: np.ndarray,
    affine: np.ndarray,
    angles: tuple[float, float, float],
    shift: tuple[float, float, float],
    sizes: tuple[float, float, float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A volume as a scan of the head turned by degrees and moved by mm shows it, on a grid of its own.

    Returned are its values, its affine, and the matrix from the old place to the new, in RAS mm.
    """
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    middle = nib.affines.apply_affine(affine, (np.array(values.shape) - 1) / 2)
    matrix[:3, 3] = middle + shift - matrix[:3, :3] @ middle
    corners = nib.affines.apply_affine(
        matrix @ affine, list(itertools.product(*((0, side - 1) for side in values.shape)))
    )
    own = np.diag([*sizes, 1.0])
    own[:3, 3] = corners.min(0)
    shape = np.ceil(np.ptp(corners, axis=0) / sizes).astype(int) + 1
    to_old = np.linalg.inv(matrix @ affine) @ own
    # the edge of the brain isn't mixed with the 0 around it
    nearest = distance_transform_edt(values == 0, return_distances=False, return_indices=True)
    moved, shown = (
        affine_transform(each, to_old[:3, :3], to_old[:3, 3], output_shape=tuple(shape), order=order)
        for each, order in ((values[tuple(nearest)].astype(np.float32), 3), ((values != 0).astype(np.float32), 1))
    )
    return np.where(shown >= 0.5, moved, 0), own, matrix


def touch(directory: Path, *names: str) -> Path:
    """Make empty files."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return directory


# some patches are drawn, some are cut from the scan
SETTINGS = {"epochs": 3, "val_interval": 1, "crops_per_epoch": 2, "batch_size": 1, "synthetic_share": 0.5}
SETTINGS["picture_interval"] = 0


def train_in_process(dataset, output, **settings):
    """Train in this process; returns the loss of each step."""
    workflow, losses = configured(dataset, output, "train.json", **SETTINGS | settings), {}
    trainer = workflow.trainer
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: losses.update({trainer.state.iteration: trainer.state.output[0]["loss"]})
    )
    workflow.run()
    return {step: float(loss) for step, loss in losses.items()}


def same(first, second) -> bool:
    """Whether two checkpoints hold the same, to the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page: str, language: str) -> list[str]:
    """The page's blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def shell_lines(page: str) -> list[str]:
    """The lines of the page's shell blocks."""
    return [line for block in blocks(page, "bash") for line in block.splitlines()]


ALL = [(page, line) for page in PAGES for line in shell_lines(page)]
SETUP = sorted({line for _, line in ALL if not line.startswith(("python -m ", "torchrun ", "make "))})


def is_picture(image: np.ndarray) -> bool:
    """Whether it shows grey, green and yellow, as a segmented brain does, beside black."""
    colors = np.unique(image.reshape(-1, image.shape[-1]) // 64, axis=0)
    return min(image.shape[:2]) > 300 and len(colors) > 10


def tensorboard_log(folder: Path) -> EventAccumulator:
    (file,) = folder.glob("events.out.tfevents*")  # TensorBoard shows only the newest of several as they grow
    return EventAccumulator(str(file)).Reload()


LAS = torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64))


def volume_in_memory(values: np.ndarray, affine: torch.Tensor = LAS, name: str = "scan.nii.gz") -> MetaTensor:
    return MetaTensor(torch.from_numpy(values[None].copy()), affine=affine, meta={"filename_or_obj": f"data/{name}"})


def segmented_subject(
    brain: dict[str, np.ndarray], subject_id: str = "9", labeled: bool = False, uncertain: bool = False
) -> Any:
    """A subject as an evaluator has it, whose segmentation is wrong in a slab on the subject's right."""
    prediction = brain["label"].copy()
    wrong = prediction[:25, 30:34, :]
    wrong[wrong > 0] = wrong[wrong > 0] % 3 + 1
    item = {"subject": subject_id, "pred": volume_in_memory(prediction)}
    for key, kind in (("t1", "T1"), ("t2", "T2")):
        item[key] = volume_in_memory(brain[kind].astype(np.float32), name=f"subject-{subject_id}-{kind}.hdr")
    if labeled:
        item["label"] = volume_in_memory(brain["label"], name=f"subject-{subject_id}-label.hdr")
    if uncertain:
        item["uncertainty"] = volume_in_memory(np.where(prediction > 0, 0.5, 0).astype(np.float32))
    return item


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def write_log(folder: Path, epochs: range, loss: int, validated_first: bool = False) -> None:
    """A log whose name says that it was begun at second `loss`."""
    with SummaryWriter(str(folder / "writing")) as writer:
        if validated_first:
            writer.add_scalar("val_mean_dice", 0.25, 1)
        for epoch in epochs:
            writer.add_scalar("train_loss", loss, epoch)
            writer.add_scalar("train_step_loss", 9, epoch)
        if epochs:
            writer.add_scalar("val_mean_dice", 0.5, epochs[-1])
    (log,) = (folder / "writing").iterdir()
    log.rename(folder / f"events.out.tfevents.{loss}.host")


PAPER = {"block_config": (4, 4, 4, 4), "grouped_upsampling": True, "bias": True}


SCORES = [f"{score}_{name}" for score in ("dice", "hd95", "hd_max", "asd") for name in (*TISSUES, "mean")]


def assert_gathered(output: Path, printed: str) -> None:
    """The tables are what NumPy makes of the folds' own files."""
    folds = json.loads((output / "folds.json").read_text())["folds"]
    of_folds = {row["subject"]: row for fold in folds for row in read_csv(output / f"fold-{fold}" / "metrics.csv")}
    rows = read_csv(output / "metrics.csv")
    assert list(rows[0]) == ["subject", "fold", *SCORES]
    for row in rows:
        assert row["subject"] in folds[row.pop("fold")]
        assert row == of_folds[row["subject"]]
    assert [row["subject"] for row in rows] == sorted(of_folds, key=int)
    table = (output / "metrics.md").read_text()
    assert table in printed
    for row in rows:
        percent = [f"{100 * float(row[f'dice_{name}']):.2f}" for name in (*TISSUES, "mean")]
        assert f"| {' | '.join([row['subject'], *percent])} |" in table.splitlines()
    for score, scale, title in (("dice", 100, "mean ± std"), ("hd95", 1, "HD95"), ("asd", 1, "ASD")):
        values = [[scale * float(row[f"{score}_{name}"]) for row in rows] for name in (*TISSUES, "mean")]
        with np.errstate(invalid="ignore"):
            cells = [f"{np.mean(v):.2f} ± {np.std(v, ddof=1):.2f}" for v in values]
        assert f"| {' | '.join([title, *cells])} |" in table.splitlines()


def bids_folder(stem: str) -> str:
    """The folder of a session's scans."""
    return "/".join([*(part for part in stem.split("_") if part.startswith(("sub-", "ses-"))), "anat"])


def save_bids(dataset: Path, stem: str, brain: dict[str, np.ndarray], **more: Any) -> None:
    """Write T1w and T2w, and a dataset description if there is none."""
    path = dataset / bids_folder(stem)
    path.mkdir(parents=True, exist_ok=True)
    for kind in ("T1", "T2"):
        image = nib.Nifti1Image(brain[kind], np.diag([-1.0, 1, 1, 1]))
        image.header.set_xyzt_units("mm")
        nib.save(image, path / f"{stem}_{kind}w.nii.gz")
    description = {"Name": "Small brains", "BIDSVersion": "1.11.1", **more}
    (dataset / "dataset_description.json").write_text(json.dumps(description))


def bids_errors(dataset: Path) -> set[tuple[str, str]]:
    """Kind and place of what the validator finds wrong."""
    command = [str(Path(sys.executable).with_name("bids-validator-deno")), str(dataset), "--format", "json"]
    result = subprocess.run(command, capture_output=True, text=True)
    issues = json.loads(result.stdout)["issues"]["issues"]
    return {(issue["code"], issue["location"]) for issue in issues if issue["severity"] == "error"}


class SpyNetwork:
    """A network that remembers what it was given and under which precision."""

    def __init__(self):
        self.shapes, self.dtypes = [], []

    def __call__(self, patch):
        self.shapes.append(tuple(patch.shape[2:]))
        self.dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        assert patch.is_contiguous(memory_format=torch.channels_last_3d)
        return patch.to(self.dtypes[-1])
