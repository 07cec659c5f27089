"""Tissue probabilities and the uncertainty of the label: transforms, and handlers that write them on request."""

import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Transform
from monai.utils import convert_to_dst_type

from scripts.results.label_images import write_map
from scripts.results.paths import result_path
from scripts.results.sidecars import write_sidecar
from scripts.results.writers import BackgroundWriter
from scripts.tissues import Tissue


class Probabilitiesd(Transform):
    """Add the class probabilities, `probabilities`, to a dict with `pred` and `t1` on the subject's own grid.

    Shapes: `pred`, logits (4, X, Y, Z), and `t1`, intensities (1, X, Y, Z), both unchanged -> float32 (4, X, Y, Z) from
    0 to 1 that sum to 1 over the classes. Where T1 is 0, background has probability 1, as in the label.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        logits = data["pred"]
        brain = torch.as_tensor(data["t1"]).to(logits.device) > 0
        probabilities = torch.as_tensor(logits).float().softmax(0) * brain
        probabilities[:1] += ~brain
        return dict(data) | {"probabilities": convert_to_dst_type(probabilities, logits)[0]}


class PredictiveEntropyd(Transform):
    """Add the uncertainty of the label, `uncertainty`, to a dict with `probabilities` by `Probabilitiesd`.

    It is the entropy of the class probabilities, divided by the entropy of four equal ones. The probabilities are a
    mean over networks, mirror images or dropout samples. The uncertainty is 0 where one class has probability 1, hence
    outside the brain too; 0.5 where two classes are equally probable and the others impossible; 1 where all four are
    equally probable. It grows where the scan is ambiguous and where the averaged predictions disagree.

    Shapes: (4, X, Y, Z) -> float32 (1, X, Y, Z).
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        probabilities = data["probabilities"]
        entropy = torch.special.entr(torch.as_tensor(probabilities)).sum(0, keepdim=True)
        uncertainty = (entropy / math.log(len(probabilities))).clamp(0, 1)
        return dict(data) | {"uncertainty": convert_to_dst_type(uncertainty, probabilities)[0]}


class ProbabilitySaver(BackgroundWriter):
    """Handler that writes the `probabilities` of CSF, GM and WM per subject, a NIfTI file each.

    The files are `subject-<id>-probability-csf.nii.gz`, `-gm` and `-wm`; background has the rest to 1.
    """

    what = "probabilities"

    def write(self, item: dict[str, Any]) -> None:
        for tissue in Tissue:
            _save_map(self.output_dir, item, f"probability-{tissue.name.lower()}", item["probabilities"][tissue])


class UncertaintySaver(BackgroundWriter):
    """Handler that writes the `uncertainty` per subject as `subject-<id>-uncertainty.nii.gz`."""

    what = "uncertainty"

    def write(self, item: dict[str, Any]) -> None:
        _save_map(self.output_dir, item, "uncertainty", item["uncertainty"][0])


def _save_map(output_dir: Path, item: Mapping[str, Any], what: str, values: torch.Tensor) -> None:
    path = result_path(output_dir, item, what, ".nii.gz")
    write_map(path, values.cpu().numpy(), item["t1"].meta["filename_or_obj"])
    write_sidecar(path, item, what)
