"""Probability of each tissue, and how uncertain the label is: transforms, and the files for those who ask for them."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.transforms import Transform
from monai.utils import convert_to_dst_type

from scripts.results.label_images import write_map
from scripts.results.paths import result_path
from scripts.results.writers import BackgroundWriter
from scripts.tissues import Tissue


class Probabilitiesd(Transform):
    """Add the class probabilities, `probabilities`, to a dict with `pred` and `t1` on the subject's own grid.

    Shapes: `pred`, logits (4, X, Y, Z), and `t1`, intensities (1, X, Y, Z), both unchanged -> float32 (4, X, Y, Z) from
    0 to 1, which sum to 1 over the classes. Where T1 is 0 it is background for certain, as in the label.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        logits = data["pred"]
        brain = torch.as_tensor(data["t1"]).to(logits.device) > 0
        probabilities = torch.as_tensor(logits).float().softmax(0) * brain
        probabilities[:1] += ~brain
        return dict(data) | {"probabilities": convert_to_dst_type(probabilities, logits)[0]}


class PredictiveEntropyd(Transform):
    """Add how uncertain the label is, `uncertainty`, to a dict with `probabilities` by `Probabilitiesd`.

    It is the entropy of the class probabilities, which here are a mean over networks, mirror images or dropout samples,
    divided by that of four equal ones: 0 where one class has probability 1, so outside the brain too; 0.5 where two
    classes are equally probable and the others impossible; 1 where all four are equally probable. It grows both where
    the scan leaves the tissue open and where those that are averaged disagree.

    Shapes: (4, X, Y, Z) -> float32 (1, X, Y, Z).
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        probabilities = data["probabilities"]
        entropy = torch.special.entr(torch.as_tensor(probabilities)).sum(0, keepdim=True)
        uncertainty = (entropy / math.log(len(probabilities))).clamp(0, 1)
        return dict(data) | {"uncertainty": convert_to_dst_type(uncertainty, probabilities)[0]}


class ProbabilitySaver(BackgroundWriter):
    """Handler that writes each subject's `probabilities` of CSF, GM and WM, a NIfTI file each, by `write_map`.

    The files are `subject-<id>-probability-csf.nii.gz`, `-gm` and `-wm`; what they lack to 1 is that of background.

    Args:
        output_dir: the folder to write to.
    """

    what = "probabilities"

    def write(self, item: dict[str, Any]) -> None:
        for tissue in Tissue:
            path = result_path(self.output_dir, item, f"probability-{tissue.name.lower()}", ".nii.gz")
            write_map(path, item["probabilities"][tissue].cpu().numpy(), item["t1"].meta["filename_or_obj"])


class UncertaintySaver(BackgroundWriter):
    """Handler that writes each subject's `uncertainty` as `subject-<id>-uncertainty.nii.gz`, by `write_map`.

    Args:
        output_dir: the folder to write to.
    """

    what = "uncertainty"

    def write(self, item: dict[str, Any]) -> None:
        path = result_path(self.output_dir, item, "uncertainty", ".nii.gz")
        write_map(path, item["uncertainty"][0].cpu().numpy(), item["t1"].meta["filename_or_obj"])
