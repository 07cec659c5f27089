"""T1 and T2 with the contrast of a 6-month-old, made from a tissue label map.

At that age the intensity histograms of grey and white matter overlap by about 0.70 in T1 and 0.87 in T2, those of CSF
and grey matter by 0.36 in both. Noise, texture, partial volume and bias field are drawn first. Then the tissue means
are set so that the subject has these overlaps.

White matter gets its adult contrast with myelination, first in the centre and last in the frontal and temporal lobes.
So its contrast to grey matter varies over the brain, see `Appearance.myelination`.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, RandBiasField, RandomizableTransform, RandRicianNoise
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter
from scipy.stats import norm

from scripts.errors import require_share
from scripts.tissues import Tissue


@dataclass(frozen=True)
class Contrast:
    """Contrast of one modality: the histogram overlaps to reach, and the scale of its intensities.

    Attributes:
        overlap_gm_wm, overlap_csf_gm: histogram overlaps.
        csf_sign, wm_sign: whether the tissue is brighter (1) or darker (-1) than grey matter.
        gm_mean: mean intensity of grey matter.
        standard_deviation: of the intensities within a tissue.
        noise_share, texture_share, regional_share: shares of the variance within a tissue, with sum 1. Smoothing
            would remove white noise alone. So part of the variance is texture as fine as the cortex is thick, and part
            varies over `regional_mm`.
        regional_mm: smoothness of the regional part.
        blur: standard deviation of the partial volume effect, in voxels.
        bias: largest coefficient of the bias field's polynomials.
        noise: factor of the noise, applied after the means are set.
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


# part of the regional variance that all tissues share; it leaves their contrast unchanged
COMMON_SHARE = 0.7

# of the phantoms, whose folds are smooth: most of the variance is noise
T1_CONTRAST = Contrast(0.70, 0.36, csf_sign=-1, wm_sign=1, gm_mean=235, standard_deviation=26)
T2_CONTRAST = Contrast(0.87, 0.36, csf_sign=1, wm_sign=-1, gm_mean=303, standard_deviation=34)

# of label maps of real brains: more of the variance is regional, as in scans
SHARES = {"noise_share": 0.30, "texture_share": 0.10, "regional_share": 0.60}
NOMINAL_T1, NOMINAL_T2 = replace(T1_CONTRAST, **SHARES), replace(T2_CONTRAST, **SHARES)


def histogram_overlap(first: np.ndarray, second: np.ndarray, bins: int = 100) -> float:
    """Return the overlap of the histograms of two samples, from 0 (disjoint) to 1 (equal).

    Args:
        first, second: intensities of two tissues, of any shape.
        bins: number of bins over the range of both.
    """
    limits = (min(first.min(), second.min()), max(first.max(), second.max()))
    shares = [np.histogram(sample, bins, limits)[0] / sample.size for sample in (first, second)]
    return float(np.minimum(*shares).sum())


def separation(overlap: float) -> float:
    """Return by how many standard deviations two normal distributions of equal width and this overlap are apart."""
    return -2 * norm.ppf(np.clip(overlap, 0.01, 0.99) / 2)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Return a Gaussian random field of mean 0 and standard deviation 1, smooth over `sigma` voxels.

    Smooth fields are drawn on a coarse grid and interpolated, which is many times faster.
    """
    step = max(1.0, sigma / 2)
    coarse = [int(np.ceil(size / step)) for size in shape]
    field = gaussian_filter(rng.standard_normal(coarse, dtype=np.float32), sigma / step, mode="wrap")
    if step > 1:
        grid = torch.from_numpy(field)[None, None]
        field = torch.nn.functional.interpolate(grid, shape, mode="trilinear", align_corners=True)[0, 0].numpy()
    return (field - field.mean()) / field.std()


def partial_volume(label: np.ndarray, sigma: float = 0.5) -> np.ndarray:
    """Return the share of each tissue in each brain voxel after blurring, (voxels, 3); background doesn't count."""
    shares = [gaussian_filter((label == tissue).astype(np.float32), sigma)[label > 0] for tissue in Tissue]
    return np.stack(shares, axis=1) / np.sum(shares, axis=0)[:, None]


