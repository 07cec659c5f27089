"""Dice on real scans with labels, as they are, cut to the labelled part, at 1 mm, and with noise."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Spacing
from tqdm import tqdm

from scripts.commands.shared import TITLES
from scripts.data.volumes import read_volume, require_same_grid
from scripts.errors import InputError
from scripts.results.metrics import tissue_scores
from scripts.segment import Segmenter
from scripts.tissues import TISSUES, Tissue, tissue_labels

SCAN_NAME = re.compile(r"(?i)(?P<scan>.+?)[-_](desc-[a-z0-9]+_)?(?P<kind>t1|t2|label|seg|dseg)w?\.(nii|nii\.gz|hdr)")


@dataclass(frozen=True)
class Treatment:
    """What is done to a real scan before it is segmented.

    Attributes:
        cut: whether T1 and T2 are set to 0 outside the label, as in iSeg's scans.
        voxel: side in mm of the voxels to which the scan is resampled; 0 keeps the grid.
        noise: standard deviation of added noise, in those of the grey matter.
    """

    cut: bool = False
    voxel: float = 0.0
    noise: float = 0.0


TREATMENTS = {
    "whole": Treatment(),
    "cut to the label": Treatment(cut=True),
    "cut, 1 mm": Treatment(cut=True, voxel=1.0),
    "cut, noise": Treatment(cut=True, noise=0.7),
}


def find_real_scans(folder: str) -> dict[str, dict[str, Path]]:
    """Return the files of each scan with label by kind, `t1`, `t2` and `label`.

    Args:
        folder: has `<scan>-T1`, `<scan>-T2` and `<scan>-label` or `-Seg`, or `_T1w`, `_T2w` and `_dseg` as in BIDS, at
            any depth.

    Raises:
        InputError: the folder has no scan with all three, or two files of a kind.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(Path(folder).rglob("*")):
        if name := SCAN_NAME.fullmatch(path.name):
            kind = name["kind"].lower()
            kind = kind if kind in ("t1", "t2") else "label"
            files = found.setdefault(name["scan"], {})
            if kind in files:
                raise InputError(f"{path}: {files[kind]} is the {kind} of the same scan; keep one of them")
            files[kind] = path
    complete = {scan: files for scan, files in found.items() if len(files) == 3}
    if not complete:
        raise InputError(f"{folder}: has no scan with label; give a folder with <scan>-T1, <scan>-T2 and <scan>-label")
    return complete


def _treated(files: dict[str, Path], treatment: Treatment, rng: np.random.Generator) -> dict[str, MetaTensor]:
    """T1, T2 and label, (1, X, Y, Z)."""
    label, affine = read_volume(str(files["label"]))
    label = tissue_labels(label, str(files["label"]))
    if missing := [tissue.name for tissue in Tissue if not (label == tissue).any()]:
        raise InputError(f"{files['label']}: has no {', '.join(missing)}; give a label with CSF, GM and WM")
    values = {"label": label}
    for kind in ("t1", "t2"):
        image, image_affine = read_volume(str(files[kind]))
        require_same_grid(str(files["label"]), label, affine, str(files[kind]), image, image_affine)
        noise = treatment.noise * image[label == Tissue.GM].std() * rng.standard_normal(image.shape, dtype=np.float32)
        values[kind] = np.where(image > 0, np.maximum(image + noise, image[image > 0].min()), 0)
        if treatment.cut:
            values[kind] *= label > 0
    result = {}
    for kind, volume in values.items():
        image = MetaTensor(torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None], affine=affine)
        if treatment.voxel:
            mode = "nearest" if kind == "label" else "bilinear"
            image = Spacing([treatment.voxel] * 3, mode=mode, padding_mode="zeros")(image)
        result[kind] = image
    if treatment.cut:
        for kind in ("t1", "t2"):
            result[kind] = result[kind] * (result["label"] > 0)
    return result


def score_real_scans(folder: str, segmenter: Segmenter, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row of scores for each scan under each of `TREATMENTS`.

    Scores are those of `tissue_scores` inside the label, and the share of each tissue in the segmentation in percent.

    Args:
        folder: see `find_real_scans`.
        segmenter: what segments them.
        seed: selects the noise.

    Raises:
        InputError: as `find_real_scans`, `read_volume`, `tissue_labels` and `require_same_grid`, or a tissue is
            missing.
    """
    trials = [(scan, files, name) for scan, files in find_real_scans(folder).items() for name in TREATMENTS]
    for scan, files, name in tqdm(trials, desc="real scans"):
        images = _treated(files, TREATMENTS[name], np.random.default_rng([seed, *scan.encode()]))
        t1, t2 = (nib.Nifti1Image(images[kind][0].numpy(), images[kind].affine.numpy()) for kind in ("t1", "t2"))
        prediction = torch.from_numpy(segmenter(t1, t2).label)[None]
        label = images["label"].as_tensor().to(torch.uint8)
        prediction = prediction * (label > 0)
        shares = torch.bincount(prediction[prediction > 0].long(), minlength=len(Tissue) + 1)[1:] / (label > 0).sum()
        row = {"scan": scan, "treatment": name}
        row |= tissue_scores(prediction, label, tuple(images["label"].pixdim.tolist()))
        yield row | {f"share_{tissue}": 100 * share for tissue, share in zip(TISSUES, shares.tolist(), strict=True)}


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as a table for readers: Dice and shares in percent, HD95 in mm."""
    return [
        {"scan": row["scan"], "treatment": row["treatment"]}
        | {title: f"{100 * row[f'dice_{name}']:.1f}" for title, name in zip(TITLES, (*TISSUES, "mean"), strict=True)}
        | {"HD95": f"{row['hd95_mean']:.1f}"}
        | {"CSF/GM/WM": "/".join(f"{row[f'share_{tissue}']:.0f}" for tissue in TISSUES)}
        for row in rows
    ]
