"""The bundle's commands as a person runs them: real processes on real files."""

import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT, configured, is_picture, save_subject, save_volume, tensorboard_log
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image
from processes import QUICK, assert_refused, bundle, evaluate, last_line, nothing_written, segment, train

from scripts.__main__ import take_text_as_it_is
from scripts.errors import InputError
from scripts.network import SkipDenseSeg
from scripts.results.metrics import tissue_scores
from scripts.results.tables import read_csv
from scripts.segment import segment as segment_files
from scripts.synthesis.contrast import T1_CONTRAST, T2_CONTRAST, six_month_image
from scripts.synthesis.phantom_brains import label_map
from scripts.tissues import tissue_labels


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    result = train(dataset, output, "--epochs", "2")
    assert result.returncode == 0, result.stderr
    assert f"best network: {output}/model.pt" in result.stdout
    return output


@pytest.mark.slow
def test_training_starts_from_a_checkpoint(dataset, trained, tmp_path):
    found = torch.load(trained / "model.pt", weights_only=True)
    result = train(dataset, tmp_path, "--start_from", str(trained / "model.pt"), "--learning_rate", "1e-9")
    assert result.returncode == 0, result.stderr
    after = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    for name, weights in SkipDenseSeg().named_parameters():
        torch.testing.assert_close(after[name], found[name], rtol=0, atol=1e-6)
        assert weights.ndim == 1 or not torch.allclose(weights, found[name], atol=1e-3)


@pytest.fixture(scope="module")
def segmented(dataset, tmp_path_factory) -> Path:
    """Segmentations of subjects 9 (labelled) and 11 with the weights that the bundle includes."""
    output = tmp_path_factory.mktemp("segmented")
    result = segment(dataset, output, "--subjects", "[9,11]")
    assert result.returncode == 0, result.stderr
    assert str(output) in result.stdout
    spans = r"waiting for reading [\d.]+, network [\d.]+, back to the own grid [\d.]+, writing [\d.]+"
    told = re.search(rf"time: ([\d.]+) s to start up, then ([\d.]+) s a subject, {spans}", result.stdout)
    assert 0 < float(told[1]) < 120
    assert float(told[2]) == pytest.approx(sum(map(float, re.findall(r"(?:\w) ([\d.]+)", told[0])[-4:])), abs=0.03)
    assert result.stdout.count("one pass over") == 2
    return output


def test_training_leaves_the_best_network_the_last_epoch_and_a_log(trained):
    SkipDenseSeg().load_state_dict(torch.load(trained / "model.pt", weights_only=True))
    last = torch.load(trained / "last.pt", weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "progress"} <= set(last)
    assert last["lr_scheduler"]["last_epoch"] == 4  # two epochs of two steps
    assert {path.name for path in trained.glob("*.pt")} == {"model.pt", "last.pt"}
    log = tensorboard_log(trained)
    for name in ("train_loss", "val_mean_dice", "val_mean_dice_csf"):
        assert [value.step for value in log.Scalars(name)] == [1, 2], name
    assert [value.step for value in log.Scalars("train_step_loss")] == [1, 2, 3, 4]
    pictures = log.Images("validation/subject-9")
    assert [picture.step for picture in pictures] == [1, 2]
    assert all(is_picture(np.asarray(Image.open(BytesIO(p.encoded_image_string)))) for p in pictures)


def test_training_again_keeps_the_earlier_weights(dataset, trained, tmp_path):
    shutil.copy(trained / "model.pt", tmp_path)
    result = train(dataset, tmp_path)
    assert result.returncode == 0, result.stderr
    earlier = list(tmp_path.glob("model-*.pt"))
    assert [path.read_bytes() for path in earlier] == [(trained / "model.pt").read_bytes()]
    assert str(earlier[0]) in result.stdout


def test_training_of_fewer_epochs_than_the_interval_saves_its_own_network(dataset, tmp_path):
    for epochs, interval, validated in ((3, 2, [2, 3]), (1, 10, [1])):
        output = tmp_path / f"{epochs}-epochs"
        settings = {"epochs": epochs, "val_interval": interval, "crops_per_epoch": 2, "batch_size": 1}
        configured(dataset, output, "train.json", ckpt_dir=str(output), **settings).run()
        assert [value.step for value in tensorboard_log(output).Scalars("val_mean_dice")] == validated
        assert (output / "model.pt").exists()


