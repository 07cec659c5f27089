"""What becomes of each subject of the corpus in training, evaluating and inference, and of a folder with many."""

import re
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from bad_subjects import CASES, LAS, T1, Case, save, write_corpus
from helpers import ROOT
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import MetaTensor
from monai.networks import one_hot
from monai.transforms import Compose
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from processes import assert_refused, bundle, evaluate, last_line, nothing_written, segment, train

from scripts.data.subjects import subjects_to_segment, training_subjects, validation_subjects
from scripts.errors import input_error_in
from scripts.results.label_images import write_label
from scripts.results.tables import read_csv
from scripts.results.writers import BackgroundWriter

CHOICES = {
    "training": lambda folder, case: training_subjects(str(folder), []),
    "evaluating": lambda folder, case: validation_subjects(str(folder), [case.subject]),
    "inference": lambda folder, case: subjects_to_segment(str(folder), [case.subject]),
}
NO_SCAN = r"lacks the scan and its grid, .*; give its T1 and T2 images$"


def named(cases: list[Case]) -> list:
    return [pytest.param(case, id=ascii(case.subject)) for case in cases]


@pytest.fixture(scope="module")
def transforms() -> SimpleNamespace:
    """Those of the configs, for each purpose, with what follows them."""
    configs = {}
    for name in ("train", "inference"):
        configs[name] = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / f"{name}.json"))
        configs[name].update({"bundle_root": str(ROOT)})
    train, inference = configs["train"], configs["inference"]
    # one box for all, so that they can be compared
    inference["foreground_margin"] = train["foreground_margin"]
    return SimpleNamespace(
        training=Compose(train.get_parsed_content("train#deterministic_transforms")),
        random=Compose(train.get_parsed_content("train#random_transforms")),
        evaluating=train.get_parsed_content("validate#preprocessing"),
        inference=inference.get_parsed_content("preprocessing"),
        postprocessing=inference.get_parsed_content("postprocessing"),
    )


