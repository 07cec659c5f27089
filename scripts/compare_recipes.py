"""`python -m scripts compare_recipes`: what scores best after the same minutes of training on the same subjects."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Events
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

    A step of each recipe is timed first, and its trainings get as many as fit, so that a schedule ends with the
    training and what disturbs the machine on the way costs time but no steps. Reading the subjects and scoring don't
    count. Trainings run one after the other, those of one seed first; run again it keeps what is finished.

    Args:
        dataset_dir: the folder of subjects.
        val_subjects: who scores; nothing is chosen by them within a training. All other labelled ones train.
        output_dir: takes a folder for each training, comparison.csv with Dice of each, comparison.md, the table, and
            steps.json, what was timed.
        minutes: of training.
        seeds: trainings of each recipe, with seeds 0, 1, ...
        names: of the recipes to compare; all of them if not given.
        settings: any setting of configs/train.json, for all recipes.

    Raises:
        InputError: a setting can't be, OUTPUT_DIR has a comparison with others, or a training or its scoring fails.
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
    of_all = {
        "dataset_dir": str(Path(dataset_dir).resolve()),
        "val_subjects": [*ensure_tuple(val_subjects)],
        **settings,
    }
    steps = _timed(Path(output_dir), {name: recipes[name] for name in chosen}, of_all, minutes)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for name in chosen:
            directory = Path(output_dir).resolve() / name.replace(" ", "-") / f"seed-{seed}"
            if not (directory / "metrics.csv").is_file():
                print(f"{name}, seed {seed}: {steps[name]['steps']} steps", flush=True)
                # the last epoch is validated, whatever the interval
                one_epoch = {"epochs": 1, "val_interval": 1, "crops_per_epoch": steps[name]["patches"]}
                _train_and_score(recipes[name], of_all | one_epoch | {"seed": seed}, directory)
            rows.append({"recipe": name, "seed": seed} | steps[name] | _mean_dice(directory))
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


def _timed(
    output_dir: Path, recipes: Mapping[str, Mapping[str, Any]], of_all: Mapping[str, Any], minutes: float
) -> dict[str, dict[str, Any]]:
    """Seconds a step, steps and patches of each recipe: from steps.json, or timed and noted there.

    Raises:
        InputError: steps.json is of a comparison with other settings or minutes.
    """
    path = output_dir / "steps.json"
    now = json.loads(json.dumps({"minutes": minutes, "settings": of_all}))
    noted = json.loads(path.read_text()) if path.is_file() else now | {"recipes": {}}
    if any(noted[name] != value for name, value in now.items()):
        raise InputError(f"{path}: is of a comparison with other settings; choose another --output_dir")
    for name in recipes:
        if name not in noted["recipes"]:
            print(f"{name}: timing a step", flush=True)
            with tempfile.TemporaryDirectory() as unused:
                step, batch_size = _seconds_a_step(recipes[name], of_all, unused)
            steps = max(1, round(60 * minutes / step))
            noted["recipes"][name] = {"seconds a step": round(step, 3), "steps": steps, "patches": steps * batch_size}
            with whole_files(output_dir) as temporary:
                (temporary / path.name).write_text(json.dumps(noted, indent=4))
    return noted["recipes"]


def _seconds_a_step(recipe: Mapping[str, Any], of_all: Mapping[str, Any], output_dir: str) -> tuple[float, int]:
    """Median seconds of a training step, and the patches of one."""
    settings = {**_overrides(recipe), **of_all, "output_dir": output_dir, "ckpt_dir": output_dir, "epochs": 1}
    settings["crops_per_epoch"] = f"$@batch_size * {WARMING_UP + TIMED}"
    settings["train#trainer#train_handlers"] = []
    workflow = ConfigWorkflow(_config_files(recipe), workflow_type="train", bundle_root=str(CONFIGS.parent), **settings)
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    times: list[float] = []
    trainer.add_event_handler(Events.STARTED | Events.ITERATION_COMPLETED, lambda: times.append(time.perf_counter()))
    trainer.run()
    return statistics.median(np.diff(times)[WARMING_UP:]), workflow.parser.get_parsed_content("batch_size")


def _train_and_score(recipe: Mapping[str, Any], settings: Mapping[str, Any], directory: Path) -> None:
    """Run both commands with the recipe and the settings laid over the configs; the training's last network scores."""
    overlay = {**_overrides(recipe), **settings, "output_dir": str(directory), "ckpt_dir": str(directory)}
    # a network of MONAI has no stride to hold the patch against
    overlay["training"] = ["$@train#trainer.run()"]
    with whole_files(directory) as temporary:
        (temporary / "overlay.json").write_text(json.dumps(overlay, indent=4))
    for task, last in (("training", ()), ("evaluating", ("evaluate.json",))):
        files = [*_config_files(recipe, *last), str(directory / "overlay.json")]
        command = ["-m", "monai.bundle", "run", task, f"--config_file={files!r}", f"--bundle_root={CONFIGS.parent}"]
        if task == "evaluating":
            command.append(f"--checkpoints={directory / 'last.pt'}")
        if status := subprocess.run([sys.executable, *command]).returncode:
            raise InputError(f"{directory}: {task} ended with status {status}, for the reason told above")


def _mean_dice(directory: Path) -> dict[str, float]:
    """Mean Dice in percent over the subjects that a finished training was scored on."""
    scores = read_csv(directory / "metrics.csv")
    return {
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