def test_evaluation_writes_scores_and_a_picture_and_prints_the_table(dataset, tmp_path):
    result = evaluate(dataset, tmp_path)
    assert result.returncode == 0, result.stderr
    rows = read_csv(tmp_path / "metrics.csv")
    names = [
        f"{score}_{tissue}" for score in ("dice", "hd95", "hd_max", "asd") for tissue in ("csf", "gm", "wm", "mean")
    ]
    assert list(rows[0]) == ["subject", *names]
    assert [row["subject"] for row in rows] == ["9"]
    percent = [f"{100 * float(rows[0][f'dice_{tissue}']):.2f}" for tissue in ("csf", "gm", "wm", "mean")]
    assert (tmp_path / "metrics.md").read_text() in result.stdout
    assert "| Subject | CSF | GM | WM | Average |" in result.stdout
    assert f"| 9 | {' | '.join(percent)} |" in result.stdout
    assert (tmp_path / "subject-9-scored.png").stat().st_size > 10_000
    report = (tmp_path / "report.html").read_text()
    assert report.count('class="viewer"') == 1
    assert f"<td>{percent[0]}</td><td>{percent[1]}</td>" in report


def test_evaluation_scores_the_segmentation_against_the_file_on_disk(dataset, segmented, tmp_path):
    assert evaluate(dataset, tmp_path).returncode == 0
    row = read_csv(tmp_path / "metrics.csv")[0]
    label, segmentation = (
        tissue_labels(np.asarray(nib.load(path).dataobj).astype(np.float32), str(path))[None, ..., 0]
        for path in (dataset / "subject-9-label.hdr", segmented / "subject-9-label.nii.gz")
    )
    expected = tissue_scores(torch.from_numpy(segmentation), torch.from_numpy(label), (1, 1, 1))
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected)


def test_scores_and_volumes_on_another_grid_are_those_of_the_files(brains, tmp_path):
    """Voxels of 2 x 1 x 0.5 mm, axes turned: the subject's own grid counts, not the network's."""
    data = tmp_path / "data"
    affine = np.array([[0, 2.0, 0, 0], [0, 0, -1.0, 0], [0.5, 0, 0, 0], [0, 0, 0, 1]])
    for kind, values in brains[0].items():
        stored = np.repeat(values[::2], 2, axis=2).transpose(2, 0, 1)[:, ::-1, ::-1]
        save_volume(data / f"subject-9-{kind}.nii.gz", stored, affine)
    configured(data, tmp_path / "scores", "train.json", "evaluate.json", run_id="evaluating").run()
    configured(data, tmp_path / "labels", "inference.json", subjects=9).run()
    label, segmentation = (
        nib.load(path) for path in (data / "subject-9-label.nii.gz", tmp_path / "labels" / "subject-9-label.nii.gz")
    )
    assert segmentation.shape == label.shape
    np.testing.assert_array_equal(segmentation.affine, affine)
    pair = [torch.from_numpy(np.asarray(image.dataobj)[None].copy()) for image in (segmentation, label)]
    expected = tissue_scores(*pair, spacing=(0.5, 2.0, 1.0))
    row = read_csv(tmp_path / "scores" / "metrics.csv")[0]
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected)
    # voxels of one cubic millimetre
    volumes = read_csv(tmp_path / "labels" / "volumes.csv")[0]
    assert float(volumes["gm_ml"]) == pytest.approx(np.count_nonzero(np.asarray(segmentation.dataobj) == 2) / 1000)


def test_subject_that_fills_little_of_its_volume(brains, tmp_path):
    """The brain's box is far smaller than the file, and the subject has a label, which is left alone."""
    data = tmp_path / "data"
    for kind, values in brains[0].items():
        save_volume(data / f"subject-9-{kind}.nii.gz", np.pad(values, ((60, 40), (0, 50), (70, 0))))
    save_volume(data / "subject-9-label.nii.gz", np.full((160, 122, 134), 77, np.uint8))
    configured(data, tmp_path / "labels", "inference.json", subjects=[9]).run()
    labels = np.asarray(nib.load(tmp_path / "labels" / "subject-9-label.nii.gz").dataobj)
    brain = np.pad(brains[0]["T1"], ((60, 40), (0, 50), (70, 0))) > 0
    assert not labels[~brain].any()
    assert (labels[brain] > 0).mean() > 0.9
    assert (tmp_path / "labels" / "subject-9-label.png").exists()


