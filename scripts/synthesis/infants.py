"""T1, T2 and label of an infant's brain of up to two years, whole or a patch, made from a map of structures.

Everything is drawn anew for each image: shape, contrast, sharpness, mask. The ranges are much wider than those of real
scans, so that a real one lies within.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch.nn.functional import affine_grid, grid_sample

from scripts.data.structures import IN_HINDBRAIN, NAMES, OUTER_LABELS, TISSUE_OF
from scripts.synthesis.fields import blurred, smooth_field, with_thick_slices
from scripts.synthesis.structures import PERCENT, StructureMap
from scripts.tissues import Tissue

# ml of the whole brain, from birth to two years; about 790 at 3 months and 1,040 at 9
VOLUME = (550, 1200)
# of CSF in the brain, and of WM in GM and WM; at 6 months 0.22 and 0.40
CSF_SHARE = (0.13, 0.31)
WM_OF_TISSUE = (0.34, 0.52)
SULCAL, CORTEX, WHITE = (NAMES.index(name) + 1 for name in ("CSF around the brain", "cortex", "cerebral white matter"))


@dataclass(frozen=True, eq=False)
class Shape:
    """The shape of a brain or a part of it.

    Attributes:
        shares: of CSF, GM and WM in each voxel, with sum 1, float32 (3, X, Y, Z).
        nearest: int64 (3, X, Y, Z), see `StructureMap`.
        outer: int64 (X, Y, Z), see `StructureMap`.
        depth: mm from the surface of white matter, negative in grey matter, float32 (X, Y, Z).
        fluid: mm from the surface of GM and WM, negative within, float32 (X, Y, Z).
        outside: mm from the surface of the brain, negative inside, float32 (X, Y, Z).
        sizes: share of each structure in the whole brain, by number.
    """

    shares: torch.Tensor
    nearest: torch.Tensor
    outer: torch.Tensor
    depth: torch.Tensor
    fluid: torch.Tensor
    outside: torch.Tensor
    sizes: np.ndarray

    @property
    def label(self) -> torch.Tensor:
        """Tissue with the largest share, uint8 (X, Y, Z); 0 outside the brain."""
        return ((self.shares.argmax(0) + 1) * (self.outside < 0)).to(torch.uint8)


def draw_shape(source: StructureMap, rng: np.random.Generator, size: Sequence[int] | None = None) -> Shape:
    """Draw a shape with voxels of 1 mm, turned, bent, and with size and tissue shares of an infant's brain.

    Args:
        source: the map of structures.
        rng: the source of all randomness.
        size: voxels of a patch around a random voxel of the brain; the whole brain by default.
    """
    voxels = np.array(source.shape)
    patch = size is not None
    scales = np.cbrt(1000 * rng.uniform(*VOLUME) / source.sizes.sum()) * rng.uniform(0.94, 1.06, 3)
    turn = Rotation.from_euler("xyz", rng.normal(0, 7, 3), degrees=True).as_matrix()
    if not patch:
        size = [int(side) for side in np.ceil(np.abs(turn) @ (voxels * scales))]
        centre = (voxels - 1) / 2
    else:
        # in the bounding box one voxel in two is of the brain
        while True:
            centre = rng.uniform(0, voxels - 1)
            if source.boundaries[(2, *np.rint(centre).astype(int))] < 0:
                break
    where = torch.stack(
        torch.meshgrid(*(torch.arange(side, dtype=torch.float32) - (side - 1) / 2 for side in size), indexing="ij")
    )
    where = torch.einsum("ij,jxyz->ixyz", torch.from_numpy((turn.T / scales[:, None]).astype(np.float32)), where)
    where += torch.from_numpy(centre.astype(np.float32))[:, None, None, None]
    where += rng.uniform(0, 2.0) * smooth_field(rng, size, rng.uniform(10, 24), 3)
    boundaries, nearest, outer = _sampled(source, where)
    factor = float(np.prod(scales) ** (1 / 3))
    white, tissue, brain = boundaries * factor

    # a thicker cortex closes sulci and narrows ventricles; in some places it is thinner and they open
    csf, wm = rng.uniform(*CSF_SHARE), rng.uniform(*WM_OF_TISSUE)
    places = smooth_field(rng, size, rng.uniform(8, 30), 2)
    wanted = factor * np.interp(1 - csf, PERCENT, source.tissue_quantiles)
    tissue = tissue - float(np.clip(wanted, -0.7, 1.5)) - float(rng.uniform(0, 0.5)) * places[0]
    wanted = factor * np.interp(wm, PERCENT, source.white_quantiles)
    cortical = (nearest[1] == CORTEX) & (nearest[2] == WHITE)
    white = white - cortical * (float(np.clip(wanted, -0.8, 0.8)) + float(rng.uniform(0, 0.3)) * places[1])
    sizes = source.sizes.astype(float)
    if rng.random() < 0.5:
        hindbrain = torch.from_numpy(IN_HINDBRAIN)
        closest = torch.where(white < 0, nearest[2], nearest[1])
        brain = torch.where(hindbrain[closest], torch.maximum(brain, torch.tensor(6.0)), brain)
        sizes *= ~IN_HINDBRAIN
    for which, share in zip(Tissue, (csf, (1 - csf) * (1 - wm), (1 - csf) * wm), strict=True):
        of_which = np.equal(TISSUE_OF, which)
        sizes[of_which] *= share / sizes[of_which].sum()
    of_tissue, of_white = (torch.clamp(0.5 - boundary, 0, 1) for boundary in (tissue, white))
    shares = torch.stack([1 - of_tissue, of_tissue * (1 - of_white), of_tissue * of_white])
    return Shape(shares, nearest, outer, -white, tissue, brain, sizes)


def _sampled(source: StructureMap, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boundaries, nearest structures and outer labels at positions in voxels, (3, X, Y, Z), also outside."""
    last = torch.tensor(source.shape, dtype=torch.float32)[:, None, None, None] - 1
    where = torch.minimum(where.clamp(min=0), last)
    start = where.amin(dim=(1, 2, 3)).floor().long()
    stop = where.amax(dim=(1, 2, 3)).ceil().long() + 1
    box = tuple(slice(int(first), int(end)) for first, end in zip(start, stop, strict=True))
    local = where - start[:, None, None, None]
    length = (stop - start - 1).clamp(min=1)[:, None, None, None]
    grid = (2 * local / length - 1).permute(1, 2, 3, 0).flip(-1)[None]
    boundaries = torch.from_numpy(source.boundaries[(slice(None), *box)].astype(np.float32))[None]
    boundaries = grid_sample(boundaries, grid, padding_mode="border", align_corners=True)[0]
    x, y, z = local.round().long()
    nearest, outer = (
        torch.from_numpy(values)[..., x, y, z].long()
        for values in (source.nearest[(slice(None), *box)], source.outer[box])
    )
    return boundaries, nearest, outer


