"""report.html: pictures, figures and warnings by which a person trusts a segmentation, or doesn't, in one file."""

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
from scripts.report.viewer import LABEL_STEP, OPAQUE_UNCERTAINTY, UNCERTAINTY_STEP, Pictures, draw
from scripts.report.warnings import (
    DEVIATIONS,
    SIX_MONTHS,
    SOURCE,
    brain_left_unlabelled,
    few_foreground_voxels,
    left_right_asymmetry,
    not_skull_stripped,
    other_voxel_size,
    t2_missing,
    usual_range,
    volume_out_of_range,
)
from scripts.results.metrics import tissue_volumes
from scripts.results.pictures import (
    DISAGREEMENT_COLOR,
    TISSUE_COLORS,
    UNCERTAINTY_COLORS,
    canonical,
    canonical_voxel_size,
    middle,
)
from scripts.results.provenance import ProvenanceSaver
from scripts.results.tables import read_csv
from scripts.results.writers import BackgroundWriter
from scripts.tissues import Tissue

HERE = Path(__file__).parent
NAME = "report.html"

# scores in the tables and box plots: their columns, and the factor for what is shown
SCORES = (("dice", "Dice in percent", 100), ("hd95", "HD95 in mm", 1), ("asd", "ASD in mm", 1))
MOST_VIEWERS = 50  # in one file, so that a browser can still open it


@dataclass(frozen=True)
class Part:
    """What the report says of a subject, but for its scores.

    Attributes:
        subject: the id.
        files: names of T1, T2 and so on.
        volumes: as `scripts.results.metrics.tissue_volumes` has them.
        warnings: what is odd, by kind.
        has_label: whether there is a label to compare with.
        pictures: None where there are too many for one file.
    """

    subject: str
    files: dict[str, str]
    volumes: dict[str, float]
    warnings: dict[str, str]
    has_label: bool
    pictures: Pictures | None


def subject_part(item: Mapping[str, Any], with_pictures: bool = True) -> Part:
    """Measure and draw a subject, given as by `scripts.results.writers.segmented_subjects`, with its `t2` besides."""
    t1, t2, prediction = (canonical(item[name]) for name in ("t1", "t2", "pred"))
    label, volumes = item.get("label"), tissue_volumes(item["pred"])
    voxel_size = canonical_voxel_size(item["t1"])
    voxel_ml = float(voxel_size.prod()) / 1000
    found = {
        "volume out of range": volume_out_of_range(volumes),
        "few foreground voxels": few_foreground_voxels(t1, voxel_ml),
        "brain left unlabelled": brain_left_unlabelled(t1, prediction),
        "not skull-stripped": not_skull_stripped(t1, voxel_ml),
        "T2 missing": t2_missing(t1, t2),
        "T2 not registered": item["t2"].meta.get("not_registered"),
        "voxel size": other_voxel_size(voxel_size),
        "left-right asymmetry": left_right_asymmetry(prediction),
    }
    files = {name: item[key].meta["filename_or_obj"] for name, key in (("T1", "t1"), ("T2", "t2"))}
    files |= {} if label is None else {"label": label.meta["filename_or_obj"]}
    files |= {"mask": item["mask"]} if "mask" in item else {}
    return Part(
        subject=item["subject"],
        files={name: Path(path).name for name, path in files.items()},
        volumes=volumes,
        warnings={kind: message for kind, message in found.items() if message},
        has_label=label is not None,
        pictures=draw(item["t1"], item["t2"], item["pred"], label, item.get("uncertainty")) if with_pictures else None,
    )


def _svg(figure: Figure) -> str:
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": NAME}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return _data_uri("image/svg+xml", content.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _number(value: float | str, digits: int = 2) -> str:
    value = float(value)
    return f"{value:.{digits}f}" if math.isfinite(value) else "none" if math.isnan(value) else "∞"


def _range_bar(tissue: Tissue, volume: float) -> dict[str, float]:
    """Places in percent along a bar that ends at 5 deviations, where a volume beyond it stands too."""
    mean, deviation = SIX_MONTHS[tissue]

    def place(deviations: float) -> float:
        return round(50 + 10 * min(max(deviations, -4.8), 4.8), 2)

    return {
        "low": place(-DEVIATIONS),
        "width": place(DEVIATIONS) - place(-DEVIATIONS),
        "inner": place(-1),
        "inner_width": place(1) - place(-1),
        "volume": place((volume - mean) / deviation),
    }


