"""Label images and maps that open beside the T1."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import SpatialImage

from scripts.data.volumes import MM_IN_UNIT, open_image
from scripts.errors import InputError
from scripts.files import whole_files
from scripts.results.paths import result_path
from scripts.results.sidecars import write_sidecar
from scripts.results.writers import BackgroundWriter
from scripts.tissues import ISEG_VALUES

# of NIfTI; the qform also takes voxel sizes and a sign from `pixdim`
AFFINE_FIELDS = (
    *("sform_code", "srow_x", "srow_y", "srow_z"),
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)


def write_analyze(path: str | Path, values: np.ndarray, description: str = "") -> None:
    """Write a volume in iSeg's format: SPM2 Analyze, 1 mm, LAS, with a fourth dimension of length 1.

    Args:
        path: the `.hdr`; the `.img` goes beside it. The folder must exist.
        values: int16 or uint8 (X, Y, Z), axes to the left, to the front, to the top.
        description: for the header's `descrip`, at most 79 characters.
    """
    image = nib.Spm2AnalyzeImage(values[..., None], None)
    image.header.set_zooms((1.0, 1.0, 1.0, 1.0))
    image.header["descrip"] = description.encode()
    image.header["origin"][:3] = 1  # the first voxel, which makes the affine diag(-1, 1, 1, 1)
    nib.save(image, path)


def _nifti_beside(values: np.ndarray, t1: SpatialImage) -> nib.Nifti1Image:
    """Values on the grid of T1. A NIfTI T1 gives both its affines, because programs differ in which one they use."""
    image = nib.Nifti1Image(values, t1.affine)
    image.header.set_xyzt_units("mm")
    if isinstance(t1, nib.Nifti1Pair):
        for field in AFFINE_FIELDS:
            image.header[field] = t1.header[field]
        image.header["pixdim"][0] = t1.header["pixdim"][0]
        image.header["pixdim"][1:4] = np.where(
            t1.header["pixdim"][1:4], t1.header["pixdim"][1:4], voxel_sizes(t1.affine)
        )
        if (unit := t1.header.get_xyzt_units()[0]) in MM_IN_UNIT:
            image.header.set_xyzt_units(unit)
    return image


def _analyze_beside(label: np.ndarray, t1: SpatialImage) -> nib.Spm2AnalyzeImage:
    """A label with iSeg's values on the grid of T1."""
    values = np.array(ISEG_VALUES, dtype=np.uint8)[label]
    if isinstance(t1, nib.Spm2AnalyzeImage) and np.allclose(t1.header.get_best_affine(), t1.affine):
        image = nib.Spm2AnalyzeImage(values, None)  # given an affine, nibabel writes a .mat file beside the pair
        # nibabel reads a negative length along the fourth axis, but doesn't write one
        image.header.set_zooms(np.abs(t1.header.get_zooms()))
        image.header["origin"] = t1.header["origin"]
    else:
        image = nib.Spm2AnalyzeImage(values, t1.affine)
        # readers that ignore the .mat file take the voxel at 0 mm, counted from 1
        image.header["origin"][:3] = np.round(np.linalg.inv(t1.affine)[:3, 3]) + 1
    return image


def write_label(path: str | Path, label: np.ndarray, t1_path: str, description: str = "") -> None:
    """Write tissue labels so that they open beside the T1: same shape (with any fourth dimension) and affine.

    The file has nothing else of the T1's header, which may identify the patient.

    Args:
        path: `.nii.gz` or `.nii` for values 0 to 3, `.hdr` for an Analyze pair with iSeg's 0, 10, 150, 250.
        label: uint8 (X, Y, Z), 0 background, 1 CSF, 2 GM, 3 WM, on the grid of the T1 file.
        t1_path: the T1 file, or the 4-D file of T1 and T2.
        description: for the header's `descrip`, at most 79 characters.
    """
    path = Path(path)
    t1 = open_image(t1_path)
    label = label.reshape(label.shape + (1,) * (len(t1.shape) - 3))  # of length 1 even if the file also holds T2
    image = _analyze_beside(label, t1) if path.suffix == ".hdr" else _nifti_beside(label, t1)
    image.header["descrip"] = description.encode()
    with whole_files(path.parent) as temporary:
        nib.save(image, temporary / path.name)
        if path.suffix == ".hdr" and not (temporary / f"{path.stem}.mat").exists():
            path.with_suffix(".mat").unlink(missing_ok=True)  # that of an earlier label on another grid


def write_map(path: str | Path, values: np.ndarray, t1_path: str) -> None:
    """Write float32 values (X, Y, Z) as NIfTI that opens beside the T1, see `write_label`."""
    write_label(path, values, t1_path)


class LabelSaver(BackgroundWriter):
    """Handler that writes each segmented subject as `subject-<id>-label`.

    Args:
        output_dir: the folder to write to.
        suffix: '.nii.gz' or '.nii' for NIfTI with labels 0 to 3, '.hdr' for Analyze pairs with iSeg's values.
        made_by: version and weights for the image's header, see `scripts.results.provenance.made_by`.

    Raises:
        InputError: `suffix` is none of these.
    """

    def __init__(self, output_dir: str, suffix: str = ".nii.gz", made_by: str = "") -> None:
        super().__init__(output_dir)
        if suffix not in (".nii.gz", ".nii", ".hdr"):
            raise InputError(f"--label_suffix must be '.nii.gz', '.nii' or '.hdr', got {suffix!r}")
        self.suffix = suffix
        self.made_by = made_by

    def write(self, item: dict[str, Any]) -> None:
        path = result_path(self.output_dir, item, "label", self.suffix)
        write_label(path, item["pred"][0].cpu().numpy(), item["t1"].meta["filename_or_obj"], self.made_by)
        write_sidecar(path, item, "label")