@dataclass(frozen=True, eq=False)
class Scan:
    """T1 and T2 of a shape.

    Attributes:
        image: float32 (2, X, Y, Z), positive inside the mask and 0 outside; grey matter's deviation is about 1.
        label: uint8 (X, Y, Z); 0 outside the mask.
        mean, deviation: those of a whole brain in each channel, (2,).
    """

    image: torch.Tensor
    label: torch.Tensor
    mean: np.ndarray
    deviation: np.ndarray

    def normalized(self) -> torch.Tensor:
        """The image as `NormalizeByT1Maskd` would make it from a whole brain, (2, X, Y, Z)."""
        mean, deviation = (torch.from_numpy(value.astype(np.float32)) for value in (self.mean, self.deviation))
        return (self.image - mean[:, None, None, None]) / deviation[:, None, None, None]


def _tissue_means(rng: np.random.Generator) -> np.ndarray:
    """Mean of CSF, GM and WM in T1 and T2, (2, 3), in deviations from GM."""
    fluid = np.array([-rng.uniform(2, 9), rng.uniform(2, 14)])
    kind = rng.random()
    if kind < 0.65:  # as from birth to two years: WM gets brighter in T1 and darker in T2 together
        age = rng.uniform(-0.6, 2.2)
        white = np.array([age, 0.95 - 1.1 * age + rng.normal(0, 0.35)]) * rng.uniform(0.3, 1.5)
    elif kind < 0.9:
        white = np.array([rng.uniform(-0.8, 2.6), rng.uniform(-2.2, 1.6)]) * rng.choice([1, 2], p=[0.7, 0.3])
    else:
        white = rng.normal(0, 1.8, 2)
        fluid *= rng.choice([1, -1], 2, p=[0.8, 0.2])
    return np.stack([fluid, np.zeros(2), white], axis=1)