def test_segmentation_opens_beside_the_t1(dataset, segmented):
    for subject in ("9", "11"):
        t1 = nib.load(dataset / f"subject-{subject}-T1.hdr")
        label = nib.load(segmented / f"subject-{subject}-label.nii.gz")
        assert label.shape == t1.shape
        np.testing.assert_array_equal(label.affine, t1.affine)
        values = np.asarray(label.dataobj)
        assert values.dtype == np.uint8
        assert set(np.unique(values)) <= {0, 1, 2, 3}
        assert not values[np.asarray(t1.dataobj) == 0].any()
        assert (segmented / f"subject-{subject}-label.png").stat().st_size > 10_000


def test_volumes_are_those_of_the_segmentation(segmented):
    rows = read_csv(segmented / "volumes.csv")
    assert [row["subject"] for row in rows] == ["9", "11"]
    for row in rows:
        values = np.asarray(nib.load(segmented / f"subject-{row['subject']}-label.nii.gz").dataobj)
        counts = {"csf_ml": 1, "gm_ml": 2, "wm_ml": 3}
        for name, value in counts.items():
            assert float(row[name]) == pytest.approx(np.count_nonzero(values == value) / 1000)
        assert float(row["brain_ml"]) == pytest.approx(np.count_nonzero(values) / 1000)


def test_unlabelled_subjects_are_segmented_by_default_also_as_analyze(dataset, tmp_path):
    result = segment(dataset, tmp_path, "--label_suffix", ".hdr")
    assert result.returncode == 0, result.stderr
    names = {"subject-11-label.hdr", "subject-11-label.img", "subject-11-label.png", "volumes.csv", "report.html"}
    names.add("inference-provenance.json")
    assert {path.name for path in tmp_path.iterdir()} == names
    assert set(np.unique(np.asarray(nib.load(tmp_path / "subject-11-label.hdr").dataobj))) <= {0, 10, 150, 250}


