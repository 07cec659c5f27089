"""Warnings of report.html: what is unusual about a subject, and the thresholds."""

from collections.abc import Mapping

import numpy as np

from scripts.data.alignment import has_values
from scripts.data.checks import exchanged, extreme_voxels
from scripts.tissues import Tissue

# ml, mean and standard deviation as reported for these subjects; this project hasn't measured them
SOURCE = "the ten training subjects of iSeg-2017"
SIX_MONTHS = {Tissue.CSF: (170, 14), Tissue.GM: (380, 40), Tissue.WM: (246, 39)}
# Ten subjects leave mean and deviation uncertain. By the prediction interval of a normal sample of ten, a tissue lies
# beyond 3 deviations in 2 of 100 such children, and beyond 2.4 in 5, which would be too many warnings.
DEVIATIONS = 3
# ml; half the mean brain at 6 months, about a newborn's: less is part of a brain, or has the wrong voxel size
SMALLEST_BRAIN = sum(mean for mean, _ in SIX_MONTHS.values()) / 2
# ml; a brain with every tissue at the upper end of its range; a head with its skull has more
LARGEST_USUAL_BRAIN = sum(mean + DEVIATIONS * deviation for mean, deviation in SIX_MONTHS.values())
# share of the voxels on the faces of the volume where T1 may be above 0: 1 in 100 for a brain cut to its box; a head is
# cut off at the neck, and noise in the air is everywhere
LARGEST_SHARE_OF_FACES = 0.1
# mm² of a brain found in a raw scan that may lie on the faces of the volume
LARGEST_AT_EDGE = 200
# share of the brain that may be labelled background: none is in iSeg's labels and in those of phantoms
LARGEST_BACKGROUND = 0.05
# share of the brain that may lack T2: on iSeg's scans T1 and T2 differ by a voxel here and there
LARGEST_WITHOUT_T2 = 0.01
# mm by which a voxel may differ from the 1 mm of the training scans: synthetic scans interpolated to 0.8 and 1.5 mm
# lost 5 and 7 points of Dice in percent, see docs/README.md
LARGEST_DIFFERENCE_OF_VOXEL = 0.15
# difference between the two sides of a tissue as a share of their sum: hemispheres differ by a few percent, each
# millimetre between the middle of the box and that of the brain adds two or three, and phantoms reach 0.12
LARGEST_ASYMMETRY = 0.15


def usual_range(tissue: Tissue) -> tuple[float, float]:
    """Return the lowest and highest volume in ml that gives no warning at 6 months."""
    mean, deviation = SIX_MONTHS[tissue]
    return mean - DEVIATIONS * deviation, mean + DEVIATIONS * deviation


def find_warnings(
    scans: Mapping[str, np.ndarray],
    prediction: np.ndarray,
    volumes: Mapping[str, float],
    voxel_size: np.ndarray,
    not_registered: str | None = None,
    brain_at_edge: float | None = None,
) -> dict[str, str]:
    """Return the warnings of a subject, by kind.

    Args:
        scans: intensities of T1 and T2, or of the only one, by name, (X, Y, Z), with X running to the subject's right.
        prediction: labels 0 to 3 on the same grid.
        volumes: see `scripts.results.metrics.tissue_volumes`.
        voxel_size: sides in mm.
        not_registered: why T2 doesn't seem to be registered to T1, if so.
        brain_at_edge: mm² of the brain on the faces of the volume, if the brain was found in a raw scan.
    """
    voxel_ml = float(voxel_size.prod()) / 1000
    name, first = next(iter(scans.items()))
    messages = {
        "one contrast": one_contrast(name) if len(scans) == 1 else None,
        "volume out of range": volume_out_of_range(volumes),
        "few foreground voxels": few_foreground_voxels(first, voxel_ml, name),
        "brain left unlabelled": brain_left_unlabelled(first, prediction),
        "not skull-stripped": not_skull_stripped(first, voxel_ml, name) if brain_at_edge is None else None,
        "large brain": None if brain_at_edge is None else large_brain(first, voxel_ml),
        "brain cut off": None if brain_at_edge is None else brain_cut_off(brain_at_edge),
        "T2 missing": t2_missing(*scans.values()) if len(scans) == 2 else None,
        "T2 not registered": not_registered,
        "T1 and T2 exchanged": exchanged(*scans.values()) if len(scans) == 2 else None,
        "extreme voxels": extreme_voxels(scans),
        "voxel size": other_voxel_size(voxel_size),
        "left-right asymmetry": left_right_asymmetry(prediction),
    }
    return {kind: message for kind, message in messages.items() if message}