class _RandomFields:
    """The random parts of an image, drawn once; the tissue means are set afterwards.

    Args:
        label: tissue labels 0 to 3, (X, Y, Z).
        contrast: its overlaps and signs, which set the means, are not used.
        rng: the source of all randomness.
        myelination: factor of the difference between WM and GM, (X, Y, Z).
    """

    def __init__(
        self, label: np.ndarray, contrast: Contrast, rng: np.random.Generator, myelination: np.ndarray | None
    ) -> None:
        self.contrast = contrast
        brain = label > 0
        self.share = partial_volume(label, contrast.blur)
        self.texture = np.sqrt(contrast.texture_share) * smooth_noise(rng, label.shape, 1.0)[brain]
        common, *by_tissue = (
            smooth_noise(rng, label.shape, contrast.regional_mm)[brain] for _ in range(1 + len(Tissue))
        )
        regional = np.sqrt(COMMON_SHARE) * common
        regional += np.sqrt(1 - COMMON_SHARE) * np.sum(self.share * np.stack(by_tissue, axis=1), axis=1)
        self.texture += np.sqrt(contrast.regional_share) * regional
        self.white = self.share[:, 2] if myelination is None else self.share[:, 2] * myelination[brain]
        bias = RandBiasField(prob=1.0, degree=3, coeff_range=(-contrast.bias, contrast.bias))
        bias.set_random_state(int(rng.integers(2**31)))
        gain = np.asarray(bias(np.ones((1, *label.shape), dtype=np.float32)))[0][brain]
        self.gain = gain / gain.mean()
        self.noise_seed = int(rng.integers(2**31))

    def intensities(self, csf: float, wm: float, noise: float = 1.0) -> np.ndarray:
        """Return the intensities of the brain's voxels.

        Args:
            csf, wm: difference of the tissue's mean to that of GM, in standard deviations.
            noise: factor of the noise.
        """
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
    """Return an image of one modality for a label map.

    Args:
        label: tissue labels 0 to 3, (X, Y, Z).
        contrast: with the overlaps, which are reached to about 0.01.
        rng: the source of all randomness.
        myelination: see `Appearance`.
        fit: whether the overlaps hold on this subject. Else the tissues are as far apart as normal distributions with
            these overlaps, and partial volume and myelination change the overlaps.

    Returns:
        int16 intensities from 1 to 1000 where label > 0, else 0, (X, Y, Z).
    """
    result = np.zeros(label.shape, dtype=np.int16)
    box = find_objects((label > 0).view(np.uint8))[0]  # no work outside the brain's box
    tissue = label[box][label[box] > 0]
    fields = _RandomFields(label[box], contrast, rng, None if myelination is None else myelination[box])
    # corrections are added, not multiplied: partial volume with CSF shifts GM, so an offset may have to change its sign
    wanted = np.array([separation(contrast.overlap_csf_gm), separation(contrast.overlap_gm_wm)])
    signs = np.array([contrast.csf_sign, contrast.wm_sign])
    offsets = wanted.copy()
    for _ in range(8 if fit else 0):
        image = fields.intensities(*(signs * offsets))
        gm = image[tissue == Tissue.GM]
        for i, other in enumerate((image[tissue == Tissue.CSF], image[tissue == Tissue.WM])):
            side = np.sign(other.mean() - gm.mean()) * signs[i]  # 1 where the tissue is on the right side of GM
            offsets[i] += wanted[i] - side * separation(histogram_overlap(gm, other))
    image = fields.intensities(*(signs * offsets), contrast.noise) * rng.uniform(0.85, 1.15)
    result[label > 0] = np.clip(np.rint(image), 1, 1000)
    return result


@dataclass(frozen=True, eq=False)
class Appearance:
    """Appearance of a subject.

    Attributes:
        t1, t2: the contrasts.
        myelination: factor of the difference between WM and GM in both, (X, Y, Z): 1 on average, 0 where both look
            alike, negative where the contrast is reversed.
        fit: see `six_month_image`.
    """

    t1: Contrast
    t2: Contrast
    myelination: np.ndarray
    fit: bool = False


def _position(shape: tuple[int, ...]) -> np.ndarray:
    """Coordinates in voxels from the middle of the volume to the right, the front and the top, (3, X, Y, Z)."""
    grid = np.meshgrid(*(np.arange(size, dtype=np.float32) - (size - 1) / 2 for size in shape), indexing="ij")
    return np.stack(grid)


def nominal(label: np.ndarray, rng: np.random.Generator) -> Appearance:
    """Return the appearance of a typical 6-month-old: myelinated in the centre, hardly at the poles.

    Args:
        label: tissue labels 0 to 3 of a whole brain, (X, Y, Z), axes to the right, the front and the top.
        rng: the source of all randomness.
    """
    box = find_objects((label > 0).view(np.uint8))[0]
    half = np.float32([(side.stop - side.start) / 2 for side in box])
    middle = np.float32([(side.stop + side.start - 1) / 2 for side in box]) - (np.float32(label.shape) - 1) / 2
    middle[1] -= 0.15 * half[1]  # the back myelinates before the front
    position = (_position(label.shape) - middle[:, None, None, None]) / half[:, None, None, None]
    radius = np.sqrt(np.sum(position**2, axis=0))
    myelination = 1 + 0.6 * (1 - 2 * np.clip(radius, 0, 1)) + 0.15 * smooth_noise(rng, label.shape, 15.0)
    myelination /= myelination[label == Tissue.WM].mean()
    return Appearance(NOMINAL_T1, NOMINAL_T2, myelination, fit=True)


