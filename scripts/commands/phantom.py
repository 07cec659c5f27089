"""`python -m scripts phantom`: synthetic subjects of procedural brains, for demonstrations and tests."""

from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from scripts.errors import InputError, require_whole_numbers
from scripts.files import already_written, whole_files
from scripts.results.label_images import write_analyze
from scripts.synthesis.contrast import T1_CONTRAST, T2_CONTRAST, six_month_image
from scripts.synthesis.phantom_brains import label_map
from scripts.synthesis.phantom_heads import raw_scans, with_margin
from scripts.tissues import ISEG_AFFINE, ISEG_VALUES

# of the generator: raise it when the subjects of a seed change
VERSION = 2


def phantom(output_dir: str, subjects: int = 6, unlabeled: int = 1, seed: int = 0, raw: bool = False) -> None:
    """Write synthetic subjects in the layout and format of iSeg-2017: Analyze, int16 T1 and T2, uint8 label.

    A subject depends only on the seed and its number. Existing subjects are kept.

    Args:
        output_dir: the folder to write to.
        subjects: number of labelled subjects, numbered from 1.
        unlabeled: number of subjects without a label, numbered after the labelled ones.
        seed: selects the population.
        raw: write whole heads instead, with a T2 that is turned and moved, as NIfTI; see
            `scripts.synthesis.phantom_heads`.

    Raises:
        InputError: a setting is out of range, or a file with one of the names exists and isn't the same phantom.
    """
    require_whole_numbers(1, subjects=subjects)
    require_whole_numbers(0, unlabeled=unlabeled, seed=seed)
    if not isinstance(raw, bool):
        raise InputError(f"--raw {raw}: must be True or False")
    suffix = ".nii.gz" if raw else ".hdr"
    for number in tqdm(range(1, subjects + unlabeled + 1), desc="phantom subjects", unit="subject"):
        kinds = ("T1", "T2", "label") if number <= subjects else ("T1", "T2")
        description = f"phantom version {VERSION} seed {seed} subject {number}{' raw' if raw else ''}"
        if number > subjects and (surplus := Path(output_dir) / f"subject-{number}-label{suffix}").exists():
            raise InputError(f"{surplus}: subject {number} must have no label; choose another --output_dir")
        if already_written([Path(output_dir) / f"subject-{number}-{kind}{suffix}" for kind in kinds], description):
            continue
        rng = np.random.default_rng([seed, number])
        label = label_map(rng)
        scans = [six_month_image(label, contrast, rng) for contrast in (T1_CONTRAST, T2_CONTRAST)]
        if raw:
            scans, label = raw_scans(*scans, rng)[:2], with_margin(label)
        volumes = {
            "T1": scans[0],
            "T2": scans[1],
            "label": label if raw else np.array(ISEG_VALUES, dtype=np.uint8)[label],
        }
        with whole_files(output_dir) as temporary:
            for kind in kinds:
                path = temporary / f"subject-{number}-{kind}{suffix}"
                if raw:
                    image = nib.Nifti1Image(volumes[kind], ISEG_AFFINE)
                    image.header.set_xyzt_units("mm")
                    image.header["descrip"] = description.encode()
                    nib.save(image, path)
                else:
                    write_analyze(path, volumes[kind], description)
    print(f"phantom subjects: {subjects} labelled and {unlabeled} unlabelled in {output_dir}")
