"""T1 and T2 with the contrast of a 6-month-old, made from a tissue label map.

At that age grey and white matter overlap: the share of their intensity histograms that coincides is about 0.70 in T1
and 0.87 in T2, and 0.36 between CSF and grey matter in both. Noise, texture, partial volume and bias field are drawn
first, then the tissue means are set so that these overlaps are met on the subject at hand.

White matter gets its adult contrast where it myelinates, first in the centre and last in the frontal and temporal
lobes, so its distance from grey matter varies over the brain: `Myelination` says how.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, RandBiasField, RandomizableTransform, RandRicianNoise
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter
from scipy.stats import norm

from scripts.errors import InputError
from scripts.tissues import Tissue


@dataclass(frozen=True)
class Contrast:
    """How one modality looks: histogram overlaps that it shall have, and the scale of its intensities.

    `csf_sign` and `wm_sign` say whether that tissue is brighter (1) or darker (-1) than grey matter. The three shares
    are those of the variance within a tissue, 1 together. White noise alone would be averaged away by any smoothing, so
    part of it is texture as fine as the cortex is thick, and part varies over `regional_mm`.

    `blur` is the standard deviation in voxels of the partial volume, `bias` the largest coefficient of the bias field's
    polynomials, `noise` a factor of the noise that comes after the means are set.
    """

    overlap_gm_wm: float
    overlap_csf_gm: float
    csf_sign: int
    wm_sign: int
    gm_mean: float
    standard_deviation: float
    noise_share: float = 0.82
    texture_share: float = 0.12
    regional_share: float = 0.06
    regional_mm: float = 14.0
    blur: float = 0.5
    bias: float = 0.02
    noise: float = 1.0


# of the variance over a region: what all tissues have in common, which leaves their contrast as it is
COMMON_SHARE = 0.7

# those of the phantoms: as most of their spread is noise, and their folds are smooth
T1_CONTRAST = Contrast(0.70, 0.36, csf_sign=-1, wm_sign=1, gm_mean=235, standard_deviation=26)
T2_CONTRAST = Contrast(0.87, 0.36, csf_sign=1, wm_sign=-1, gm_mean=303, standard_deviation=34)

# those on real folds, where more of the spread is that of regions, as in scans
SHARES = {"noise_share": 0.30, "texture_share": 0.10, "regional_share": 0.60}
NOMINAL_T1, NOMINAL_T2 = replace(T1_CONTRAST, **SHARES), replace(T2_CONTRAST, **SHARES)


def histogram_overlap(first: np.ndarray, second: np.ndarray, bins: int = 100) -> float:
    """Share that the histograms of two samples have in common: 1 where they are alike, 0 where they never meet.

    Args:
        first, second: intensities of two tissues, of any shape.
        bins: number of bins over the range of both.
    """
    limits = (min(first.min(), second.min()), max(first.max(), second.max()))
    shares = [np.histogram(sample, bins, limits)[0] / sample.size for sample in (first, second)]
    return float(np.minimum(*shares).sum())


def distance(overlap: float) -> float:
    """Standard deviations that two normal distributions of like width are apart if they overlap that much."""
    return -2 * norm.ppf(np.clip(overlap, 0.01, 0.99) / 2)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Gaussian random field of mean 0 and standard deviation 1, smooth over `sigma` voxels.

    Coarse fields are drawn on a coarse grid and interpolated, which is as smooth and many times faster.
    """
    step = max(1.0, sigma / 2)
    coarse = [int(np.ceil(size / step)) for size in shape]
    field = gaussian_filter(rng.standard_normal(coarse, dtype=np.float32), sigma / step, mode="wrap")
    if step > 1:
        grid = torch.from_numpy(field)[None, None]
        field = torch.nn.functional.interpolate(grid, shape, mode="trilinear", align_corners=True)[0, 0].numpy()
    return (field - field.mean()) / field.std()


def partial_volume(label: np.ndarray, sigma: float = 0.5) -> np.ndarray:
    """Share of each tissue in each brain voxel after blurring, (voxels, 3); background takes no part."""
    shares = [gaussian_filter((label == tissue).astype(np.float32), sigma)[label > 0] for tissue in Tissue]
    return np.stack(shares, axis=1) / np.sum(shares, axis=0)[:, None]


