"""A real MONAI Label server, installed, filled and started as the page says, and asked as 3D Slicer asks.

The requests are made by the client of the plugin for 3D Slicer that comes with MONAI Label. What they hold, and how
images are read and written around them (SimpleITK, NRRD for results), is as in the plugin's `MONAILabel.py`.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT, blocks, copy_bundle, save_subject, save_volume
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from processes import bundle
from scipy.ndimage import zoom

from scripts.data.volumes import read_volume

pytestmark = [
    pytest.mark.monailabel,
    pytest.mark.skipif(importlib.util.find_spec("monailabel") is None, reason="run by `make test-monailabel`"),
    # the client of MONAI Label's plugin for 3D Slicer
    pytest.mark.filterwarnings("ignore:'cgi' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
PAGE = "docs/annotating_in_3d_slicer.md"
NAME = "infant_brain_mri_skipdenseseg"
INSTALL, PUT, START, GO_BACK = blocks(PAGE, "shell")
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
# in another order of axes, flipped, of other voxel sizes, turned by some degrees and moved
TURN = np.array([[0.995, -0.0998, 0, 12], [0.0998, 0.995, 0, -7], [0, 0, 1, 30], [0, 0, 0, 1]])


def turned(values: np.ndarray, order: int) -> nib.Nifti1Image:
    image = nib.Nifti1Image(zoom(values, (1, 1, 0.8), order=order), np.diag([-1.0, 1, 1.25, 1]))
    image = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt("SRP")))
    return nib.Nifti1Image(np.asarray(image.dataobj), TURN @ image.affine)


def shell(command: str, home: Path) -> str:
    """What a line of the page prints."""
    result = subprocess.run(["bash", "-euc", command], cwd=home, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def home_with_scans(directory: Path) -> SimpleNamespace:
    """A copy of the bundle, put into the app as the page says, and a folder for scans."""
    home = copy_bundle(directory)
    shell(PUT, home)
    (home / "scans").mkdir()
    model = home / "annotation" / "monaibundle" / "model" / NAME
    assert not (model / "data").exists()  # no dataset of ours is there
    return SimpleNamespace(path=home, scans=home / "scans", model=model, weights=model / "models" / "model.pt")


@contextmanager
def server(home: SimpleNamespace, start: str = START):
    """The server that the page starts, on a free port, and 3D Slicer's way to ask it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = home.path / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-euc", start.replace("8000", str(port))],
            cwd=home.path, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    slicer = Slicer(f"http://127.0.0.1:{port}", home.path, log)
    try:
        for _ in range(600):
            try:
                slicer.client.info()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
        else:
            pytest.fail(log.read_text())
        yield slicer
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


class Slicer:
    """What the MONAI Label module of 3D Slicer does, without its windows."""

    def __init__(self, url: str, folder: Path, log: Path) -> None:
        path = Path(sys.prefix) / "monailabel" / "plugins" / "slicer" / "MONAILabel" / "MONAILabelLib" / "client.py"
        spec = importlib.util.spec_from_file_location("slicer_client", path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.folder = folder / "slicer"
        self.folder.mkdir(exist_ok=True)
        self.client = self.module.MONAILabelClient(url, str(self.folder), "user-xyz")
        self.log = log

    def options(self, section: str) -> dict:
        """Those of the server, of each list the first: what is sent unless the user chooses otherwise."""
        config = self.client.info()[section][NAME]["config"]
        return {name: value[0] if isinstance(value, list) else value for name, value in config.items()}

    def segment(self, image: str, session: str | None = None, /, **options):
        params = self.options("models") | {"result_extension": ".nrrd", "result_dtype": "uint8"} | options
        result, told = self.client.infer(NAME, image, params, session_id=session)
        assert told["label_names"] == {"csf": 1, "grey matter": 2, "white matter": 3}
        return result

    def submit(self, image: str, t1: Path, label: np.ndarray) -> None:
        """Save a label, in the order of the axes of its T1 file, as 3D Slicer writes it."""
        import SimpleITK as sitk

        values = sitk.GetImageFromArray(label.astype(np.int16).T)
        values.CopyInformation(sitk.ReadImage(t1))
        path = self.folder / "tmpabcdefgh.nii.gz"
        sitk.WriteImage(values, path)
        names = ("csf", "grey matter", "white matter")
        info = {"label_info": [{"name": name, "idx": number + 1} for number, name in enumerate(names)]}
        assert self.client.save_label(image, str(path), params=info) == {"image": image, "label": image}

    def train(self, **options) -> None:
        self.client.train_start(NAME, self.options("trainers") | options)

    def training_ends(self) -> dict:
        while (task := self.client.train_status())["status"] in ("SUBMITTED", "RUNNING"):
            time.sleep(0.5)
        return task


def assert_label(result: str, own: Path, t1: Path, seen_in_slicer: bool = True) -> None:
    """The file that 3D Slicer got has, voxel for voxel and on the same grid, the label of the bundle itself."""
    import SimpleITK as sitk

    label, expected, scan = sitk.ReadImage(result), nib.load(own), nib.load(t1)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label).T, np.asarray(expected.dataobj).reshape(scan.shape[:3]))
    assert set(np.unique(sitk.GetArrayFromImage(label))) == {0, 1, 2, 3}
    axes = np.array(label.GetDirection()).reshape(3, 3) * label.GetSpacing()
    affine = np.diag([-1.0, -1, 1, 1]) @ np.block([[axes, np.array(label.GetOrigin())[:, None]], [0, 0, 0, 1]])
    np.testing.assert_allclose(affine, scan.affine, atol=1e-4)
    np.testing.assert_allclose(expected.affine, scan.affine, atol=1e-4)
    if seen_in_slicer:
        shown = sitk.ReadImage(t1)
        for grid in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(label, grid)(), getattr(shown, grid)(), atol=1e-4)