def render(
    parts: Sequence[Part],
    provenance: Mapping[str, str],
    scores: Mapping[str, Mapping[str, str]],
    history: Mapping[str, Mapping[int, float]],
) -> str:
    """The page.

    Args:
        parts: the subjects.
        provenance: how the segmentations came about, by what is told.
        scores: columns of `scripts.results.metrics.tissue_scores` by subject; empty where there are no labels.
        history: as `training_history` gives it; empty where there is none.
    """
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "number": _number,
        "picture": lambda content: _data_uri(Image.open(io.BytesIO(content)).get_format_mimetype(), content),
    }
    viewer = (HERE / "viewer.js").read_text(encoding="utf-8")
    # only this script may run, whatever a name holds, and nothing may be fetched
    digest = base64.b64encode(hashlib.sha256(viewer.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
    policy += "base-uri 'none'; form-action 'none'"
    names = [tissue.name for tissue in Tissue]
    plots = {}
    several = len(parts) > 1
    if scores and several:
        plots["Scores of all subjects"] = box_plots(
            {
                title: {
                    name: [factor * float(row[f"{score}_{name.lower()}"]) for row in scores.values()] for name in names
                }
                for score, title, factor in SCORES
            }
        )
    if several:
        volumes = {name: [part.volumes[f"{name.lower()}_ml"] for part in parts] for name in names}
        plots["Volumes of all subjects"] = box_plots({"Volume in ml; grey: usual at 6 months": volumes}, ranges=True)
    if history:
        plots["Training"] = learning_curves(history)
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
            "place": middle((1000, 1000, 1000)).tolist(),
        },
        parts=parts,
        scores=scores,
        score_titles=SCORES,
        plots={title: _svg(figure) for title, figure in plots.items()},
        tissues=[(tissue.name, TISSUE_COLORS[tissue], usual_range(tissue)) for tissue in Tissue],
        range_bars={
            part.subject: {t.name: _range_bar(t, part.volumes[f"{t.name.lower()}_ml"]) for t in Tissue}
            for part in parts
        },
        errors=any(part.has_label for part in parts),
        errors_color=DISAGREEMENT_COLOR,
        uncertain=any(part.pictures and "uncertainty" in part.pictures.layers for part in parts),
        shades=[to_hex(color / 255) for color in inferno[::51]],
        source=SOURCE,
        deviations=DEVIATIONS,
        most_viewers=MOST_VIEWERS,
        provenance=provenance,
    )


def warnings_by_kind(parts: Sequence[Part]) -> dict[str, list[str]]:
    """The subjects of which the report warns, by what it warns of."""
    found: dict[str, list[str]] = {}
    for part in parts:
        for kind in part.warnings:
            found.setdefault(kind, []).append(part.subject)
    return found


class ReportSaver(BackgroundWriter):
    """Handler that writes `report.html`, which replaces one of an earlier run.

    It shows the subjects of this run, of several processes those of all, and scores, where `ScoreTable` has written
    them. It stands after the handlers that write what it reads.

    Args:
        output_dir: the folder to write to, where the TensorBoard log of a training may lie too.
        provenance: what it told when the engine started; stands before this handler.
        scores: the table of `scripts.results.metrics.ScoreTable`; None where nothing is scored.
    """

    def __init__(self, output_dir: str, provenance: ProvenanceSaver, scores: str | None = None) -> None:
        super().__init__(output_dir)
        self.provenance = provenance
        self.scores = scores
        self.parts: list[Part] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.parts.clear)
        super().attach(engine)
        engine.add_event_handler(Events.COMPLETED, self.save)

    def write(self, item: dict[str, Any]) -> None:
        self.parts.append(subject_part(item, with_pictures=len(self.parts) < MOST_VIEWERS))

    def save(self) -> None:
        # a subject that two processes had counts once
        parts = list({part.subject: part for part in gathered(self.parts)}.values())
        if idist.get_rank() > 0:
            return
        parts = [part if n < MOST_VIEWERS else replace(part, pictures=None) for n, part in enumerate(parts)]
        rows = read_csv(self.scores) if self.scores else []
        scores = {row["subject"]: row for row in rows}
        page = render(parts, self.provenance.told, scores, training_history(self.output_dir))
        with whole_files(self.output_dir) as temporary:
            # a path in the command needn't be UTF-8; Python has surrogates in place of what isn't
            (temporary / NAME).write_text(page, encoding="utf-8", errors="backslashreplace")
        found = "; ".join(f"{kind} ({', '.join(ids)})" for kind, ids in warnings_by_kind(parts).items())
        print(f"report: {self.output_dir / NAME}; warnings: {found or 'none'}")
