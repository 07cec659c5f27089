"""The bundle's commands as a person runs them: real processes on real files."""

import itertools
import json
import re
import resource
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bad_subjects import save
from helpers import (
    PAPER,
    ROOT,
    configured,
    is_picture,
    refused_run,
    save_subject,
    save_volume,
    tensorboard_log,
    voxels,
)
from monai.bundle import ConfigParser
from PIL import Image
from processes import (
    QUICK,
    assert_one_line,
    assert_refused,
    bundle,
    evaluating,
    flags,
    last_line,
    nothing_written,
    run,
    segmenting,
    succeeds,
    training,
)

from scripts.network import SkipDenseSeg
from scripts.results.metrics import tissue_scores
from scripts.results.tables import read_csv
from scripts.segment import segment as segment_files
from scripts.synthesis.contrast import T1_CONTRAST, T2_CONTRAST, nominal, six_month_image, six_month_subject
from scripts.synthesis.phantom_brains import label_map
from scripts.tissues import tissue_labels


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    result = succeeds(*training(dataset, output, "--epochs", "2", "--picture_interval", "1"))
    assert f"best network: {output}/model.pt" in result.stdout
    return output


@pytest.fixture(scope="module")
def segmented(dataset, tmp_path_factory) -> Path:
    """Segmentations of subjects 9 (labelled) and 11 with the weights that the bundle includes."""
    output = tmp_path_factory.mktemp("segmented")
    result = succeeds(*segmenting(dataset, output, "--subjects", "[9,11]"))
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


def test_training_starts_from_a_checkpoint_and_keeps_what_it_replaces(dataset, trained, tmp_path):
    shutil.copy(trained / "model.pt", tmp_path)
    start = ("--start_from", str(tmp_path / "model.pt"), "--learning_rate", "1e-9")
    result = succeeds(*training(dataset, tmp_path, *start))
    found = torch.load(trained / "model.pt", weights_only=True)
    after = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    for name, weights in SkipDenseSeg().named_parameters():
        torch.testing.assert_close(after[name], found[name], rtol=0, atol=1e-6)
        assert weights.ndim == 1 or not torch.allclose(weights, found[name], atol=1e-3)
    (earlier,) = tmp_path.glob("model-*.pt")
    assert earlier.read_bytes() == (trained / "model.pt").read_bytes()
    assert str(earlier) in result.stdout


def test_training_of_fewer_epochs_than_the_interval_saves_its_own_network(dataset, tmp_path):
    for epochs, interval, validated in ((3, 2, [2, 3]), (1, 10, [1])):
        output = tmp_path / f"{epochs}-epochs"
        settings = {"epochs": epochs, "val_interval": interval, "crops_per_epoch": 2, "batch_size": 1}
        settings["picture_interval"] = 0
        configured(dataset, output, "train.json", **settings).run()
        assert [value.step for value in tensorboard_log(output).Scalars("val_mean_dice")] == validated
        assert (output / "model.pt").exists()


def test_evaluation_scores_the_segmentation_against_the_file_on_disk(dataset, segmented, tmp_path):
    result = succeeds(*evaluating(dataset, tmp_path))
    (row,) = read_csv(tmp_path / "metrics.csv")
    label, segmentation = (
        tissue_labels(voxels(path).astype(np.float32), str(path))[None]
        for path in (dataset / "subject-9-label.hdr", segmented / "subject-9-label.nii.gz")
    )
    expected = tissue_scores(torch.from_numpy(segmentation), torch.from_numpy(label), (1, 1, 1))
    tissues = ("csf", "gm", "wm", "mean")
    scores = [f"{score}_{tissue}" for score in ("dice", "hd95", "hd_max", "asd") for tissue in tissues]
    assert (list(row), row["subject"]) == (["subject", *scores], "9")
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected)
    percent = [f"{100 * float(row[f'dice_{tissue}']):.2f}" for tissue in tissues]
    assert (tmp_path / "metrics.md").read_text() in result.stdout
    assert "| Subject | CSF | GM | WM | Average |" in result.stdout
    assert f"| 9 | {' | '.join(percent)} |" in result.stdout
    assert (tmp_path / "subject-9-scored.png").stat().st_size > 10_000
    report = (tmp_path / "report.html").read_text()
    assert report.count('class="viewer"') == 1
    assert f"<td>{percent[0]}</td><td>{percent[1]}</td>" in report


