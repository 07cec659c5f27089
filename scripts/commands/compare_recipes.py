"""`python -m scripts compare_recipes`: which recipe scores best after the same training time on the same subjects."""

import json
import multiprocessing
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import ensure_tuple
from torch.utils.benchmark import timer

from scripts.commands.shared import CONFIGS, TITLES, config_files, mean_cells, require_same_options, run_task
from scripts.data.subjects import Ids, SubjectFolder
from scripts.errors import InputError, require_whole_numbers
from scripts.files import ROOT, whole_files
from scripts.results.metrics import mean_and_deviation
from scripts.results.tables import markdown_table, read_csv, write_csv
from scripts.settings import nearest, unknown_setting
from scripts.tissues import TISSUES

RECIPES = CONFIGS / "comparison.json"
# steps that are timed, after those that warm up
TIMED, WARM_UP = 24, 6
Recipe = Mapping[str, Any]


def compare_recipes(
    dataset_dir: str,
    val_subjects: Ids,
    output_dir: str = "eval/recipes",
    minutes: float = 5,
    seeds: int = 3,
    names: str | Sequence[str] | None = None,
) -> None:
    """Train each recipe of configs/comparison.json from scratch for the same time, and score it.

    A step of each recipe is timed first. The recipe then trains for as many steps as fit into the time, so that its
    schedule ends with the training, and a disturbance of the machine costs time but no steps. Reading the subjects and
    scoring don't count. Trainings run one after the other, all recipes of one seed first. Run the same command again to
    continue: finished trainings are kept.

    Args:
        dataset_dir: the folder of subjects.
        val_subjects: subjects to score; they choose nothing within a training. All other labelled subjects train.
        output_dir: gets a folder per training, comparison.csv with the Dice of each training, comparison.md with the
            table, and steps.json with the timings.
        minutes: training time.
        seeds: trainings per recipe, with seeds 0, 1, ...
        names: recipes to train; all by default. The table also has recipes trained before.

    Raises:
        InputError: an option is out of range, a recipe has an unknown setting, OUTPUT_DIR has a comparison with other
            options or recipes, or a training or its scoring fails.
    """
    require_whole_numbers(1, seeds=seeds)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or minutes <= 0:
        raise InputError(f"--minutes {minutes}: must be a number above 0")
    dataset = SubjectFolder(dataset_dir)
    dataset.require(dataset.training(val_subjects), "train")
    dataset.require(dataset.validation(val_subjects), "validate")
    recipes = _chosen_recipes(names)
    common = {"dataset_dir": str(Path(dataset_dir).resolve()), "val_subjects": [*ensure_tuple(val_subjects)]}
    output = Path(output_dir).resolve()
    timings = _timings(output, recipes, common, minutes)
    for seed in range(seeds):
        for name, recipe in recipes.items():
            if not _is_finished(directory := _folder(output, name, seed)):
                print(f"{name}, seed {seed}: {timings[name]['steps']} steps", flush=True)
                # one epoch, so that it is validated whatever the interval
                length = {"epochs": 1, "val_interval": 1, "crops_per_epoch": timings[name]["patches"]}
                _train_and_score(recipe, common | length | {"seed": seed}, directory)
            rows = _rows(output, timings)
            write_csv(output / "comparison.csv", rows)
            table = markdown_table(_summary(rows))
            with whole_files(output) as temporary:
                (temporary / "comparison.md").write_text(table + "\n")
    print(f"Dice in percent after {minutes:g} minutes of training:\n{table}")
    print(f"in {output_dir}: comparison.md, comparison.csv")


def _chosen_recipes(names: str | Sequence[str] | None) -> dict[str, Recipe]:
    """The recipes with these names, or all.

    Raises:
        InputError: there is no such recipe, or one has a setting that its configs don't know.
    """
    recipes = json.loads(RECIPES.read_text())
    chosen = list(recipes) if names is None else [str(name) for name in ensure_tuple(names)]
    for name in chosen:
        if name not in recipes:
            hint = nearest(name, recipes) or ", ".join(recipes)
            raise InputError(f"--names {name}: no such recipe in {RECIPES}; did you mean {hint}?")
        config = ConfigParser(ConfigParser.load_config_files(_config_files(recipes[name])["training"]))
        for setting in _overrides(recipes[name]):
            if hint := unknown_setting(setting, config):
                raise InputError(f"{RECIPES}: {name} has {setting}, which is no setting; {hint}")
    return {name: recipes[name] for name in chosen}


def _config_files(recipe: Recipe) -> dict[str, list[str]]:
    return config_files(recipe.get("overlays", ()))


def _overrides(recipe: Recipe) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name != "overlays"}


