"""Transforms around the network: load, check and normalise a subject, and turn logits into labels."""

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import MetaKeys, SpaceKeys, convert_to_dst_type

from scripts.data.checks import (
    exchanged,
    extreme_voxels,
    fill_holes,
    require_brain_only,
    require_contrast,
    require_label_of_brain,
    require_t2_of_brain,
    shows_more,
    unlike_its_tissues,
)
from scripts.data.hdf5 import read_hdf5
from scripts.data.structures import LABEL_NUMBERS, tissues_of_labels
from scripts.data.volumes import (
    CONTRASTS,
    Scan,
    contrasts_of,
    read_scans,
    read_volume,
    require_same_grid,
)
from scripts.errors import InputError
from scripts.tissues import ISEG_AFFINE, LARGEST_ROUNDING

logger = logging.getLogger(__name__)

# smaller values are rounding errors, not intensities; whole numbers of usual images are never that small
SMALLEST_SHARE = 1e-6


def meta_tensor(values: np.ndarray, affine: np.ndarray, path: str) -> MetaTensor:
    """Return values (channels, X, Y, Z) of a file with its affine, for MONAI's transforms."""
    meta = {
        MetaKeys.ORIGINAL_AFFINE: affine,
        MetaKeys.SPATIAL_SHAPE: np.array(values.shape[1:]),
        MetaKeys.SPACE: SpaceKeys.RAS,
        "filename_or_obj": str(path),
    }
    return MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(affine), meta=meta)


class LoadSubjectd(Transform):
    """Read the T1, T2 and label of a subject.

    The input is a dict with `image` (see `read_scans`) and optionally `label` and `mask` (paths). A subject in
    HDF5 has the path of its `.h5` file twice in `image`, and in `label`. A subject of one contrast has None in the
    place of the other. The result is a copy for the transforms of `scripts.preparation` and `CheckSubjectd`, with:

    - `scans`: a list of `Scan`, T1 first, as on disk, or as `read_hdf5` returns them; voxels of the first that are 0
      but for rounding are 0
    - `brain`: where the first shows the brain, bool (X, Y, Z): where `mask` is above 0 or, if it is interpolated, at
      least half of its maximum; in HDF5, where T1 is above 0; otherwise None
    - `label`, if there is one: uint8 (1, X, Y, Z) on the grid of the first, 0 background, 1 CSF, 2 GM, 3 WM

    Calls share no state, so any number of workers may load at a time.

    Args:
        label_numbers: what the labels of images mean, see `tissues_of_labels`; by default `tissues`, and labels of a
            BIDS dataset are refused, whose numbers differ from tool to tool.

    Raises:
        InputError: `label_numbers` is something else, or a BIDS dataset needs it; mask or label differ in grid from the
            first scan; or as `read_scans`, `read_volume`, `tissues_of_labels` and `read_hdf5`.
    """

    def __init__(self, label_numbers: str | None = None) -> None:
        if label_numbers not in (None, *LABEL_NUMBERS):
            raise InputError(f"--label_numbers {label_numbers}: must be one of {', '.join(LABEL_NUMBERS)}")
        self.label_numbers = label_numbers

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data) | {"brain": None}
        path = data["image"] if isinstance(data["image"], str) else data["image"][0]
        if isinstance(path, str) and path.endswith(".h5"):
            image, label = read_hdf5(path)
            result["scans"] = [Scan(values, ISEG_AFFINE.copy(), path) for values in image]
            return result | {"label": meta_tensor(label[None], ISEG_AFFINE, path), "brain": image[0] > 0}
        scans = read_scans(data["image"])
        values, affine, path = scans[0]
        values = np.array(values, order="C")
        # splines leave residue in the air; every seventh voxel is enough, and the maximum may be an artefact
        usual = np.quantile(np.abs(values.ravel()[::7]), 0.995)
        values[np.abs(values) < SMALLEST_SHARE * usual] = 0
        result["scans"] = [Scan(values, affine, path), *scans[1:]]
        if "mask" in data:
            mask, mask_affine = read_volume(data["mask"])
            require_same_grid(data["mask"], mask, mask_affine, path, values, affine)
            # interpolation widens a mask; one of whole numbers may have several parts
            whole = (np.abs(mask - np.rint(mask)) <= LARGEST_ROUNDING).all()
            result["brain"] = (np.rint(mask) > 0) if whole else (mask > 0) & (mask >= mask.max() / 2)
        if "label" in data:
            label, label_affine = read_volume(data["label"])
            require_same_grid(data["label"], label, label_affine, path, values, affine)
            if self.label_numbers is None and "anat" in data:
                raise InputError(
                    f"{data['label']}: is of a BIDS dataset, where numbers of labels differ; say what they mean by "
                    f"--label_numbers {', '.join(LABEL_NUMBERS)}"
                )
            label = tissues_of_labels(label, data["label"], self.label_numbers or "tissues")
            result["label"] = meta_tensor(label[None], affine, data["label"])
        return result


