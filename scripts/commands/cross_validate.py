"""Cross-validation: each labelled subject is scored by a network that wasn't trained on it."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser
from monai.bundle.utils import EXPR_KEY, ID_REF_KEY, MACRO_KEY
from monai.utils import ensure_tuple

from scripts.commands.shared import config_files, require_same_options, run_task
from scripts.data.subjects import SubjectFolder, natural_order
from scripts.errors import InputError
from scripts.files import whole_files
from scripts.results.metrics import mean_and_deviation
from scripts.results.tables import markdown_table, read_csv, write_csv
from scripts.settings import unknown_setting
from scripts.tissues import TISSUES

# settings that this command chooses for each fold
SET_PER_FOLD = ("bundle_root", "val_subjects", "ckpt_dir", "checkpoints", "resume")
TITLES = ("CSF", "GM", "WM", "Average")


def assign_folds(subjects: Sequence[str], folds: int | str) -> dict[str, list[str]]:
    """Assign subjects to folds in turn, so that the sizes of folds differ by at most one.

    Args:
        subjects: their ids.
        folds: number of folds, or 'leave-one-out' for one fold per subject.

    Returns:
        The ids of each fold, by its number from '1' on.

    Raises:
        InputError: `folds` isn't a whole number from 2 to the number of subjects.
    """
    number = len(subjects) if folds == "leave-one-out" else folds
    if isinstance(number, bool) or not isinstance(number, int) or not 2 <= number <= len(subjects):
        raise InputError(
            f"--folds {folds}: must be leave-one-out or a whole number from 2 to the number of labelled subjects, "
            f"{len(subjects)}"
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
    """Train and evaluate each fold of the labelled subjects, in OUTPUT_DIR/fold-1, fold-2, ..., and gather the scores.

    Run the same command again to continue: finished folds are kept and unfinished trainings are resumed.

    Args:
        dataset_dir: the folder of subjects.
        output_dir: the folder of the folds. Its folds.json records the subjects of each fold, the settings and the
            configs.
        folds: number of folds, or leave-one-out. Subjects are assigned in the order of their ids.
        fold: number of a single fold to run, so that several machines can share the work; all folds by default.
        config_file: one or several configs to lay over configs/train.json.
        settings: any settings of configs/train.json or configs/evaluate.json; each reaches the task that knows it.

    Raises:
        InputError: a subject's id would be read as an expression, a setting is unknown or chosen here per fold,
            OUTPUT_DIR holds other folds or other results, or training or evaluating a fold fails.
    """
    overlays = [str(Path(path).resolve()) for path in ensure_tuple(config_file)]
    files = config_files(overlays)
    configs = {task: ConfigParser.load_config_files(paths) for task, paths in files.items()}
    settings_of = _settings_by_task(settings, configs)
    dataset = SubjectFolder(dataset_dir, str(settings.get("contrasts", "both")))
    labeled = dataset.training(())
    dataset.require(labeled, "train")
    for subject in labeled:
        if subject["subject"].startswith((EXPR_KEY, ID_REF_KEY, MACRO_KEY)):
            raise InputError(
                f"{subject['image'][0]}: its id begins with {subject['subject'][0]!r}, which has a meaning of its own "
                f"in settings; rename it"
            )
    plan = {
        "dataset_dir": str(Path(dataset_dir).resolve()),
        "config_files": overlays,
        "settings": settings,
        "folds": assign_folds([subject["subject"] for subject in labeled], folds),
        # so that no folds of two recipes are gathered if a config or the bundle's version changes between two runs
        "configs": configs,
    }
    if fold is not None and str(fold) not in plan["folds"]:
        raise InputError(f"--fold {fold}: must be one of 1 to {len(plan['folds'])}")
    _record_plan(Path(output_dir), plan)
    for number, subjects in plan["folds"].items():
        if fold is not None and str(fold) != number:
            continue
        directory = Path(output_dir) / f"fold-{number}"
        title = f"fold {number} of {len(plan['folds'])}, subjects {', '.join(subjects)}"
        if _scores(directory, subjects) is not None:
            print(f"{title}: already finished", flush=True)
            continue
        of_fold = {"dataset_dir": dataset_dir, "val_subjects": subjects}
        of_fold |= {"ckpt_dir": str(directory), "output_dir": str(directory)}
        for task, of_task in settings_of.items():
            print(f"{title}: {task}", flush=True)
            run_task(task, files[task], of_task | of_fold, f"fold {number}")
    gather_folds(output_dir)


def _settings_by_task(settings: Mapping[str, Any], configs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give each task the settings that its config knows.

    Raises:
        InputError: a setting is unknown to both tasks or one of SET_PER_FOLD.
    """
    parsers = {task: ConfigParser(config) for task, config in configs.items()}
    own_options = inspect.signature(cross_validate).parameters
    by_task: dict[str, dict[str, Any]] = {"training": {"resume": True}, "evaluating": {}}
    for name, value in settings.items():
        if name in SET_PER_FOLD:
            raise InputError(f"--{name}: is set by cross_validate for each fold; leave it out")
        hints = {task: unknown_setting(name, parser, own_options) for task, parser in parsers.items()}
        if all(hints.values()):
            raise InputError(f"--{name}: no such setting; {hints['evaluating']}")
        for task, hint in hints.items():
            if hint is None:
                by_task[task][name] = value
    return by_task