def test_other_grids_come_back_right(dataset, segmented, brains, tmp_path):
    """The same brain stored with turned axes gives the same labels; with other voxels it gives nearly the same."""
    data = tmp_path / "data"
    size = brains[0]["T1"].shape[0]
    turned_affine = np.array([[0, 0, 1, 1 - size], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    for kind in ("T1", "T2"):
        values = brains[0][kind]
        save_volume(data / f"subject-1-{kind}.nii.gz", values[::-1].transpose(2, 1, 0), turned_affine)
        doubled = np.repeat(values, 2, axis=2)
        save_volume(data / f"subject-2-{kind}.nii.gz", doubled, np.diag([-1, 1, 0.5, 1]))
    result = segment(data, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    expected = np.asarray(nib.load(segmented / "subject-9-label.nii.gz").dataobj)[..., 0]
    turned = nib.load(tmp_path / "out" / "subject-1-label.nii.gz")
    np.testing.assert_array_equal(turned.affine, turned_affine)
    np.testing.assert_array_equal(np.asarray(turned.dataobj).transpose(2, 1, 0)[::-1], expected)
    finer = nib.load(tmp_path / "out" / "subject-2-label.nii.gz")
    assert finer.shape == (*expected.shape[:2], 2 * expected.shape[2])
    np.testing.assert_array_equal(finer.affine, np.diag([-1, 1, 0.5, 1]))
    brain = expected > 0
    assert np.mean(np.asarray(finer.dataobj)[..., ::2][brain] == expected[brain]) > 0.9


def test_subjects_of_differing_shapes_and_formats_in_one_folder(brains, tmp_path):
    data = tmp_path / "data"
    for subject, suffix, cut in (("1", ".hdr", 0), ("2", ".nii.gz", 4), ("9", ".nii", 8), ("11", ".hdr", 2)):
        brain = {kind: np.pad(values, ((0, 0), (cut, 0), (0, cut))) for kind, values in brains[0].items()}
        save_subject(data, subject, brain, labeled=subject != "11", suffix=suffix)
    (data / "__MACOSX").mkdir()
    (data / "__MACOSX" / "._subject-3-T1.hdr").write_bytes(b"\0")
    output = tmp_path / "out"
    quick = {"epochs": 1, "crops_per_epoch": 2, "batch_size": 2, "ckpt_dir": str(output)}
    configured(data, output, "train.json", "recipes/robust.json", **quick).run()
    configured(data, output, "inference.json", ckpt_dir=str(output)).run()
    assert nib.load(output / "subject-11-label.nii.gz").shape == (60, 74, 66, 1)


@pytest.mark.slow
def test_both_command_styles_from_another_directory(dataset, tmp_path):
    configs = [str(ROOT / "configs" / name) for name in ("train.json", "evaluate.json", "inference.json")]
    root = ["--bundle_root", str(ROOT), "--dataset_dir", str(dataset)]
    result = bundle(
        *("run", "--config_file", configs[0], *root, "--output_dir", "out", "--ckpt_dir", "out", *QUICK), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "model.pt").exists()
    (tmp_path / "args.json").write_text(json.dumps({"config_file": configs[:2]}))
    result = bundle("run", "--args_file", "args.json", *root, "--output_dir", "scores", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "scores" / "metrics.csv").exists()
    result = bundle("run", "--config_file", configs[2], *root, "--output_dir", "labels", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "labels" / "subject-11-label.nii.gz").exists()


@pytest.mark.parametrize("place", [".", "labels"])
def test_segmentations_are_not_written_among_the_subjects(own_dataset, place):
    data = own_dataset()
    before = sorted(data.iterdir())
    result = segment(data, data / place)
    assert result.returncode != 0
    assert last_line(result).startswith("error: ")
    assert "choose an --output_dir outside" in last_line(result)
    assert sorted(data.iterdir()) == before


def test_misspelt_override(dataset, tmp_path):
    output = tmp_path / "out"
    assert_refused(train(dataset, output, "--epocs", "1"), output, "--epocs", "did you mean --epochs?")


def test_folder_that_is_not_there(tmp_path):
    output = tmp_path / "out"
    assert_refused(segment(tmp_path / "dta", output), output, f"{tmp_path}/dta: no such folder", "--dataset_dir")


def test_setting_that_can_not_train(dataset, tmp_path):
    output = tmp_path / "out"
    assert_refused(train(dataset, output, "--patch_size", "[50,50,50]"), output, "--patch_size", "multiples of 4")


@pytest.mark.parametrize("command", [train, evaluate, segment])
def test_folder_without_subjects(tmp_path, command):
    (tmp_path / "data").mkdir()
    output = tmp_path / "out"
    assert_refused(command(tmp_path / "data", output), output, str(tmp_path / "data"), "subject-<id>-T1")


def remove_t2(data: Path) -> str:
    (data / "subject-1-T2.hdr").unlink()
    (data / "subject-1-T2.img").unlink()
    return "subject-1-T1.hdr: subject 1 has no T2"


def other_shape(data: Path) -> str:
    save_volume(data / "subject-1-T2.hdr", np.ones((60, 72, 60), np.int16))
    return "subject-1-T2.hdr: shape (60, 72, 60) differs"


def other_label_shape(data: Path) -> str:
    save_volume(data / "subject-1-label.hdr", np.zeros((60, 72, 60), np.uint8))
    return "subject-1-label.hdr: shape (60, 72, 60) differs"


def empty_foreground(data: Path) -> str:
    save_volume(data / "subject-1-T1.hdr", np.zeros((60, 72, 64), np.int16))
    return "subject-1-T1.hdr: T1 is nowhere above 0"


def not_a_number(data: Path) -> str:
    for half in ("hdr", "img"):
        (data / f"subject-1-T1.{half}").unlink()
    values = np.ones((60, 72, 64), np.float32)
    values[3, 4, 5] = np.nan
    save_volume(data / "subject-1-T1.nii", values)
    return "subject-1-T1.nii: has NaN or infinite values"


def unknown_label_value(data: Path) -> str:
    values = np.zeros((60, 72, 64), np.uint8)
    values[30, 30, 30] = 100
    save_volume(data / "subject-1-label.hdr", values)
    return "subject-1-label.hdr: label value 100 isn't known"


def truncated_image(data: Path) -> str:
    os.truncate(data / "subject-1-T1.img", 1000)
    return "subject-1-T1.hdr: can't be read"


def header_without_image(data: Path) -> str:
    (data / "subject-1-label.img").unlink()
    return "subject-1-label.hdr: its image subject-1-label.img is missing"


DAMAGES = [
    *(remove_t2, other_shape, other_label_shape, empty_foreground, not_a_number),
    *(unknown_label_value, truncated_image, header_without_image),
]


def test_damaged_subject(own_dataset, tmp_path):
    data = own_dataset()
    message = unknown_label_value(data)
    output = tmp_path / "out"
    shutil.copy(ROOT / "models" / "model.pt", tmp_path)
    result = train(data, output, "--ckpt_dir", str(tmp_path))
    assert_refused(result, output, message)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["model.pt"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_ends_training_before_it_begins(own_dataset, tmp_path, damage):
    data = own_dataset()
    message = damage(data)
    output = tmp_path / "out"
    workflow = ConfigWorkflow(
        str(ROOT / "configs" / "train.json"), workflow_type="train", bundle_root=str(ROOT), dataset_dir=str(data),
        output_dir=str(output), ckpt_dir=str(output),
    )  # fmt: skip
    workflow.initialize()
    with pytest.raises((InputError, RuntimeError)) as caught:  # MONAI wraps what its components raise
        workflow.run()
    error = caught.value
    while not isinstance(error, InputError):
        error = error.__cause__
    assert message in str(error)
    assert nothing_written(output)


@pytest.mark.parametrize("damage", [truncated_image, empty_foreground])
def test_damaged_subject_when_segmenting(own_dataset, tmp_path, damage):
    data = own_dataset()
    message = damage(data)
    output = tmp_path / "out"
    assert_refused(segment(data, output, "--subjects", "[1]"), output, message)


def test_damaged_subject_after_a_good_one(own_dataset, tmp_path):
    data = own_dataset()
    message = truncated_image(data)
    output = tmp_path / "out"
    result = segment(data, output, "--subjects", "[9,1]")
    assert result.returncode != 0
    assert message in last_line(result)
    # what was finished is whole, and of the other there is nothing
    names = {"subject-9-label.nii.gz", "subject-9-label.png", "volumes.csv", "report.html", "inference-provenance.json"}
    assert {path.name for path in output.iterdir()} == names
    assert [row["subject"] for row in read_csv(output / "volumes.csv")] == ["9"]


def test_damaged_subject_when_evaluating(own_dataset, tmp_path):
    data = own_dataset()
    message = unknown_label_value(data)
    output = tmp_path / "out"
    assert_refused(evaluate(data, output, "--val_subjects", "[1]"), output, message)


@pytest.mark.parametrize("command", [evaluate, segment])
def test_checkpoint_of_another_architecture(dataset, tmp_path, command):
    torch.save(SkipDenseSeg(growth_rate=8).state_dict(), tmp_path / "model.pt")
    output = tmp_path / "out"
    result = command(dataset, output, "--ckpt_dir", str(tmp_path))
    assert_refused(result, output, f"{tmp_path}/model.pt: a checkpoint of another network")


@pytest.mark.slow
def test_average_of_checkpoints_and_mirror_images(brains, tmp_path):
    """The labels are those of the mean that torch gives by itself, and not those of any one network."""
    middle = {kind: values[14:46, 20:52, 16:48] for kind, values in brains[0].items()}
    save_subject(tmp_path / "data", "11", middle, labeled=False)
    state = torch.load(ROOT / "models" / "model.pt", weights_only=True)
    torch.manual_seed(0)
    networks = []
    for fold in (1, 2):
        changed = {n: t + 0.3 * t.std() * torch.randn_like(t) if t.ndim == 5 else t for n, t in state.items()}
        (tmp_path / f"fold-{fold}").mkdir()
        torch.save(changed, tmp_path / f"fold-{fold}" / "model.pt")
        networks.append(SkipDenseSeg().eval())
        networks[-1].load_state_dict(changed)
    pattern = str(tmp_path / "fold-*" / "model.pt")
    options = ["--checkpoints", pattern, "--flips", "True", "--precision", "fp32", "--patch_size", "[32,32,32]"]
    result = segment(tmp_path / "data", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    assert "average of 2 networks" in result.stdout
    config = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "inference.json"))
    config.update({"dataset_dir": str(tmp_path / "data"), "patch_size": [32, 32, 32]})
    item = config.get_parsed_content("dataset")[0]
    image = item["image"][None].as_tensor()
    mirrors = [axes for n in range(4) for axes in itertools.combinations((2, 3, 4), n)]
    with torch.no_grad():
        mean = sum(n(image.flip(axes)).flip(axes).softmax(1) for n in networks for axes in mirrors) / 16
        singles = [network(image).argmax(1)[0].numpy() for network in networks]
    assert image.shape == (1, 2, 32, 32, 32)
    found = np.asarray(nib.load(tmp_path / "out" / "subject-11-label.nii.gz").dataobj)[..., 0]
    brain = middle["T1"] > 0
    assert (found == mean.argmax(1)[0].numpy())[brain].mean() > 0.999
    for single in singles:
        assert (found == single)[brain].mean() < 0.99


def test_pattern_that_no_checkpoint_fits(dataset, tmp_path):
    output, pattern = tmp_path / "out", str(tmp_path / "fold-*" / "model.pt")
    result = evaluate(dataset, output, "--checkpoints", pattern)
    assert_refused(result, output, f"{pattern}: no checkpoint fits this pattern")


def test_missing_checkpoint(dataset, tmp_path):
    output = tmp_path / "out"
    result = segment(dataset, output, "--ckpt_dir", str(tmp_path))
    assert_refused(result, output, f"{tmp_path}/model.pt: no such checkpoint")


@pytest.mark.parametrize(("setting", "value"), [("--precision", "fp16"), ("--label_suffix", ".mha")])
def test_setting_with_an_unknown_value(dataset, tmp_path, setting, value):
    output = tmp_path / "out"
    assert_refused(segment(dataset, output, setting, value), output, setting.strip("-"), value)


def test_validation_subject_that_does_not_exist(dataset, tmp_path):
    output = tmp_path / "out"
    result = train(dataset, output, "--val_subjects", "[99]")
    assert_refused(result, output, "val_subjects names subject 99", "choose from 1, 2, 9, 11")


def test_no_training_subject_left(dataset, tmp_path):
    output = tmp_path / "out"
    result = train(dataset, output, "--val_subjects", "[1,2,9]")
    assert_refused(result, output, str(dataset), "no subject left to train among 4, 3 of them labelled")


@pytest.mark.slow
def test_volume_of_256_cubed_in_4_gb(tmp_path):
    rng = np.random.default_rng([3, 2])
    label = label_map(rng)
    label = np.pad(label, [((256 - n) // 2, 256 - n - (256 - n) // 2) for n in label.shape])
    images = {"T1": six_month_image(label, T1_CONTRAST, rng), "T2": six_month_image(label, T2_CONTRAST, rng)}
    save_subject(tmp_path / "scans", "1", {"label": label, **images})
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    command += ["--dataset_dir", str(tmp_path / "scans"), "--output_dir", str(tmp_path), "--subjects", "[1]"]
    # in bfloat16 one pass fits
    command += ["--precision", "fp32"]
    # of addresses, which are more than the memory that is used
    limit = 4 * 2**30
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    told = result.stdout + result.stderr
    assert result.returncode == 0, told
    assert "windows of" in told, told
    found = np.asarray(nib.load(tmp_path / "subject-1-label.nii.gz").dataobj)
    assert found.shape == (256, 256, 256, 1)
    scans = (tmp_path / "scans" / f"subject-1-{kind}.hdr" for kind in ("T1", "T2"))
    in_one_pass = segment_files(*map(str, scans), precision="fp32").label.reshape(label.shape)
    assert (found[..., 0] == in_one_pass)[label > 0].mean() > 0.99


OF_EACH_TASK = {
    "training": ("train",),
    "evaluating": ("train", "evaluate"),
    "run": ("inference",),
}


@pytest.mark.parametrize("task", OF_EACH_TASK)
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("device", "gpu", "--device gpu: can't be used "),
        ("foreground_margin", "-1", "--foreground_margin -1: must be a whole number of at least 0"),
        ("output_dir", "2024", "2024: isn't text, as a path must be; write ./2024"),
        ("ckpt_dir", "2024", "2024: isn't text, as a path must be; write ./2024"),
        ("dataset_dir", "2024", "2024: isn't text, as a path must be; write ./2024"),
    ],
)
def test_settings_that_no_task_can_use_end_in_one_line(dataset, tmp_path, task, setting, value, message):
    files = repr([f"configs/{name}.json" for name in OF_EACH_TASK[task]])
    folders = {"dataset_dir": str(dataset), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(ROOT / "models")}
    if task == "training":
        folders["ckpt_dir"] = str(tmp_path / "out")
    options = [f"--{name}={text}" for name, text in (folders | {setting: value}).items()]
    name = () if task == "run" else (task,)
    result = bundle("run", *name, "--config_file", files, *options)
    assert result.returncode != 0
    assert last_line(result).startswith(f"error: {message}")
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_folder_named_by_a_number():
    given = []

    def command(folder: str, number: int) -> None:
        given.append((folder, number))

    take_text_as_it_is(command)
    fire.Fire(command, command=["--folder", "007", "--number", "7"])
    assert given == [("007", 7)]


def test_options_of_our_own_commands_are_checked_before_they_run(tmp_path):
    result = bundle("phantom", "--output_dir", str(tmp_path), "--seeds", "3", module="scripts")
    assert result.returncode != 0
    assert last_line(result) == "error: --seeds: no such option of phantom; did you mean --seed?"
    assert not list(tmp_path.iterdir())