def write(case: Case, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    case.write(folder, case.subject)
    return folder


def refusal(load: Callable[[], object]) -> str:
    """The message by which a subject is refused; what else goes wrong is raised."""
    try:
        load()
    except Exception as error:
        if input_error := input_error_in(error):
            return str(input_error)
        raise
    return pytest.fail("it was accepted")


def assert_clear(message: str, case: Case, folder: Path) -> None:
    """One line that begins with the path of one of the subject's files and says in the end what to do."""
    assert re.match(rf"'?{re.escape(str(folder))}/(subject-|train_iseg_nocut_)", message), message
    assert repr(case.subject)[1:-1] in message.split(": ")[0]
    assert len(message.splitlines()) == 1
    assert re.search(r": .+; \w", message), message


def test_corpus_is_large_and_writes_all_it_has(tmp_path):
    assert len(CASES) >= 60
    assert len({case.subject for case in CASES}) == len(CASES)
    write_corpus(tmp_path / "corpus")
    lines = (tmp_path / "corpus" / "expected.tsv").read_text().splitlines()
    assert len(lines) == 1 + len(CASES)


@pytest.mark.parametrize("case", named([case for case in CASES if case.message]))
def test_bad_subject_is_refused_in_one_clear_line(case, transforms, open_folder, as_nobody):
    folder = write(case, open_folder / "data")
    before = sorted(folder.iterdir())
    with as_nobody() if case.subject == "unreadable" else nullcontext():
        assert_refused_for_each_purpose(case, transforms, folder)
    assert sorted(folder.iterdir()) == before


def assert_refused_for_each_purpose(case: Case, transforms: SimpleNamespace, folder: Path) -> None:
    for purpose, choose in CHOICES.items():
        if purpose == "inference" and case.of_label:
            assert transforms.inference(choose(folder, case)[0])["image"].isfinite().all()
            continue
        tracemalloc.start()
        message = refusal(lambda purpose=purpose, choose=choose: getattr(transforms, purpose)(choose(folder, case)[0]))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert_clear(message, case, folder)
        expected = NO_SCAN if case.is_hdf5 and purpose == "inference" else case.message
        assert re.search(expected, message), message
        assert peak < 20 * 2**20


def in_las(values: torch.Tensor, affine: torch.Tensor) -> np.ndarray:
    return apply_orientation(values[0].numpy(), ornt_transform(io_orientation(affine.numpy()), io_orientation(LAS)))


@pytest.mark.parametrize("case", named([case for case in CASES if not case.message]))
def test_odd_but_good_subject_is_read_right_and_its_label_comes_back_on_its_own_grid(case, transforms, tmp_path):
    folder = write(case, tmp_path / "data")
    loaded = transforms.training(CHOICES["training"](folder, case)[0])
    image, label, t1 = loaded["image"], loaded["label"], loaded["t1"]
    if case.t1_scale:
        np.testing.assert_allclose(in_las(t1, t1.affine), T1 * case.t1_scale)
    assert image.shape[1:] == label.shape[1:] == (32, 32, 32)
    if not case.resampled:
        mean = image[:, t1_in(image)].mean(1)
        torch.testing.assert_close(mean.as_tensor(), torch.zeros(2), rtol=0, atol=2e-3)
    for patch in transforms.random(loaded):
        assert patch["image"].isfinite().all()
        assert set(patch["label"].unique().tolist()) <= {0, 1, 2, 3}
        assert patch["label"].any()
    evaluated = transforms.evaluating(CHOICES["evaluating"](folder, case)[0])
    assert torch.equal(evaluated["image"].as_tensor(), image.as_tensor())
    assert torch.equal(evaluated["label"].as_tensor(), loaded["reference"].as_tensor())
    if case.is_hdf5:
        assert re.search(NO_SCAN, refusal(lambda: CHOICES["inference"](folder, case)))
        return

    segmented = transforms.inference(CHOICES["inference"](folder, case)[0])
    assert torch.equal(segmented["image"].as_tensor(), image.as_tensor())
    logits = one_hot(label.as_tensor()[None], num_classes=4)[0]
    found = transforms.postprocessing(segmented | {"pred": MetaTensor(logits)})["pred"]
    same = (found == loaded["reference"])[t1 > 0].float().mean()
    assert same > 0.95 if case.resampled else same == 1
    assert not found[t1 <= 0].any()
    for suffix in (".nii.gz", ".hdr"):
        path, t1_path = tmp_path / f"found{suffix}", t1.meta["filename_or_obj"]
        write_label(path, found[0].numpy(), t1_path)
        written, original = nib.load(path), nib.load(t1_path)
        assert written.shape == original.shape
        np.testing.assert_allclose(written.affine, original.affine, atol=1e-5)
        values = np.asarray(written.dataobj).reshape(found.shape[1:])
        expected = np.array([0, 10, 150, 250])[found[0].numpy()] if suffix == ".hdr" else found[0].numpy()
        np.testing.assert_array_equal(values, expected)


def t1_in(image: MetaTensor) -> torch.Tensor:
    """Where the brain is on the network's grid; all else has the value of the corner."""
    return (image[0] != image[0, 0, 0, 0]).as_tensor()


def run_inference(folder: Path, output: Path, **settings: object) -> None:
    workflow = ConfigWorkflow(
        str(ROOT / "configs" / "inference.json"), workflow_type="infer", bundle_root=str(ROOT),
        dataset_dir=str(folder), output_dir=str(output), **settings,
    )  # fmt: skip
    workflow.initialize()
    workflow.run()


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
    good = [case for case in CASES if case.subject in ("with space", "it's", 'say-"hello"', "naïve-赤ちゃん", "-dash")]
    folder, output = unlabelled(tmp_path / "data", [*bad, *good]), tmp_path / "out"
    message = refusal(lambda: run_inference(folder, output))
    assert message == f"{len(bad)} subjects are not segmented, see above; mend or remove them"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not segmented: ")]
    assert len(lines) == len(bad)
    for case in bad:
        assert sum(bool(re.search(case.message, line)) for line in lines) >= 1, case.subject
        assert sum(repr(case.subject)[1:-1] + "-T" in line for line in lines) >= 1, case.subject
    names = {case.subject for case in good}
    assert segmented_in(output) == names == {row["subject"] for row in read_csv(output / "volumes.csv")}
    pictures = {f"subject-{name}-label.png" for name in names}
    labels = {f"subject-{name}-label.nii.gz" for name in names}
    assert {path.name for path in output.iterdir()} == pictures | labels | {
        "volumes.csv",
        "report.html",
        "inference-provenance.json",
    }


TRUNCATED = next(case for case in CASES if case.subject == "truncated-nii-gz")
NO_T2 = next(case for case in CASES if case.subject == "no-t2")


@pytest.fixture
def good_bad_good(tmp_path) -> Path:
    """Subjects 1 and 3 are good, the T1 of 2 is cut off."""
    for subject, write_one in (("1", save), ("2", TRUNCATED.write), ("3", save)):
        write_one(tmp_path, subject)
    return tmp_path


def test_one_bad_subject_between_good_ones(good_bad_good, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    message = refusal(lambda: run_inference(good_bad_good, output, subjects=[1, 2, 3]))
    assert re.search(TRUNCATED.message, message)
    assert segmented_in(output) == {"1", "3"}
    assert (output / "report.html").exists()


def test_inference_stops_at_the_first_bad_subject_when_asked_to(good_bad_good, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    message = refusal(lambda: run_inference(good_bad_good, output, subjects=[1, 2, 3], stop_at_bad_subject=True))
    assert re.search(TRUNCATED.message, message)
    assert "3" not in segmented_in(output)
    wait(BackgroundWriter.writing)  # as the process would before it ends
    assert not list(output.glob(".*"))


def test_missing_files_stop_it_before_it_begins_when_asked_to(good_bad_good, tmp_path_factory):
    NO_T2.write(good_bad_good, "no-t2")
    output = tmp_path_factory.mktemp("out")
    message = refusal(lambda: run_inference(good_bad_good, output, subjects=[1, 2, 3], stop_at_bad_subject=True))
    assert re.search(NO_T2.message, message)
    assert nothing_written(output)


def test_only_bad_subjects(tmp_path, capsys):
    folder, output = unlabelled(tmp_path / "data", [TRUNCATED, NO_T2]), tmp_path / "out"
    message = refusal(lambda: run_inference(folder, output))
    assert message == "2 subjects are not segmented, see above; mend or remove them"
    assert capsys.readouterr().out.count("not segmented: ") == 2
    assert nothing_written(output)


def test_bad_subject_that_is_not_asked_for(good_bad_good, tmp_path_factory):
    NO_T2.write(good_bad_good, "no-t2")
    output = tmp_path_factory.mktemp("out")
    run_inference(good_bad_good, output, subjects=[3])
    assert segmented_in(output) == {"3"}


def sample() -> Iterator[Case]:
    """A case of each kind."""
    for name in ("link-to-nowhere", "new\nline", "huge-nii-gz", "rgb", "label-all-0", "h5-truncated"):
        yield next(case for case in CASES if case.subject == name)


@pytest.mark.slow
@pytest.mark.parametrize("case", named(list(sample())))
def test_bad_subject_ends_the_commands(case, tmp_path):
    folder, output = write(case, tmp_path / "data"), tmp_path / "out"
    save(folder, "good")
    save(folder, "good-9")
    line = repr(case.subject)[1:-1]
    result = train(folder, output, "--val_subjects", "['good-9']")
    assert_refused(result, output, line)
    assert re.search(case.message, last_line(result))
    if "\n" in case.subject:
        return
    result = evaluate(folder, output, "--val_subjects", f"['good-9','{case.subject}']")
    assert_refused(result, output, line)
    assert re.search(case.message, last_line(result))
    if case.of_label or case.is_hdf5:
        return
    result = segment(folder, output, "--subjects", f"['good','{case.subject}','good-9']")
    assert result.returncode != 0
    assert re.search(case.message, last_line(result))
    assert segmented_in(output) == {"good", "good-9"}


@pytest.mark.slow
def test_processes_whose_subjects_are_all_bad(tmp_path):
    folder, output = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    for subject, write_one in (("1", save), ("2", TRUNCATED.write), ("3", save), ("4", TRUNCATED.write)):
        write_one(folder, subject)
    result = bundle(
        *("--nproc_per_node", "2", "-m", "monai.bundle", "run", "--config_file"),
        "['configs/inference.json','configs/multi_gpu_inference.json']",
        *("--dataset_dir", str(folder), "--output_dir", str(output), "--subjects", "[1,2,3,4]", "--device", "cpu"),
        module="torch.distributed.run",
    )
    assert result.returncode != 0
    assert result.stdout.count("not segmented: ") == 2, result.stdout + result.stderr
    assert segmented_in(output) == {"1", "3"}