def varied(label: np.ndarray, rng: np.random.Generator) -> Appearance:
    """Return a random appearance around the nominal one: contrast varies in strength, in space, with depth and in sign.

    Args:
        label: tissue labels 0 to 3 of a brain or a patch, (X, Y, Z).
        rng: the source of all randomness.
    """
    depth = np.minimum(distance_transform_edt(label == Tissue.WM), 6).astype(np.float32) / 3 - 1
    direction = rng.standard_normal(3).astype(np.float32)
    direction *= rng.uniform(0, 1) / np.linalg.norm(direction) / 50  # 50 mm from the middle to the end of a brain
    myelination = 1 + np.einsum("i,ixyz->xyz", direction, _position(label.shape))
    myelination += rng.uniform(0, 0.6) * smooth_noise(rng, label.shape, rng.uniform(8, 30))
    myelination += rng.uniform(-0.1, 0.5) * depth
    sign = rng.choice([1, -1], p=[0.85, 0.15])

    def contrast(usual: Contrast, largest_overlap: float) -> Contrast:
        noise, texture, regional = rng.dirichlet([1.5, 1.0, 1.0])
        return Contrast(
            overlap_gm_wm=rng.uniform(0.45, largest_overlap),
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
    """Return an appearance unseen in training: regions with edges and random contrast, reversed in a third of them.

    Args:
        label: tissue labels 0 to 3 of a whole brain, (X, Y, Z).
        rng: the source of all randomness.
    """
    regions = 12
    brain = np.argwhere(label > 0)
    seeds = brain[rng.choice(len(brain), regions, replace=False)]
    elsewhere = np.ones(label.shape, dtype=bool)
    elsewhere[tuple(seeds.T)] = False
    nearest = distance_transform_edt(elsewhere, return_distances=False, return_indices=True)
    number = np.zeros(label.shape, dtype=int)
    number[tuple(seeds.T)] = range(regions)
    strength = rng.uniform(0.5, 1.5, regions).astype(np.float32)
    strength[: regions // 3] *= -1
    return Appearance(NOMINAL_T1, NOMINAL_T2, gaussian_filter(strength[number[tuple(nearest)]], 2.0))


def six_month_subject(label: np.ndarray, appearance: Appearance, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return `T1` and `T2` of an appearance, each as `six_month_image`."""
    return {
        name: six_month_image(label, contrast, rng, appearance.myelination, appearance.fit)
        for name, contrast in (("T1", appearance.t1), ("T2", appearance.t2))
    }


APPEARANCES = {"nominal": nominal, "varied": varied, "patchwork": patchwork}

# shares of CSF, GM and WM in the brain at 6 months
_SHARES = np.float32([0.22, 0.47, 0.31])


def normalized_patch(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return T1 and T2 of a patch of a label map with `varied` contrast, normalised like a whole brain.

    Mean and standard deviation of the whole brain are estimated from the tissue shares at 6 months.

    Args:
        label: tissue labels 0 to 3, (X, Y, Z).
        rng: the source of all randomness.

    Returns:
        float32 (2, X, Y, Z).
    """
    brain = label > 0
    appearance = varied(label, rng)
    # a patch may lie anywhere in a brain, and `varied` centres its gradient on the patch
    myelination = appearance.myelination + rng.uniform(-0.8, 0.8)
    result = np.empty((2, *label.shape), dtype=np.float32)
    for values, contrast in zip(result, (appearance.t1, appearance.t2), strict=True):
        csf = contrast.csf_sign * separation(contrast.overlap_csf_gm)
        wm = contrast.wm_sign * separation(contrast.overlap_gm_wm)
        means = np.float32([csf, 0, wm])
        mean = float(_SHARES @ means)
        spread = float(np.sqrt(1 + _SHARES @ (means - mean) ** 2)) * rng.uniform(0.9, 1.1)
        gm_level = contrast.gm_mean / contrast.standard_deviation
        values[...] = -(gm_level + mean) / spread
        if brain.any():
            intensities = _RandomFields(label, contrast, rng, myelination).intensities(csf, wm)
            values[brain] = (intensities / contrast.standard_deviation - gm_level - mean) / spread
    return result


class RandSixMonthImaged(RandomizableTransform, MapTransform):
    """Replace the image of a patch by a new synthetic image of its label, see `normalized_patch`.

    Args:
        keys: the image, (2, X, Y, Z).
        label_key: its label, 0 to 3, (1, X, Y, Z).
        prob: share of patches that are replaced.
        allow_missing_keys: whether an image may be missing.

    Raises:
        InputError: `prob`, the setting synthetic_share, isn't from 0 to 1.
    """

    def __init__(
        self, keys: Hashable, label_key: Hashable = "label", prob: float = 1.0, allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        require_share(synthetic_share=prob)
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