def own_labels(home: SimpleNamespace, output: str, *options: str) -> Path:
    """Where the bundle's own inference, with the weights of the server, put its labels."""
    folder = home.path / output
    result = bundle(
        *("run", "--config_file", "configs/inference.json", "--dataset_dir", str(home.scans)),
        *("--output_dir", str(folder), *options),
        cwd=home.model,
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory, brains):
    """Subjects 1 and 2 as iSeg lies, and 3 turned; subject 1 has a label beside it, which is no image."""
    home = home_with_scans(tmp_path_factory.mktemp("monailabel"))
    for subject, brain in (("1", 0), ("2", 1)):
        save_subject(home.scans, subject, brains[brain], subject == "1", ".nii.gz")
    for kind in ("T1", "T2"):
        nib.save(turned(brains[0][kind], order=1), home.scans / f"subject-3-{kind}.nii.gz")
    return home


@pytest.fixture(scope="module")
def slicer(home):
    with server(home) as slicer:
        yield slicer


@pytest.fixture(scope="module")
def first_labels(home):
    return own_labels(home, "first", "--subjects", "['1','2','3']")


@pytest.fixture(scope="module")
def both(home, tmp_path_factory):
    """T1 and T2 of subject 3 in one file, under a name like those that 3D Slicer gives its uploads."""
    volumes = [nib.load(home.scans / f"subject-3-{kind}.nii.gz") for kind in ("T1", "T2")]
    path = tmp_path_factory.mktemp("both") / "tmpt1_k2x9.nii.gz"
    save_volume(path, np.stack([np.asarray(v.dataobj) for v in volumes], axis=-1), volumes[0].affine)
    return path


