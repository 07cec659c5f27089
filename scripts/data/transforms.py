"""Transforms around the network: load, check and normalise a subject, and turn logits into labels."""

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import MetaKeys, SpaceKeys, convert_to_dst_type

from scripts.data.alignment import FEWEST_VOXELS, not_registered
from scripts.data.checks import (
    LARGEST_SHARE_WITHOUT_T2,
    exchanged,
    extreme_voxels,
    require_brain_only,
    require_contrast,
    require_label_of_brain,
    require_t2_of_brain,
    unlike_its_tissues,
)
from scripts.data.hdf5 import read_hdf5
from scripts.data.volumes import (
    CONTRASTS,
    Scan,
    contrasts_of,
    on_same_grid,
    read_scans,
    read_volume,
    require_same_grid,
)
from scripts.errors import InputError
from scripts.preparation import steps_of
from scripts.tissues import ISEG_AFFINE, LARGEST_ROUNDING, tissue_labels

logger = logging.getLogger(__name__)

# smaller values are rounding errors, not intensities; whole numbers of usual images are never that small
SMALLEST_SHARE = 1e-6
# of fewer voxels, `not_registered`, which looks at every eighth, can't tell whether a registration went well
FEWEST_TO_REGISTER = 12 * FEWEST_VOXELS


def _meta_tensor(values: np.ndarray, affine: np.ndarray, path: str) -> MetaTensor:
    meta = {
        MetaKeys.ORIGINAL_AFFINE: affine,
        MetaKeys.SPATIAL_SHAPE: np.array(values.shape[1:]),
        MetaKeys.SPACE: SpaceKeys.RAS,
        "filename_or_obj": str(path),
    }
    return MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(affine), meta=meta)