def test_scores_and_volumes_on_another_grid_are_those_of_the_files(brains, tmp_path):
    """Voxels of 2 x 1 x 0.5 mm, axes turned: the subject's own grid counts, not the network's."""
    data = tmp_path / "data"
    affine = np.array([[0, 2.0, 0, 0], [0, 0, -1.0, 0], [0.5, 0, 0, 0], [0, 0, 0, 1]])
    for kind, values in brains[0].items():
        stored = np.repeat(values[::2], 2, axis=2).transpose(2, 0, 1)[:, ::-1, ::-1]
        save_volume(data / f"subject-9-{kind}.nii.gz", stored, affine)
    configured(data, tmp_path / "scores", "train.json", "evaluate.json", run_id="evaluating").run()
    configured(data, tmp_path / "labels", subjects=9).run()
    label, segmentation = (nib.load(folder / "subject-9-label.nii.gz") for folder in (data, tmp_path / "labels"))
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
    configured(data, tmp_path / "labels", subjects=[9]).run()
    labels = voxels(tmp_path / "labels" / "subject-9-label.nii.gz")
    brain = np.pad(brains[0]["T1"], ((60, 40), (0, 50), (70, 0))) > 0
    assert not labels[~brain].any()
    assert (labels[brain] > 0).mean() > 0.9
    assert (tmp_path / "labels" / "subject-9-label.png").exists()


def test_segmentation_opens_beside_the_t1_and_has_the_volumes_of_the_table(dataset, segmented):
    rows = read_csv(segmented / "volumes.csv")
    assert [row["subject"] for row in rows] == ["9", "11"]
    for row in rows:
        t1 = nib.load(dataset / f"subject-{row['subject']}-T1.hdr")
        label = nib.load(segmented / f"subject-{row['subject']}-label.nii.gz")
        assert label.shape == t1.shape
        np.testing.assert_array_equal(label.affine, t1.affine)
        values = np.asarray(label.dataobj)
        assert values.dtype == np.uint8
        assert set(np.unique(values)) <= {0, 1, 2, 3}
        assert not values[np.asarray(t1.dataobj) == 0].any()
        assert (segmented / f"subject-{row['subject']}-label.png").stat().st_size > 10_000
        counts = dict(zip(("csf_ml", "gm_ml", "wm_ml"), np.bincount(values.ravel(), minlength=4)[1:], strict=True))
        for name, count in (counts | {"brain_ml": sum(counts.values())}).items():
            assert float(row[name]) == pytest.approx(count / 1000)


def test_subjects_of_differing_shapes_and_formats_in_one_folder(brains, tmp_path):
    data, output, labels = (tmp_path / name for name in ("data", "out", "labels"))
    for subject, suffix, cut in (("1", ".hdr", 0), ("2", ".nii.gz", 4), ("9", ".nii", 8), ("11", ".hdr", 2)):
        brain = {kind: np.pad(values, ((0, 0), (cut, 0), (0, cut))) for kind, values in brains[0].items()}
        save_subject(data, subject, brain, labeled=subject != "11", suffix=suffix)
    save_volume(data / "__MACOSX" / "._subject-3-T1.nii", np.zeros((2, 2, 2), np.uint8))
    quick = {"epochs": 1, "crops_per_epoch": 2, "batch_size": 2}
    configured(data, output, "train.json", "recipes/robust.json", **quick).run()
    # by default those without a label
    configured(data, labels, ckpt_dir=str(output), label_suffix=".hdr").run()
    names = {"subject-11-label.hdr", "subject-11-label.img", "subject-11-label.png", "volumes.csv", "report.html"}
    assert {path.name for path in labels.iterdir()} == {*names, "inference-provenance.json"}
    label = np.asarray(nib.load(labels / "subject-11-label.hdr").dataobj)
    assert label.shape == (60, 74, 66, 1)
    assert set(np.unique(label)) <= {0, 10, 150, 250}


@pytest.mark.slow
def test_both_command_styles_from_another_directory(dataset, tmp_path):
    configs = [str(ROOT / "configs" / name) for name in ("train.json", "evaluate.json", "inference.json")]
    root = flags(bundle_root=ROOT, dataset_dir=dataset)
    results = flags(output_dir="out", ckpt_dir="out")
    succeeds("run", "--config_file", configs[0], *root, *results, *QUICK, cwd=tmp_path)
    assert (tmp_path / "out" / "model.pt").exists()
    (tmp_path / "args.json").write_text(json.dumps({"config_file": configs[:2]}))
    succeeds("run", "--args_file", "args.json", *root, "--output_dir", "scores", cwd=tmp_path)
    assert (tmp_path / "scores" / "metrics.csv").exists()
    succeeds("run", "--config_file", configs[2], *root, "--output_dir", "labels", cwd=tmp_path)
    assert (tmp_path / "labels" / "subject-11-label.nii.gz").exists()


