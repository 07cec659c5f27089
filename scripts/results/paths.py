"""Where the results of a subject go."""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

# `desc` of our results
DESC = "skipdenseseg"


def derivative_path(anat: str, subject: str, what: str, suffix: str) -> PurePath:
    """Path of a result from the derivative dataset on.

    Args:
        anat: folder of the scans from their dataset on, as in `BidsSubject`.
        subject: the id.
        what: 'label', 'probability-csf', '-gm' or '-wm', or 'uncertainty', for which BIDS has no name of its own.
        suffix: '.nii.gz' or '.nii'; a '.png' goes to the folder `figures` beside `anat`.
    """
    if what.startswith("probability-"):
        ending = f"label-{what.removeprefix('probability-').upper()}_desc-{DESC}_probseg"
    else:
        ending = {"label": f"desc-{DESC}_dseg", "uncertainty": f"desc-{DESC}_uncertainty"}[what]
    folder = PurePath(anat)
    return (folder.with_name("figures") if suffix == ".png" else folder) / f"{subject}_{ending}{suffix}"


def result_path(output_dir: str | Path, item: Mapping[str, Any], what: str, suffix: str) -> Path:
    """Where a result of a subject goes; that of a BIDS subject as `scripts.results.paths.derivative_path` has it.

    Args:
        output_dir: the folder of the results.
        item: the subject, as `segmented_subjects` gives it; one of a BIDS dataset has `anat` as well.
        what: what it shows: 'label', 'scored' and so on.
        suffix: '.nii.gz', '.nii', '.hdr' or '.png'.
    """
    if "anat" in item:
        return Path(output_dir) / derivative_path(item["anat"], item["subject"], what, suffix)
    return Path(output_dir) / f"subject-{item['subject']}-{what}{suffix}"
