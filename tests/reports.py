"""Reports of a few subjects."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers import ROOT
from ignite.engine import Engine, Events

from scripts.network import SkipDenseSeg
from scripts.report.page import ReportSaver
from scripts.results.provenance import ProvenanceSaver
from scripts.weights import load_weights

WEIGHTS = ROOT / "models" / "model.pt"
HOSTILE = """<script>alert('1')</script>"><img src=x onerror=alert(2)>&amp;$\\frac{ 日本"""
PROVENANCE = {"date": "today", "command": "python -m monai.bundle run", "checkpoint model.pt": "SHA-256 abc"}


def scores_of(number: float) -> dict[str, str]:
    """A row of the table of scores."""
    names = [f"{score}_{name}" for score in ("dice", "hd95", "hd_max", "asd") for name in ("csf", "gm", "wm", "mean")]
    return {name: str(number + place / 100) for place, name in enumerate(names)}


@cache
def included_network() -> SkipDenseSeg:
    network = SkipDenseSeg()
    load_weights(network, str(WEIGHTS))
    return network


def report_of(
    items: list[Any],
    output: Path,
    scored: bool = False,
    network: SkipDenseSeg | None = None,
    **settings: Any,
) -> str:
    """The page that the handler writes for an engine with these subjects."""
    engine = Engine(lambda engine, batch: None)
    engine.state.device = torch.device("cpu")
    engine.network = network or included_network()

    @engine.on(Events.ITERATION_COMPLETED)
    def hand_over() -> None:
        item = items[engine.state.iteration - 1]
        engine.state.batch, engine.state.output = [item], [{}]

    settings = {"checkpoints": str(WEIGHTS), "precision": "fp32", "dataset_dir": "the/data"} | settings
    ReportSaver(str(output), str(output / "metrics.csv") if scored else None).attach(engine)
    ProvenanceSaver(str(output), "inference", settings).attach(engine)
    engine.run(range(len(items)))
    return (output / "report.html").read_text(encoding="utf-8")
