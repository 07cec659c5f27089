"""JSON files beside the images of BIDS subjects."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.files import whole_files

SOURCE = "source"  # name of the dataset of the scans in the URIs of their files
DESCRIPTIONS = {
    "label": "Tissues: 0 background, 1 cerebrospinal fluid, 2 gray matter, 3 white matter",
    "probability-csf": "Probability of cerebrospinal fluid",
    "probability-gm": "Probability of gray matter",
    "probability-wm": "Probability of white matter",
    "brain-mask": "Brain in which tissues were labelled",
    "T2-registered": "T2w, registered to the T1w by a rigid transform",
    "uncertainty": "How uncertain the label is, from 0 (certain) to 1 (all classes equally probable)",
}
# further fields, which BIDS wants
FIELDS = {"brain-mask": {"Type": "Brain"}, "T2-registered": {"SkullStripped": True}}


def to_json(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file."""
    return json.dumps(content, indent=4) + "\n"


def write_sidecar(path: Path, item: Mapping[str, Any], what: str) -> None:
    """Write the JSON file of an image of a BIDS subject; do nothing for other subjects.

    Args:
        path: the image.
        item: the subject, see `scripts.results.writers.segmented_subjects`, with its `t2` if it has one.
        what: a key of `DESCRIPTIONS`.
    """
    if "anat" not in item:
        return
    files = [item[key].meta["filename_or_obj"] for key in ("t1", "t2") if key in item] + (
        [item["mask"]] if "mask" in item else []
    )
    sources = [f"bids:{SOURCE}:{item['anat']}/{Path(file).name}" for file in files]
    sidecar = {"Description": DESCRIPTIONS[what], "Manual": False, "Sources": sources, "SpatialReference": sources[0]}
    sidecar |= FIELDS.get(what, {})
    with whole_files(path.parent) as temporary:
        (temporary / f"{path.name.split('.')[0]}.json").write_text(to_json(sidecar))
