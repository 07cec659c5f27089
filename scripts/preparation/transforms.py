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
from scripts.data.volumes import Scan, on_same_grid, read_volume
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


class RegisterScansd(Transform):
    """Bring T2 to the grid of T1, unless it is there and fits; bring further runs there too and average them.

    `scans` are then on the grid of the first. `registration` becomes a dict about T2: `registered` tells how it was
    moved, or is empty; `to_t2` is the matrix from RAS mm of T1 to RAS mm of T2, if it was; `not_registered` is the
    warning of `scripts.data.alignment`, or of a second search, or empty. HDF5 files are only judged.

    Args:
        prepare: the setting; scans are only judged unless it names `registration` or is `auto`.

    Raises:
        InputError: as `steps_of`; when called, a scan is constant, or can't be registered and is on another grid or a
            further run.
    """

    def __init__(self, prepare: str | Sequence[str] = "auto") -> None:
        self.steps = steps_of(prepare)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        further = result.pop("runs", [])
        scans, brain = list(data["scans"]), data["brain"]
        brain = scans[0].values > 0 if brain is None else brain & (scans[0].values > 0)
        if not brain.any():  # which `CheckSubjectd` says
            return result
        if len(scans) == 2:
            scans[1], result["registration"] = self._fitted(scans[1], scans[0], brain, "head" in data)
        for place, paths in enumerate(further):
            runs = [scans[place].values]
            for path in paths:
                run, about = self._fitted(Scan(*read_volume(path), path), scans[0], brain, True)
                if about["not_registered"]:
                    raise InputError(
                        f"{path}: it isn't clear where it fits {scans[0].path}; remove this run, or segment each by "
                        f"--runs apart"
                    )
                runs.append(run.values)
            # scanners may scale each run
            levels = [run[brain].mean() for run in runs]
            values = np.mean([run * (levels[0] / level) for run, level in zip(runs, levels, strict=True)], axis=0)
            scans[place] = scans[place]._replace(values=values.astype(np.float32))
        return result | {"scans": scans}

    def _fitted(self, scan: Scan, t1: Scan, brain: np.ndarray, is_raw: bool) -> tuple[Scan, dict[str, Any]]:
        """A scan on the grid of T1, and what `registration` says of it.

        One that is prepared may be there although it can't be registered; a raw one then isn't used.
        """
        sizes = nib.affines.voxel_sizes(t1.affine)
        same_grid = on_same_grid(scan.values, scan.affine, t1.values, t1.affine)
        warning = not_registered(t1.values * brain, scan.values, sizes) if same_grid else "it is on another grid"
        can_be_judged = same_grid or np.count_nonzero(brain) >= FEWEST_TO_REGISTER
        if not warning or "registration" not in self.steps or not can_be_judged or t1.path.endswith(".h5"):
            return scan, {"registered": "", "not_registered": warning or ""}
        require_contrast({"T2": np.ptp(scan.values)}, scan.path)
        # SimpleITK, which takes a tenth of a second and 100 MB, is loaded where it is needed
        from scripts.preparation.registration import register

        # skull and skin, which move against the brain and differ between the contrasts, would lead astray
        found = register(scan.values, scan.affine, t1.values * brain, t1.affine, brain)
        covered = found and found.covered >= 1 - LARGEST_SHARE_WITHOUT_T2
        if covered and found.doubt <= LARGEST_DOUBT and not not_registered(t1.values * brain, found.image, sizes):
            logger.info("%s: registered to T1, %s", scan.path, found)
            doubt = found.doubt > SMALLEST_DOUBT and (
                f"a second search for its place ended up to {found.doubt:.1f} mm away; look whether it fits T1"
            )
            about = {"registered": str(found), "to_t2": found.matrix, "not_registered": doubt or ""}
            return Scan(found.image, t1.affine, scan.path), about
        if same_grid and not is_raw:
            return scan, {"registered": "", "not_registered": warning}
        raise InputError(
            f"{scan.path}: couldn't be registered to {t1.path}; check that both show the same head, or register it "
            f"yourself"
        )