class _Draw:
    """All that is random in an image of a label map, drawn once, so that its means may still be set.

    Args:
        label: tissue labels 0 to 3, (X, Y, Z).
        contrast: the means are not taken from it.
        rng: all that is random comes from here.
        myelination: factor of the distance between WM and GM, (X, Y, Z).
    """

    def __init__(
        self, label: np.ndarray, contrast: Contrast, rng: np.random.Generator, myelination: np.ndarray | None
    ) -> None:
        self.contrast = contrast
        brain = label > 0
        self.share = partial_volume(label, contrast.blur)
        self.texture = np.sqrt(contrast.texture_share) * smooth_noise(rng, label.shape, 1.0)[brain]
        common, *own = (smooth_noise(rng, label.shape, contrast.regional_mm)[brain] for _ in range(1 + len(Tissue)))
        regional = np.sqrt(COMMON_SHARE) * common
        regional += np.sqrt(1 - COMMON_SHARE) * np.sum(self.share * np.stack(own, axis=1), axis=1)
        self.texture += np.sqrt(contrast.regional_share) * regional
        self.white = self.share[:, 2] if myelination is None else self.share[:, 2] * myelination[brain]
        bias = RandBiasField(prob=1.0, degree=3, coeff_range=(-contrast.bias, contrast.bias))
        bias.set_random_state(int(rng.integers(2**31)))
        gain = np.asarray(bias(np.ones((1, *label.shape), dtype=np.float32)))[0][brain]
        self.gain = gain / gain.mean()
        self.noise_seed = int(rng.integers(2**31))

    def intensities(self, csf: float, wm: float, noise: float = 1.0) -> np.ndarray:
        """Intensities of the brain's voxels, the means of CSF and WM that many standard deviations above GM's."""
        contrast = self.contrast
        clean = csf * self.share[:, 0] + wm * self.white + self.texture
        deviation = float(noise * np.sqrt(contrast.noise_share) * contrast.standard_deviation)
        rician = RandRicianNoise(prob=1.0, std=deviation, sample_std=False).set_random_state(self.noise_seed)
        return np.asarray(rician((contrast.gm_mean + contrast.standard_deviation * clean) * self.gain))


def six_month_image(
    label: np.ndarray,
    contrast: Contrast,
    rng: np.random.Generator,
    myelination: np.ndarray | None = None,
    fit: bool = True,
) -> np.ndarray:
    """One modality for a label map.

    Args:
        label: tissue labels 0 to 3, (X, Y, Z).
        contrast: the overlaps to be met, each to about 0.01.
        rng: all that is random comes from here.
        myelination: see `Appearance`.
        fit: whether the overlaps are met on this subject; else the tissues are as far apart as normal distributions of
            that overlap, and partial volume and myelination move them.

    Returns:
        int16 intensities in 1 to 1000 where label > 0, else 0, (X, Y, Z).
    """
    result = np.zeros(label.shape, dtype=np.int16)
    box = find_objects((label > 0).view(np.uint8))[0]  # no work outside the brain's box
    tissue = label[box][label[box] > 0]
    draw = _Draw(label[box], contrast, rng, None if myelination is None else myelination[box])
    # partial volume with CSF shifts GM, so that WM may have to lie on the other side of pure GM: added, not multiplied
    wanted = np.array([distance(contrast.overlap_csf_gm), distance(contrast.overlap_gm_wm)])
    signs = np.array([contrast.csf_sign, contrast.wm_sign])
    offsets = wanted.copy()
    for _ in range(8 if fit else 0):
        image = draw.intensities(*(signs * offsets))
        gm = image[tissue == Tissue.GM]
        for i, other in enumerate((image[tissue == Tissue.CSF], image[tissue == Tissue.WM])):
            right_side = np.sign(other.mean() - gm.mean()) * signs[i]
            offsets[i] += wanted[i] - right_side * distance(histogram_overlap(gm, other))
    image = draw.intensities(*(signs * offsets), contrast.noise) * rng.uniform(0.85, 1.15)
    result[label > 0] = np.clip(np.rint(image), 1, 1000)
    return result


