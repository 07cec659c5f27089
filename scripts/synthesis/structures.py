"""Label maps of heads with all structures, and smooth boundaries between the tissues."""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter, label

from scripts.data.structures import STRUCTURES, TISSUE_OF, structures_and_outer
from scripts.data.volumes import read_volume
from scripts.synthesis.label_maps import label_map_name, require_usable
from scripts.tissues import Tissue

# of the quantiles of a map
PERCENT = np.linspace(0, 1, 101)
# mm around the brain that are kept
RIM = 10
# mm from the brain's tissue to the CSF around it that is kept; beyond it is the spinal canal
CSF_AROUND = 12


@dataclass(frozen=True, eq=False)
class StructureMap:
    """The shape of a head, cropped to the brain and RIM around it, on axes to the right, the front and the top.

    The three boundaries are signed distances in voxels, float16, (3, X, Y, Z), negative inside, smoothed a little:
    of WM against GM, also where there is CSF; of GM and WM against all else; of the brain against all else. So tissue
    can be moved by parts of a voxel, and each voxel has shares of tissues.

    Attributes:
        name: of the file, without suffix.
        boundaries: see above.
        nearest: uint8 (3, X, Y, Z), number of the nearest structure that is CSF, GM and WM.
        outer: uint8 (X, Y, Z), label of the head around the brain, from 1, by its place in OUTER_LABELS; 0 elsewhere.
        sizes: voxels of each structure, by number.
        tissue_quantiles, white_quantiles: percentiles, 0 to 100, of the second boundary over the brain and of the first
            over GM and WM: by how much to move it so that the tissue within gets a given share.
    """

    name: str
    boundaries: np.ndarray
    nearest: np.ndarray
    outer: np.ndarray
    sizes: np.ndarray
    tissue_quantiles: np.ndarray
    white_quantiles: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Sides in voxels."""
        return self.outer.shape


def _signed(inside: np.ndarray) -> np.ndarray:
    """Distance in voxels to the boundary, negative inside."""
    return np.where(inside, 0.5 - distance_transform_edt(inside), distance_transform_edt(~inside) - 0.5)


def read_head(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a label map of a head or a brain, on axes to the right, the front and the top.

    CSF of the spinal canal and single voxels in the neck aren't of the brain.

    Args:
        path: Analyze or NIfTI, with FreeSurfer's numbers, or with those of three tissues (0 to 3 or iSeg's values).

    Returns:
        uint8 (X, Y, Z) each: the number of the structure, 0 outside the brain; the label of the head around the brain,
        from 1, by its place in OUTER_LABELS; where the spinal CSF is.

    Raises:
        InputError: as `read_volume`, a number isn't known, a tissue is missing, or the voxels aren't near 1 mm.
    """
    path = Path(path)
    values, affine = read_volume(str(path))
    structures, outer = structures_and_outer(values, path)
    require_usable(path, TISSUE_OF[structures], affine)
    structures, outer = (
        np.asarray(nib.as_closest_canonical(nib.Nifti1Image(each, affine)).dataobj) for each in (structures, outer)
    )
    parts, _ = label(structures)
    brain = parts == np.bincount(parts[parts > 0]).argmax()
    brain &= distance_transform_edt(TISSUE_OF[structures * brain] <= Tissue.CSF) <= CSF_AROUND
    return structures * brain, outer, ((structures > 0) & ~brain).astype(np.uint8)


def read_structure_map(path: str | Path) -> StructureMap:
    """Read a label map of a head or a brain, and measure its boundaries.

    Args:
        path: see `read_head`.

    Raises:
        InputError: as `read_head`.
    """
    structures, outer, _ = read_head(path)
    structures, outer = np.pad(structures, RIM), np.pad(outer, RIM)
    box = find_objects((structures > 0).view(np.uint8))[0]
    box = tuple(slice(side.start - RIM, side.stop + RIM) for side in box)
    structures, outer = structures[box], outer[box]
    tissue = TISSUE_OF[structures]
    distances, nearest = [], []
    for which in Tissue:
        distance, indices = distance_transform_edt(tissue != which, return_indices=True)
        distances.append(distance)
        nearest.append(structures[tuple(indices)])
    white = distances[Tissue.WM - 1] - distances[Tissue.GM - 1]
    # between two voxels the boundary is half a voxel from each centre; in CSF it lies where both are as near
    white = np.where(tissue > Tissue.CSF, np.sign(white) * (np.abs(white) - 0.5), white)
    boundaries = np.stack(
        [gaussian_filter(each, 0.4) for each in (white, _signed(tissue > Tissue.CSF), _signed(tissue > 0))]
    )
    return StructureMap(
        name=label_map_name(Path(path)),
        boundaries=boundaries.astype(np.float16),
        nearest=np.stack(nearest),
        outer=outer,
        sizes=np.bincount(structures[structures > 0], minlength=len(STRUCTURES) + 1),
        tissue_quantiles=np.quantile(boundaries[1, tissue > 0], PERCENT),
        white_quantiles=np.quantile(boundaries[0, tissue > Tissue.CSF], PERCENT),
    )
