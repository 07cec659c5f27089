"""The brain in a scan of a head, of any contrast, found by a network of its own."""

import functools
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Orientation
from scipy.ndimage import binary_fill_holes, label
from torch.nn.functional import interpolate, pad

from scripts.errors import InputError
from scripts.files import ROOT
from scripts.network import SkipDenseSeg
from scripts.weights import load_weights

WEIGHTS = ROOT / "models" / "brain.pt"
# mm of the voxels that the network sees
VOXEL = 2.0
# mm along an axis; in slices thicker than this it can't be relied on
LARGEST_VOXEL = 6.0
# voxels along each axis that it sees at a time; nearly all heads have fewer
LARGEST_WINDOW = 128
# a stripped scan is above 0 in less, ml, and on a smaller share of each face of its volume; of others the network tells
LARGEST_STRIPPED = 1000
LARGEST_SHARE_OF_FACE = 0.04
# share of what a stripped scan shows that the network takes for brain, at least
SMALLEST_SHARE_OF_STRIPPED = 0.85
# ml of a brain from birth to adulthood, with some room
USUAL_BRAINS = (200, 1800)
# below one half, since what is cut off is lost, while the network of the tissues may label what is left around
THRESHOLD = 0.35
# share of what the network takes for brain that is in one piece, at least, and of which it is sure, by its probability
SMALLEST_PIECE = 0.7
SURE, SMALLEST_SURE = 0.9, 0.75


@dataclass(frozen=True, eq=False)
class FoundBrain:
    """The brain in a scan.

    Attributes:
        mask: bool (X, Y, Z), in one piece and without holes.
        volume: of the mask, in ml.
        at_edge: mm² of the mask on the faces of the volume, where the scan may cut the brain.
    """

    mask: np.ndarray
    volume: float
    at_edge: float


def may_show_a_head(scan: np.ndarray, affine: np.ndarray) -> bool:
    """Return whether a scan (X, Y, Z) shows so much that it may not be skull-stripped."""
    shown = scan > 0
    volume = np.count_nonzero(shown) * abs(np.linalg.det(affine[:3, :3])) / 1000
    faces = (np.moveaxis(shown, axis, 0)[side].mean() for axis in range(3) for side in (0, -1))
    return volume > LARGEST_STRIPPED or (volume > USUAL_BRAINS[0] and max(faces) > LARGEST_SHARE_OF_FACE)


def brain_of(scan: np.ndarray, affine: np.ndarray, path: str) -> FoundBrain | None:
    """Find the brain in a scan, unless it plainly shows no head; see `find_brain`."""
    return find_brain(scan, affine, path) if may_show_a_head(scan, affine) else None


def find_brain(scan: np.ndarray, affine: np.ndarray, path: str) -> FoundBrain | None:
    """Find the brain in a scan, unless the scan shows nothing else.

    Args:
        scan: intensities (X, Y, Z) of any contrast and unit, above 0 in the brain.
        affine: 4 x 4, from voxels to RAS mm.
        path: for messages.

    Returns:
        None if the scan is skull-stripped, or constant.

    Raises:
        InputError: there is no brain in it, the network isn't sure where, or the voxels are too large.
    """
    if not np.ptp(scan):
        return None
    sizes = nib.affines.voxel_sizes(affine)
    if sizes.max() > LARGEST_VOXEL:
        raise InputError(
            f"{path}: isn't skull-stripped, and its voxels of {sizes.max():.3g} mm are too large to find the brain; "
            f"give it skull-stripped, 0 outside the brain"
        )
    probability = _brain_probability(scan, affine)
    found = probability > THRESHOLD
    shown, voxel_ml = scan > 0, abs(np.linalg.det(affine[:3, :3])) / 1000
    is_stripped = np.count_nonzero(found & shown) >= SMALLEST_SHARE_OF_STRIPPED * np.count_nonzero(shown)
    if is_stripped and np.count_nonzero(shown) * voxel_ml <= USUAL_BRAINS[1]:
        return None
    parts, _ = label(found)
    pieces = np.bincount(parts[found], minlength=2)
    mask = binary_fill_holes(parts == pieces.argmax()) if pieces.any() else found
    volume = np.count_nonzero(mask) * voxel_ml
    usual = USUAL_BRAINS[0] <= volume <= USUAL_BRAINS[1]
    sure = np.count_nonzero(probability > SURE) >= SMALLEST_SURE * np.count_nonzero(probability > 0.5)
    if not (usual and sure and pieces.max() >= SMALLEST_PIECE * pieces.sum()):
        raise InputError(
            f"{path}: no brain is found in it ({volume:,.0f} ml look like brain); check the scan and its orientation, "
            f"or give it skull-stripped, 0 outside the brain"
        )
    at_edge = sum(np.moveaxis(mask, axis, 0)[[0, -1]].sum() * float(np.delete(sizes, axis).prod()) for axis in range(3))
    return FoundBrain(mask, volume, at_edge)


def brain_network() -> SkipDenseSeg:
    """Return the network, with random weights: logits of background and brain, from one scan with voxels of 2 mm."""
    return SkipDenseSeg(
        in_channels=1,
        out_channels=2,
        init_features=16,
        growth_rate=8,
        block_config=(4, 4, 4),
        dropout_prob=0.0,
        grouped_upsampling=True,
    )


@functools.cache
def _trained_network() -> SkipDenseSeg:
    network = brain_network()
    load_weights(network, str(WEIGHTS))
    return network.eval()


@torch.no_grad()
def _brain_probability(scan: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The network's probability of brain, from 0 to 1, (X, Y, Z)."""
    network, orientation = _trained_network(), Orientation("RAS", labels=None)
    values = np.ascontiguousarray(scan, dtype=np.float32).clip(min=0)
    head = orientation(MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(affine)))
    sizes = nib.affines.voxel_sizes(head.affine.numpy())
    shape = [max(1, round(side * size / VOXEL)) for side, size in zip(head.shape[1:], sizes, strict=True)]
    image = interpolate(head.as_tensor()[None], shape, mode="area")
    # the brightest voxels may be artefacts, and most of the field may be air
    image = image / image[image > image.mean()].quantile(0.98)
    image = pad(image, [end for side in reversed(shape) for end in (0, -side % network.stride)])
    window = [min(side, LARGEST_WINDOW) for side in image.shape[2:]]
    logits = SlidingWindowInferer(window, overlap=0.25, mode="gaussian")(image, network)
    probability = logits.softmax(1)[:, 1:, : shape[0], : shape[1], : shape[2]]
    head.set_array(interpolate(probability, head.shape[1:], mode="trilinear")[0])
    return orientation.inverse(head)[0].numpy()
