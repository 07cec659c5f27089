"""Dice on real scans with labels, as they are, cut to the labelled part, at 1 mm, with noise, and by one contrast."""

import logging
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
from scripts.data.structures import tissues_of_structures
from scripts.data.volumes import CONTRASTS, read_volume, require_same_grid
from scripts.errors import InputError, require_path
from scripts.files import is_hidden
from scripts.results.metrics import tissue_scores
from scripts.segment import Segmenter
from scripts.synthesis.label_maps import require_usable
from scripts.tissues import TISSUES, Tissue

logger = logging.getLogger(__name__)

SCAN_NAME = re.compile(r"(?i)(?P<scan>.+?)[-_](desc-[a-z0-9]+_)?(?P<kind>t1|t2|label|seg|dseg)w?\.(nii|nii\.gz|hdr)")


@dataclass(frozen=True)
class Treatment:
    """What is done to a real scan before it is segmented.

    Attributes:
        cut: whether T1 and T2 are set to 0 outside the label, as in iSeg's scans.
        voxel: side in mm of the voxels to which the scan is resampled; 0 keeps the grid.
        noise: standard deviation of added noise, in those of the grey matter.
        contrasts: the scans that the segmenter gets.
    """

    cut: bool = False
    voxel: float = 0.0
    noise: float = 0.0
    contrasts: tuple[str, ...] = CONTRASTS


TREATMENTS = {
    "whole": Treatment(),
    "cut to the label": Treatment(cut=True),
    "cut, 1 mm": Treatment(cut=True, voxel=1.0),
    "cut, noise": Treatment(cut=True, noise=0.7),
    "cut, T1 alone": Treatment(cut=True, contrasts=("T1",)),
    "cut, T2 alone": Treatment(cut=True, contrasts=("T2",)),
}


def find_real_scans(folder: str) -> dict[str, dict[str, Path]]:
    """Return the files of each scan with label by kind, `t1`, `t2` and `label`; log those that lack one.

    Args:
        folder: has `<scan>-T1`, `<scan>-T2` and `<scan>-label` or `-Seg`, or `_T1w`, `_T2w` and `_dseg` as in BIDS, at
            any depth. Hidden files don't count.

    Raises:
        InputError: the folder doesn't exist or has no scan with all three, or a scan has two files of a kind.
    """
    require_path(folder)
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of the real scans as --atlas_dir")
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(Path(folder).rglob("*")):
        if (name := SCAN_NAME.fullmatch(path.name)) and not is_hidden(path.name):
            kind = name["kind"].lower()
            kind = kind if kind in ("t1", "t2") else "label"
            files = found.setdefault(name["scan"], {})
            if kind in files:
                raise InputError(f"{path}: {files[kind]} is a {kind} of scan {name['scan']} too; rename or remove one")
            files[kind] = path
    complete = {scan: files for scan, files in found.items() if len(files) == 3}
    if not complete:
        raise InputError(f"{folder}: has no scan with label; give a folder with <scan>-T1, <scan>-T2 and <scan>-label")
    for scan in found.keys() - complete.keys():
        logger.warning("%s: scan %s has no T1, no T2 or no label; skipped", folder, scan)
    return complete


def _read(files: dict[str, Path]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """T1, T2 and label of a scan, each (X, Y, Z), and their affine."""
    path = str(files["label"])
    label, affine = read_volume(path)
    volumes = {"label": tissues_of_structures(label, path)}
    require_usable(files["label"], volumes["label"], affine)
    for kind in ("t1", "t2"):
        volumes[kind], image_affine = read_volume(str(files[kind]))
        require_same_grid(str(files[kind]), volumes[kind], image_affine, path, label, affine)
    return volumes, affine


def _treated(
    volumes: dict[str, np.ndarray], affine: np.ndarray, treatment: Treatment, rng: np.random.Generator
) -> dict[str, MetaTensor]:
    """T1, T2 and label after a treatment, (1, X, Y, Z)."""
    label, result = volumes["label"], {}
    for kind in ("label", "t1", "t2"):
        values = volumes[kind].astype(np.float32)
        if kind != "label" and treatment.noise:
            spread = treatment.noise * values[label == Tissue.GM].std()
            noisy = values + spread * rng.standard_normal(values.shape, dtype=np.float32)
            # what was above 0 stays above 0, as in a stripped scan
            values = np.where(values > 0, np.maximum(noisy, 1e-3 * values.max()), values)
        if kind != "label" and treatment.cut:
            values = values * (label > 0)
        image = MetaTensor(torch.from_numpy(np.ascontiguousarray(values))[None], affine=affine)
        if treatment.voxel:
            mode = "nearest" if kind == "label" else "bilinear"
            image = Spacing([treatment.voxel] * 3, mode=mode, padding_mode="zeros")(image)
        result[kind] = image
    if treatment.cut:
        for kind in ("t1", "t2"):
            result[kind] = result[kind] * (result["label"] > 0)
    return result


def score_real_scans(scans: Mapping[str, dict[str, Path]], segmenter: Segmenter, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row of scores for each scan under each of `TREATMENTS`; log what the segmenter refuses.

    Scores are those of `tissue_scores` inside the label, and the share of each tissue in the segmentation, from 0 to 1.

    Args:
        scans: see `find_real_scans`.
        segmenter: what segments them.
        seed: selects the noise.

    Raises:
        InputError: as `read_volume`, `tissues_of_structures`, `require_usable` and `require_same_grid`.
    """
    with tqdm(total=len(scans) * len(TREATMENTS), desc="real scans") as progress:
        for scan, files in scans.items():
            volumes, affine = _read(files)
            for name, treatment in TREATMENTS.items():
                images = _treated(volumes, affine, treatment, np.random.default_rng([seed, *scan.encode()]))
                t1, t2 = (
                    nib.Nifti1Image(images[name.lower()][0].numpy(), images[name.lower()].affine.numpy())
                    if name in treatment.contrasts
                    else None
                    for name in CONTRASTS
                )
                label = images["label"].as_tensor().to(torch.uint8)
                progress.update()
                try:
                    prediction = torch.from_numpy(segmenter(t1, t2).label)[None] * (label > 0)
                except InputError as error:
                    logger.warning("%s, %s: %s", scan, name, error)
                    continue
                voxels = torch.bincount(prediction.flatten().long(), minlength=len(Tissue) + 1)[1:]
                shares = (voxels / (label > 0).sum()).tolist()
                yield (
                    {"scan": scan, "treatment": name}
                    | tissue_scores(prediction, label, tuple(images["label"].pixdim.tolist()))
                    | {f"share_{tissue}": share for tissue, share in zip(TISSUES, shares, strict=True)}
                )


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as a table for readers: Dice and shares in percent, HD95 in mm."""
    return [
        {"scan": row["scan"], "treatment": row["treatment"]}
        | {title: f"{100 * row[f'dice_{name}']:.1f}" for title, name in zip(TITLES, (*TISSUES, "mean"), strict=True)}
        | {"HD95": f"{row['hd95_mean']:.1f}"}
        | {"CSF/GM/WM": "/".join(f"{100 * row[f'share_{tissue}']:.0f}" for tissue in TISSUES)}
        for row in rows
    ]