class CheckSubjectd(Transform):
    """Check that the scans and the label of a subject belong together, and make the network's image of them.

    The input is that of `LoadSubjectd`, which the transforms of `scripts.preparation` may have changed. T1 and T2 are
    set to 0 outside `brain`, if it is known; otherwise T2 is set to 0 where T1 is 0, if it isn't skull-stripped. Holes
    in the first are filled, see `fill_holes`. The result is on the grid of the T1 file and with its affine, with:

    - `image`: float32 (2, X, Y, Z), T1 and T2
    - `t1`, `t2`: float32 (1, X, Y, Z), copies of the channels, to stay on this grid. Of a subject with one contrast,
      that is `t1`, both channels of `image`, and there is no `t2`; `contrast` in the meta data of `t1` is its name
    - `label`, `reference`: uint8 (1, X, Y, Z), if there is a label; `label` is to be resampled to the network's grid,
      `reference` stays on this one

    Warnings are logged if T2 isn't registered, if T1 and T2 seem to be exchanged, if a few voxels distort a spread, or
    if the label's CSF isn't CSF in either.

    Raises:
        InputError: T2 is on another grid; T1 or T2 is constant inside the brain; the two are the same; the label is 0
            everywhere; or as `require_label_of_brain`, `require_brain_only` and `require_t2_of_brain`.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        scans, inside = result.pop("scans"), result.pop("brain")
        registration = result.pop("registration", {})
        contrasts = contrasts_of(data["image"])
        first, second = scans[0], scans[-1]
        # in C order: in the order on disk, selecting voxels takes 4 to 9 times as long
        image = np.empty((2, *first.values.shape), np.float32)
        image[0] = first.values
        if inside is not None:
            image[0] *= inside
        require_brain_only(image[0], first.affine, first.path, contrasts[0])
        if second is not first:
            require_same_grid(second.path, second.values, second.affine, first.path, first.values, first.affine)
        image[1] = second.values
        can_be_brain = np.ones_like(image[0], bool) if second is first else image[1] > 0
        if inside is not None:
            can_be_brain &= inside
        fill_holes(image[0], can_be_brain, first.path, contrasts[0])
        # an HDF5 file has no mask of its own
        if inside is not None and not first.path.endswith(".h5"):
            image[1] *= inside
        elif shows_more(*image):
            image[1] *= image[0] > 0
        # checked before resampling, which blurs the edge of a mask
        brain = image[0] > 0
        by_name = dict(zip(contrasts, image, strict=False))
        require_contrast({name: np.ptp(scan[brain]) for name, scan in by_name.items()}, first.path)
        mixed_up = None
        if contrasts == CONTRASTS:
            if np.array_equal(*image):
                raise InputError(f"{first.path}: T1 and T2 of this subject are the same scan; give the T2 itself")
            require_t2_of_brain(*image, second.path)
            if warning := registration.get("not_registered"):
                logger.warning("%s: %s", second.path, warning)
            mixed_up = exchanged(*image)
        for warning in filter(None, (mixed_up, extreme_voxels(by_name))):
            logger.warning("%s: %s", first.path, warning)
        if "label" in data:
            self._check_label(data["label"], image, contrasts == CONTRASTS and not mixed_up)
            result["reference"] = data["label"].clone()
        result["image"] = meta_tensor(image, first.affine, first.path)
        missing = "".join(name for name in CONTRASTS if name not in contrasts)
        result["image"].meta |= {"t1_path": first.path, "missing": missing}
        if any(str(key).startswith("image_") for key in data):
            # if an image has the name of a NIfTI file, Spacingd takes any `image_...` beside it, such as MONAI Label's
            # `image_path`, for a dict of meta data
            del result["image"].meta["filename_or_obj"]
        result["t1"] = meta_tensor(image[:1].copy(), first.affine, first.path)
        result["t1"].meta["contrast"] = contrasts[0]
        if not missing:
            result["t2"] = meta_tensor(image[1:].copy(), first.affine, second.path)
            result["t2"].meta |= registration
        return result

    def _check_label(self, label: MetaTensor, image: np.ndarray, know_csf: bool) -> None:
        """Check a label (1, X, Y, Z); `know_csf` is whether T1 and T2 tell where CSF is."""
        values, path = label[0].numpy(), label.meta["filename_or_obj"]
        if not values.any():
            raise InputError(f"{path}: the label is 0 everywhere; give one with tissues, or remove it")
        require_label_of_brain(values, image[0], path)
        if know_csf and (contradiction := unlike_its_tissues(values, *image)):
            logger.warning("%s: %s", path, contradiction)


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
