"""Fixtures that all tests share."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import head_of, save_subject, save_volume, small_brain

from scripts.commands.prepare_hdf5 import prepare_hdf5
from scripts.network import SkipDenseSeg

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def network() -> SkipDenseSeg:
    """Untrained, in evaluation mode, with statistics for its batch norms."""
    torch.manual_seed(0)
    network = SkipDenseSeg()
    network(torch.randn(2, 2, 32, 32, 32))
    return network.eval()


@pytest.fixture(scope="session")
def brains() -> list[dict[str, np.ndarray]]:
    return [small_brain(number) for number in range(2)]


@pytest.fixture(scope="session")
def heads_dir(tmp_path_factory: pytest.TempPathFactory, brains: list[dict[str, np.ndarray]]) -> Path:
    """Label maps of two small heads, A and B; a third file, C, has B's tissues only."""
    folder = tmp_path_factory.mktemp("heads")
    for name, brain in zip("AB", brains, strict=True):
        nib.save(nib.Nifti1Image(head_of(brain["label"][::-1]), np.eye(4)), folder / f"{name}.nii.gz")
    tissues = brains[1]["label"][::-1].copy()
    nib.save(nib.Nifti1Image(tissues, np.eye(4)), folder / "C.nii.gz")
    return folder


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder where anybody may read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def as_nobody() -> Callable[[], AbstractContextManager[None]]:
    """A block as a user who may do what everybody may; the superuser may do everything."""

    @contextmanager
    def become() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return become


@pytest.fixture(autouse=True)
def no_handler_left() -> Iterator[None]:
    """Commands in this process add one that writes to where output went then."""
    before = list(logging.getLogger().handlers)
    yield
    for handler in list(logging.getLogger().handlers):
        if type(handler) is logging.StreamHandler and handler not in before:
            logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="session")
def pieces(brains: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """32 x 32 x 32 voxels of each brain, of which the network makes short work."""
    return [{kind: values[14:46, 20:52, 16:48] for kind, values in brain.items()} for brain in brains]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, brains: list[dict[str, np.ndarray]]) -> Path:
    """Labelled subjects 1, 2 and 9, unlabelled 11. To be read only."""
    directory = tmp_path_factory.mktemp("dataset")
    for subject, brain, labeled in (("1", 0, True), ("2", 1, True), ("9", 0, True), ("11", 1, False)):
        save_subject(directory, subject, brains[brain], labeled)
    return directory


@pytest.fixture
def own_dataset(tmp_path: Path, brains: list[dict[str, np.ndarray]]) -> Callable[..., Path]:
    """A dataset of the test's own, to be damaged: labelled 1 and 9, unlabelled 11."""

    def make(suffix: str = ".hdr") -> Path:
        directory = tmp_path / "dataset"
        for subject, labeled in (("1", True), ("9", True), ("11", False)):
            save_subject(directory, subject, brains[0], labeled, suffix)
        return directory

    return make


@pytest.fixture(scope="session")
def hdf5_scans(tmp_path_factory, brains) -> Path:
    """Labelled 1, 9 and, turned and with finer voxels, 2; unlabelled 11. To be read only."""
    directory = tmp_path_factory.mktemp("scans")
    # more on some sides than the margin of 32, less on others
    wide = {kind: np.pad(values, ((40, 0), (3, 50), (33, 20))) for kind, values in brains[0].items()}
    save_subject(directory, "1", wide)
    save_subject(directory, "9", brains[1])
    save_subject(directory, "11", brains[1], labeled=False)
    turned_affine = np.array([[0, 0, 1, 0], [0, -1, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 1.0]])
    for kind, values in wide.items():
        stored = np.repeat(values, 2, axis=2).transpose(2, 1, 0)
        save_volume(directory / f"subject-2-{kind}.nii.gz", stored, turned_affine)
    return directory


@pytest.fixture(scope="session")
def hdf5_prepared(hdf5_scans, tmp_path_factory) -> Path:
    """The HDF5 files of these subjects. To be read only."""
    output = tmp_path_factory.mktemp("prepared")
    with redirect_stdout(StringIO()) as printed:
        prepare_hdf5(str(hdf5_scans), str(output))
    assert f"HDF5 files: 2 for training in {output}/data_train_no_cut, 1 for validation in" in printed.getvalue()
    assert "1 subjects without a label left out" in printed.getvalue()
    return output
