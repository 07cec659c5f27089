"""Provenance of results: version, weights, packages, command and settings."""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Trainer

from scripts.data.storage import without_credentials
from scripts.files import ROOT, whole_files
from scripts.inference.exported import is_exported
from scripts.inference.precision import network_precision
from scripts.preparation.brain import WEIGHTS as BRAIN_WEIGHTS
from scripts.weights import checkpoint_paths, has_weights_of, is_fresh_start, sha256

NAME = "infant_brain_mri_skipdenseseg"
METADATA = ROOT / "configs" / "metadata.json"
GIVEN_WEIGHTS = "not used: weights were given by the calling program"


def metadata() -> dict[str, Any]:
    """Return the content of `configs/metadata.json`."""
    return json.loads(METADATA.read_text(encoding="utf-8"))


def software() -> str:
    """Return the installed versions of Python and of the packages named in `configs/metadata.json`."""
    versions = {"Python": platform.python_version()}
    for package in ("monai", "torch", "numpy", *metadata()["required_packages_version"]):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # in a bundled program without the packages' metadata
            versions[package] = "unknown"
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def command() -> str:
    """Return the command of this process, quoted for a shell, without credentials in URLs."""
    return " ".join([Path(sys.orig_argv[0]).name, *map(_quoted, map(without_credentials, sys.orig_argv[1:]))])


def _quoted(argument: str) -> str:
    """An argument quoted for a shell; a list of texts as in README.md."""
    return f'"{argument}"' if "'" in argument and not set(argument) & set('"$`\\!') else shlex.quote(argument)


def summary_of(value: Any) -> Any:
    """Return a plain setting unchanged, and the kind of a network, an optimiser and the like."""
    if isinstance(value, torch.nn.Module) and (parameters := sum(each.numel() for each in value.parameters())):
        return f"{type(value).__name__}, {parameters:,} parameters"
    plain = value is None or isinstance(value, str | int | float | Sequence)
    return value if plain else type(value).__name__


def provenance(engine: Engine, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the provenance of the results of an engine, by topic.

    Args:
        engine: an engine with a network, about to run.
        settings: by name, with `precision`, and `checkpoints` if these give the weights.
    """
    device = torch.device(engine.state.device)
    dtype = network_precision(device, settings["precision"], training=isinstance(engine, Trainer))
    precision = str(dtype).removeprefix("torch.")
    paths = checkpoint_paths(settings["checkpoints"]) if "checkpoints" in settings else []
    exported = any(map(is_exported, paths))
    # MONAI's federated client evaluates the weights that it got, even if a checkpoint exists
    given = len(paths) == 1 and not exported and not has_weights_of(paths[0], engine.network)
    if start := settings.get("start_from"):
        paths.append(start)
    return {
        "date": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "command": command(),
        "bundle": f"{metadata()['name']}, version {metadata()['version']}",
        "software": software(),
        "device": f"{device}, {processes} processes" if (processes := idist.get_world_size()) > 1 else str(device),
        "precision": "that of the exported network" if exported else precision,
        **{
            f"checkpoint {path}": GIVEN_WEIGHTS if given or not Path(path).is_file() else f"SHA-256 {sha256(path)}"
            for path in paths
        },
        **({"brain mask": f"SHA-256 {sha256(BRAIN_WEIGHTS)}"} if settings.get("prepare") else {}),
        **{f"setting {name}": without_credentials(str(summary_of(value))) for name, value in settings.items()},
    }


def made_by(checkpoints: str | Sequence[str]) -> str:
    """Return bundle, version and weights in at most 79 characters, for the header of a label image.

    Args:
        checkpoints: see `scripts.weights.checkpoint_paths`. The weights are named by the start of their SHA-256; for
            several checkpoints that of their SHA-256s in a row. They aren't named if a file is missing.

    Raises:
        InputError: as `checkpoint_paths`.
    """
    paths = checkpoint_paths(checkpoints)
    weights = ""
    if all(Path(path).is_file() for path in paths):
        digests = [sha256(path) for path in paths]
        digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        weights = f", weights {digest[:16]}"
    return f"{NAME} {metadata()['version']}{weights}"


class ProvenanceSaver:
    """Handler that writes the provenance of a run's results as `<kind>-provenance.json`, once there are results.

    It also sets `engine.state.provenance` when the run starts, for other handlers.

    Args:
        output_dir: the folder of the results.
        kind: of the run: 'training', 'evaluation', 'inference'.
        settings: see `provenance`.
        weights: a checkpoint that the run writes; its SHA-256 is added at the end.
        resume: whether the run resumes another; it is then added to that run's file.
    """

    def __init__(
        self,
        output_dir: str,
        kind: str,
        settings: Mapping[str, Any],
        weights: Path | None = None,
        resume: bool = False,
    ) -> None:
        self.path = Path(output_dir) / f"{kind}-provenance.json"
        self.settings = settings
        self.weights = weights
        self.resume = resume
        self.record: dict[str, str] = {}
        self.written = False

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.note)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.write_once)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def note(self, engine: Engine) -> None:
        """Record the provenance now: a training may replace the checkpoint that it started from."""
        self.record, self.written = provenance(engine, self.settings), False
        # a training that found nothing to resume starts at its first epoch, and the file is of an older one
        if self.resume and not is_fresh_start(engine) and self.path.is_file():
            resumed = "; ".join(self.record[name] for name in ("command", "bundle", "software"))
            with suppress(ValueError):  # the file was edited by hand
                earlier = json.loads(self.path.read_text(encoding="utf-8"))
                self.record = earlier | {f"resumed {self.record['date']}": resumed}
        engine.state.provenance = self.record

    def write_once(self) -> None:
        if not self.written:
            self.write()

    def write(self) -> None:
        if idist.get_rank() > 0:
            return
        weights = {}
        if self.written and self.weights and self.weights.is_file():
            weights = {f"weights {self.weights}": f"SHA-256 {sha256(self.weights)}"}
        content = json.dumps(self.record | weights, indent=4) + "\n"
        with whole_files(self.path.parent) as temporary:
            (temporary / self.path.name).write_text(content, encoding="utf-8")
        self.written = True
