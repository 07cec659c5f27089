"""report.html: one file with the pictures, scores and warnings by which a person judges segmentations."""

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import matplotlib
import numpy as np
from ignite.engine import Engine, Events
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from scripts.distributed import gathered
from scripts.files import whole_files
from scripts.report.plots import box_plots, learning_curves, training_history
from scripts.report.prepared import draw_prepared, what_was_prepared
from scripts.report.viewer import LABEL_STEP, OPAQUE_UNCERTAINTY, UNCERTAINTY_STEP, Pictures, draw_pictures
from scripts.report.warnings import DEVIATIONS, SIX_MONTHS, SOURCE, find_warnings, usual_range
from scripts.results.metrics import tissue_volumes
from scripts.results.pictures import (
    DISAGREEMENT_COLOR,
    TISSUE_COLORS,
    UNCERTAINTY_COLORS,
    canonical,
    canonical_voxel_size,
    slice_position,
)
from scripts.results.tables import read_csv
from scripts.results.writers import BackgroundWriter
from scripts.tissues import TISSUES, Tissue

HERE = Path(__file__).parent
NAME = "report.html"

# columns of the scores in tables and box plots, with title and factor
SCORES = (("dice", "Dice in percent", 100), ("hd95", "HD95 in mm", 1), ("asd", "ASD in mm", 1))
MOST_VIEWERS = 50  # per file, so that a browser can still open it


@dataclass(frozen=True)
class SubjectReport:
    """What the report shows of a subject, except its scores.

    Attributes:
        subject: the id.
        files: names of T1, T2 and so on.
        volumes: see `scripts.results.metrics.tissue_volumes`.
        prepared: what was done to the scans before they were segmented, see `what_was_prepared`.
        prepared_picture: see `draw_prepared`; None beyond MOST_VIEWERS too.
        warnings: messages by kind, see `scripts.report.warnings.find_warnings`.
        has_label: whether there is a label to compare with.
        pictures: None beyond MOST_VIEWERS.
    """

    subject: str
    files: dict[str, str]
    volumes: dict[str, float]
    prepared: list[str]
    prepared_picture: bytes | None
    warnings: dict[str, str]
    has_label: bool
    pictures: Pictures | None


def report_subject(item: Mapping[str, Any], with_pictures: bool = True) -> SubjectReport:
    """Measure and draw a subject, see `scripts.results.writers.segmented_subjects`; its `t2`, if any, is needed too."""
    t1, t2, prediction, label = item["t1"], item.get("t2"), item["pred"], item.get("label")
    volumes = tissue_volumes(prediction)
    contrast = t1.meta.get("contrast", "T1")
    files = {contrast: t1.meta["filename_or_obj"]} | ({} if t2 is None else {"T2": t2.meta["filename_or_obj"]})
    files |= {} if label is None else {"label": label.meta["filename_or_obj"]}
    files |= {"mask": item["mask"]} if "mask" in item else {}
    return SubjectReport(
        subject=item["subject"],
        files={name: Path(path).name for name, path in files.items()},
        volumes=volumes,
        prepared=what_was_prepared(item),
        prepared_picture=draw_prepared(item) if with_pictures else None,
        warnings=find_warnings(
            {contrast: canonical(t1)} | ({} if t2 is None else {"T2": canonical(t2)}),
            canonical(prediction),
            volumes,
            canonical_voxel_size(t1),
            None if t2 is None else t2.meta.get("not_registered"),
            item["head"].meta["at_edge"] if "head" in item else None,
        ),
        has_label=label is not None,
        pictures=draw_pictures(t1, t2, prediction, label, item.get("uncertainty")) if with_pictures else None,
    )


def _svg(figure: Figure) -> str:
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": NAME}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return _data_uri("image/svg+xml", content.getvalue())


def _picture(content: bytes) -> str:
    return _data_uri(Image.open(io.BytesIO(content)).get_format_mimetype(), content)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _number(value: float | str, digits: int = 2) -> str:
    value = float(value)
    return f"{value:.{digits}f}" if math.isfinite(value) else "none" if math.isnan(value) else "∞"


def _range_bar(tissue: Tissue, volume: float) -> dict[str, float]:
    """Positions in percent along a bar from -5 to 5 deviations; a volume outside is put at its end."""
    mean, deviation = SIX_MONTHS[tissue]

    def percent(deviations: float) -> float:
        return round(50 + 10 * min(max(deviations, -4.8), 4.8), 2)

    return {
        "low": percent(-DEVIATIONS),
        "width": percent(DEVIATIONS) - percent(-DEVIATIONS),
        "inner": percent(-1),
        "inner_width": percent(1) - percent(-1),
        "volume": percent((volume - mean) / deviation),
    }