def _timings(
    output: Path, recipes: Mapping[str, Recipe], common: Mapping[str, Any], minutes: float
) -> dict[str, dict[str, Any]]:
    """Seconds per step, steps and patches of each recipe, read from steps.json or measured and recorded there.

    Raises:
        InputError: steps.json has other subjects, minutes or settings of a recipe.
    """
    path = output / "steps.json"
    options = {"minutes": minutes, **common}
    record = json.loads(path.read_text()) if path.is_file() else {"options": options, "recipes": {}}
    require_same_options(path, record["options"], options)
    for name, recipe in recipes.items():
        definition = ConfigParser.load_config_files(_config_files(recipe)["evaluating"]) | _overrides(recipe)
        if name in record["recipes"]:
            require_same_options(path, record["recipes"][name]["definition"], definition)
            continue
        print(f"{name}: timing a step", flush=True)
        # in a new process, like its trainings
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            step, batch_size = process.submit(_seconds_per_step, recipe, common).result()
        steps = max(1, round(60 * minutes / step))
        record["recipes"][name] = {"seconds per step": round(step, 3), "steps": steps, "patches": steps * batch_size}
        record["recipes"][name]["definition"] = definition
        with whole_files(output) as temporary:
            (temporary / path.name).write_text(json.dumps(record, indent=4))
    return record["recipes"]


def _seconds_per_step(recipe: Recipe, common: Mapping[str, Any]) -> tuple[float, int]:
    """Median seconds of a training step, and its number of patches."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as unused:
        settings = {**_overrides(recipe), **common, "output_dir": unused, "ckpt_dir": unused, "epochs": 1}
        settings["crops_per_epoch"] = f"$@batch_size * {WARM_UP + TIMED}"
        settings["train#trainer#train_handlers"] = []
        files = _config_files(recipe)["training"]
        workflow = ConfigWorkflow(files, workflow_type="train", bundle_root=str(ROOT), **settings)
        workflow.initialize()
        trainer = workflow.parser.get_parsed_content("train#trainer")
        trainer.add_event_handler(Events.STARTED | Events.ITERATION_COMPLETED, lambda: times.append(timer()))
        trainer.run()
    return statistics.median(np.diff(times)[WARM_UP:]), workflow.parser.get_parsed_content("batch_size")


def _folder(output: Path, name: str, seed: int) -> Path:
    return output / name.replace(" ", "-") / f"seed-{seed}"


def _is_finished(directory: Path) -> bool:
    return (directory / "metrics.md").is_file()  # the last file that scoring writes


def _train_and_score(recipe: Recipe, settings: Mapping[str, Any], directory: Path) -> None:
    """Train with the recipe and the settings laid over the configs, and score the last network."""
    overlay = directory / "overlay.json"
    is_begun = overlay.is_file()
    is_trained = is_begun and (directory / "last.pt").is_file()  # written at the end of the only epoch
    if is_begun and not is_trained:
        shutil.rmtree(directory)  # an unfinished training of this command
    folders = {"output_dir": str(directory), "ckpt_dir": str(directory)}
    with whole_files(directory) as temporary:
        (temporary / overlay.name).write_text(json.dumps({**_overrides(recipe), **settings, **folders}, indent=4))
    files = _config_files(recipe)
    if not is_trained:
        run_task("training", [*files["training"], str(overlay)], {}, str(directory))
    checkpoints = {"checkpoints": str(directory / "last.pt")}
    run_task("evaluating", [*files["evaluating"], str(overlay)], checkpoints, str(directory))


def _rows(output: Path, timings: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per finished training: mean Dice in percent over the validation subjects."""
    rows = []
    for name, timing in timings.items():
        for seed in range(len(list(_folder(output, name, 0).parent.glob("seed-*")))):
            if _is_finished(directory := _folder(output, name, seed)):
                row = {"recipe": name, "seed": seed} | {key: timing[key] for key in ("seconds per step", "steps")}
                scores = read_csv(directory / "metrics.csv")
                dice = [[float(score[f"dice_{column}"]) for column in (*TISSUES, "mean")] for score in scores]
                means = (100 * mean_and_deviation(dice)[0]).round(2).tolist()
                rows.append(row | dict(zip(TITLES, means, strict=True)))
    return rows


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per recipe, the best first: mean over the seeds, and the mean of each seed.

    Args:
        rows: as `_rows` returns them, those of one recipe in succession.
    """
    result = []
    for name, group in groupby(rows, itemgetter("recipe")):
        trainings = list(group)
        by_seed = " ".join(f"{row['mean']:.2f}" for row in trainings)
        row = {"recipe": name, "steps": trainings[0]["steps"]} | mean_cells(trainings, TITLES, digits=2)
        result.append(row | {"mean of each seed": by_seed})
    # recipes without a score (NaN) come last
    return sorted(result, key=lambda row: np.nan_to_num(float(row["mean"]), nan=-1.0), reverse=True)
