"""`python -m scripts submission` as a process."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from processes import bundle, last_line

from scripts.results.label_images import write_label


def brain_of(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A T1 of a small block and its labels, all different from their mirror images."""
    label = np.zeros(shape, dtype=np.uint8)
    label[1:5, 2:5, 3:5] = 1
    label[2:5, 2:4, 3] = 2
    label[4, 3:5, 4] = 3
    return np.where(label > 0, 100 * label, 0).astype(np.int16), label


def save_t1(path: Path, t1: np.ndarray, subject: str) -> None:
    """As iSeg has it, but with a header in which each field shows, that is carried over or isn't."""
    image = nib.Spm2AnalyzeImage(t1[..., None], None)
    image.header.set_zooms((1.0, 1.0, 1.0, 1.0))
    image.header["descrip"] = f"scan of {subject}".encode()
    image.header["origin"][:3] = (3, 4, 5)
    nib.save(image, path)


def make(directory: Path, shapes: dict[str, tuple[int, int, int]]) -> tuple[Path, Path]:
    """Dataset and predictions: every other one in Analyze, the others in NIfTI."""
    data, predictions = directory / "data", directory / "labels"
    data.mkdir()
    for position, (subject, shape) in enumerate(shapes.items()):
        t1, label = brain_of(shape)
        for kind in ("T1", "T2"):
            save_t1(data / f"subject-{subject}-{kind}.hdr", t1, subject)
        suffix = (".nii.gz", ".hdr")[position % 2]
        t1_path = str(data / f"subject-{subject}-T1.hdr")
        write_label(predictions / f"subject-{subject}-label{suffix}", label, t1_path)
    return data, predictions


@pytest.fixture
def small(tmp_path) -> tuple[Path, Path]:
    """Subjects 11 (segmented in NIfTI) and 12 (in Analyze)."""
    return make(tmp_path, {"11": (6, 7, 8), "12": (6, 7, 8)})


def test_error_is_one_line_on_the_command_line(small):
    arguments = ("--predictions", str(small[1]), "--dataset_dir", str(small[0]), "--output", str(small[0] / "x.zip"))
    result = bundle("submission", *arguments, module="scripts")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert last_line(result).startswith(f"error: {small[0]}: subjects names subject 13")
