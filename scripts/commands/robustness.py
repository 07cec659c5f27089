"""`python -m scripts robustness`: Dice on synthetic subjects, and how far it falls where contrast and scans differ."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.metrics import compute_dice
from monai.networks import one_hot
from monai.transforms import Rotate, Spacing
from tqdm import tqdm

from scripts.errors import require_whole_numbers
from scripts.files import whole_files
from scripts.results.tables import markdown_table, write_csv
from scripts.segment import Segmenter
from scripts.synthesis.contrast import APPEARANCES, T1_CONTRAST, T2_CONTRAST, Appearance, six_month_subject
from scripts.synthesis.label_maps import LabelMap, find_label_maps, read_label_map
from scripts.synthesis.phantom_brains import label_map
from scripts.tissues import TISSUES, Tissue


@dataclass(frozen=True)
class Condition:
    """What a synthetic scan is like.

    Attributes:
        contrast: a key of `scripts.synthesis.contrast.APPEARANCES`.
        noise, bias: factors of the noise and of the bias field.
        gain: factor of all intensities.
        voxel: side of the voxels in mm, to which the scan is interpolated; 0 leaves the grid as it is.
        rotation: degrees about the axes to the right, the front and the top; the scan is interpolated.
    """

    contrast: str = "nominal"
    noise: float = 1.0
    bias: float = 1.0
    gain: float = 1.0
    voxel: float = 0.0
    rotation: tuple[float, float, float] = (0.0, 0.0, 0.0)


CONDITIONS = {
    "nominal": Condition(),
    "varied contrast": Condition(contrast="varied"),
    "patchwork contrast, kept out of training": Condition(contrast="patchwork"),
    "noise x 2": Condition(noise=2),
    "bias field x 2": Condition(bias=2),
    "gain x 0.5": Condition(gain=0.5),
    "gain x 2": Condition(gain=2),
    "voxels of 0.8 mm": Condition(voxel=0.8),
    "voxels of 1.5 mm": Condition(voxel=1.5),
    "nodding by 15 degrees": Condition(rotation=(15, 0, 0)),
    "tilted by 15 degrees": Condition(rotation=(0, 15, 0)),
    "turned by 15 degrees": Condition(rotation=(0, 0, 15)),
}


def scan(brain: LabelMap, condition: Condition, rng: np.random.Generator) -> dict[str, nib.Nifti1Image]:
    """T1, T2 and label of a brain, by these names, under a condition."""
    look = APPEARANCES[condition.contrast](brain.label, rng)
    t1, t2 = (
        replace(contrast, noise=condition.noise, bias=contrast.bias * condition.bias) for contrast in (look.t1, look.t2)
    )
    volumes = six_month_subject(brain.label, replace(look, t1=t1, t2=t2), rng) | {"label": brain.label}
    result = {}
    for kind, values in volumes.items():
        mode = "nearest" if kind == "label" else "bilinear"
        moved = MetaTensor(torch.from_numpy(values.astype(np.float32))[None], affine=torch.from_numpy(brain.affine))
        if any(condition.rotation):
            moved = Rotate(np.deg2rad(condition.rotation), keep_size=False, mode=mode, padding_mode="zeros")(moved)
        if condition.voxel:
            moved = Spacing([condition.voxel] * 3, mode=mode, padding_mode="zeros")(moved)
        result[kind] = moved
    inside = result["label"] > 0
    for kind in ("T1", "T2"):
        result[kind] = (result[kind] * condition.gain).clamp(min=1) * inside
    return {kind: nib.Nifti1Image(values[0].numpy(), values.affine.numpy()) for kind, values in result.items()}


def phantom_scan(rng: np.random.Generator) -> dict[str, nib.Nifti1Image]:
    """T1, T2 and label of a procedural brain, by these names, as the phantom command makes it."""
    label = label_map(rng)
    look = Appearance(T1_CONTRAST, T2_CONTRAST, np.ones(label.shape, dtype=np.float32), fit=True)
    volumes = six_month_subject(label, look, rng) | {"label": label}
    return {kind: nib.Nifti1Image(values, np.diag([-1.0, 1, 1, 1])) for kind, values in volumes.items()}


def dice(prediction: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Dice of CSF, GM, WM and their mean, each from 0 to 1, of labels 0 to 3, (X, Y, Z)."""
    pair = [one_hot(torch.from_numpy(x)[None, None].long(), num_classes=1 + len(Tissue)) for x in (prediction, label)]
    values = compute_dice(*pair, include_background=False)[0].tolist()
    return dict(zip((*TISSUES, "mean"), (*values, float(np.mean(values))), strict=True))


def robustness(
    labels_dir: str,
    output_dir: str = "eval/robustness",
    names: str | list[str] | None = None,
    seed: int = 0,
    **settings: Any,
) -> None:
    """Segment synthetic scans of label maps that weren't trained on, under each of `CONDITIONS`, and a phantom.

    Prints the mean Dice of each condition in percent and writes it as `robustness.md`, and each brain's own Dice as
    `robustness.csv`. A brain has the same shape and, where only the scan differs, the same contrast everywhere.

    Args:
        labels_dir: label maps, as `synthesize` takes them.
        output_dir: the folder to write to.
        names: of the label maps to take, without suffix; all of them if not given.
        seed: for other images.
        settings: those of `scripts.segment.Segmenter`: `checkpoints`, `flips` and so on.

    Raises:
        InputError: as `find_label_maps`, `read_label_map` and `Segmenter`.
    """
    require_whole_numbers(0, seed=seed)
    segmenter = Segmenter(**settings)
    brains = [read_label_map(path) for path in find_label_maps(labels_dir, names)]
    trials = [(title, brain.name) for title in CONDITIONS for brain in brains] + [("procedural phantom", "phantom")]
    by_name = {brain.name: brain for brain in brains}
    rows: list[dict[str, Any]] = []
    for title, name in tqdm(trials, desc="synthetic scans"):
        rng = np.random.default_rng([seed, *name.encode()])
        images = scan(by_name[name], CONDITIONS[title], rng) if title in CONDITIONS else phantom_scan(rng)
        found = segmenter(images["T1"], images["T2"]).label
        rows.append({"condition": title, "brain": name} | dice(found, np.asarray(images["label"].dataobj)))
    write_csv(Path(output_dir) / "robustness.csv", rows)
    table = markdown_table(_means(rows))
    with whole_files(output_dir) as temporary:
        (temporary / "robustness.md").write_text(table + "\n")
    print(f"Dice in percent, mean over {', '.join(by_name)}:\n{table}\nin {output_dir}: robustness.md, robustness.csv")


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each condition: mean Dice in percent over the brains, and the worst brain's mean."""
    result = []
    for title in dict.fromkeys(row["condition"] for row in rows):
        own = [row for row in rows if row["condition"] == title]
        means = {name: f"{100 * np.mean([row[name] for row in own]):.1f}" for name in (*TISSUES, "mean")}
        columns = dict(zip(("CSF", "GM", "WM", "mean"), means.values(), strict=True))
        result.append({"condition": title} | columns | {"worst": f"{100 * min(row['mean'] for row in own):.1f}"})
    return result
