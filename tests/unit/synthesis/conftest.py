"""A head made for these tests, with structures."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation


def head_of(label: np.ndarray) -> np.ndarray:
    """FreeSurfer's numbers from tissues 0 to 3: ventricles within, a brain stem below, a skull around."""
    head = np.array([0, 24, 3, 2], dtype=np.int16)[label]
    x, y, z = np.indices(label.shape)
    middle = [np.mean(axis[label > 0]) for axis in (x, y, z)]
    radius = np.sqrt(sum((axis - centre) ** 2 for axis, centre in zip((x, y, z), middle, strict=True)))
    head[(label > 0) & (radius < 5)] = 4
    head[(label == 3) & (z < middle[2] - 8)] = 16
    head[(label == 2) & (z < middle[2] - 16)] = 8
    head[binary_dilation(label > 0, iterations=3) & (label == 0)] = 515
    return head


@pytest.fixture(scope="session")
def heads_dir(tmp_path_factory: pytest.TempPathFactory, brains: list[dict[str, np.ndarray]]) -> Path:
    """Label maps of two small heads, A and B; a third file, C, has B's tissues only."""
    folder = tmp_path_factory.mktemp("heads")
    for name, brain in zip("AB", brains, strict=True):
        nib.save(nib.Nifti1Image(head_of(brain["label"][::-1]), np.eye(4)), folder / f"{name}.nii.gz")
    tissues = brains[1]["label"][::-1].copy()
    nib.save(nib.Nifti1Image(tissues, np.eye(4)), folder / "C.nii.gz")
    return folder