@pytest.mark.parametrize("command", [training, evaluating, segmenting])
def test_results_are_not_written_among_the_subjects(own_dataset, command):
    data = own_dataset()
    before = sorted(data.iterdir())
    assert_one_line(bundle(*command(data, data)), "choose an --output_dir outside")
    assert sorted(data.iterdir()) == before


def test_output_in_ascii_and_to_a_file(own_dataset, tmp_path):
    result = run(
        [sys.executable, "-m", "monai.bundle", *segmenting(own_dataset(), tmp_path, "--subjects", "[9,11]")],
        PYTHONIOENCODING="ascii",
        PYTHONUTF8="0",
        LC_ALL="C",
    )
    assert result.returncode == 0, result.stderr
    told = result.stdout + result.stderr
    assert "\r" not in told and "%|" not in told
    assert re.findall(r"segmenting: (\d of \d) subjects done", told) == ["1 of 2", "2 of 2"]
    assert (tmp_path / "subject-11-label.nii.gz").exists()


NAMELESS = """
import os, pwd, runpy, sys

def no_entry(user):
    raise KeyError(f"getpwuid(): uid not found: {user}")

pwd.getpwuid = no_entry
for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
runpy.run_module("scripts", run_name="__main__", alter_sys=True)
"""


def test_nameless_user():
    result = run([sys.executable, "-c", NAMELESS, "phantom", "--help"])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("command", "settings", "words"),
    [
        (training, {"epocs": 1}, ["--epocs", "did you mean --epochs?"]),
        (segmenting, {"dataset_dir": "{tmp}/dta"}, ["{tmp}/dta: no such folder", "--dataset_dir"]),
        (training, {"patch_size": [50, 50, 50]}, ["--patch_size", "multiples of 4"]),
        *(
            (each, {"dataset_dir": "{tmp}/no"}, ["{tmp}/no", "subject-<id>-T1"])
            for each in (training, evaluating, segmenting)
        ),
        *((e, {"ckpt_dir": "{tmp}"}, ["{tmp}/model.pt: a checkpoint of another"]) for e in (evaluating, segmenting)),
        (evaluating, {"checkpoints": "{tmp}/fold-*.pt"}, ["{tmp}/fold-*.pt: no checkpoint fits this pattern"]),
        (segmenting, {"ckpt_dir": "{tmp}/x"}, ["{tmp}/x/model.pt: no such checkpoint"]),
        (segmenting, {"checkpoints": "{tmp}/model.onnx"}, ["{tmp}/model.onnx: can't be read as ONNX"]),
        (segmenting, {"precision": "fp16"}, ["precision", "fp16"]),
        (segmenting, {"label_suffix": ".mha"}, ["label_suffix", ".mha"]),
        (training, {"val_subjects": [99]}, ["val_subjects names subject 99", "choose from 1, 2, 9"]),
        (training, {"val_subjects": [1, 2, 9]}, ["no subject left to train among 4, 3 of them labelled"]),
    ],
)
def test_settings_that_can_not_be_used(dataset, tmp_path, command, settings, words):
    torch.save(SkipDenseSeg(growth_rate=8).state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.onnx").touch()
    (tmp_path / "no").mkdir()
    given = {name: str(value).format(tmp=tmp_path) for name, value in settings.items()}
    data = given.pop("dataset_dir", dataset)
    result = bundle(*command(data, tmp_path / "out", *flags(**given)))
    assert_refused(result, tmp_path / "out", *(word.format(tmp=tmp_path) for word in words))


@pytest.mark.parametrize("configs", [["train.json"], ["train.json", "evaluate.json"], ["inference.json"]])
def test_settings_that_no_task_can_use(dataset, tmp_path, configs):
    output, run_id = tmp_path / "out", "evaluating" if len(configs) == 2 else "run"
    for settings, message in (
        ({"device": "gpu"}, "--device gpu: can't be used "),
        ({"foreground_margin": -1}, "--foreground_margin -1: must be a whole number of at least 0"),
        *(
            ({name: 2024}, "2024: isn't text, so it can't be a path")
            for name in ("output_dir", "ckpt_dir", "dataset_dir")
        ),
    ):
        assert refused_run(dataset, output, *configs, run_id=run_id, **settings).startswith(message)
        assert nothing_written(output)


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
    options = flags(checkpoints=tmp_path / "fold-*" / "model.pt", flips=True, precision="fp32")
    result = succeeds(*segmenting(tmp_path / "data", tmp_path / "out", *options))
    assert "average of 2 networks" in result.stdout
    config = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "inference.json"))
    config["dataset_dir"] = str(tmp_path / "data")
    image = config.get_parsed_content("dataset")[0]["image"][None].as_tensor()
    mirrors = [axes for n in range(4) for axes in itertools.combinations((2, 3, 4), n)]
    with torch.no_grad():
        mean = sum(n(image.flip(axes)).flip(axes).softmax(1) for n in networks for axes in mirrors) / 16
        singles = [network(image).argmax(1)[0].numpy() for network in networks]
    assert image.shape == (1, 2, 32, 32, 32)
    found = voxels(tmp_path / "out" / "subject-11-label.nii.gz")
    brain = middle["T1"] > 0
    assert (found == mean.argmax(1)[0].numpy())[brain].mean() > 0.999
    for single in singles:
        assert (found == single)[brain].mean() < 0.99


