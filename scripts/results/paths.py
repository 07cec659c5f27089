"""Paths of a subject's results."""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

DESC = "skipdenseseg"  # BIDS entity `desc` of our results


def derivative_path(anat: str, subject: str, what: str, suffix: str) -> PurePath:
    """Return the path of a result within the derivative dataset.

    Args:
        anat: the folder of the scans within their dataset, as in `BidsSubject`.
        subject: the id.
        what: 'label', 'probability-csf', '-gm', '-wm', 'brain-mask', 'T2-registered', 'T2-to-T1'; or 'scored' and
            'uncertainty', for which BIDS has no name.
        suffix: '.nii.gz', '.nii' or '.txt'; a '.png' goes to the folder `figures` beside `anat`.
    """
    if what.startswith("probability-"):
        ending = f"label-{what.removeprefix('probability-').upper()}_desc-{DESC}_probseg"
    else:
        space = "" if "_space-" in subject else "space-T1w_"
        ending = {
            "label": f"desc-{DESC}_dseg",
            "scored": f"desc-{DESC}_scored",
            "uncertainty": f"desc-{DESC}_uncertainty",
            "brain-mask": "desc-brain_mask",
            "T2-registered": f"{space}desc-{DESC}_T2w",
            "T2-to-T1": f"from-T2w_to-T1w_mode-image_desc-{DESC}_xfm",
        }[what]
    folder = PurePath(anat)
    return (folder.with_name("figures") if suffix == ".png" else folder) / f"{subject}_{ending}{suffix}"


def result_path(output_dir: str | Path, item: Mapping[str, Any], what: str, suffix: str) -> Path:
    """Return the path of a subject's result; for a BIDS subject that of `derivative_path`.

    Args:
        output_dir: the folder of the results.
        item: the subject, see `segmented_subjects`; a BIDS subject also has `anat`.
        what: 'label', 'scored' and so on.
        suffix: '.nii.gz', '.nii', '.hdr' or '.png'.
    """
    if "anat" in item:
        return Path(output_dir) / derivative_path(item["anat"], item["subject"], what, suffix)
    return Path(output_dir) / f"subject-{item['subject']}-{what}{suffix}"
