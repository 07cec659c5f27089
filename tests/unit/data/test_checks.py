"""What becomes of each subject of the corpus in training, evaluating and inference."""

import re
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from bad_subjects import CASES, LAS, T1, Case, write_corpus
from helpers import ROOT, refusal
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.networks import one_hot
from monai.transforms import Compose
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

from scripts.data.subjects import SubjectFolder
from scripts.results.label_images import write_label

CHOICES = {
    "training": lambda folder, case: SubjectFolder(str(folder)).training([]),
    "evaluating": lambda folder, case: SubjectFolder(str(folder)).validation([case.subject]),
    "inference": lambda folder, case: SubjectFolder(str(folder)).to_segment([case.subject]),
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
        random=Compose(train.get_parsed_content("train#sampling") + train.get_parsed_content("train#augmentation")),
        evaluating=train.get_parsed_content("validate#preprocessing"),
        inference=inference.get_parsed_content("preprocessing"),
        postprocessing=inference.get_parsed_content("postprocessing"),
    )


def write(case: Case, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    case.write(folder, case.subject)
    return folder


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
