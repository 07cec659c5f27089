"""Transforms that prepare raw scans, between `LoadSubjectd` and `CheckSubjectd`."""

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
from monai.transforms import Transform

from scripts.data.alignment import FEWEST_VOXELS, not_registered
from scripts.data.checks import LARGEST_SHARE_WITHOUT_T2, require_contrast
from scripts.data.transforms import meta_tensor
from scripts.data.volumes import Scan, on_same_grid
from scripts.errors import InputError

logger = logging.getLogger(__name__)

STEPS = ("brain_mask", "registration")
# of fewer voxels, `not_registered`, which looks at every eighth, can't tell whether a registration went well
FEWEST_TO_REGISTER = 12 * FEWEST_VOXELS
# mm by which two searches for the place of T2 may differ without a warning, and with one
SMALLEST_DOUBT, LARGEST_DOUBT = 0.3, 6.0


def steps_of(prepare: str | Sequence[str]) -> tuple[str, ...]:
    """Return the steps that the setting prepare stands for: `auto` for all that a subject needs, or a list of STEPS.

    Raises:
        InputError: it is something else.
    """
    if prepare == "auto":
        return STEPS
    steps = tuple(prepare) if isinstance(prepare, list | tuple) else (prepare,)
    if unknown := [step for step in steps if step not in STEPS]:
        raise InputError(f"--prepare {unknown[0]}: must be auto, or a list of {', '.join(STEPS)}, or [] for nothing")
    return steps


class FindBraind(Transform):
    """Find the brain in a first scan that isn't skull-stripped, unless there is a mask of it.

    `brain` becomes the mask, and `head` the scan as it was, float32 (1, X, Y, Z), with `brain_ml` and `at_edge` of
    `scripts.preparation.brain.FoundBrain` in its meta data. A skull-stripped scan stays as it is.

    Args:
        prepare: the setting; nothing is done unless it names `brain_mask` or is `auto`.

    Raises:
        InputError: as `steps_of`; when called, as `scripts.preparation.brain.brain_of`.
    """

    def __init__(self, prepare: str | Sequence[str] = "auto") -> None:
        self.steps = steps_of(prepare)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        if result["brain"] is not None or "brain_mask" not in self.steps:
            return result
        # MONAI's inferers, which take a second to load, are loaded where they are needed
        from scripts.preparation.brain import brain_of

        scan = result["scans"][0]
        if (found := brain_of(*scan)) is None:
            return result
        # dark voxels in the brain are of the brain
        darkest = scan.values[found.mask & (scan.values > 0)].min()
        values = np.where(found.mask, scan.values.clip(min=darkest), scan.values)
        result["brain"] = found.mask
        result["scans"] = [Scan(values, scan.affine, scan.path), *result["scans"][1:]]
        result["head"] = meta_tensor(scan.values[None], scan.affine, scan.path)
        result["head"].meta |= {"brain_ml": found.volume, "at_edge": found.at_edge}
        return result


class RegisterT2d(Transform):
    """Register a T2 that isn't on the grid of its T1, or fits T1 better elsewhere.

    The T2 in `scans` is then on the grid of T1. `registration` becomes a dict: `registered` tells how T2 was moved, or
    is empty; `to_t2` is the matrix from RAS mm of T1 to RAS mm of T2, if it was; `not_registered` is the warning of
    `scripts.data.alignment`, or empty. HDF5 files are only judged.

    Args:
        prepare: the setting; T2 is only judged unless it names `registration` or is `auto`.

    Raises:
        InputError: as `steps_of`; when called, T2 is constant, or on another grid and can't be registered.
    """

    def __init__(self, prepare: str | Sequence[str] = "auto") -> None:
        self.steps = steps_of(prepare)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        if len(data["scans"]) == 1:
            return result
        t1, t2 = data["scans"]
        brain = (t1.values > 0) if data["brain"] is None else data["brain"] & (t1.values > 0)
        if not brain.any():  # which `CheckSubjectd` says
            return result
        sizes = nib.affines.voxel_sizes(t1.affine)
        same_grid = on_same_grid(t2.values, t2.affine, t1.values, t1.affine)
        warning = not_registered(t1.values * brain, t2.values, sizes) if same_grid else "T2 is on another grid"
        result["registration"] = {"registered": "", "not_registered": warning or ""}
        can_be_judged = same_grid or np.count_nonzero(brain) >= FEWEST_TO_REGISTER
        if not warning or "registration" not in self.steps or not can_be_judged or t1.path.endswith(".h5"):
            return result
        require_contrast({"T2": np.ptp(t2.values)}, t2.path)
        # SimpleITK, which takes a tenth of a second and 100 MB, is loaded where it is needed
        from scripts.preparation.registration import register

        found = register(t2.values, t2.affine, t1.values, t1.affine, brain)
        covered = found and found.covered >= 1 - LARGEST_SHARE_WITHOUT_T2
        if covered and found.doubt <= LARGEST_DOUBT and not not_registered(t1.values * brain, found.image, sizes):
            logger.info("%s: registered to T1, %s", t2.path, found)
            doubt = found.doubt > SMALLEST_DOUBT and (
                f"a second search for the place of T2 ended up to {found.doubt:.1f} mm away; look whether T2 fits T1"
            )
            result["scans"] = [t1, Scan(found.image, t1.affine, t2.path)]
            result["registration"] = {"registered": str(found), "to_t2": found.matrix, "not_registered": doubt or ""}
        elif not same_grid:
            raise InputError(
                f"{t2.path}: couldn't be registered to {t1.path}; check that both show the same head, or register it "
                f"yourself"
            )
        return result
