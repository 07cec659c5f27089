"""What is odd about a subject: the thresholds, and the warnings of report.html."""

from collections.abc import Mapping

import numpy as np

from scripts.data.alignment import has_values
from scripts.tissues import Tissue

# ml, mean and standard deviation as reported for these; this project hasn't measured them
SOURCE = "the ten training subjects of iSeg-2017"
SIX_MONTHS = {Tissue.CSF: (170, 14), Tissue.GM: (380, 40), Tissue.WM: (246, 39)}
# Ten leave mean and deviation uncertain: by the prediction interval of a normal sample of ten, 2 in 100 such children
# lie beyond 3 deviations of a tissue, and 5 in 100 beyond 2.4, too many to be warned of.
DEVIATIONS = 3
# ml; half the mean brain at 6 months, about that of a newborn: less is a part of a brain, or voxels of a wrong size
SMALLEST_BRAIN = sum(mean for mean, _ in SIX_MONTHS.values()) / 2
# ml; a brain whose tissues are all at the upper end of their ranges; a head has more, with its skull
LARGEST_USUAL_BRAIN = sum(mean + DEVIATIONS * deviation for mean, deviation in SIX_MONTHS.values())
# share of the voxels on the faces of the volume where T1 may be above 0: where a brain is cut to its box it is 1 in
# 100, while a head is cut off at the neck, and noise in the air is everywhere
LARGEST_SHARE_OF_FACES = 0.1
# share of the brain that may be labelled background: in iSeg's labels and those of phantoms none is
LARGEST_BACKGROUND = 0.05
# share of the brain that may be without T2: on iSeg's scans T1 and T2 differ by a voxel here and there
LARGEST_WITHOUT_T2 = 0.01
# mm by which a voxel may differ from those of 1 mm that networks are trained on: synthetic scans that were interpolated
# to 0.8 and 1.5 mm lost 5 and 7 points of Dice in percent, see docs/README.md
LARGEST_DIFFERENCE_OF_VOXEL = 0.15
# difference of the two sides of a tissue as a share of their sum: hemispheres differ by a few percent, each millimetre
# by which the middle of the box misses that of the brain adds two or three, and phantoms come to 0.12
LARGEST_ASYMMETRY = 0.15


def usual_range(tissue: Tissue) -> tuple[float, float]:
    """Lowest and highest volume in ml that is no reason for a warning at 6 months."""
    mean, deviation = SIX_MONTHS[tissue]
    return mean - DEVIATIONS * deviation, mean + DEVIATIONS * deviation


def volume_out_of_range(volumes: Mapping[str, float]) -> str | None:
    """Warning of tissues that are smaller or larger than at 6 months.

    Args:
        volumes: as `scripts.results.metrics.tissue_volumes` has them.
    """
    outside = []
    for tissue in Tissue:
        (low, high), volume = usual_range(tissue), volumes[f"{tissue.name.lower()}_ml"]
        if not low <= volume <= high:
            outside.append(f"{tissue.name} {volume:.0f} ml, usual at 6 months {low:.0f} to {high:.0f}")
    return "; ".join(outside) or None


def few_foreground_voxels(t1: np.ndarray, voxel_ml: float) -> str | None:
    """Warning of a T1 (X, Y, Z) that is above 0 in less than a whole brain."""
    volume = np.count_nonzero(t1 > 0) * voxel_ml
    return f"T1 is above 0 in only {volume:.0f} ml" if volume < SMALLEST_BRAIN else None


def brain_left_unlabelled(t1: np.ndarray, prediction: np.ndarray) -> str | None:
    """Warning of a segmentation (X, Y, Z) that calls much background of where T1 is above 0."""
    share = np.count_nonzero(prediction[t1 > 0] == 0) / np.count_nonzero(t1 > 0)
    return f"{share:.0%} of the brain is labelled background" if share > LARGEST_BACKGROUND else None


def not_skull_stripped(t1: np.ndarray, voxel_ml: float) -> str | None:
    """Warning of a T1 (X, Y, Z) that is above 0 in more than a brain, or on much of the faces of its volume."""
    volume = np.count_nonzero(t1 > 0) * voxel_ml
    if volume > LARGEST_USUAL_BRAIN:
        return f"T1 is above 0 in {volume:.0f} ml, and a brain at 6 months has up to {LARGEST_USUAL_BRAIN:.0f}"
    faces = [np.moveaxis(t1, axis, 0)[[0, -1]] for axis in range(3)]
    share = sum(np.count_nonzero(face > 0) for face in faces) / sum(face.size for face in faces)
    return f"T1 is above 0 on {share:.0%} of the faces of its volume" if share > LARGEST_SHARE_OF_FACES else None


def t2_missing(t1: np.ndarray, t2: np.ndarray) -> str | None:
    """Warning of a T2 (X, Y, Z) that shows nothing where T1 is above 0."""
    share = np.mean(~has_values(t1, t2))
    return f"T2 shows nothing in {share:.0%} of the brain" if share > LARGEST_WITHOUT_T2 else None


def other_voxel_size(sizes: np.ndarray) -> str | None:
    """Warning of voxels, given by their sides in mm, that are finer or coarser than those trained on."""
    if np.abs(sizes - 1).max() <= LARGEST_DIFFERENCE_OF_VOXEL + 1e-6:
        return None
    return f"voxels of {' x '.join(f'{size:.3g}' for size in sizes)} mm: labels are less right than at 1 mm"


def left_right_asymmetry(prediction: np.ndarray) -> str | None:
    """Warning of tissues that have more on one side of the middle of the segmentation's box than on the other.

    Args:
        prediction: labels 0 to 3, (X, Y, Z), where X runs to the subject's right.
    """
    occupied = np.flatnonzero(prediction.any((1, 2)))
    if len(occupied) < 2:
        return None
    low, high = occupied[0], occupied[-1] + 1
    half = (high - low) // 2
    sides = {"left": prediction[low : low + half], "right": prediction[high - half : high]}
    uneven = []
    for tissue in Tissue:
        voxels = {side: np.count_nonzero(part == tissue) for side, part in sides.items()}
        both, larger = sum(voxels.values()), max(voxels, key=voxels.get)
        if both and 2 * voxels[larger] - both > LARGEST_ASYMMETRY * both:
            uneven.append(f"{voxels[larger] / both:.0%} of {tissue.name} is on the {larger}")
    return "; ".join(uneven) or None
