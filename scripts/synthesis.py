"""T1 and T2 with the contrast of a 6-month-old, made from a tissue label map.

At that age grey and white matter overlap: the share of their intensity histograms that coincides is about 0.70 in T1
and 0.87 in T2, and 0.36 between CSF and grey matter in both. Noise, texture, partial volume and bias field are drawn
first, then the tissue means are set so that these overlaps are met on the subject at hand.
"""

from dataclasses import dataclass

import numpy as np
from monai.transforms import RandBiasField, RandRicianNoise
from scipy.ndimage import find_objects, gaussian_filter, zoom
from scipy.stats import norm

from scripts.transforms import Tissue


@dataclass(frozen=True)
class Contrast:
    """Histogram overlaps that a modality shall have, and the scale of its intensities.

    `csf_sign` and `wm_sign` say whether that tissue is brighter (1) or darker (-1) than grey matter.
    """

    overlap_gm_wm: float
    overlap_csf_gm: float
    csf_sign: int
    wm_sign: int
    gm_mean: float
    standard_deviation: float


T1_CONTRAST = Contrast(0.70, 0.36, csf_sign=-1, wm_sign=1, gm_mean=235, standard_deviation=26)
T2_CONTRAST = Contrast(0.87, 0.36, csf_sign=1, wm_sign=-1, gm_mean=303, standard_deviation=34)

# Shares of the variance within a tissue. White noise alone would be averaged away by any smoothing, so part of it is
# texture as fine as the cortex is thick, and part varies over centimetres, as myelination does.
NOISE_SHARE, TEXTURE_SHARE, REGIONAL_SHARE = 0.82, 0.12, 0.06


def histogram_overlap(first: np.ndarray, second: np.ndarray, bins: int = 100) -> float:
    """Share that the histograms of two samples have in common: 1 where they are alike, 0 where they never meet.

    Args:
        first, second: intensities of two tissues, of any shape.
        bins: number of bins over the range of both.
    """
    limits = (min(first.min(), second.min()), max(first.max(), second.max()))
    shares = [np.histogram(sample, bins, limits)[0] / sample.size for sample in (first, second)]
    return float(np.minimum(*shares).sum())


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Gaussian random field of mean 0 and standard deviation 1, smooth over `sigma` voxels.

    Coarse fields are drawn on a coarse grid and interpolated, which is as smooth and many times faster.
    """
    step = max(1.0, sigma / 2)
    coarse = [int(np.ceil(size / step)) for size in shape]
    field = gaussian_filter(rng.standard_normal(coarse, dtype=np.float32), sigma / step, mode="wrap")
    if step > 1:
        field = zoom(field, [size / c for size, c in zip(shape, coarse, strict=True)], order=1)
    return (field - field.mean()) / field.std()


def partial_volume(label: np.ndarray, sigma: float = 0.5) -> np.ndarray:
    """Share of each tissue in each brain voxel after blurring, (voxels, 3); background takes no part."""
    shares = [gaussian_filter((label == tissue).astype(np.float32), sigma)[label > 0] for tissue in Tissue]
    return np.stack(shares, axis=1) / np.sum(shares, axis=0)[:, None]


def six_month_image(label: np.ndarray, contrast: Contrast, rng: np.random.Generator) -> np.ndarray:
    """One modality for a label map.

    Args:
        label: tissue labels 0 to 3, (X, Y, Z).
        contrast: the overlaps to be met, each to about 0.01.
        rng: all that is random comes from here.

    Returns:
        int16 intensities in 1 to 1000 where label > 0, else 0, (X, Y, Z).
    """
    result = np.zeros(label.shape, dtype=np.int16)
    whole, label = label, label[find_objects((label > 0).view(np.uint8))[0]]  # no work outside the brain's box
    brain = label > 0
    tissue = label[brain]
    share = partial_volume(label)
    texture = np.sqrt(TEXTURE_SHARE) * smooth_noise(rng, label.shape, 1.0)[brain]
    regional = [np.sqrt(REGIONAL_SHARE) * smooth_noise(rng, label.shape, 14.0)[brain] for _ in range(3)]
    texture += np.sum(share * np.stack(regional, axis=1), axis=1)
    bias = RandBiasField(prob=1.0, degree=3, coeff_range=(-0.02, 0.02))
    bias.set_random_state(int(rng.integers(2**31)))
    gain = np.asarray(bias(np.ones((1, *label.shape), dtype=np.float32)))[0][brain]
    gain /= gain.mean()
    noise = RandRicianNoise(prob=1.0, std=float(np.sqrt(NOISE_SHARE)) * contrast.standard_deviation, sample_std=False)
    noise_seed = int(rng.integers(2**31))

    def render(csf: float, wm: float) -> np.ndarray:
        """Intensities with the means of CSF and WM that many standard deviations from grey matter's."""
        clean = contrast.gm_mean + contrast.standard_deviation * (share @ np.float32([csf, 0.0, wm]) + texture)
        return np.asarray(noise.set_random_state(noise_seed)(clean * gain))

    # two normal distributions of like width d standard deviations apart overlap by 2 * norm.cdf(-d / 2)
    def distance(overlap: float) -> float:
        return -2 * norm.ppf(np.clip(overlap, 0.01, 0.99) / 2)

    csf_gm, gm_wm = distance(contrast.overlap_csf_gm), distance(contrast.overlap_gm_wm)
    csf, wm = csf_gm, gm_wm
    for _ in range(6):
        image = render(contrast.csf_sign * csf, contrast.wm_sign * wm)
        csf *= csf_gm / distance(histogram_overlap(image[tissue == Tissue.CSF], image[tissue == Tissue.GM]))
        wm *= gm_wm / distance(histogram_overlap(image[tissue == Tissue.GM], image[tissue == Tissue.WM]))

    image = render(contrast.csf_sign * csf, contrast.wm_sign * wm) * rng.uniform(0.85, 1.15)
    result[whole > 0] = np.clip(np.rint(image), 1, 1000)
    return result