def _record_plan(output_dir: Path, plan: dict[str, Any]) -> None:
    """Write folds.json, or check that an existing one has the same plan.

    Raises:
        InputError: it has another plan, or the folder holds results of something else than a cross-validation.
    """
    path = output_dir / "folds.json"
    if path.is_file():
        require_same_options(path, json.loads(path.read_text()), plan)
        return
    for other in [*output_dir.glob("fold-*"), *output_dir.glob("metrics.*")]:
        raise InputError(f"{other}: already exists and isn't from a cross-validation; choose another --output_dir")
    with whole_files(output_dir) as temporary:
        (temporary / path.name).write_text(json.dumps(plan, indent=4) + "\n")


def _scores(directory: Path, subjects: Sequence[str]) -> list[dict[str, str]] | None:
    """The scores of a fold; None if it isn't finished."""
    path = directory / "metrics.csv"
    rows = read_csv(path) if path.is_file() else []
    return rows if {row["subject"] for row in rows} == set(subjects) else None


def gather_folds(output_dir: str) -> None:
    """Gather the scores of all finished folds: print tables, write metrics.csv and metrics.md.

    Args:
        output_dir: the OUTPUT_DIR of cross_validate.

    Raises:
        InputError: it holds no cross-validation, or no fold is finished.
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
    print(f"{report}\n\nscores per subject: {output_dir}/metrics.csv; these tables: {output_dir}/metrics.md")


def score_report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return two Markdown tables: Dice in percent per subject and overall, HD95 and ASD overall.

    "Overall" is mean ± standard deviation over the subjects.

    Args:
        rows: `subject` and the columns of `scripts.results.metrics.tissue_scores`, a row per subject.

    Returns:
        Markdown. The standard deviation is the sample's (n - 1), so it is NaN for one subject. Where a label lacks a
        tissue, its subject doesn't count for that tissue.
    """

    def values(score: str) -> np.ndarray:
        return np.array([[float(row[f"{score}_{name}"]) for name in (*TISSUES, "mean")] for row in rows])

    def overall(values: np.ndarray) -> dict[str, str]:
        cells = (f"{mean:.2f} ± {deviation:.2f}" for mean, deviation in zip(*mean_and_deviation(values), strict=True))
        return dict(zip(TITLES, cells, strict=True))

    percent = 100 * values("dice")
    dice = [
        {"Subject": row["subject"]} | dict(zip(TITLES, (f"{score:.2f}" for score in scores), strict=True))
        for row, scores in zip(rows, percent, strict=True)
    ]
    dice.append({"Subject": "mean ± std"} | overall(percent))
    distances = [{"Distance": score.upper()} | overall(values(score)) for score in ("hd95", "asd")]
    return f"Dice in percent\n\n{markdown_table(dice)}\n\nDistances in mm, mean ± std\n\n{markdown_table(distances)}"