def draw_scan(shape: Shape, rng: np.random.Generator) -> Scan:
    """Draw T1 and T2 of a shape: its contrast, sharpness, noise, bias field and mask."""
    size = shape.outside.shape
    means = _tissue_means(rng)
    by_structure = means[:, TISSUE_OF.astype(int) - 1]
    scatter = rng.normal(0, rng.uniform(0.1, 0.7), by_structure.shape)
    scatter[:, [CORTEX, WHITE]] = 0  # these two are the reference
    by_structure = by_structure + scatter
    # around the brain, CSF mixes with membranes and vessels, and is seldom as clear as in the ventricles
    by_structure[:, SULCAL] *= rng.uniform(0.3, 1)
    by_structure[:, 0] = 0

    # myelination changes both contrasts, against each other in most
    fields = smooth_field(rng, size, rng.uniform(8, 30), 6) * float(rng.uniform(0.1, 0.6))
    depth = shape.depth.clamp(0, 9) / 3 - 0.7
    ripeness = smooth_field(rng, size, rng.uniform(15, 40))[0] * float(rng.uniform(0, 0.6))
    myelin = fields[0] + ripeness + float(rng.uniform(-0.1, 0.8)) * depth
    myelin_effect = np.array([rng.uniform(0, 1.2), -rng.uniform(0, 1.2)]) * rng.choice([1, -1], 2, p=[0.85, 0.15])
    # white matter under the cortex myelinates last, and narrow sulci are never seen in full
    kept = [_contrast_by_depth(depth, rng) for depth in (shape.fluid, shape.depth)]
    shares = shape.shares * torch.stack([kept[0], torch.ones_like(kept[0]), kept[1]])
    # CSF differs by flow, and near the dura
    flow = smooth_field(rng, size, rng.uniform(5, 20), 2) * float(rng.uniform(0, 1.5))
    rim = (
        torch.exp(shape.outside.clamp(max=0) / float(rng.uniform(0.2, 2.5)))
        * shape.shares[0]
        * float(rng.random() < 0.5)
    )
    structures = torch.from_numpy(by_structure.astype(np.float32))
    outer = torch.from_numpy(rng.normal(0, 3, (2, len(OUTER_LABELS) + 1)).astype(np.float32))
    texture = smooth_field(rng, size, rng.uniform(1.5, 3.5), 2)
    texture *= float(rng.choice([0, rng.uniform(0, 0.5)], p=[0.5, 0.5]))
    vessels = _vessels(shape, rng) if rng.random() < 0.4 else None
    # averages of many children, and scans in which one moved, are blurred most near the surface
    softness = torch.clamp(1 + shape.outside / float(rng.uniform(5, 50)), 0, 1)
    softness = softness * float(rng.choice([0, rng.uniform(0.5, 1)], p=[0.65, 0.35]))
    noise = float(rng.choice([0, rng.uniform(0, 1.2)], p=[0.45, 0.55]))
    edge = torch.clamp(0.5 - shape.outside, 0, 1)
    channels = []
    for channel in range(2):
        values = (shares * structures[channel][shape.nearest]).sum(0)
        values = values + shares[2] * (float(myelin_effect[channel]) * myelin + fields[1 + channel])
        values = values + shares[1] * fields[3 + channel] + shares[0] * flow[channel] + 0.7 * fields[5]
        values = values + rim * (float(rng.normal(0, 3)) - values)
        values = edge * values + (1 - edge) * outer[channel][shape.outer]
        if vessels is not None:
            values = values + vessels * (float(rng.normal(0, 4)) - values)
        values = values[None] + texture[channel]
        values, soft = blurred(values, float(rng.uniform(0.3, 1.0))), blurred(values, float(rng.uniform(1.0, 2.0)))
        values = values + softness * (soft - values)
        if rng.random() < 0.15:
            values = with_thick_slices(values, int(rng.integers(3)), float(rng.uniform(1.3, 3)))
        if channel and rng.random() < 0.3:
            values = _shifted(values, rng.uniform(-1, 1, 3))
        channels.append(values[0])
    image = torch.stack(channels)
    image = image + noise * torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))

    mean, deviation = _of_whole_brain(image, shape, by_structure)
    deviation *= rng.uniform(0.92, 1.08, 2)
    # the level of grey matter above 0, where air is
    level = np.maximum(rng.uniform(5, 14, 2), rng.uniform(0.5, 3, 2) - by_structure.min(axis=1))
    bias = 1 + float(rng.uniform(0, 0.06)) * smooth_field(rng, size, 40, 2)
    image = (image + torch.from_numpy(level.astype(np.float32))[:, None, None, None]) * bias
    mask = _mask(shape, rng)
    label = shape.label * mask
    return Scan(image.clamp(min=0.05) * mask, label, mean + level, deviation)


