"""`python -m scripts prepare_hdf5`: subjects in the published HDF5 layout, which `scripts.data.hdf5` reads."""

import filecmp
from pathlib import Path

import h5py
import numpy as np
from monai.transforms import Compose, CropForegroundd, Orientationd, Spacingd
from tqdm import tqdm

from scripts.data.checks import require_found_brain
from scripts.data.subjects import Ids, Subject, SubjectFolder
from scripts.data.transforms import CheckSubjectd, LoadSubjectd, NormalizeByT1Maskd
from scripts.errors import InputError
from scripts.files import whole_files
from scripts.preparation.transforms import FindBraind, RegisterScansd

TRAINING_FOLDER = "data_train_no_cut"
VALIDATION_FOLDER = "data_val_no_cut"
PUBLISHED_MARGIN = 32  # voxels around the box of T1 > 0

# to the grid and the box of the published files; all steps but the last are those of train.json
published_volume = Compose(
    [
        LoadSubjectd(),
        FindBraind(),
        RegisterScansd(),
        CheckSubjectd(),
        Orientationd(["image", "label"], axcodes="LAS", labels=None),
        Spacingd(
            ["image", "label"],
            pixdim=(1.0, 1.0, 1.0),
            min_pixdim=(0.99, 0.99, 0.99),
            max_pixdim=(1.01, 1.01, 1.01),
            mode=("bilinear", "nearest"),
        ),
        CropForegroundd(
            ["image", "label"], source_key="image", channel_indices=0, margin=PUBLISHED_MARGIN, allow_smaller=True
        ),
    ]
)


def _file_name(subject: Subject) -> str:
    return f"train_iseg_nocut_{subject['subject']}.h5"


def _write(subject: Subject, folder: Path) -> None:
    """Write the file of a labelled subject, or keep an equal file."""
    volume = published_volume(subject)
    label = volume["label"].numpy().astype(np.uint8)
    require_found_brain(volume["image"][0].numpy(), label[0], subject["image"][0])
    brain = volume["image"][0].numpy() > 0
    image = NormalizeByT1Maskd("image")(volume)["image"].numpy()
    # resampling leaves voxels barely above 0; rounded to the background, they would fall out of the brain mask, which
    # readers can only take from the intensities
    image[0, brain] = np.maximum(image[0, brain], np.nextafter(image[0].min(), np.float32(np.inf)))
    path = folder / _file_name(subject)
    with whole_files(folder) as temporary:
        with h5py.File(temporary / path.name, "w") as file:
            for name, values in (("data", image), ("label", label)):
                file[name] = np.moveaxis(values, -1, 1)[None]  # (channel, X, Y, Z) -> (1, channel, Z, X, Y)
        if path.exists():
            if not filecmp.cmp(temporary / path.name, path, shallow=False):
                raise InputError(
                    f"{path}: already exists and differs from what subject {subject['subject']} gives now; "
                    f"remove it or choose another --output_dir"
                )
            (temporary / path.name).unlink()


def prepare_hdf5(dataset_dir: str, output_dir: str, val_subjects: Ids = (9,)) -> None:
    """Write each labelled subject as `train_iseg_nocut_<id>.h5`, in the layout of the published pipelines.

    A file holds two datasets, neither chunked nor compressed: `data`, float32 (1, 2, Z, X, Y), T1 and T2, and `label`,
    uint8 (1, 1, Z, X, Y), 0 background, 1 CSF, 2 GM, 3 WM. The images are normalised, background included, by mean and
    population standard deviation over T1 > 0, and cropped to the box of T1 > 0 with up to 32 voxels around it. Axes are
    those of iSeg files, LAS and 1 mm; subjects on another grid are resampled. Training subjects go to
    `data_train_no_cut`, validation subjects to `data_val_no_cut`. Existing equal files are kept.

    Args:
        dataset_dir: the folder of subjects.
        output_dir: the folder to write to, outside `dataset_dir`.
        val_subjects: ids of the validation subjects; an empty list holds out none.

    Raises:
        InputError: a subject has a file in the other folder, or another file with its name exists; no subject is
            labelled; or as `SubjectFolder.validation`, `CheckSubjectd`, `NormalizeByT1Maskd` and `require_found_brain`.
    """
    output = Path(output_dir)
    if output.resolve().is_relative_to(Path(dataset_dir).resolve()):
        raise InputError(
            f"{output_dir}: lies in the dataset, which would then have each subject twice; "
            f"choose an --output_dir outside {dataset_dir}"
        )
    dataset = SubjectFolder(dataset_dir)
    training, validation = dataset.training(val_subjects), dataset.validation(val_subjects)
    dataset.require([*training, *validation], "train")
    planned = [(subject, TRAINING_FOLDER, VALIDATION_FOLDER) for subject in training]
    planned += [(subject, VALIDATION_FOLDER, TRAINING_FOLDER) for subject in validation]
    for subject, folder, other_folder in planned:
        if (other := output / other_folder / _file_name(subject)).exists():
            raise InputError(
                f"{other}: already exists, but subject {subject['subject']} now belongs in {folder}; "
                f"remove it, choose another --output_dir, or set --val_subjects as before"
            )
    for subject, folder, _ in tqdm(planned, desc="HDF5 files", unit="subject"):
        _write(subject, output / folder)
    unlabeled = sum("label" not in subject for subject in dataset.subjects)
    print(
        f"HDF5 files: {len(training)} for training in {output / TRAINING_FOLDER}, {len(validation)} for validation in "
        f"{output / VALIDATION_FOLDER}; {unlabeled} subjects without a label left out"
    )
