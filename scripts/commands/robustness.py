"""`python -m scripts robustness`: Dice on synthetic subjects, and how far it drops when contrast or scan differ."""

from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Rotate, Spacing
from tqdm import tqdm

from scripts.commands.real_scans import find_real_scans, score_real_scans, summary
from scripts.commands.shared import mean_cells
from scripts.errors import InputError, require_whole_numbers
from scripts.files import whole_files
from scripts.results.metrics import tissue_dice
from scripts.results.tables import markdown_table, write_csv
from scripts.segment import Segmenter
from scripts.synthesis.contrast import APPEARANCES, T1_CONTRAST, T2_CONTRAST, Appearance, six_month_subject
from scripts.synthesis.label_maps import LabelMap, find_label_maps, read_label_map
from scripts.synthesis.phantom_brains import label_map
from scripts.tissues import TISSUES


@dataclass(frozen=True)
class Condition:
    """Properties of a synthetic scan.

    Attributes:
        contrast: a key of `scripts.synthesis.contrast.APPEARANCES`.
        noise, bias: factors of the noise and of the bias field.
        gain: factor of all intensities.
        voxel: side in mm of the voxels to which the scan is resampled; 0 keeps the grid.
        rotation: degrees about the axes to the right, the front and the top; the scan is resampled.
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


def synthetic_scan(brain: LabelMap, condition: Condition, rng: np.random.Generator) -> dict[str, nib.Nifti1Image]:
    """Return `T1`, `T2` and `label` of a brain under a condition."""
    appearance = APPEARANCES[condition.contrast](brain.label, rng)
    t1, t2 = (
        replace(contrast, noise=condition.noise, bias=contrast.bias * condition.bias)
        for contrast in (appearance.t1, appearance.t2)
    )
    volumes = six_month_subject(brain.label, replace(appearance, t1=t1, t2=t2), rng) | {"label": brain.label}
    result = {}
    for kind, values in volumes.items():
        mode = "nearest" if kind == "label" else "bilinear"
        image = MetaTensor(torch.from_numpy(values.astype(np.float32))[None], affine=torch.from_numpy(brain.affine))
        if any(condition.rotation):
            image = Rotate(np.deg2rad(condition.rotation), keep_size=False, mode=mode, padding_mode="zeros")(image)
        if condition.voxel:
            image = Spacing([condition.voxel] * 3, mode=mode, padding_mode="zeros")(image)
        result[kind] = image
    inside = result["label"] > 0
    for kind in ("T1", "T2"):
        result[kind] = (result[kind] * condition.gain).clamp(min=1) * inside
    return {kind: nib.Nifti1Image(values[0].numpy(), values.affine.numpy()) for kind, values in result.items()}


def phantom_scan(rng: np.random.Generator) -> dict[str, nib.Nifti1Image]:
    """Return `T1`, `T2` and `label` of a procedural brain, as the phantom command makes it."""
    label = label_map(rng)
    appearance = Appearance(T1_CONTRAST, T2_CONTRAST, np.ones(label.shape, dtype=np.float32), fit=True)
    volumes = six_month_subject(label, appearance, rng) | {"label": label}
    return {kind: nib.Nifti1Image(values, np.diag([-1.0, 1, 1, 1])) for kind, values in volumes.items()}


def robustness(
    labels_dir: str | None = None,
    output_dir: str = "eval/robustness",
    names: str | list[str] | None = None,
    seed: int = 0,
    atlas_dir: str | None = None,
    **settings: Any,
) -> None:
    """Segment real scans with labels, a phantom, and synthetic scans of unseen label maps under each of `CONDITIONS`.

    Prints the mean Dice per condition in percent and writes it to `robustness.md`; writes the Dice of each brain to
    `robustness.csv`. A brain has the same shape under all conditions, and the same contrast if only the scan differs.
    Scores of real scans go to `real_scans.md` and `real_scans.csv`.

    Args:
        labels_dir: label maps, see `synthesize`; without it, no synthetic scan is segmented.
        output_dir: the folder to write to.
        names: label maps to use, without suffix; all by default.
        seed: selects the images and the noise added to real scans.
        atlas_dir: real scans with labels, see `scripts.commands.real_scans`.
        settings: settings of `scripts.segment.Segmenter`: `checkpoints`, `flips` and so on.

    Raises:
        InputError: neither folder is given, or as `find_label_maps`, `read_label_map`, `find_real_scans`,
            `score_real_scans` and `Segmenter`.
    """
    require_whole_numbers(0, seed=seed)
    if labels_dir is None and atlas_dir is None:
        raise InputError("robustness: give label maps by --labels_dir, real scans with labels by --atlas_dir, or both")
    scans = {} if atlas_dir is None else find_real_scans(atlas_dir)
    brains = [] if labels_dir is None else [read_label_map(path) for path in find_label_maps(labels_dir, names)]
    segmenter = Segmenter(**settings)
    if scans:
        rows = list(score_real_scans(scans, segmenter, seed))
        _report(output_dir, "real_scans", "inside the label: Dice, shares in percent, HD95 in mm", rows, summary(rows))
    if not brains:
        return
    trials = [(title, brain.name) for title in CONDITIONS for brain in brains] + [("procedural phantom", "phantom")]
    by_name = {brain.name: brain for brain in brains}
    rows = []
    for title, name in tqdm(trials, desc="synthetic scans"):
        rng = np.random.default_rng([seed, *name.encode()])
        images = synthetic_scan(by_name[name], CONDITIONS[title], rng) if title in CONDITIONS else phantom_scan(rng)
        prediction = segmenter(images["T1"], images["T2"]).label
        rows.append({"condition": title, "brain": name} | tissue_dice(prediction, np.asarray(images["label"].dataobj)))
    _report(output_dir, "robustness", f"Dice in percent, mean over {', '.join(by_name)}", rows, _summary(rows))


def _report(
    output_dir: str, name: str, title: str, rows: list[dict[str, Any]], summary_rows: list[dict[str, Any]]
) -> None:
    """Write `<name>.csv` and `<name>.md`, and print the latter."""
    write_csv(Path(output_dir) / f"{name}.csv", rows)
    table = markdown_table(summary_rows)
    with whole_files(output_dir) as temporary:
        (temporary / f"{name}.md").write_text(table + "\n")
    print(f"{title}:\n{table}\nin {output_dir}: {name}.md, {name}.csv")


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per condition: mean Dice in percent over the brains, and the mean Dice of the worst brain."""
    result = []
    for condition, group in groupby(rows, itemgetter("condition")):
        brains = [{name: 100 * row[name] for name in (*TISSUES, "mean")} for row in group]
        cells = mean_cells(brains, (*TISSUES, "mean"), digits=1)
        result.append({"condition": condition} | cells | {"worst": f"{min(row['mean'] for row in brains):.1f}"})
    return result
