"""`python -m scripts compare_recipes`: what scores best after the same minutes of training on the same subjects."""

import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import ensure_tuple

from scripts.data.subjects import Ids, require_subjects, training_subjects, validation_subjects
from scripts.errors import InputError, require_whole_numbers
from scripts.files import ROOT, whole_files
from scripts.results.metrics import mean_and_deviation
from scripts.results.tables import markdown_table, read_csv, write_csv
from scripts.settings import nearest, unknown_setting
from scripts.tissues import TISSUES

CONFIGS = ROOT / "configs"
RECIPES = CONFIGS / "comparison.json"
# steps that are timed, and those before them that aren't
TIMED, WARMING_UP = 24, 6
COLUMNS = dict(zip(("CSF", "GM", "WM", "mean"), (*TISSUES, "mean"), strict=True))
Recipe = Mapping[str, Any]


def compare_recipes(
    dataset_dir: str,
    val_subjects: Ids,
    output_dir: str = "eval/recipes",
    minutes: float = 5,
    seeds: int = 3,
    names: str | Sequence[str] | None = None,
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
        names: of the recipes to train; all of them if not given. The table has those trained before too.

    Raises:
        InputError: an option can't be, a recipe has an unknown setting, OUTPUT_DIR has a comparison with other options
            or recipes, or a training or its scoring fails.
    """
    require_whole_numbers(1, seeds=seeds)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or minutes <= 0:
        raise InputError(f"--minutes {minutes}: must be a number above 0")
    require_subjects(training_subjects(dataset_dir, val_subjects), dataset_dir, "train")
    require_subjects(validation_subjects(dataset_dir, val_subjects), dataset_dir, "validate")
    recipes = _chosen_recipes(names)
    of_all = {"dataset_dir": str(Path(dataset_dir).resolve()), "val_subjects": [*ensure_tuple(val_subjects)]}
    output = Path(output_dir).resolve()
    timed = _timed(output, recipes, of_all, minutes)
    for seed in range(seeds):
        for name, recipe in recipes.items():
            if not _is_finished(directory := _folder(output, name, seed)):
                print(f"{name}, seed {seed}: {timed[name]['steps']} steps", flush=True)
                # the last epoch is validated, whatever the interval
                one_epoch = {"epochs": 1, "val_interval": 1, "crops_per_epoch": timed[name]["patches"]}
                _train_and_score(recipe, of_all | one_epoch | {"seed": seed}, directory)
            rows = _rows(output, timed)
            write_csv(output / "comparison.csv", rows)
            table = markdown_table(_summary(rows))
            with whole_files(output) as temporary:
                (temporary / "comparison.md").write_text(table + "\n")
    print(f"Dice in percent after {minutes:g} minutes of training:\n{table}")
    print(f"in {output_dir}: comparison.md, comparison.csv")


def _chosen_recipes(names: str | Sequence[str] | None) -> dict[str, Recipe]:
    """The recipes of these names, all of whose settings train.json and their overlays have."""
    recipes = json.loads(RECIPES.read_text())
    chosen = list(recipes) if names is None else [str(name) for name in ensure_tuple(names)]
    for name in chosen:
        if name not in recipes:
            hint = nearest(name, recipes) or ", ".join(recipes)
            raise InputError(f"--names {name}: no such recipe in {RECIPES}; did you mean {hint}?")
        config = ConfigParser(ConfigParser.load_config_files(_config_files(recipes[name])))
        for setting in _overrides(recipes[name]):
            if hint := unknown_setting(setting, config):
                raise InputError(f"{RECIPES}: {name} has {setting}, which is no setting; {hint}")
    return {name: recipes[name] for name in chosen}


def _config_files(recipe: Recipe, *last: str) -> list[str]:
    return [str(CONFIGS / name) for name in ("train.json", *recipe.get("overlays", ()), *last)]


def _overrides(recipe: Recipe) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name != "overlays"}


def _timed(
    output: Path, recipes: Mapping[str, Recipe], of_all: Mapping[str, Any], minutes: float
) -> dict[str, dict[str, Any]]:
    """Seconds a step, steps and patches of each recipe, from steps.json or timed and noted there.

    Raises:
        InputError: steps.json is of a comparison with other subjects, minutes or settings of a recipe.
    """
    path = output / "steps.json"
    options = json.loads(json.dumps({"minutes": minutes, **of_all}))
    noted = json.loads(path.read_text()) if path.is_file() else {"options": options, "recipes": {}}
    for name, recipe in recipes.items():
        definition = ConfigParser.load_config_files(_config_files(recipe, "evaluate.json")) | _overrides(recipe)
        before = noted["recipes"].get(name, {"definition": definition})
        if noted["options"] != options or before["definition"] != definition:
            raise InputError(f"{path}: is of a comparison with other settings; choose another --output_dir")
        if name in noted["recipes"]:
            continue
        print(f"{name}: timing a step", flush=True)
        # in a process of its own, as its trainings run
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own_process:
            step, batch_size = own_process.submit(_seconds_a_step, recipe, of_all).result()
        steps = max(1, round(60 * minutes / step))
        noted["recipes"][name] = {"seconds a step": round(step, 3), "steps": steps, "patches": steps * batch_size}
        noted["recipes"][name]["definition"] = definition
        with whole_files(output) as temporary:
            (temporary / path.name).write_text(json.dumps(noted, indent=4))
    return noted["recipes"]


def _seconds_a_step(recipe: Recipe, of_all: Mapping[str, Any]) -> tuple[float, int]:
    """Median seconds of a training step, and the patches of one."""
    times: list[float] = []

    def note() -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as unused:
        settings = {**_overrides(recipe), **of_all, "output_dir": unused, "ckpt_dir": unused, "epochs": 1}
        settings["crops_per_epoch"] = f"$@batch_size * {WARMING_UP + TIMED}"
        settings["train#trainer#train_handlers"] = []
        workflow = ConfigWorkflow(
            _config_files(recipe), workflow_type="train", bundle_root=str(CONFIGS.parent), **settings
        )
        workflow.initialize()
        trainer = workflow.parser.get_parsed_content("train#trainer")
        trainer.add_event_handler(Events.STARTED | Events.ITERATION_COMPLETED, note)
        trainer.run()
    return statistics.median(np.diff(times)[WARMING_UP:]), workflow.parser.get_parsed_content("batch_size")


def _folder(output: Path, name: str, seed: int) -> Path:
    return output / name.replace(" ", "-") / f"seed-{seed}"


def _is_finished(directory: Path) -> bool:
    # scoring writes it last
    return (directory / "metrics.md").is_file()


def _train_and_score(recipe: Recipe, settings: Mapping[str, Any], directory: Path) -> None:
    """Run both commands with the recipe and the settings laid over the configs; the training's last network scores."""
    is_begun = (directory / "overlay.json").is_file()
    is_trained = is_begun and (directory / "last.pt").is_file()  # written at the end of its only epoch
    if is_begun and not is_trained:
        shutil.rmtree(directory)  # what was begun here and not finished
    overlay = {**_overrides(recipe), **settings, "output_dir": str(directory), "ckpt_dir": str(directory)}
    with whole_files(directory) as temporary:
        (temporary / "overlay.json").write_text(json.dumps(overlay, indent=4))
    for task, last in (("training", ()), ("evaluating", ("evaluate.json",))):
        if task == "training" and is_trained:
            continue
        files = [*_config_files(recipe, *last), str(directory / "overlay.json")]
        command = ["-m", "monai.bundle", "run", task, f"--config_file={files!r}", f"--bundle_root={CONFIGS.parent}"]
        if task == "evaluating":
            command.append(f"--checkpoints={directory / 'last.pt'}")
        if status := subprocess.run([sys.executable, *command]).returncode:
            raise InputError(f"{directory}: {task} ended with status {status}, for the reason told above")


def _rows(output: Path, timed: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each training that is finished: mean Dice in percent over the subjects that scored."""
    rows = []
    for name, steps in timed.items():
        for seed in range(len(list(_folder(output, name, 0).parent.glob("seed-*")))):
            if _is_finished(directory := _folder(output, name, seed)):
                scores = read_csv(directory / "metrics.csv")
                row = {"recipe": name, "seed": seed} | {key: steps[key] for key in ("seconds a step", "steps")}
                dice = [[float(score[f"dice_{column}"]) for column in COLUMNS.values()] for score in scores]
                means = (100 * mean_and_deviation(dice)[0]).round(2).tolist()
                rows.append(row | dict(zip(COLUMNS, means, strict=True)))
    return rows


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each recipe, the best first: means over the seeds, and the means of single seeds."""
    result = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == name]
        means, _ = mean_and_deviation([[row[title] for title in COLUMNS] for row in own])
        columns = {title: f"{mean:.2f}" for title, mean in zip(COLUMNS, means, strict=True)}
        by_seed = " ".join(f"{row['mean']:.2f}" for row in own)
        result.append({"recipe": name, "steps": own[0]["steps"]} | columns | {"mean of each seed": by_seed})
    # NaN, where no label has any tissue, comes last
    return sorted(result, key=lambda row: np.nan_to_num(float(row["mean"]), nan=-1.0), reverse=True)