@dataclass(frozen=True, eq=False)
class Appearance:
    """How a subject looks.

    Attributes:
        t1, t2: the contrasts.
        myelination: factor of the distance between WM and GM in both, (X, Y, Z): 1 on average, 0 where they look alike,
            negative where the brighter of the two is the darker one.
        fit: see `six_month_image`.
    """

    t1: Contrast
    t2: Contrast
    myelination: np.ndarray
    fit: bool = False


def _position(shape: tuple[int, ...]) -> np.ndarray:
    """Voxels right, in front and on top of the middle of the volume, (3, X, Y, Z)."""
    grid = np.meshgrid(*(np.arange(size, dtype=np.float32) - (size - 1) / 2 for size in shape), indexing="ij")
    return np.stack(grid)


def nominal(label: np.ndarray, rng: np.random.Generator) -> Appearance:
    """As the mean 6-month-old: the centre is myelinated, the frontal, temporal and occipital poles are hardly.

    Args:
        label: tissue labels 0 to 3 of a whole brain, (X, Y, Z), axes to the right, the front and the top.
        rng: all that is random comes from here.
    """
    box = find_objects((label > 0).view(np.uint8))[0]
    half = np.float32([(side.stop - side.start) / 2 for side in box])
    middle = np.float32([(side.stop + side.start - 1) / 2 for side in box]) - (np.float32(label.shape) - 1) / 2
    middle[1] -= 0.15 * half[1]  # the back is ahead of the front
    position = (_position(label.shape) - middle[:, None, None, None]) / half[:, None, None, None]
    outward = np.sqrt(np.sum(position**2, axis=0))
    myelination = 1 + 0.6 * (1 - 2 * np.clip(outward, 0, 1)) + 0.15 * smooth_noise(rng, label.shape, 15.0)
    myelination /= myelination[label == Tissue.WM].mean()
    return Appearance(NOMINAL_T1, NOMINAL_T2, myelination, fit=True)


def varied(label: np.ndarray, rng: np.random.Generator) -> Appearance:
    """Of a wide family around the nominal one: contrast that varies in strength, with place and depth, and in sign.

    Args:
        label: tissue labels 0 to 3 of a brain or a patch of one, (X, Y, Z).
        rng: all that is random comes from here.
    """
    depth = np.minimum(distance_transform_edt(label == Tissue.WM), 6).astype(np.float32) / 3 - 1
    direction = rng.standard_normal(3).astype(np.float32)
    direction *= rng.uniform(0, 1) / np.linalg.norm(direction) / 50  # mm from the middle to the end of a brain
    myelination = 1 + np.einsum("i,ixyz->xyz", direction, _position(label.shape))
    myelination += rng.uniform(0, 0.6) * smooth_noise(rng, label.shape, rng.uniform(8, 30))
    myelination += rng.uniform(-0.1, 0.5) * depth
    sign = rng.choice([1, -1], p=[0.85, 0.15])

    def contrast(usual: Contrast, most_alike: float) -> Contrast:
        noise, texture, regional = rng.dirichlet([1.5, 1.0, 1.0])
        return Contrast(
            overlap_gm_wm=rng.uniform(0.45, most_alike),
            overlap_csf_gm=rng.uniform(0.10, 0.55),
            csf_sign=usual.csf_sign,
            wm_sign=usual.wm_sign * sign,
            gm_mean=usual.gm_mean,
            standard_deviation=usual.gm_mean / rng.uniform(5, 13),
            noise_share=noise,
            texture_share=texture,
            regional_share=regional,
            regional_mm=rng.uniform(6, 30),
            blur=rng.uniform(0.3, 0.8),
            bias=rng.uniform(0, 0.05),
        )

    return Appearance(contrast(T1_CONTRAST, 0.92), contrast(T2_CONTRAST, 0.97), myelination)