def _of_whole_brain(image: torch.Tensor, shape: Shape, by_structure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel in the whole brain, (2,), also if the image is of a part of it.

    Structures that the part doesn't show count with their mean before blur.
    """
    inside = shape.outside < 0
    structure = shape.nearest.gather(0, shape.shares.argmax(0, keepdim=True))[0][inside].numpy()
    voxels = np.bincount(structure, minlength=len(TISSUE_OF))
    means, squares = by_structure.copy(), by_structure**2
    for channel, values in enumerate(image[:, inside].double().numpy()):
        for moment, power in ((means, 1), (squares, 2)):
            total = np.bincount(structure, values**power, minlength=len(TISSUE_OF))
            moment[channel] = np.where(voxels, total / np.maximum(voxels, 1), moment[channel])
    shares = shape.sizes / shape.sizes.sum()
    return means @ shares, np.sqrt(squares @ shares - (means @ shares) ** 2)


def _contrast_by_depth(depth: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Share of a tissue's contrast to GM that is left at a depth in mm below its surface, (X, Y, Z)."""
    lost = float(rng.choice([0, rng.uniform(0.3, 1)], p=[0.25, 0.75]))
    return 1 - lost * torch.exp(-depth.clamp(min=0) / float(rng.uniform(0.4, 2.5)))


def _vessels(shape: Shape, rng: np.random.Generator) -> torch.Tensor:
    """Share of each voxel that is a vessel in the CSF, (X, Y, Z): curves where two random fields are both 0."""
    first, second = smooth_field(rng, shape.outside.shape, rng.uniform(6, 12), 2).abs()
    return torch.clamp(1 - 8 * (first + second), 0, 1) * shape.shares[0]


def _shifted(image: torch.Tensor, shift: np.ndarray) -> torch.Tensor:
    """An image (1, X, Y, Z) shifted by voxels along each axis."""
    theta = torch.eye(3, 4)[None]
    theta[0, :, 3] = torch.from_numpy(2 * shift[::-1] / np.array(image.shape[:0:-1])).float()
    grid = affine_grid(theta, [1, 1, *image.shape[1:]], align_corners=False)
    return grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]


def _mask(shape: Shape, rng: np.random.Generator) -> torch.Tensor:
    """Where the scan shows something, (X, Y, Z): the brain, in some scans too tight or too wide."""
    kind = rng.random()
    if kind < 0.75:
        margin = rng.uniform(-0.5, 0.5)
    elif kind < 0.9:
        margin = rng.uniform(-2, 0)
    else:
        margin = rng.uniform(0, 4)
    rough = rng.uniform(0, 1) * smooth_field(rng, shape.outside.shape, rng.uniform(4, 16))[0]
    return shape.outside < margin + (rough if kind >= 0.75 else 0)


def infant_subject(source: StructureMap, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return `T1`, `T2` (int16, above 0 inside the mask) and `label` (uint8) of a whole brain, (X, Y, Z), 1 mm."""
    scan = draw_scan(draw_shape(source, rng), rng)
    t1, t2 = np.rint(scan.image.numpy() * 30).astype(np.int16)
    return {"T1": t1, "T2": t2, "label": scan.label.numpy()}
