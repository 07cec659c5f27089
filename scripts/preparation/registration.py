"""Rigid registration of a T2 to the T1 of the same head, by mutual information, with SimpleITK."""

import itertools
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy.ndimage import distance_transform_edt

# world axes of ITK run to the left, back and top
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# mm of the voxels by which starts are compared, and of the two steps of refinement
COARSE, STEPS = 5.0, (3.0, 1.5)
# degrees about each axis from which the search starts
START_TURNS = (-24.0, 0.0, 24.0)
# how many starts are refined at the coarse step
STARTS = 6
# mm around the brain of T1 that count, so that its edge does
MARGIN = 6
BINS = 32
# share of the voxels that a step of refinement looks at
SAMPLED = 0.3
# degrees about each axis and mm along each by which a second search starts away from the end of the first
MOVED_BY = (2.0, 2.0)
# the work is divided alike on every machine, so that its result is the same
THREADS = 4


@dataclass(frozen=True, eq=False)
class Registration:
    """A T2 on the grid of its T1.

    Attributes:
        image: float32, on the grid of the T1; 0 where T2 shows nothing.
        matrix: 4 x 4, from RAS mm of T1 to RAS mm of T2.
        turn: degrees by which T2 was turned.
        shift: mm by which the middle of the brain was moved.
        covered: share of the brain in which T2 shows something.
        doubt: mm by which another search, from a place nearby, ended elsewhere, at the farthest voxel of the brain.
    """

    image: np.ndarray
    matrix: np.ndarray
    turn: float
    shift: float
    covered: float
    doubt: float

    def __str__(self) -> str:
        return f"turned by {self.turn:.1f} degrees, and moved by {self.shift:.1f} mm in the middle of the brain"


def register(
    t2: np.ndarray, t2_affine: np.ndarray, t1: np.ndarray, t1_affine: np.ndarray, brain: np.ndarray
) -> Registration | None:
    """Register a T2 to a T1 by a rigid transform.

    Many starts are compared on a coarse grid, so that they may be 30 degrees and 40 mm apart.

    Args:
        t2: intensities (X, Y, Z), skull-stripped or not.
        t1: intensities (X, Y, Z), skull-stripped or not.
        t2_affine, t1_affine: 4 x 4, from voxels to RAS mm.
        brain: where T1 shows the brain, bool (X, Y, Z).

    Returns:
        None if the two don't overlap anywhere, or are too small.
    """
    around = distance_transform_edt(~brain, sampling=nib.affines.voxel_sizes(t1_affine)) <= MARGIN
    fixed, moving, mask = _image(t1, t1_affine), _image(t2, t2_affine), _image(around.astype(np.float32), t1_affine)
    try:
        best = _coarse(_at(fixed, COARSE), _at(moving, COARSE), _at(mask, COARSE))
        for size in STEPS:
            images = [_at(image, size) for image in (fixed, moving, mask)]
            best = _refined(best, *images, SAMPLED)
        again = _refined(_moved(best), *images, SAMPLED, seed=2)
    except RuntimeError:  # of ITK, which has no others
        return None
    matrix = _matrix(best)
    resampled, shown = _resampled(t2, t2_affine, fixed, best)
    places = nib.affines.apply_affine(t1_affine, np.argwhere(brain)[::100])
    middle = places.mean(0)
    here, there = (nib.affines.apply_affine(_matrix(each), places) for each in (best, again))
    angle = np.degrees(np.arccos(np.clip((np.trace(matrix[:3, :3]) - 1) / 2, -1, 1)))
    return Registration(
        image=resampled,
        matrix=matrix,
        turn=float(angle),
        covered=float(shown[brain].mean()),
        doubt=float(np.linalg.norm(here - there, axis=1).max()),
        shift=float(np.linalg.norm(nib.affines.apply_affine(matrix, middle) - middle)),
    )


def _image(values: np.ndarray, affine: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0), dtype=np.float32))
    world = TO_LPS @ affine
    sizes = nib.affines.voxel_sizes(world)
    image.SetSpacing(sizes.tolist())
    image.SetDirection((world[:3, :3] / sizes).ravel().tolist())
    image.SetOrigin(world[:3, 3].tolist())
    return image


def _resampled(
    t2: np.ndarray, affine: np.ndarray, fixed: sitk.Image, transform: sitk.Transform
) -> tuple[np.ndarray, np.ndarray]:
    """T2 on the grid of another image, and where it shows something, both (X, Y, Z).

    The edge of a stripped T2 isn't mixed with the 0 around it.
    """
    shown = t2 != 0
    nearest = distance_transform_edt(~shown, return_distances=False, return_indices=True)
    image, mask = (
        sitk.GetArrayFromImage(sitk.Resample(_image(values, affine), fixed, transform, interpolation, 0.0))
        # splines keep the noise, which linear interpolation averages away where voxels lie between voxels
        for values, interpolation in ((t2[tuple(nearest)], sitk.sitkBSpline), (shown, sitk.sitkLinear))
    )
    resampled = np.where(mask > 0, np.clip(image, t2.min(), t2.max()), 0)
    return resampled.transpose(2, 1, 0), (mask > 0).transpose(2, 1, 0)