class LoadSubjectd(Transform):
    """Load the T1, T2 and label of a subject and check that they belong together.

    The input is a dict with `image` (see `read_scans`) and optionally `label` and `mask` (paths). A subject in
    HDF5 has the path of its `.h5` file twice in `image`, and in `label`. A subject of one contrast has None in the
    place of the other. T1 and T2 are set to 0 outside `mask`: where
    it isn't above 0 or, if it is interpolated, is below half of its maximum. The result is a copy, on the grid of the
    T1 file and with its affine, with:

    - `image`: float32 (2, X, Y, Z), T1 and T2 as on disk, or as `read_hdf5` returns them
    - `t1`, `t2`: float32 (1, X, Y, Z), copies of the channels, to stay on this grid; `not_registered` in the meta data
      of `t2` is the warning of `scripts.data.alignment`, which is also logged, or an empty text. Of a subject with one
      contrast, that is `t1`, both channels of `image`, and there is no `t2`; `contrast` in the meta data of `t1` is its
      name
    - `label`, `reference`: uint8 (1, X, Y, Z), 0 background, 1 CSF, 2 GM, 3 WM, if there is a label; `label` is to be
      resampled to the network's grid, `reference` stays on this one

    A warning is logged if T1 and T2 seem to be exchanged, if a few voxels distort a spread, or if the label's CSF isn't
    CSF in either.

    A T2 that isn't on the grid of its T1, or fits T1 better elsewhere, is registered if `prepare` says so; `registered`
    in the meta data of `t2` then tells how it was moved, and is an empty text otherwise.

    Calls share no state, so any number of workers may load at a time.

    Args:
        prepare: steps for raw scans, of `scripts.preparation.STEPS`: `auto` for all that a subject needs, or a list.

    Raises:
        InputError: `prepare` names another step; T2 differs in grid and isn't to be registered or can't be; mask or
            label differ in grid; T1 or T2 is constant inside the brain; the two are the same; the label is 0
            everywhere; or as `read_scans`, `read_volume`, `tissue_labels`, `require_label_of_brain`, `read_hdf5`,
            `require_brain_only` and `require_t2_of_brain`.
    """

    def __init__(self, prepare: str | Sequence[str] = "auto") -> None:
        self.steps = steps_of(prepare)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        label, registered, warning, mixed_up = None, "", None, None
        contrasts = contrasts_of(data["image"])
        t1_path = t2_path = data["image"] if isinstance(data["image"], str) else data["image"][0]
        if isinstance(t1_path, str) and t1_path.endswith(".h5"):
            image, label = read_hdf5(t1_path)
            affine = ISEG_AFFINE.copy()
            require_brain_only(image[0], affine, t1_path)
            warning = not_registered(*image, np.ones(3))
        else:
            scans = read_scans(data["image"])
            affine, t1_path, t2_path = scans[0].affine, scans[0].path, scans[-1].path
            t1 = np.array(scans[0].values, order="C")
            # splines leave residue in the air; every seventh voxel is enough, and the maximum may be an artefact
            usual = np.quantile(np.abs(t1.ravel()[::7]), 0.995)
            t1[np.abs(t1) < SMALLEST_SHARE * usual] = 0
            if "mask" in data:
                mask, mask_affine = read_volume(data["mask"])
                require_same_grid(data["mask"], mask, mask_affine, t1_path, t1, affine)
                # interpolation widens a mask; one of whole numbers may have several parts
                whole = (np.abs(mask - np.rint(mask)) <= LARGEST_ROUNDING).all()
                inside = (np.rint(mask) > 0) if whole else (mask > 0) & (mask >= mask.max() / 2)
                t1 *= inside
            require_brain_only(t1, affine, t1_path, contrasts[0])
            t2, registered, warning = self._t2_on_grid(t1, scans)
            # in C order: in the order on disk, selecting voxels takes 4 to 9 times as long
            image = np.stack([t1, t2], out=np.empty((2, *t1.shape), np.float32))
            if "mask" in data:
                image[1] *= inside
            if "label" in data:
                values, label_affine = read_volume(data["label"])
                require_same_grid(data["label"], values, label_affine, t1_path, image[0], affine)
                label = tissue_labels(values, data["label"])
        # checked before resampling, which blurs the edge of a mask
        brain = image[0] > 0
        scans = dict(zip(contrasts, image, strict=False))
        require_contrast({name: np.ptp(scan[brain]) for name, scan in scans.items()}, t1_path)
        if contrasts == CONTRASTS:
            if np.array_equal(*image):
                raise InputError(f"{t1_path}: T1 and T2 of this subject are the same scan; give the T2 itself")
            require_t2_of_brain(*image, t2_path)
            if warning:
                logger.warning("%s: %s", t2_path, warning)
            mixed_up = exchanged(*image)
        for warning_of_both in filter(None, (mixed_up, extreme_voxels(scans))):
            logger.warning("%s: %s", t1_path, warning_of_both)
        if label is not None:
            if not label.any():
                raise InputError(f"{data['label']}: the label is 0 everywhere; give one with tissues, or remove it")
            require_label_of_brain(label, image[0], data["label"])
            if contrasts == CONTRASTS and not mixed_up and (contradiction := unlike_its_tissues(label, *image)):
                logger.warning("%s: %s", data["label"], contradiction)
        loaded = dict(data)
        loaded["image"] = _meta_tensor(image, affine, t1_path)
        missing = "".join(name for name in CONTRASTS if name not in contrasts)
        loaded["image"].meta |= {"t1_path": t1_path, "missing": missing}
        if any(str(key).startswith("image_") for key in data):
            # if an image has the name of a NIfTI file, Spacingd takes any `image_...` beside it, such as MONAI Label's
            # `image_path`, for a dict of meta data
            del loaded["image"].meta["filename_or_obj"]
        loaded["t1"] = _meta_tensor(image[:1].copy(), affine, t1_path)
        loaded["t1"].meta["contrast"] = contrasts[0]
        if not missing:
            loaded["t2"] = _meta_tensor(image[1:].copy(), affine, t2_path)
            loaded["t2"].meta |= {"not_registered": warning or "", "registered": registered}
        if label is not None:
            loaded["label"] = _meta_tensor(label[None], affine, data["label"])
            loaded["reference"] = _meta_tensor(label[None].copy(), affine, data["label"])
        return loaded

    def _t2_on_grid(self, t1: np.ndarray, scans: Sequence[Scan]) -> tuple[np.ndarray, str, str | None]:
        """T2 on the grid of T1, how it was moved, and the warning of `not_registered`.

        Of a subject with one contrast, that is returned instead.
        """
        first, second = scans[0], scans[-1]
        if len(scans) == 1:
            return t1, "", None
        sizes = nib.affines.voxel_sizes(first.affine)
        same_grid = on_same_grid(second.values, second.affine, first.values, first.affine)
        can_be_judged = np.count_nonzero(t1 > 0) >= FEWEST_TO_REGISTER
        if not same_grid and not ("registration" in self.steps and can_be_judged):
            require_same_grid(second.path, second.values, second.affine, first.path, first.values, first.affine)
        warning = not_registered(t1, second.values, sizes) if same_grid else "T2 is on another grid"
        if not warning or "registration" not in self.steps:
            return second.values, "", warning
        require_contrast({"T2": np.ptp(second.values)}, second.path)
        # SimpleITK, which takes a tenth of a second and 100 MB, is loaded where it is needed
        from scripts.preparation.registration import register

        result = register(second.values, second.affine, t1, first.affine)
        covered = result and result.covered >= 1 - LARGEST_SHARE_WITHOUT_T2
        if covered and not not_registered(t1, result.image, sizes):
            logger.info("%s: registered to T1, %s", second.path, result)
            return result.image, str(result), None
        if same_grid:
            return second.values, "", warning
        raise InputError(
            f"{second.path}: couldn't be registered to {first.path}; check that both show the same head, or register "
            f"it yourself"
        )


