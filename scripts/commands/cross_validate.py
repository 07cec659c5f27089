"""Cross-validation: each labelled subject is scored by a network that didn't train on it."""

import inspect
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

from scripts.data.subjects import natural_order, require_subjects, training_subjects
from scripts.errors import InputError
from scripts.files import ROOT, whole_files
from scripts.results.metrics import mean_and_deviation
from scripts.results.tables import markdown_table, read_csv, write_csv
from scripts.settings import unknown_setting
from scripts.tissues import TISSUES

# settings that each fold has its own of
OF_A_FOLD = ("bundle_root", "val_subjects", "ckpt_dir", "checkpoints", "resume")
# by what a text begins that MONAI takes for code, for another setting or for a part of a file
MEANT_OTHERWISE = "$@%"
TITLES = ("CSF", "GM", "WM", "Average")


def deal(subjects: Sequence[str], folds: int | str) -> dict[str, list[str]]:
    """Subjects dealt round to folds like cards, so that the folds differ in size by one at most.

    Args:
        subjects: their ids.
        folds: how many, or 'leave-one-out' for one a subject.

    Returns:
        The ids of each fold, by its number from '1' on.

    Raises:
        InputError: it isn't a whole number from 2 to the number of subjects.
    """
    number = len(subjects) if folds == "leave-one-out" else folds
    if isinstance(number, bool) or not isinstance(number, int) or not 2 <= number <= len(subjects):
        raise InputError(
            f"--folds {folds}: must be a whole number from 2 to that of the labelled subjects, {len(subjects)}, "
            f"or leave-one-out"
        )
    return {str(fold + 1): list(subjects[fold::number]) for fold in range(number)}


def cross_validate(
    dataset_dir: str,
    output_dir: str,
    folds: int | str = 5,
    fold: int | None = None,
    config_file: str | Sequence[str] = (),
    **settings: Any,
) -> None:
    """Train and evaluate once for each fold of the labelled subjects, in OUTPUT_DIR/fold-1, fold-2, ..., and gather.

    Run again it keeps the folds that are finished and goes on with the others.

    Args:
        dataset_dir: the folder of subjects.
        output_dir: where the folds go; folds.json in it says who is in which, and with which settings and configs they
            run.
        folds: how many, to which the subjects are dealt in the order of their ids, or leave-one-out.
        fold: the number of the only one to run, so that several machines can share the work; all by default.
        config_file: one or several configs that are laid over configs/train.json.
        settings: any setting of configs/train.json or configs/evaluate.json, handed on to the command that has it.

    Raises:
        InputError: an id would be taken for code, a setting isn't known or is set for each fold here, OUTPUT_DIR has
            other folds or something else, or training or evaluating a fold fails.
    """
    overlays = [str(Path(path).resolve()) for path in ensure_tuple(config_file)]
    config_files = _config_files(overlays)
    configs = {task: ConfigParser.load_config_files(files) for task, files in config_files.items()}
    commands = _commands(config_files, configs, settings)
    labeled = training_subjects(dataset_dir, ())
    require_subjects(labeled, dataset_dir, "train")
    for subject in labeled:
        if subject["subject"][0] in MEANT_OTHERWISE:
            raise InputError(
                f"{subject['image'][0]}: its id begins with {subject['subject'][0]!r}, by which settings name other "
                f"things than a subject; rename it"
            )
    plan = {
        "dataset_dir": str(Path(dataset_dir).resolve()),
        "config_files": overlays,
        "settings": settings,
        "folds": deal([subject["subject"] for subject in labeled], folds),
        # or folds of two recipes would be gathered where a config, or the bundle's version, changed between two runs
        "configs": configs,
    }
    if fold is not None and str(fold) not in plan["folds"]:
        raise InputError(f"--fold {fold}: must be one of 1 to {len(plan['folds'])}")
    _write_plan(Path(output_dir), plan)
    for number, subjects in plan["folds"].items():
        directory = Path(output_dir) / f"fold-{number}"
        if fold is not None and str(fold) != number:
            continue
        title = f"fold {number} of {len(plan['folds'])}, subjects {', '.join(subjects)}"
        if _scores(directory, subjects) is not None:
            print(f"{title}: finished already", flush=True)
            continue
        of_fold = {"bundle_root": str(ROOT), "dataset_dir": dataset_dir, "val_subjects": subjects}
        of_fold |= {"ckpt_dir": str(directory), "output_dir": str(directory)}
        for task, command in commands.items():
            print(f"{title}: {task}", flush=True)
            if status := subprocess.run([sys.executable, *command, *_options(of_fold)]).returncode:
                raise InputError(
                    f"fold {number}: {task} ended with status {status}, for the reason told above; "
                    f"mend it and give the same command again: finished folds are kept"
                )
    gather_folds(output_dir)


def _options(settings: dict[str, Any]) -> list[str]:
    """Settings as options of the command line, where `fire` reads Python literals."""
    return [f"--{name}={value!r}" for name, value in settings.items()]


def _config_files(overlays: list[str]) -> dict[str, list[str]]:
    """The configs of training and of evaluating.

    Raises:
        InputError: an overlay isn't there.
    """
    for path in overlays:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; name the configs to lay over train.json by --config_file")
    train, evaluate = (str(ROOT / "configs" / f"{name}.json") for name in ("train", "evaluate"))
    return {"training": [train, *overlays], "evaluating": [train, *overlays, evaluate]}


