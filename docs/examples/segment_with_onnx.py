"""Segment a subject with the exported network, without PyTorch or MONAI.

python segment_with_onnx.py model.onnx subject-11-T1.hdr subject-11-T2.hdr subject-11-label.nii.gz
"""

import sys

import nibabel as nib
import numpy as np
import onnxruntime
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

MARGIN, MULTIPLE = 2, 16  # voxels: margin around the brain, and the divisor of the sides of the box

model_path, t1_path, t2_path, label_path = sys.argv[1:]
t1, t2 = (nib.squeeze_image(nib.load(path)) for path in (t1_path, t2_path))
if t1.ndim != 3 or t2.shape != t1.shape or not np.allclose(t2.affine, t1.affine, atol=0.01):
    sys.exit(f"error: {t2_path} isn't one volume on the grid of {t1_path}")
if not np.allclose(nib.affines.voxel_sizes(t1.affine), 1, atol=0.01):
    sys.exit(f"error: {t1_path}: voxels aren't 1 mm; resample T1 and T2 first")

# axes run to the left, front and top, as in training
own_axes, las = io_orientation(t1.affine), axcodes2ornt("LAS")
t1, t2 = (volume.as_reoriented(ornt_transform(own_axes, las)) for volume in (t1, t2))
image = np.stack([volume.get_fdata(dtype=np.float32) for volume in (t1, t2)])
brain = image[0] > 0
if not np.isfinite(image).all() or not brain.any() or not image[:, brain].std(1).all():
    sys.exit(f"error: {t1_path}, {t2_path}: not two skull-stripped scans (0 outside, and not constant inside)")

# same box as inference.json: in another one the network's coarse voxels lie elsewhere, and some labels differ
voxels = np.argwhere(brain)
start, stop = np.maximum(voxels.min(0) - MARGIN, 0), np.minimum(voxels.max(0) + 1 + MARGIN, brain.shape)
size = -(-(stop - start) // MULTIPLE) * MULTIPLE
start -= (size - (stop - start)) // 2
padded = np.pad(image, [(0, 0), *3 * [(MULTIPLE, MULTIPLE)]])  # the box may extend beyond the volume
box = tuple(slice(first, first + length) for first, length in zip(start + MULTIPLE, size, strict=True))

mean, deviation = (measure(image[:, brain], 1, dtype=np.float64)[:, None, None, None] for measure in (np.mean, np.std))
patch = ((padded[(slice(None), *box)] - mean) / deviation).astype(np.float32)

session = onnxruntime.InferenceSession(model_path, providers=["CPUExecutionProvider"])
(logits,) = session.run(None, {session.get_inputs()[0].name: patch[None]})

padded_label = np.zeros(padded.shape[1:], np.uint8)
padded_label[box] = logits[0].argmax(0)  # 0 background, 1 CSF, 2 grey matter, 3 white matter
label = padded_label[tuple(slice(MULTIPLE, MULTIPLE + side) for side in brain.shape)] * brain
nib.save(nib.Nifti1Image(label, t1.affine).as_reoriented(ornt_transform(las, own_axes)), label_path)