@pytest.mark.slow
def test_volume_of_256_cubed_in_4_gb(tmp_path):
    rng = np.random.default_rng([3, 2])
    label = label_map(rng)
    label = np.pad(label, [((256 - n) // 2, 256 - n - (256 - n) // 2) for n in label.shape])
    images = {"T1": six_month_image(label, T1_CONTRAST, rng), "T2": six_month_image(label, T2_CONTRAST, rng)}
    save_subject(tmp_path / "scans", "1", {"label": label, **images})
    # in bfloat16 one pass fits
    arguments = segmenting(tmp_path / "scans", tmp_path, *flags(subjects=[1], precision="fp32"))
    # of addresses, which are more than the memory that is used
    limit = 4 * 2**30
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "monai.bundle", *arguments], cwd=ROOT, capture_output=True, text=True,
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


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        (
            "phantom",
            {"output_dir": "{tmp}/out", "seeds": 3},
            "--seeds: no such option of phantom; did you mean --seed?",
        ),
        ("cross_validate", {"output_dir": "{tmp}/out", "epocs": 3}, "--epocs: no such setting; did you mean --epochs?"),
        (
            "cross_validate",
            {"output_dir": "s3://b/cv"},
            "--output_dir s3://b/cv: cross_validate takes paths, not URLs;",
        ),
        ("submission", {"predictions": "{tmp}", "output": "{tmp}/x.zip"}, "{tmp}/data: subjects names subject 11"),
        ("synthesize", {"labels_dir": "{tmp}", "output_dir": "{tmp}/out"}, "{tmp}: has no label map"),
    ],
)
def test_own_commands_refuse_in_one_line(tmp_path, command, settings, message):
    (tmp_path / "data").mkdir()
    save(tmp_path / "data", "1")
    if command in ("cross_validate", "submission"):
        settings = {"dataset_dir": "{tmp}/data", **settings}
    given = {name: str(value).format(tmp=tmp_path) for name, value in settings.items()}
    result = bundle(command, *flags(**given), module="scripts")
    assert_one_line(result)
    assert result.stderr.count("\n") == 1
    assert last_line(result).startswith("error: " + message.format(tmp=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert not (ROOT / "s3:").exists()


@pytest.mark.slow
def test_imported_paper_variant_segments_by_the_settings_that_were_told(dataset, tmp_path):
    torch.save(SkipDenseSeg(**PAPER).state_dict(), tmp_path / "weights.pth")
    files = flags(checkpoint=tmp_path / "weights.pth", output=tmp_path / "model.pt")
    result = succeeds("import_weights", *files, module="scripts")
    told = result.stdout.splitlines()[-1].partition(" by ")[2].replace('"', "").split()
    succeeds(*segmenting(dataset, tmp_path / "out", *told))
    assert nib.load(tmp_path / "out" / "subject-11-label.nii.gz").shape == (60, 72, 64, 1)


def test_t2_out_of_place_is_warned_of_in_the_log_and_the_report(tmp_path, capfd):
    rng = np.random.default_rng(5)
    label = label_map(rng)[20:124, 40:140, 70:170]
    scans = six_month_subject(label, nominal(label, rng), rng)
    scans["T2"] = np.roll(scans["T2"], 4, axis=2)
    save_subject(tmp_path / "data", "1", scans, labeled=False)
    configured(tmp_path / "data", tmp_path / "out", subjects=[1], window_size=[64, 64, 64], prepare=[]).run()
    warning = "T2 fits T1 as well, or nearly, when it is moved by 3 mm; register it to T1"
    assert f"subject-1-T2.hdr: {warning}" in "".join(capfd.readouterr())
    report = (tmp_path / "out" / "report.html").read_text()
    assert "T2 not registered" in report
    assert warning in report