def _commands(
    config_files: dict[str, list[str]], configs: dict[str, dict[str, Any]], settings: dict[str, Any]
) -> dict[str, list[str]]:
    """The arguments of Python for training and for evaluating, each with those settings that its configs have.

    Raises:
        InputError: a setting is known to neither or is one of OF_A_FOLD.
    """
    parsers = {task: ConfigParser(config) for task, config in configs.items()}
    own_options = inspect.signature(cross_validate).parameters
    known: dict[str, list[str]] = {}
    for name in settings:
        if name in OF_A_FOLD:
            raise InputError(f"--{name}: is set by cross_validate for each fold; leave it out")
        hints = {task: unknown_setting(name, config, own_options) for task, config in parsers.items()}
        known[name] = [task for task, hint in hints.items() if hint is None]
        if not known[name]:
            raise InputError(f"--{name}: no such setting; {hints['evaluating']}")
    commands = {}
    for task, files in config_files.items():
        of_task = {name: value for name, value in settings.items() if task in known[name]}
        if task == "training":
            of_task["resume"] = True  # what an earlier run left unfinished
        commands[task] = ["-m", "monai.bundle", "run", task, f"--config_file={files!r}", *_options(of_task)]
    return commands


def _write_plan(output_dir: Path, plan: dict[str, Any]) -> None:
    """Write folds.json, or see that the one that is there says the same.

    Raises:
        InputError: it says something else, or the folder holds results that aren't of a cross-validation.
    """
    path = output_dir / "folds.json"
    text = json.dumps(plan, indent=4) + "\n"
    if path.is_file():
        before, now = json.loads(path.read_text()), json.loads(text)
        differing = [name for name in now if before.get(name) != now[name]]
        if differing:
            raise InputError(
                f"{path}: is of a cross-validation with other {', '.join(differing)}; "
                f"give the options of then with the configs of then, or choose another --output_dir"
            )
        return
    for other in [*output_dir.glob("fold-*"), *output_dir.glob("metrics.*")]:
        raise InputError(f"{other}: is there already and not from a cross-validation; choose another --output_dir")
    with whole_files(output_dir) as temporary:
        (temporary / path.name).write_text(text)


def _scores(directory: Path, subjects: Sequence[str]) -> list[dict[str, str]] | None:
    """The scores of a fold; None if it isn't finished."""
    path = directory / "metrics.csv"
    rows = read_csv(path) if path.is_file() else []
    return rows if {row["subject"] for row in rows} == set(subjects) else None


def gather_folds(output_dir: str) -> None:
    """Put the scores of all finished folds together: prints tables, writes metrics.csv and metrics.md.

    Args:
        output_dir: that of cross_validate.

    Raises:
        InputError: there is no cross-validation in it, or no fold is finished.
    """
    path = Path(output_dir) / "folds.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; name the --output_dir of cross_validate")
    folds = json.loads(path.read_text())["folds"]
    scores = {fold: _scores(Path(output_dir) / f"fold-{fold}", subjects) for fold, subjects in folds.items()}
    missing = [fold for fold, rows in scores.items() if rows is None]
    if len(missing) == len(folds):
        raise InputError(f"{output_dir}: no fold is finished yet; run cross_validate first")
    rows = [{"subject": row.pop("subject"), "fold": fold, **row} for fold in scores for row in scores[fold] or ()]
    rows.sort(key=lambda row: natural_order(row["subject"]))
    report = score_report(rows)
    if missing:
        report += f"\n\nNot finished yet: {'fold' if len(missing) == 1 else 'folds'} {', '.join(missing)}"
    write_csv(Path(output_dir) / "metrics.csv", rows)
    with whole_files(output_dir) as temporary:
        (temporary / "metrics.md").write_text(report + "\n")
    print(f"{report}\n\nscores of each subject: {output_dir}/metrics.csv; these tables: {output_dir}/metrics.md")


def score_report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two tables: Dice in percent of each subject, and over the subjects mean and deviation of Dice, HD95 and ASD.

    Args:
        rows: `subject` and the columns of `scripts.results.metrics.tissue_scores`, a row for each subject.

    Returns:
        Markdown. The standard deviation is that of a sample, divided by n - 1; NaN for one subject. Where a label
        lacks a tissue, its subject doesn't count for that one.
    """

    def line(title: str, cells: Iterable[str], of: str = "Subject") -> dict[str, str]:
        return {of: title} | dict(zip(TITLES, cells, strict=True))

    def values(score: str) -> np.ndarray:
        return np.array([[float(row[f"{score}_{name}"]) for name in (*TISSUES, "mean")] for row in rows])

    def summary(values: np.ndarray) -> list[str]:
        return [f"{mean:.2f} ± {deviation:.2f}" for mean, deviation in zip(*mean_and_deviation(values), strict=True)]

    percent = 100 * values("dice")
    dice = [line(row["subject"], [f"{x:.2f}" for x in scores]) for row, scores in zip(rows, percent, strict=True)]
    dice.append(line("mean ± std", summary(percent)))
    distances = [line(score.upper(), summary(values(score)), of="Distance") for score in ("hd95", "asd")]
    return f"Dice in percent\n\n{markdown_table(dice)}\n\nDistances in mm, mean ± std\n\n{markdown_table(distances)}"
