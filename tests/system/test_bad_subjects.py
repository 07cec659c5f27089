"""What becomes of the corpus of bad subjects in the commands. One by one: tests/unit/data/test_checks.py."""

import re
import shutil
from concurrent.futures import wait
from pathlib import Path

import pytest
from bad_subjects import CASES, Case, save
from helpers import ROOT, configured, refused_run
from processes import (
    assert_one_line,
    assert_refused,
    bundle,
    evaluating,
    flags,
    last_line,
    nothing_written,
    segmenting,
    torchrun_bundle,
    training,
)

from scripts.results.tables import read_csv
from scripts.results.writers import BackgroundWriter

OF_A_RUN = {"volumes.csv", "report.html", "inference-provenance.json"}


def case_of(subject: str) -> Case:
    return next(case for case in CASES if case.subject == subject)


TRUNCATED, NO_T2 = case_of("truncated-nii-gz"), case_of("no-t2")


def files_of(*subjects: str) -> set[str]:
    return OF_A_RUN | {f"subject-{subject}-label.{suffix}" for subject in subjects for suffix in ("nii.gz", "png")}


def segmented_in(output: Path) -> set[str]:
    return {path.name.removeprefix("subject-").removesuffix("-label.nii.gz") for path in output.glob("*-label.nii.gz")}


def unlabelled(folder: Path, cases: list[Case]) -> Path:
    folder.mkdir()
    for case in cases:
        case.write(folder, case.subject)
        for path in folder.glob("*-label.*"):
            path.unlink()
    return folder


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_inference_does_the_good_ones_of_a_folder_and_lists_the_bad_ones(tmp_path, capsys):
    # this user may read what others may not
    bad = [c for c in CASES if c.message and not c.of_label and not c.is_hdf5 and c.subject != "unreadable"]
    good = [case_of(name) for name in ("with space", "it's", 'say-"hello"', "naïve-赤ちゃん", "-dash")]
    folder, output = unlabelled(tmp_path / "data", [*bad, *good]), tmp_path / "out"
    message = refused_run(folder, output)
    assert message == f"{len(bad)} subjects are not segmented, see above; fix or remove them"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not segmented: ")]
    assert len(lines) == len(bad)
    for case in bad:
        assert sum(bool(re.search(case.message, line)) for line in lines) >= 1, case.subject
        assert sum(repr(case.subject)[1:-1] + "-T" in line for line in lines) >= 1, case.subject
    names = {case.subject for case in good}
    assert names == {row["subject"] for row in read_csv(output / "volumes.csv")}
    assert {path.name for path in output.iterdir()} == files_of(*names)


@pytest.fixture
def good_bad_good(tmp_path) -> Path:
    """Subjects 1 and 3 are good, the T1 of 2 is cut off, and no-t2 has no T2."""
    folder = tmp_path / "data"
    folder.mkdir()
    for subject, write in (("1", save), ("2", TRUNCATED.write), ("3", save), ("no-t2", NO_T2.write)):
        write(folder, subject)
    return folder


def test_bad_subject_between_good_ones(good_bad_good, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert re.search(TRUNCATED.message, refused_run(good_bad_good, first, subjects=[1, 2, 3]))
    assert {path.name for path in first.iterdir()} == files_of("1", "3")
    # one that isn't asked for doesn't matter
    configured(good_bad_good, second, subjects=[3]).run()
    assert segmented_in(second) == {"3"}


def test_inference_stops_at_a_bad_subject_when_asked_to(good_bad_good, tmp_path):
    """Before it begins where a file is missing, else when it comes to it."""
    output = tmp_path / "out"
    message = refused_run(good_bad_good, output, subjects=[1, 2, 3], stop_at_bad_subject=True)
    assert re.search(NO_T2.message, message)
    assert nothing_written(output)
    for path in good_bad_good.glob("subject-no-t2-*"):
        path.unlink()
    message = refused_run(good_bad_good, output, subjects=[1, 2, 3], stop_at_bad_subject=True)
    assert re.search(TRUNCATED.message, message)
    assert "3" not in segmented_in(output)
    wait(BackgroundWriter.writing)  # as the process would before it ends
    assert not list(output.glob(".*"))


def test_only_bad_subjects(tmp_path, capsys):
    folder, output = unlabelled(tmp_path / "data", [TRUNCATED, NO_T2]), tmp_path / "out"
    assert refused_run(folder, output) == "2 subjects are not segmented, see above; fix or remove them"
    assert capsys.readouterr().out.count("not segmented: ") == 2
    assert nothing_written(output)


@pytest.mark.parametrize(
    "name",
    [
        "no-t2",
        "no-img",
        "t2-of-other-shape",
        "label-of-other-shape",
        "t1-all-0",
        "nan",
        "label-unknown",
        "truncated-img",
    ],
)
def test_training_does_not_begin(tmp_path, name):
    data, output, case = tmp_path / "data", tmp_path / "out", case_of(name)
    data.mkdir()
    case.write(data, name)
    for subject in ("good", "good-9"):
        save(data, subject)
    output.mkdir()
    shutil.copy(ROOT / "models" / "model.pt", output)
    assert re.search(case.message, refused_run(data, output, "train.json", val_subjects=["good-9"]))
    assert [path.name for path in output.iterdir()] == ["model.pt"]


# one of each kind
@pytest.mark.parametrize(
    "name",
    [
        "truncated-nii-gz",
        *(
            pytest.param(name, marks=pytest.mark.slow, id=ascii(name))
            for name in ("link-to-nowhere", "new\nline", "huge-nii-gz", "rgb", "label-all-0", "h5-truncated")
        ),
    ],
)
def test_bad_subject_ends_the_commands(tmp_path, name):
    data, output, case = tmp_path / "data", tmp_path / "out", case_of(name)
    data.mkdir()
    for subject, write in ((name, case.write), ("good", save), ("good-9", save)):
        write(data, subject)
    result = bundle(*training(data, output, "--val_subjects", "['good-9']"))
    assert_refused(result, output, repr(name)[1:-1])
    assert re.search(case.message, last_line(result))
    if "\n" in name:
        return
    result = bundle(*evaluating(data, output, "--val_subjects", f"['good-9','{name}']"))
    assert_refused(result, output, name)
    assert re.search(case.message, last_line(result))
    if case.of_label or case.is_hdf5:
        return
    result = bundle(*segmenting(data, output, "--subjects", f"['good','{name}','good-9']"))
    assert_one_line(result)
    assert re.search(case.message, last_line(result))
    # what was finished is whole, and of the other there is nothing
    assert {path.name for path in output.iterdir()} == files_of("good", "good-9")
    assert [row["subject"] for row in read_csv(output / "volumes.csv")] == ["good", "good-9"]


@pytest.mark.slow
def test_processes_whose_subjects_are_all_bad(tmp_path):
    data, output = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for subject, write in (("1", save), ("2", TRUNCATED.write), ("3", save), ("4", TRUNCATED.write)):
        write(data, subject)
    configs = "['configs/inference.json','configs/multi_gpu_inference.json']"
    settings = flags(config_file=configs, dataset_dir=data, output_dir=output, subjects=[1, 2, 3, 4], device="cpu")
    result = torchrun_bundle(2, "run", *settings)
    assert result.returncode != 0
    assert result.stdout.count("not segmented: ") == 2, result.stdout + result.stderr
    assert segmented_in(output) == {"1", "3"}
