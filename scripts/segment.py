"""Segment a subject from Python: `from scripts.segment import segment`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser, ReferenceResolver
from monai.data import MetaTensor
from nibabel.spatialimages import SpatialImage
from numpy.typing import ArrayLike

from scripts.data.volumes import CONTRASTS
from scripts.errors import InputError, input_error_in, require_whole_numbers
from scripts.files import ROOT
from scripts.inference.averaging import CheckpointLoader
from scripts.machine import require_device
from scripts.results.metrics import tissue_volumes
from scripts.settings import unknown_setting

Source = str | os.PathLike[str] | SpatialImage | ArrayLike

# settings of configs/inference.json that define how a subject is segmented; the others are about the command's files
SETTINGS = {
    *(
        "ckpt_dir",
        "cache_dir",
        "checkpoints",
        "device",
        "precision",
        "memory_format",
        "seed",
        "foreground_margin",
        "window_size",
    ),
    *("prepare", "flips", "uncertainty", "dropout_samples"),
    *("network_def", "network", "preprocessing", "inferer", "postprocessing"),
}


@contextmanager
def _bare_input_errors() -> Iterator[None]:
    """Raise an InputError unwrapped; MONAI wraps it in a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if input_error := input_error_in(error):
            raise input_error from None
        raise


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The segmentation of a subject, on the grid of its T1, or of its T2 if it has no T1.

    Attributes:
        label: uint8 (X, Y, Z), 0 background, 1 CSF, 2 GM, 3 WM, with the axes of the T1; 0 where T1 is 0.
        volumes: `csf_ml`, `gm_ml`, `wm_ml` and their sum `brain_ml`, by `scripts.results.metrics.tissue_volumes`.
        probabilities: float32 (4, X, Y, Z) of background, CSF, GM and WM, which sum to 1.
        affine: that of the T1, 4 x 4, from voxels to RAS mm.
        uncertainty: float32 (X, Y, Z) from 0 to 1 by `scripts.results.probabilities.PredictiveEntropyd`; None without
            the setting `uncertainty`.
    """

    label: np.ndarray
    volumes: dict[str, float]
    probabilities: np.ndarray
    affine: np.ndarray
    uncertainty: np.ndarray | None


class Segmenter:
    """Segment subjects one by one as configs/inference.json does, with a network that is loaded once.

    The calling process keeps its seeds, logging and display of errors.

    Args:
        settings: of configs/inference.json, except those about files: `checkpoints`, `ckpt_dir`, `flips`,
            `uncertainty`, `precision`, `window_size`, `device` and so on.

    Raises:
        InputError: a setting is unknown or invalid, or as `scripts.inference.averaging.CheckpointLoader`.
    """

    def __init__(self, **settings: Any) -> None:
        config = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "inference.json"))
        for name in settings:
            if hint := unknown_setting(name, config):
                raise InputError(f"{name}: no such setting; {hint.replace('--', '')}")
            if ReferenceResolver.split_id(name)[0] not in SETTINGS:
                raise InputError(f"{name}: is a setting of the command, which reads and writes folders; leave it out")
        config.update({"bundle_root": str(ROOT), "probabilities": True, **settings})
        # a new network gets random weights, which the checkpoint replaces
        with _bare_input_errors(), torch.random.fork_rng(devices=[]):
            require_device(config.get_parsed_content("device"))
            require_whole_numbers(0, foreground_margin=config.get_parsed_content("foreground_margin"))
            self.device = torch.device(config.get_parsed_content("device"))
            self.network: torch.nn.Module = config.get_parsed_content("network").eval()
            self.preprocessing = config.get_parsed_content("preprocessing")
            self.inferer = config.get_parsed_content("inferer")
            self.postprocessing = config.get_parsed_content("postprocessing")
            CheckpointLoader(config.get_parsed_content("checkpoints"), self.network).load()

    def __call__(
        self,
        t1: Source | None,
        t2: Source | None,
        affine: ArrayLike | None = None,
    ) -> Segmentation:
        """Segment a subject; see `segment`."""
        if t1 is None and t2 is None:
            raise InputError("T1 and T2 are None; give at least one of them")
        volumes = [
            None if volume is None else _volume(volume, affine, name)
            for volume, name in zip((t1, t2), CONTRASTS, strict=True)
        ]
        with _bare_input_errors():
            subject = self.preprocessing({"image": volumes})
            with torch.no_grad():
                logits = self.inferer(subject["image"].as_tensor()[None].to(self.device), self.network)
            result = self.postprocessing(subject | {"pred": MetaTensor(logits[0])})
        label, probabilities, uncertainty = (
            result[name].as_tensor().cpu().numpy() if name in result else None
            for name in ("pred", "probabilities", "uncertainty")
        )
        return Segmentation(
            label=label[0],
            volumes=tissue_volumes(result["pred"]),
            probabilities=probabilities,
            affine=result["t1"].affine.numpy().copy(),
            uncertainty=None if uncertainty is None else uncertainty[0],
        )


def segment(
    t1: Source | None,
    t2: Source | None,
    affine: ArrayLike | None = None,
    **settings: Any,
) -> Segmentation:
    """Segment a subject; the label equals that of the command with the same settings, voxel for voxel.

    For many subjects, make one `Segmenter` and call it like this function, without settings.

    Args:
        t1, t2: skull-stripped (0 outside the brain); paths (`.hdr`, `.nii`, `.nii.gz`) or nibabel images, on any grids,
            or arrays (X, Y, Z) on one. One may be None: the other is then segmented alone, and the result is on its
            grid.
        affine: for arrays only: 4 x 4, from voxels to RAS mm, with orientation and voxel size.
        settings: see `Segmenter`.

    Raises:
        InputError: both are None, an array has no affine, or a file or image is given one; or as `Segmenter`,
            the transforms of `preprocessing` in configs/inference.json.
    """
    return Segmenter(**settings)(t1, t2, affine)


def _volume(volume: Source, affine: ArrayLike | None, name: str) -> str | SpatialImage:
    """A volume for `scripts.data.transforms.LoadSubjectd`; `name` is its name in messages if it has no path."""
    in_memory = not isinstance(volume, str | os.PathLike)
    if in_memory and not isinstance(volume, SpatialImage):
        volume = _image(volume, affine, name)
    elif affine is not None:
        raise InputError(
            f"affine: is for arrays, and the {name} is a file or an image, which has its own; leave it out"
        )
    if not in_memory:
        path = os.fspath(volume)
        if path.endswith(".h5"):
            raise InputError(f"{path}: lacks the scan and its grid; give T1 and T2 images")
        return path
    if volume.affine is None:
        raise InputError(f"{name}: the image has no affine; create it with one")
    return volume


def _image(values: ArrayLike, affine: ArrayLike | None, name: str) -> nib.Nifti1Image:
    """An image from an array and its affine."""
    if affine is None:
        raise InputError(f"{name}: is an array, which has no grid; give the 4 x 4 affine of the T1 as well")
    try:
        matrix, values = np.asarray(affine, dtype=np.float64), np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: isn't a path, an image or an array of numbers with an affine ({error})") from error
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or np.linalg.det(matrix) == 0:
        raise InputError("affine: must be an invertible 4 x 4 matrix, from voxels to RAS mm")
    return nib.Nifti1Image(values, matrix)