def patchwork(label: np.ndarray, rng: np.random.Generator) -> Appearance:
    """Never trained on: regions with edges, each with a strength of its own, the sign reversed in a third of them.

    Args:
        label: tissue labels 0 to 3 of a whole brain, (X, Y, Z).
        rng: all that is random comes from here.
    """
    regions = 12
    brain = np.argwhere(label > 0)
    seeds = brain[rng.choice(len(brain), regions, replace=False)]
    around = np.ones(label.shape, dtype=bool)
    around[tuple(seeds.T)] = False
    nearest = distance_transform_edt(around, return_distances=False, return_indices=True)
    number = np.zeros(label.shape, dtype=int)
    number[tuple(seeds.T)] = range(regions)
    strength = rng.uniform(0.5, 1.5, regions).astype(np.float32)
    strength[: regions // 3] *= -1
    return Appearance(NOMINAL_T1, NOMINAL_T2, gaussian_filter(strength[number[tuple(nearest)]], 2.0))


def six_month_subject(label: np.ndarray, appearance: Appearance, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """T1 and T2 by these names, as `six_month_image`."""
    return {
        name: six_month_image(label, contrast, rng, appearance.myelination, appearance.fit)
        for name, contrast in (("T1", appearance.t1), ("T2", appearance.t2))
    }


APPEARANCES = {"nominal": nominal, "varied": varied, "patchwork": patchwork}

# shares of the brain at 6 months: CSF, GM, WM
_SHARES = np.float32([0.22, 0.47, 0.31])


def normalized_patch(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """T1 and T2 of a patch of a label map, `varied` and normalised as its whole brain would be.

    The mean and the spread of the whole brain are those expected of the shares of tissue at 6 months.

    Args:
        label: tissue labels 0 to 3, (X, Y, Z).
        rng: all that is random comes from here.

    Returns:
        float32 (2, X, Y, Z).
    """
    brain = label > 0
    look = varied(label, rng)
    # a patch lies anywhere between the ends of a brain
    myelination = look.myelination + rng.uniform(-0.8, 0.8)
    result = np.empty((2, *label.shape), dtype=np.float32)
    for values, contrast in zip(result, (look.t1, look.t2), strict=True):
        csf = contrast.csf_sign * distance(contrast.overlap_csf_gm)
        wm = contrast.wm_sign * distance(contrast.overlap_gm_wm)
        means = np.float32([csf, 0, wm])
        mean = float(_SHARES @ means)
        spread = float(np.sqrt(1 + _SHARES @ (means - mean) ** 2)) * rng.uniform(0.9, 1.1)
        gm_level = contrast.gm_mean / contrast.standard_deviation
        values[...] = -(gm_level + mean) / spread
        if brain.any():
            intensities = _Draw(label, contrast, rng, myelination).intensities(csf, wm)
            values[brain] = (intensities / contrast.standard_deviation - gm_level - mean) / spread
    return result


class RandSixMonthImaged(RandomizableTransform, MapTransform):
    """Replace the image of a patch by a synthetic one of its label, new at each draw: see `normalized_patch`.

    Args:
        keys: the image, (2, X, Y, Z).
        label_key: its label, 0 to 3, (1, X, Y, Z).
        prob: share of the patches that are replaced.
        allow_missing_keys: whether an image may be missing.

    Raises:
        InputError: `prob`, which is the setting synthetic_share, isn't from 0 to 1.
    """

    def __init__(
        self, keys: Hashable, label_key: Hashable = "label", prob: float = 1.0, allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        if isinstance(prob, bool) or not isinstance(prob, int | float) or not 0 <= prob <= 1:
            raise InputError(f"--synthetic_share {prob}: must be a number from 0 to 1")
        RandomizableTransform.__init__(self, prob)
        self.label_key = label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        self.randomize(None)
        if self._do_transform:
            label = torch.as_tensor(result[self.label_key])[0].cpu().numpy()
            rng = np.random.default_rng(self.R.randint(2**32, dtype=np.uint64))
            for key in self.key_iterator(result):
                result[key] = torch.from_numpy(normalized_patch(label, rng)).to(result[key])
        return result
