"""The results of a BIDS dataset as a BIDS derivative dataset: its tables and its description."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from scripts.data.bids import read_json
from scripts.data.subjects import Subject, location
from scripts.errors import InputError
from scripts.files import whole_files
from scripts.results.metrics import VolumeTable, tissue_volumes
from scripts.results.paths import DESC
from scripts.results.provenance import metadata
from scripts.results.sidecars import SOURCE, to_json
from scripts.results.tables import write_csv
from scripts.tissues import Tissue

BIDS_VERSION = "1.11.1"
LONGEST_DOI = 200
# `mapping` is the label's number in BIDS's own list, which differs from ours
LABELS = (
    {"index": 0, "name": "Background", "abbreviation": "BG", "mapping": 0},
    {"index": int(Tissue.CSF), "name": "Cerebrospinal Fluid", "abbreviation": "CSF", "mapping": 3},
    {"index": int(Tissue.GM), "name": "Gray Matter", "abbreviation": "GM", "mapping": 1},
    {"index": int(Tissue.WM), "name": "White Matter", "abbreviation": "WM", "mapping": 2},
)
# files for which BIDS has no names
BIDSIGNORE = (
    *("figures", "report.html", "*-provenance.json", "volumes.tsv", "volumes.json", "*_uncertainty.*", "*_xfm.txt"),
    *("rank-*.log", "mlruns", "mlruns.db"),
)
VOLUME_COLUMNS = {
    "subject": {"Description": "Name of the T1w without desc, suffix and extension"},
    "participant_id": {"Description": "Participant, as in participants.tsv"},
    "session_id": {"Description": "Session, as in sessions.tsv, where there are several"},
    "csf_ml": {"Description": "Volume of cerebrospinal fluid", "Units": "mL"},
    "gm_ml": {"Description": "Volume of gray matter", "Units": "mL"},
    "wm_ml": {"Description": "Volume of white matter", "Units": "mL"},
    "brain_ml": {"Description": "Volume of the three together", "Units": "mL"},
}


class BidsVolumeTable(VolumeTable):
    """VolumeTable with columns for participant and session."""

    columns = ("subject", "participant_id", "session_id", *VolumeTable.columns[1:])

    def measure(self, item: dict[str, Any]) -> dict[str, Any]:
        entities = dict(part.split("-", 1) for part in item["subject"].split("_"))
        session = f"ses-{entities['ses']}" if "ses" in entities else "n/a"
        ids = {"participant_id": f"sub-{entities['sub']}", "session_id": session}
        return ids | tissue_volumes(item["pred"])


def volume_table(output_dir: str, subjects: Sequence[Subject]) -> VolumeTable:
    """Return the handler that writes volumes: to `volumes.tsv` for subjects of a BIDS dataset, else `volumes.csv`."""
    if any("anat" in subject for subject in subjects):
        return BidsVolumeTable(f"{output_dir}/volumes.tsv")
    return VolumeTable(f"{output_dir}/volumes.csv")


def source_link(dataset_dir: str, output_dir: str) -> str:
    """Return the link from the derivative dataset to the scans: relative from their `derivatives`, else a URL.

    Args:
        dataset_dir, output_dir: as the user gives them, paths or URLs.
    """
    (protocol, dataset), (output_protocol, output) = location(dataset_dir), location(output_dir)
    if protocol == output_protocol and output.is_relative_to(dataset):
        return os.path.relpath(dataset, output)
    return Path(dataset).as_uri() if protocol == "file" else dataset_dir


class BidsDerivative:
    """Handler that makes the results of a BIDS dataset a derivative dataset; it does nothing for other datasets.

    It writes the files that describe the dataset before the first subject, unless they exist. The handlers that write
    an image also write its JSON file, see `scripts.results.sidecars`.

    Args:
        output_dir, dataset_dir: the folders of results and scans.
        source: the link to the scans, see `source_link`.
        subjects: those of this process.
        left_out: why other subjects can't be segmented, by id; printed at the end.
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
        self.left_out = left_out
        self.is_bids = any("anat" in subject for subject in subjects)
        if self.is_bids and suffix not in (".nii.gz", ".nii"):
            raise InputError(f"--label_suffix must be '.nii.gz' or '.nii' for a BIDS dataset, got {suffix!r}")

    def attach(self, engine: Engine) -> None:
        if self.is_bids:
            engine.add_event_handler(Events.STARTED, self.begin)
            engine.add_event_handler(Events.COMPLETED, self.finish)

    def begin(self) -> None:
        path = self.output_dir / "dataset_description.json"
        bundle = metadata()
        if path.exists():
            self.require_own(path, bundle["name"])
        if idist.get_rank() > 0:
            return
        texts = {
            path.name: to_json(self.description(bundle)),
            ".bidsignore": "\n".join(BIDSIGNORE) + "\n",
            "volumes.json": to_json(VOLUME_COLUMNS),
        }
        with whole_files(self.output_dir) as temporary:
            for name, text in texts.items():
                if not (self.output_dir / name).exists():
                    (temporary / name).write_text(text)
        labels = self.output_dir / f"desc-{DESC}_dseg.tsv"
        if not labels.exists():
            write_csv(labels, LABELS)

    def require_own(self, path: Path, name: str) -> None:
        """Check that a description is ours and of the same scans.

        Raises:
            InputError: it is another pipeline's, or of other scans, or can't be read.
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

    def description(self, bundle: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of `dataset_description.json`."""
        of_source = read_json(self.dataset_dir / "dataset_description.json")
        doi = of_source.get("DatasetDOI") if isinstance(of_source, dict) else None
        is_doi = isinstance(doi, str) and 0 < len(doi) <= LONGEST_DOI  # a wrong one is its owner's to correct
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

    def finish(self) -> None:
        if idist.get_rank() > 0:
            return
        print(f"BIDS derivative dataset: {self.output_dir}")
        for subject, reason in self.left_out.items():
            print(f"not segmented: {subject} {reason}")