def test_page_installs_what_is_tested():
    made = subprocess.run(
        ["make", "--dry-run", "--always-make", ".venv-monailabel/.installed"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    made = re.sub(r'python=.*"(python3\.\d+)"\) && "\$python"', r"\1", made)  # make looks for it first
    made = made.replace(".venv-monailabel/bin/", "").replace(" --quiet", "").replace(" --clear", "")
    for line in INSTALL.splitlines():
        if not line.startswith(". "):
            assert line in made.splitlines()


def test_server_lists_the_subjects(slicer):
    info = slicer.client.info()
    assert info["labels"] == ["csf", "grey matter", "white matter"]
    assert list(info["models"]) == list(info["trainers"]) == [NAME]
    images = slicer.client.datastore()["objects"]
    assert {name: entry["image"]["info"]["name"] for name, entry in images.items()} == {
        f"subject-{n}": f"subject-{n}-T1.nii.gz" for n in (1, 2, 3)
    }
    sample = slicer.client.next_sample("first", {})
    assert Path(sample["path"]).is_file()


@pytest.mark.parametrize("subject", ["1", "3"])
def test_t1_with_its_t2_beside_it(home, slicer, first_labels, subject):
    t1 = home.scans / f"subject-{subject}-T1.nii.gz"
    assert_label(slicer.segment(f"subject-{subject}"), first_labels / f"subject-{subject}-label.nii.gz", t1)


def test_list_of_two(home, slicer, first_labels):
    pair = [str(home.scans / f"subject-3-{kind}.nii.gz") for kind in ("T1", "T2")]
    result = slicer.segment("subject-3", image=pair)
    assert_label(result, first_labels / "subject-3-label.nii.gz", Path(pair[0]))


def test_file_of_t1_and_t2_as_image_and_as_session(home, slicer, first_labels, both):
    subject = f"[{{'subject':'both','image':'{both}'}}]"
    own = own_labels(home, "both", "--dataset#data", subject) / "subject-both-label.nii.gz"
    t1 = home.scans / "subject-3-T1.nii.gz"
    np.testing.assert_array_equal(
        np.asarray(nib.load(own).dataobj)[..., 0], nib.load(first_labels / "subject-3-label.nii.gz").dataobj
    )
    assert slicer.client.upload_image(str(both), "a name of its own") == {"image": "a name of its own"}
    assert_label(slicer.segment("a name of its own"), own, t1)
    session = slicer.client.create_session(str(both))["session_id"]
    assert_label(slicer.segment("", session), own, t1)


def test_nifti_result_as_it_is_downloaded(home, slicer, first_labels):
    result = slicer.segment("subject-3", result_extension=".nii.gz")
    own = nib.load(first_labels / "subject-3-label.nii.gz")
    np.testing.assert_array_equal(nib.load(result).dataobj, own.dataobj)
    np.testing.assert_allclose(nib.load(result).affine, own.affine, atol=1e-4)


def refused(slicer: Slicer, image: str) -> str:
    """What the server's log says of an image that it refused to segment."""
    told = len(slicer.log.read_text())
    with pytest.raises(slicer.module.MONAILabelClientException, match="500"):
        slicer.segment(image)
    for _ in range(300):
        if reason := re.search(r"InputError: .*\n", slicer.log.read_text()[told:]):
            return reason[0]
        time.sleep(0.1)
    pytest.fail(slicer.log.read_text()[told:])


def test_image_that_can_not_be_segmented(home, slicer, both, tmp_path):
    t1 = tmp_path / "tmp4x_abc.nii.gz"
    shutil.copy(home.scans / "subject-1-T1.nii.gz", t1)
    slicer.client.upload_image(str(t1), "subject-8-T1")
    alone, looked_for = (f"{home.scans}/subject-8-{kind}.nii.gz" for kind in ("T1", "T2"))
    assert f"InputError: {looked_for}: not found, and {alone} has only T1" in refused(slicer, "subject-8-T1")
    Path(alone).unlink()
    slicer.client.upload_image(str(t1), "volume")
    assert "volume.nii.gz: has one volume, and its name doesn't end in -T1" in refused(slicer, "volume")
    values = np.asarray(nib.load(both).dataobj)
    save_volume(tmp_path / "tmp_three.nii.gz", np.concatenate([values, values[..., :1]], axis=-1))
    slicer.client.upload_image(str(tmp_path / "tmp_three.nii.gz"), "three")
    assert "three.nii.gz: has 3 volumes, not two" in refused(slicer, "three")


def same_weights(path: Path, other: Path) -> bool:
    states = [torch.load(p, map_location="cpu", weights_only=True) for p in (path, other)]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_training_and_the_way_back(home, slicer, first_labels, brains):
    """With nothing but labels that were submitted; all that 3D Slicer sends, but one epoch."""
    found = home.weights.read_bytes()
    t1 = {n: home.scans / f"subject-{n}-T1.nii.gz" for n in (1, 2, 3)}
    before = slicer.segment("subject-3")
    for number, label in ((1, brains[0]["label"]), (2, brains[1]["label"])):
        slicer.submit(f"subject-{number}", t1[number], label)
    label = np.asarray(turned(brains[0]["label"].astype(np.uint8), order=0).dataobj)
    slicer.submit("subject-3", t1[3], label)

    # stopped in its first epoch
    slicer.train(max_epochs=50)
    while "training [1/50]: [2/" not in slicer.log.read_text():
        assert slicer.client.train_status()["status"] in ("SUBMITTED", "RUNNING"), slicer.log.read_text()
        time.sleep(0.2)
    assert slicer.client.train_stop()["status"] == "STOPPED"
    assert home.weights.read_bytes() == found
    (kept,) = home.model.glob("models/model-*.pt")
    assert kept.read_bytes() == found
    assert not list(home.model.glob("models/.unfinished*"))

    told = len(slicer.log.read_text())
    assert slicer.options("trainers")["run_id"] == ""
    slicer.train(max_epochs=1)
    task = slicer.training_ends()
    log = slicer.log.read_text()[told:]
    assert task["status"] == "DONE", log
    assert "Total Records for Training: 2" in log
    assert "Total Records for Validation: 1" in log
    scores = [float(score) for score in re.findall(r"val_mean_dice: ([\d.]+)", log)]
    assert len(scores) == 2  # of the weights found and of the one epoch
    assert scores[1] > scores[0]
    assert log.count(f"best network: {home.weights}") == 1
    assert f"{home.weights} will be replaced; its present content is kept in {kept}" in log
    assert list(home.model.glob("models/model-*.pt")) == [kept]
    assert kept.read_bytes() == found
    assert not same_weights(home.weights, kept)

    # the server segments with the new weights, and with the old ones after the page's way back
    new = own_labels(home, "new", "--subjects", "['3']") / "subject-3-label.nii.gz"
    assert_label(slicer.segment("subject-3"), new, t1[3])
    with pytest.raises(AssertionError):
        assert_label(before, new, t1[3])
    shell(GO_BACK.replace("<hash>", kept.stem.removeprefix("model-")), home.path)
    assert same_weights(home.weights, kept)
    assert len(list(home.model.glob("models/model.pt.~1~"))) == 1
    assert_label(slicer.segment("subject-3"), first_labels / "subject-3-label.nii.gz", t1[3])


TRAIN_ON_TWO_DEVICES = """
import json, logging, sys
from monailabel.datastore.local import LocalDatastore
from monailabel.tasks.train.bundle import BundleTrainTask
logging.basicConfig(level=logging.INFO)
model, scans, request = sys.argv[1:]
BundleTrainTask(model, {})(json.loads(request), LocalDatastore(scans, extensions=["*-label.nii.gz", "*-T1.nii.gz"]))
"""


def test_training_on_several_devices_and_with_too_few_labels_to_validate(home, brains, tmp_path):
    """What MONAI Label starts where it sees several GPUs; here two processes on the CPU, and a training of seconds."""
    model, scans = tmp_path / "model", tmp_path / "scans"
    shutil.copytree(home.model, model, ignore=shutil.ignore_patterns("model-*.pt", "*~", "eval"))
    config = json.loads((model / "configs" / "train.json").read_text())
    config |= {"crops_per_epoch": 2, "patch_size": [32, 32, 32]}
    (model / "configs" / "train.json").write_text(json.dumps(config))
    save_subject(scans, "1", brains[0], False, ".nii.gz")
    save_volume(scans / "labels" / "final" / "subject-1-label.nii.gz", brains[0]["label"].astype(np.uint8))
    request = {
        "model": NAME, "device": "cpu", "pretrained": True, "max_epochs": 1, "val_split": 0.2, "tracking": "None",
        "tracking_uri": "", "run_id": "", "model_filename": "model.pt", "force_multi_gpu": True, "gpus": "0,1",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAIN_ON_TWO_DEVICES, str(model), str(scans), json.dumps(request)],
        cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(model)}, capture_output=True, text=True,
    )  # fmt: skip
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert "Return code: 0" in said
    assert said.count("best network:") == 1
    assert "no subject is left to validate: the training subjects (1) are used" in said
    assert (model / "eval" / "rank-1.log").exists()


def test_analyze_pairs(tmp_path, brains):
    home = home_with_scans(tmp_path)
    save_subject(home.scans, "1", brains[0], True, ".hdr")
    own = own_labels(home, "own", "--subjects", "['1']") / "subject-1-label.nii.gz"
    with server(home, START.replace(".nii.gz", ".hdr")) as slicer:
        assert list(slicer.client.datastore()["objects"]) == ["subject-1"]
        assert_label(slicer.segment("subject-1"), own, home.scans / "subject-1-T1.hdr", seen_in_slicer=False)


def test_page_converts_analyze_pairs(tmp_path, brains, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_subject(tmp_path, "9", brains[0], False, ".hdr")
    (code,) = blocks(PAGE, "python")
    exec(code, {})
    for kind in ("T1", "T2"):
        pair, converted = (read_volume(f"subject-9-{kind}{suffix}") for suffix in (".hdr", ".nii.gz"))
        np.testing.assert_array_equal(converted[0], pair[0])
        np.testing.assert_array_equal(converted[1], pair[1])
        assert nib.load(f"subject-9-{kind}.nii.gz").ndim == 3
