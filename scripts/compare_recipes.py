"""`python -m scripts compare_recipes`: what scores best after the same minutes of training on the same subjects."""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.utils import ensure_tuple

from scripts.errors import InputError, require_whole_numbers
from scripts.metrics import TISSUES
from scripts.workflow import nearest
from scripts.writers import markdown_table, read_csv, whole_files, write_csv

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = CONFIGS / "comparison.json"
# steps that are timed, and those before them that aren't
TIMED, WARMING_UP = 12, 4
# in percent: Dice of each tissue and their mean
COLUMNS = dict(zip(("CSF", "GM", "WM", "mean"), (*TISSUES, "mean"), strict=True))


def compare_recipes(
    dataset_dir: str,
    val_subjects: Sequence[int | str],
    output_dir: str = "eval/recipes",
    minutes: float = 5,
    seeds: int = 3,
    names: str | Sequence[str] | None = None,
    **settings: Any,
) -> None:
    """Train each recipe of configs/comparison.json from scratch for the same minutes, and score it.

    The median step is timed beforehand and the training given as many steps as fit, so that a schedule ends with it
    and what disturbs the machine on the way costs time but no steps. Reading the subjects and scoring don't count.
    Trainings run one after the other, those of one seed first; run again it keeps those that are finished.

    Args:
        dataset_dir: the folder of subjects.
        val_subjects: who scores; nothing is chosen by them within a training. All other labelled ones train.
        output_dir: takes a folder for each training, comparison.csv with Dice of each, and comparison.md, the table.
        minutes: of training.
        seeds: trainings of each recipe, with seeds 0, 1, ...
        names: of the recipes to compare; all of them if not given.
        settings: any setting of configs/train.json, for all recipes.

    Raises:
        InputError: a setting can't be, or a training or its scoring fails.
    """
    require_whole_numbers(1, seeds=seeds)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or minutes <= 0:
        raise InputError(f"--minutes {minutes}: must be a number above 0")
    recipes = json.loads(RECIPES.read_text())
    chosen = list(recipes) if names is None else [str(name) for name in ensure_tuple(names)]
    for name in chosen:
        if name not in recipes:
            hint = nearest(name, recipes) or ", ".join(recipes)
            raise InputError(f"--names {name}: no such recipe in {RECIPES.name}; did you mean {hint}?")
    of_all = {"dataset_dir": str(Path(dataset_dir).resolve()), "val_subjects": ensure_tuple(val_subjects), **settings}
    steps: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for name in chosen:
            directory = Path(output_dir).resolve() / name.replace(" ", "-") / f"seed-{seed}"
            plan = of_all | {"seed": seed, "output_dir": str(directory), "ckpt_dir": str(directory)}
            if not (directory / "metrics.csv").is_file():
                if name not in steps:
                    print(f"{name}: timing a step", flush=True)
                    steps[name] = _steps(recipes[name], plan, 60 * minutes)
                print(f"{name}, seed {seed}: {steps[name]['steps']} steps", flush=True)
                _train_and_score(recipes[name], plan | steps[name]["settings"], directory, steps[name])
            rows.append({"recipe": name, "seed": seed} | _result(directory))
            write_csv(Path(output_dir) / "comparison.csv", rows)
    table = markdown_table(_summary(rows))
    with whole_files(output_dir) as temporary:
        (temporary / "comparison.md").write_text(table + "\n")
    print(
        f"Dice in percent after {minutes:g} minutes of training\n\n{table}\n\nin {output_dir}: comparison.md and .csv"
    )


def _config_files(recipe: Mapping[str, Any], *last: str) -> list[str]:
    return [str(CONFIGS / name) for name in ("train.json", *recipe.get("overlays", ()), *last)]


def _overrides(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name != "overlays"}


def _steps(recipe: Mapping[str, Any], plan: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """How many training steps fit into some seconds, and the settings that make one epoch of them."""
    settings = {**_overrides(recipe), **plan, "epochs": 1, "train#trainer#train_handlers": []}
    workflow = ConfigWorkflow(_config_files(recipe), workflow_type="train", bundle_root=str(CONFIGS.parent), **settings)
    batch_size = workflow.parser.get_parsed_content("batch_size")
    workflow.parser["crops_per_epoch"] = batch_size * (WARMING_UP + TIMED)
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    times: list[float] = []

    def note(engine: Engine) -> None:
        times.append(time.perf_counter())

    trainer.add_event_handler(Events.STARTED | Events.ITERATION_COMPLETED, note)
    trainer.run()
    step = statistics.median(np.diff(times)[WARMING_UP:])
    steps = max(1, round(seconds / step))
    del workflow, trainer
    gc.collect()
    # the last epoch is validated, whatever the interval
    own = {"epochs": 1, "val_interval": 1, "crops_per_epoch": batch_size * steps}
    return {"seconds a step": round(step, 3), "steps": steps, "settings": own}


def _train_and_score(
    recipe: Mapping[str, Any], settings: Mapping[str, Any], directory: Path, steps: Mapping[str, Any]
) -> None:
    """Run both commands with the recipe and the settings laid over the configs; the training's last network scores."""
    with whole_files(directory) as temporary:
        # a network of MONAI has no stride to hold the patch against
        overlay = {**_overrides(recipe), **settings, "training": ["$@train#trainer.run()"]}
        (temporary / "overlay.json").write_text(json.dumps(overlay, indent=4))
        (temporary / "steps.json").write_text(json.dumps(steps))
    for task, last in (("training", ()), ("evaluating", ("evaluate.json",))):
        files = [*_config_files(recipe, *last), str(directory / "overlay.json")]
        command = ["-m", "monai.bundle", "run", task, f"--config_file={files!r}", f"--bundle_root={CONFIGS.parent}"]
        if task == "evaluating":
            command.append(f"--checkpoints={directory / 'last.pt'}")
        if status := subprocess.run([sys.executable, *command]).returncode:
            raise InputError(f"{directory}: {task} ended with status {status}, for the reason told above")


def _result(directory: Path) -> dict[str, Any]:
    """Steps and mean Dice in percent over the subjects of a training that is finished."""
    scores = read_csv(directory / "metrics.csv")
    steps = json.loads((directory / "steps.json").read_text())
    return {name: steps[name] for name in ("seconds a step", "steps")} | {
        title: round(100 * float(np.mean([float(row[f"dice_{name}"]) for row in scores])), 2)
        for title, name in COLUMNS.items()
    }


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each recipe, the best first: means over the seeds, and the means of single seeds."""
    result = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == name]
        columns = {title: f"{np.mean([row[title] for row in own]):.2f}" for title in COLUMNS}
        by_seed = " ".join(f"{row['mean']:.2f}" for row in own)
        result.append({"recipe": name, "steps": own[0]["steps"]} | columns | {"mean of each seed": by_seed})
    return sorted(result, key=lambda row: -float(row["mean"]))
