"""Small data sets in iSeg's layout, the bundle's pages, and what several tests compare."""

import io
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.distributed.run
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from PIL import Image
from scipy.ndimage import zoom
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from scripts.results.label_images import write_analyze
from scripts.synthesis.contrast import T1_CONTRAST, T2_CONTRAST, six_month_image
from scripts.synthesis.phantom_brains import label_map
from scripts.tissues import ISEG_VALUES

ROOT = Path(__file__).parents[1]


def configured(dataset: Path, output: Path, *configs: str, **settings: Any) -> ConfigWorkflow:
    """A command in this process, ready to run."""
    workflow = ConfigWorkflow(
        [str(ROOT / "configs" / name) for name in configs],
        workflow_type="train" if "train.json" in configs else "inference",
        bundle_root=str(ROOT),
        dataset_dir=str(dataset),
        output_dir=str(output),
        **settings,
    )
    workflow.initialize()
    return workflow


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


def small_brain(number: int) -> dict[str, np.ndarray]:
    """Label (0 to 3), T1 and T2 of a phantom shrunk to 0.4: 60 x 72 x 64 voxels."""
    rng = np.random.default_rng([7, number])
    # the middle of the volume, where the brain lies
    label = zoom(label_map(rng)[:, 8:-8, 60:-60], 0.4, order=0)
    label = np.pad(label, [(0, max(0, size - n)) for size, n in zip((60, 72, 64), label.shape, strict=True)])
    return {
        "label": label,
        "T1": six_month_image(label, T1_CONTRAST, rng),
        "T2": six_month_image(label, T2_CONTRAST, rng),
    }


def save_subject(
    directory: Path, subject: str, brain: dict[str, np.ndarray], labeled: bool = True, suffix: str = ".hdr"
) -> None:
    """Write a subject as iSeg names it."""
    for kind in ("T1", "T2"):
        save_volume(directory / f"subject-{subject}-{kind}{suffix}", brain[kind])
    if labeled:
        label = np.array(ISEG_VALUES, dtype=np.uint8)[brain["label"]]
        save_volume(directory / f"subject-{subject}-label{suffix}", label)


def touch(directory: Path, *names: str) -> Path:
    """Make empty files."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return directory


SETTINGS = {"epochs": 3, "val_interval": 1, "crops_per_epoch": 2}
SETTINGS["batch_size"] = 1
SETTINGS["synthetic_share"] = 0.5  # some patches are drawn, some are cut from the scan


def train_in_process(dataset, output, **settings):
    """Train in this process; returns the loss of each step."""
    workflow = ConfigWorkflow(
        str(ROOT / "configs" / "train.json"),
        workflow_type="train",
        bundle_root=str(ROOT),
        dataset_dir=str(dataset),
        output_dir=str(output),
        ckpt_dir=str(output),
        **(SETTINGS | settings),
    )
    workflow.initialize()
    losses = {}
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


def surface(mask: np.ndarray) -> np.ndarray:
    """Positions of the voxels of which a face touches the outside."""
    padded = np.pad(mask, 1)
    inside = np.logical_and.reduce([np.roll(padded, s, axis) for axis in range(3) for s in (-1, 1)])
    return np.argwhere(padded & ~inside) - 1