class NormalizeByT1Maskd(MapTransform):
    """Scale T1 and T2 to mean 0 and population standard deviation 1 over the voxels where T1 > 0.

    As in both published pipelines, the mask of T1 serves both channels, and all voxels are transformed, background
    included. Of a subject with one contrast, the channel of the other becomes 0 everywhere, as `RandDropContrastd`
    makes it in training. Shapes: (2, X, Y, Z) -> (2, X, Y, Z), T1 first, in any units.

    Raises:
        InputError: a channel is constant where T1 > 0, T1 is nowhere above 0, or a result isn't finite.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            channels = torch.as_tensor(image)
            brain = channels[:, channels[0] > 0].double()
            deviation, mean = torch.std_mean(brain, dim=1, correction=0)
            if not (deviation > 0).all():
                require_contrast(dict(zip(CONTRASTS, deviation.tolist(), strict=True)), image.meta["t1_path"])
            scale = tuple(value.to(channels.dtype)[:, None, None, None] for value in (mean, deviation))
            result[key] = (image - scale[0]) / scale[1]
            if missing := getattr(image, "meta", {}).get("missing"):
                result[key][CONTRASTS.index(missing)] = 0
            if not torch.as_tensor(result[key]).isfinite().all():
                raise InputError(
                    f"{image.meta['t1_path']}: T1 or T2 of this subject has values too large for float32 at the scale "
                    f"of its brain; give the scan itself, with values of a usual size"
                )
        return result


class MostLikelyTissued(MapTransform):
    """Turn logits into labels: the class with the largest logit, the first of equal ones.

    The result is that of MONAI's AsDiscreted with argmax, in an eighth of the time: torch's argmax over the channels
    takes 1.4 s per subject on 2 cores. Shapes: (classes, X, Y, Z) -> (1, X, Y, Z), with the type of the logits: a
    smaller type would make MONAI's MaskIntensityd convert its mask to that type and lose values.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            labels = torch.as_tensor(result[key]).max(dim=0, keepdim=True).indices
            result[key] = convert_to_dst_type(labels, result[key])[0]
        return result