def volume_out_of_range(volumes: Mapping[str, float]) -> str | None:
    """Warn of tissues smaller or larger than at 6 months."""
    outside = []
    for tissue in Tissue:
        (low, high), volume = usual_range(tissue), volumes[f"{tissue.name.lower()}_ml"]
        if not low <= volume <= high:
            outside.append(f"{tissue.name} {volume:.0f} ml, usual at 6 months {low:.0f} to {high:.0f}")
    return "; ".join(outside) or None


def one_contrast(name: str) -> str:
    """Warn of a subject that was segmented from T1 or T2 alone."""
    return f"segmented from {name} alone; docs/README.md (Real infants) says what that costs"


def few_foreground_voxels(scan: np.ndarray, voxel_ml: float, name: str = "T1") -> str | None:
    """Warn of a scan, called T1 or T2, that is above 0 in less than a whole brain."""
    volume = np.count_nonzero(scan > 0) * voxel_ml
    return f"{name} is above 0 in only {volume:.0f} ml" if volume < SMALLEST_BRAIN else None


def brain_left_unlabelled(t1: np.ndarray, prediction: np.ndarray) -> str | None:
    """Warn of a segmentation that labels much of the brain background."""
    share = np.count_nonzero(prediction[t1 > 0] == 0) / np.count_nonzero(t1 > 0)
    return f"{share:.0%} of the brain is labelled background" if share > LARGEST_BACKGROUND else None


def not_skull_stripped(scan: np.ndarray, voxel_ml: float, name: str = "T1") -> str | None:
    """Warn of a scan, called T1 or T2, that is above 0 in more than a brain, or on much of the faces of its volume."""
    volume = np.count_nonzero(scan > 0) * voxel_ml
    if volume > LARGEST_USUAL_BRAIN:
        return f"{name} is above 0 in {volume:.0f} ml, and a brain at 6 months has up to {LARGEST_USUAL_BRAIN:.0f}"
    faces = [np.moveaxis(scan, axis, 0)[[0, -1]] for axis in range(3)]
    share = sum(np.count_nonzero(face > 0) for face in faces) / sum(face.size for face in faces)
    return f"{name} is above 0 on {share:.0%} of the faces of its volume" if share > LARGEST_SHARE_OF_FACES else None


def large_brain(scan: np.ndarray, voxel_ml: float) -> str | None:
    """Warn of a brain, found in a raw scan, that is larger than at 6 months."""
    volume = np.count_nonzero(scan > 0) * voxel_ml
    if volume <= LARGEST_USUAL_BRAIN:
        return None
    return f"the brain found has {volume:.0f} ml, and one at 6 months up to {LARGEST_USUAL_BRAIN:.0f}; see its outline"


def brain_cut_off(at_edge: float) -> str | None:
    """Warn of a brain, found in a raw scan, that reaches the faces of the volume, by the mm² there."""
    if at_edge <= LARGEST_AT_EDGE:
        return None
    return f"the brain found reaches the edge of the scan on {at_edge / 100:.0f} cm², so a part of it may be missing"


def t2_missing(t1: np.ndarray, t2: np.ndarray) -> str | None:
    """Warn of a T2 that shows nothing in part of the brain."""
    share = np.mean(~has_values(t1, t2))
    return f"T2 shows nothing in {share:.0%} of the brain" if share > LARGEST_WITHOUT_T2 else None


def other_voxel_size(sizes: np.ndarray) -> str | None:
    """Warn of voxels finer or coarser than those of the training scans."""
    if np.abs(sizes - 1).max() <= LARGEST_DIFFERENCE_OF_VOXEL + 1e-6:
        return None
    return f"voxels of {' x '.join(f'{size:.3g}' for size in sizes)} mm: labels are less accurate than at 1 mm"


def left_right_asymmetry(prediction: np.ndarray) -> str | None:
    """Warn of tissues with more volume on one side of the middle of the segmentation's box than on the other."""
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
