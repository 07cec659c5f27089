"""What makes the results of a BIDS dataset's subjects a BIDS derivative dataset: its tables and JSON files."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from scripts.data.bids import read_json
from scripts.data.subjects import Subject, place
from scripts.errors import InputError
from scripts.files import whole_files
from scripts.results.metrics import VolumeTable, tissue_volumes
from scripts.results.paths import DESC, result_path
from scripts.results.provenance import metadata
from scripts.results.tables import write_csv
from scripts.results.writers import segmented_subjects
from scripts.tissues import Tissue

BIDS_VERSION = "1.11.1"
LONGEST_DOI = 200
# name of the dataset of the scans in the URIs of their files
SOURCE = "source"
# labels with their numbers in BIDS's own list, which differ from ours
LABELS = (
    {"index": 0, "name": "Background", "abbreviation": "BG", "mapping": 0},
    {"index": int(Tissue.CSF), "name": "Cerebrospinal Fluid", "abbreviation": "CSF", "mapping": 3},
    {"index": int(Tissue.GM), "name": "Gray Matter", "abbreviation": "GM", "mapping": 1},
    {"index": int(Tissue.WM), "name": "White Matter", "abbreviation": "WM", "mapping": 2},
)
# what BIDS has no names for
BIDSIGNORE = (
    "figures",
    "report.html",
    "*-provenance.json",
    "volumes.tsv",
    "volumes.json",
    "*_uncertainty.*",
    "rank-*.log",
    "mlruns",
    "mlruns.db",
)
VOLUME_COLUMNS = {
    "subject": {"Description": "Name of the T1w without desc, suffix and extension"},
    "participant_id": {"Description": "Participant, as in participants.tsv"},
    "session_id": {"Description": "Session, as in sessions.tsv, where there are several"},
    **{
        column: {"Description": f"Volume of {tissue}", "Units": "mL"}
        for column, tissue in (
            ("csf_ml", "cerebrospinal fluid"),
            ("gm_ml", "gray matter"),
            ("wm_ml", "white matter"),
            ("brain_ml", "the three together"),
        )
    },
}
DESCRIPTIONS = {
    "label": "Tissues: 0 background, 1 cerebrospinal fluid, 2 gray matter, 3 white matter",
    "probability-csf": "Probability of cerebrospinal fluid",
    "probability-gm": "Probability of gray matter",
    "probability-wm": "Probability of white matter",
    "uncertainty": "How uncertain the label is, from 0 (certain) to 1 (all classes equally probable)",
}


class BidsVolumeTable(VolumeTable):
    """Handler that measures each segmented subject, as VolumeTable does, with participant and session of its own."""

    columns = ("subject", "participant_id", "session_id", *VolumeTable.columns[1:])

    def measure(self, item: dict[str, Any]) -> dict[str, Any]:
        entities = dict(part.split("-", 1) for part in item["subject"].split("_"))
        session = f"ses-{entities['ses']}" if "ses" in entities else "n/a"
        ids = {"participant_id": f"sub-{entities['sub']}", "session_id": session}
        return ids | tissue_volumes(item["pred"])


def volume_table(output_dir: str, subjects: Sequence[Subject]) -> VolumeTable:
    """Handler for the volumes of these subjects: `volumes.tsv` where they are of a BIDS dataset, else `volumes.csv`."""
    if any("anat" in subject for subject in subjects):
        return BidsVolumeTable(f"{output_dir}/volumes.tsv")
    return VolumeTable(f"{output_dir}/volumes.csv")


def source_link(dataset_dir: str, output_dir: str) -> str:
    """Where the scans lie, as the derivative dataset says it: relative from its `derivatives`, else by URL.

    Args:
        dataset_dir, output_dir: as given, paths or URLs.
    """
    (protocol, dataset), (output_protocol, output) = place(dataset_dir), place(output_dir)
    if protocol == output_protocol and output.is_relative_to(dataset):
        return os.path.relpath(dataset, output)
    return Path(dataset).as_uri() if protocol == "file" else dataset_dir


class BidsDerivative:
    """Handler that makes what is written of a BIDS dataset's subjects a derivative dataset; of others it does nothing.

    Before the first subject it writes what describes the dataset, where that isn't there yet, and after each a JSON
    file beside each of its images. It stands after the handlers that write these.

    Args:
        output_dir, dataset_dir: the folders of results and scans.
        source: where the scans lie, see `source_link`.
        subjects: those of this process.
        left_out: why others can't be segmented, by id; told at the end.
        suffix: that of the label images.

    Raises:
        InputError: `suffix` isn't one of NIfTI; when the engine starts, if `output_dir` holds another dataset, or ours
            of other scans.
    """

    def __init__(
        self,
        output_dir: str,
        dataset_dir: str,
        source: str,
        subjects: Sequence[Subject],
        left_out: Mapping[str, str],
        suffix: str = ".nii.gz",
    ) -> None:
        self.output_dir = Path(output_dir)
        self.dataset_dir = Path(dataset_dir)
        self.source = source
        self.subjects = {subject["subject"]: subject for subject in subjects if "anat" in subject}
        self.left_out = left_out
        self.written: list[str] = []
        if self.subjects and suffix not in (".nii.gz", ".nii"):
            raise InputError(f"--label_suffix must be '.nii.gz' or '.nii' for a BIDS dataset, got {suffix!r}")

    def attach(self, engine: Engine) -> None:
        if not self.subjects:
            return
        engine.add_event_handler(Events.STARTED, self.begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.describe_images)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def begin(self) -> None:
        path = self.output_dir / "dataset_description.json"
        bundle = metadata()
        if path.exists():
            self.require_own(path, bundle["name"])
        if idist.get_rank() > 0:
            return
        with whole_files(self.output_dir) as temporary:
            self.write_missing(temporary, path.name, _json(self.description(bundle)))
            self.write_missing(temporary, ".bidsignore", "\n".join(BIDSIGNORE) + "\n")
            self.write_missing(temporary, "volumes.json", _json(VOLUME_COLUMNS))
        labels = self.output_dir / f"desc-{DESC}_dseg.tsv"
        if not labels.exists():
            write_csv(labels, LABELS)

    def require_own(self, path: Path, name: str) -> None:
        """Refuse a description that is another pipeline's, or ours of other scans.

        Raises:
            InputError: it is so, or can't be read.
        """
        description = read_json(path)
        try:
            is_own = name in [generator["Name"] for generator in description["GeneratedBy"]]
            source = description["DatasetLinks"][SOURCE] if is_own else None
        except (LookupError, TypeError):
            source = None
        if not isinstance(source, str):
            raise InputError(f"{path}: is that of another dataset; choose another --output_dir")
        if source != self.source:
            raise InputError(
                f"{path}: says that the scans lie in {source:.200}, not in {self.source}; choose another --output_dir, "
                f"or correct {SOURCE} in its DatasetLinks if they were moved"
            )

    def write_missing(self, temporary: Path, name: str, text: str) -> None:
        if not (self.output_dir / name).exists():
            (temporary / name).write_text(text)

    def description(self, bundle: Mapping[str, Any]) -> dict[str, Any]:
        """Content of `dataset_description.json`."""
        of_source = read_json(self.dataset_dir / "dataset_description.json")
        doi = of_source.get("DatasetDOI") if isinstance(of_source, dict) else None
        is_doi = isinstance(doi, str) and 0 < len(doi) <= LONGEST_DOI  # else it's for its owner to mend
        known = ({"DOI": doi} if is_doi else {}) | ({"URL": self.source} if "://" in self.source else {})
        return {
            "Name": bundle["name"],
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [
                {"Name": bundle["name"], "Version": bundle["version"], "Description": bundle["description"]}
            ],
            **({"SourceDatasets": [known]} if known else {}),
            "DatasetLinks": {SOURCE: self.source},
            "ReferencesAndLinks": bundle["references"],
        }

    def describe_images(self, engine: Engine) -> None:
        # other handlers still write the images of this subject, but those of the one before are whole
        self.describe_written()
        self.written = [item["subject"] for item in segmented_subjects(engine)]

    def describe_written(self) -> None:
        for subject in self.written:
            self.describe(self.subjects[subject])

    def describe(self, subject: Subject) -> None:
        """Write the JSON file of each image of a subject."""
        files = [*subject["image"], *([subject["mask"]] if "mask" in subject else [])]
        sources = [f"bids:{SOURCE}:{Path(file).relative_to(self.dataset_dir).as_posix()}" for file in files]
        for what, description in DESCRIPTIONS.items():
            paths = [result_path(self.output_dir, subject, what, suffix) for suffix in (".nii.gz", ".nii")]
            for path in paths:
                if not path.exists():
                    continue
                sidecar = {
                    "Description": description,
                    "Manual": False,
                    "Sources": sources,
                    "SpatialReference": sources[0],
                }
                with whole_files(path.parent) as temporary:
                    (temporary / f"{path.name.split('.')[0]}.json").write_text(_json(sidecar))

    def finish(self) -> None:
        self.describe_written()
        if idist.get_rank() > 0:
            return
        print(f"BIDS derivative dataset: {self.output_dir}")
        for subject, reason in self.left_out.items():
            print(f"not segmented: {subject} {reason}")


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=4) + "\n"