def _plots(
    subjects: Sequence[SubjectReport],
    scores: Mapping[str, Mapping[str, str]],
    history: Mapping[str, Mapping[int, float]],
) -> dict[str, Figure]:
    """The plots of the page, by title."""
    plots = {}
    if scores and len(subjects) > 1:
        plots["Scores of all subjects"] = box_plots(
            {
                title: {
                    tissue.upper(): [factor * float(row[f"{score}_{tissue}"]) for row in scores.values()]
                    for tissue in TISSUES
                }
                for score, title, factor in SCORES
            }
        )
    if len(subjects) > 1:
        volumes = {tissue.upper(): [subject.volumes[f"{tissue}_ml"] for subject in subjects] for tissue in TISSUES}
        plots["Volumes of all subjects"] = box_plots({"Volume in ml; grey: usual at 6 months": volumes}, ranges=True)
    if history:
        plots["Training"] = learning_curves(history)
    return plots


def render(
    subjects: Sequence[SubjectReport],
    provenance: Mapping[str, str],
    scores: Mapping[str, Mapping[str, str]],
    history: Mapping[str, Mapping[int, float]],
) -> str:
    """Return the page.

    Args:
        subjects: in the order of the page.
        provenance: how the segmentations were made, by name.
        scores: columns of `scripts.results.metrics.tissue_scores` by subject; empty without labels.
        history: see `training_history`; empty without a training.
    """
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"number": _number, "picture": _picture}
    viewer = (HERE / "viewer.js").read_text(encoding="utf-8")
    # only this script may run, whatever a name contains, and nothing may be fetched
    digest = base64.b64encode(hashlib.sha256(viewer.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
    policy += "base-uri 'none'; form-action 'none'"
    inferno = matplotlib.colormaps[UNCERTAINTY_COLORS](np.arange(256), bytes=True)[:, :3]
    return environment.get_template("page.html.jinja").render(
        policy=policy,
        viewer=viewer,
        constants={
            "tissues": list(TISSUE_COLORS.values()),
            "errors": DISAGREEMENT_COLOR,
            "uncertainty": inferno.tolist(),
            "labelStep": LABEL_STEP,
            "uncertaintyStep": UNCERTAINTY_STEP,
            "opaqueUncertainty": OPAQUE_UNCERTAINTY,
            "position": slice_position((1000, 1000, 1000)).tolist(),
        },
        subjects=subjects,
        scores=scores,
        score_titles=SCORES,
        plots={title: _svg(figure) for title, figure in _plots(subjects, scores, history).items()},
        tissues=[(tissue.name, TISSUE_COLORS[tissue], usual_range(tissue)) for tissue in Tissue],
        range_bars={
            subject.subject: {t.name: _range_bar(t, subject.volumes[f"{t.name.lower()}_ml"]) for t in Tissue}
            for subject in subjects
        },
        errors=any(subject.has_label for subject in subjects),
        errors_color=DISAGREEMENT_COLOR,
        uncertain=any(subject.pictures and "uncertainty" in subject.pictures.layers for subject in subjects),
        shades=[to_hex(color / 255) for color in inferno[::51]],
        source=SOURCE,
        deviations=DEVIATIONS,
        most_viewers=MOST_VIEWERS,
        provenance=provenance,
    )


class ReportSaver(BackgroundWriter):
    """Handler that writes `report.html` and replaces that of an earlier run.

    The page shows the subjects of this run, those of all processes together. It is written at COMPLETED, so this
    handler may stand anywhere: `ProvenanceSaver` sets `engine.state.provenance` when the engine starts, and the scores
    are complete at the end of the epoch.

    Args:
        output_dir: the folder to write to, which may also hold the TensorBoard log of a training.
        scores: the table of `scripts.results.metrics.ScoreTable`; None without scores.
    """

    def __init__(self, output_dir: str, scores: str | None = None) -> None:
        super().__init__(output_dir)
        self.scores = scores
        self.subjects: list[SubjectReport] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.subjects.clear)
        super().attach(engine)
        engine.add_event_handler(Events.COMPLETED, self.save)

    def write(self, item: dict[str, Any]) -> None:
        self.subjects.append(report_subject(item, with_pictures=len(self.subjects) < MOST_VIEWERS))

    def save(self, engine: Engine) -> None:
        # by id: a sampler may give one subject to two processes
        subjects = list({subject.subject: subject for subject in gathered(self.subjects)}.values())
        if idist.get_rank() > 0:
            return
        subjects[MOST_VIEWERS:] = [
            replace(subject, pictures=None, prepared_picture=None) for subject in subjects[MOST_VIEWERS:]
        ]
        scores = {row["subject"]: row for row in (read_csv(self.scores) if self.scores else [])}
        page = render(subjects, engine.state.provenance, scores, training_history(self.output_dir))
        with whole_files(self.output_dir) as temporary:
            # a path in the command may not be UTF-8: Python then has surrogates in it
            (temporary / NAME).write_text(page, encoding="utf-8", errors="backslashreplace")
        by_kind: dict[str, list[str]] = {}
        for subject in subjects:
            for kind in subject.warnings:
                by_kind.setdefault(kind, []).append(subject.subject)
        found = "; ".join(f"{kind} ({', '.join(ids)})" for kind, ids in by_kind.items())
        print(f"report: {self.output_dir / NAME}; warnings: {found or 'none'}")