def _at(image: sitk.Image, size: float) -> sitk.Image:
    """The image with voxels of about `size` mm, unless they are larger, blurred accordingly."""
    spacing = np.array(image.GetSpacing())
    factors = np.maximum(1, np.floor(size / spacing)).astype(int)
    if (factors == 1).all():
        return image
    blurred = sitk.SmoothingRecursiveGaussian(image, np.where(factors > 1, 0.5 * factors * spacing, 1e-3).tolist())
    return sitk.Shrink(blurred, factors.tolist())


def _moved(transform: sitk.Euler3DTransform) -> sitk.Euler3DTransform:
    result = sitk.Euler3DTransform(transform)
    angles = (transform.GetAngleX(), transform.GetAngleY(), transform.GetAngleZ())
    result.SetRotation(*(angle + float(np.radians(MOVED_BY[0])) for angle in angles))
    result.SetTranslation([mm + MOVED_BY[1] for mm in transform.GetTranslation()])
    return result


def _method(mask: sitk.Image, sampled: float, seed: int = 1) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricFixedMask(mask > 0.5)
    if sampled < 1:
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(sampled, seed)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetNumberOfThreads(THREADS)
    return method


def _refined(
    start: sitk.Euler3DTransform,
    fixed: sitk.Image,
    moving: sitk.Image,
    mask: sitk.Image,
    sampled: float,
    seed: int = 1,
) -> sitk.Euler3DTransform:
    method = _method(mask, sampled, seed)
    transform = sitk.Euler3DTransform(start)
    method.SetInitialTransform(transform, inPlace=True)
    step = max(fixed.GetSpacing())
    # with ITK's relaxation of 0.5 and 100 steps, the search ended millimetres away where GM and WM look alike
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=step,
        minStep=step / 200,
        numberOfIterations=300,
        relaxationFactor=0.8,
        gradientMagnitudeTolerance=1e-8,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.Execute(fixed, moving)
    return transform


def _coarse(fixed: sitk.Image, moving: sitk.Image, mask: sitk.Image) -> sitk.Euler3DTransform:
    """The best transform on a coarse grid, from many starts."""
    method = _method(mask, 1)
    method.SetInitialTransform(sitk.Euler3DTransform())
    middle = _middle(mask)
    shifts = {(0.0, 0.0, 0.0), tuple(_middle(moving > _threshold(moving)) - middle), tuple(_centre(moving) - middle)}
    starts = []
    for shift in shifts:
        for angles in itertools.product(np.radians(START_TURNS), repeat=3):
            start = sitk.Euler3DTransform(middle.tolist(), *map(float, angles), [float(mm) for mm in shift])
            method.SetInitialTransform(start)
            starts.append((_value(method, fixed, moving), start))
    starts.sort(key=lambda pair: pair[0])
    refined = [_refined(start, fixed, moving, mask, 1) for _, start in starts[:STARTS]]
    values = []
    for transform in refined:
        method.SetInitialTransform(transform)
        values.append(_value(method, fixed, moving))
    return refined[int(np.argmin(values))]


def _value(method: sitk.ImageRegistrationMethod, fixed: sitk.Image, moving: sitk.Image) -> float:
    """The metric in place, lower is better; infinite if the two hardly overlap."""
    try:
        return method.MetricEvaluate(fixed, moving)
    except RuntimeError:
        return np.inf


def _threshold(image: sitk.Image) -> float:
    values = sitk.GetArrayViewFromImage(image)
    return float(0.2 * np.quantile(values, 0.98))


def _middle(mask: sitk.Image) -> np.ndarray:
    """LPS mm of the middle of a mask."""
    indices = np.argwhere(sitk.GetArrayViewFromImage(mask) > 0.5).mean(0)[::-1]
    return np.array(mask.TransformContinuousIndexToPhysicalPoint(indices.tolist()))


def _centre(image: sitk.Image) -> np.ndarray:
    """LPS mm of the centre of an image."""
    return np.array(image.TransformContinuousIndexToPhysicalPoint([(side - 1) / 2 for side in image.GetSize()]))


def _matrix(transform: sitk.Euler3DTransform) -> np.ndarray:
    """4 x 4, from RAS mm to RAS mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    centre = np.array(transform.GetCenter())
    matrix[:3, 3] = centre + transform.GetTranslation() - matrix[:3, :3] @ centre
    return TO_LPS @ matrix @ TO_LPS
