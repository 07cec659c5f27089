"""The zip that is published: what is in it, and that it works where nothing else of this repository is."""

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import monai.bundle
import pytest
import torch
from helpers import ROOT, blocks, copy_bundle, save_subject
from huggingface_hub import ModelCard
from processes import QUICK, bundle, server

from scripts.commands import package as package_module
from scripts.commands.package import AT_THE_TOP, LEFT_OUT, NAME, contents, package, require_publishable, zipped
from scripts.errors import InputError
from scripts.network import SkipDenseSeg

PAGE = "docs/packaging.md"
METADATA = json.loads((ROOT / "configs" / "metadata.json").read_text())
ZIP = f"{NAME}_v{METADATA['version']}.zip"


def page_commands(start: str) -> list[str]:
    """The lines of the page's block whose first line starts so."""
    (block,) = [block for block in blocks(PAGE, "shell") if block.startswith(start)]
    return block.splitlines()


def run_commands(commands: list[str], cwd: Path, programs: Path, **environment: str) -> str:
    """Run lines of a page in a shell that finds its programs in a virtual environment; return what they print."""
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": "", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        ["bash", "-euc", "\n".join(commands)],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@contextmanager
def served(dist: Path) -> Iterator[str]:
    """The address of the web server that the page starts, which hands out a folder `dist`."""
    (command,) = page_commands("python -m http.server")
    with server(command.removeprefix("python -m ").replace("8000", "PORT"), cwd=dist.parent) as port:
        yield f"http://127.0.0.1:{port}"


def tree(directory: Path) -> dict[str, bytes]:
    """The files below a folder by name."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def copy_contents(directory: Path) -> Path:
    """What goes into the zip, as another checkout may have it: other order, times and permissions."""
    for number, name in enumerate(reversed(contents(ROOT))):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, directory / name)
        (directory / name).chmod(0o600)
        os.utime(directory / name, (10**9 + number, 10**9 + number))
    return directory


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the zip and its checksum. To be read only."""
    directory = tmp_path_factory.mktemp("published") / "dist"
    package(str(directory))
    return directory


@pytest.fixture(scope="module")
def downloaded(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as MONAI downloads it from a web server. To be read only."""
    directory = tmp_path_factory.mktemp("downloaded")
    with served(dist) as address, pytest.warns(UserWarning, match="file integrity is NOT verified"):
        monai.bundle.download(name=NAME, url=f"{address}/{ZIP}", bundle_dir=directory)
    return directory / NAME


def test_downloaded_bundle_has_what_belongs_in_it_and_nothing_else(downloaded):
    files = tree(downloaded)
    assert set(files) == {*contents(ROOT), *AT_THE_TOP}
    assert {"LICENSE", "README.md", "metadata.json", "requirements.txt", "models/model.pt", "models/brain.pt"} <= set(
        files
    )
    for name, content in files.items():
        assert content == (ROOT / AT_THE_TOP.get(name, name)).read_bytes(), name
        assert not (downloaded / name).is_symlink()


def test_untracked_files_of_a_checkout_stay_out(tmp_path):
    for name in ("configs/train.json", "configs/mine.json", "docs/index.md", "docs/private.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len(contents(tmp_path)) == 4
    for arguments in (["init", "--quiet"], ["add", "configs/train.json", "docs/index.md"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    assert contents(tmp_path) == ["configs/train.json", "docs/index.md"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a downloaded bundle doesn't know what is tracked")
def test_contents_are_the_tracked_files_of_the_bundle():
    folders = sorted({name.partition("/")[0] for name in contents(ROOT)})
    tracked = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = [name for name in tracked.stdout.splitlines() if not any(fnmatch(name, each) for each in LEFT_OUT)]
    assert contents(ROOT) == sorted(expected)


def test_same_bytes_from_another_checkout_with_other_files_lying_about(dist, tmp_path):
    copy = copy_contents(tmp_path)
    for stray in (
        *("models/model-0a1b2c3d.pt", "models/model.ts", "configs/.mine.json", "scripts/.hidden.py", "eval/x"),
        *("scripts/data/__pycache__/x.pyc", "docs/.drafts/x.md", "requirements-dev.txt", "requirements/dev.txt"),
    ):
        (copy / stray).parent.mkdir(parents=True, exist_ok=True)
        (copy / stray).write_text("stray")
    assert zipped(copy) == (dist / ZIP).read_bytes()


def test_packing_again_in_the_unzipped_bundle_gives_the_same_and_the_checksum_is_right(dist, downloaded, tmp_path):
    copy = tmp_path / NAME
    shutil.copytree(downloaded, copy)
    mask = os.umask(0o077)
    try:
        result = bundle("package", "--output_dir", "dist", cwd=copy, module="scripts")
    finally:
        os.umask(mask)
    assert result.returncode == 0, result.stderr
    assert f"dist/{ZIP}.sha256" in result.stdout
    assert tree(copy / "dist") == tree(dist)
    check = ["sha256sum", "--check", f"{ZIP}.sha256"]
    assert subprocess.run(check, cwd=copy / "dist", capture_output=True).returncode == 0
    with (copy / "dist" / ZIP).open("ab") as file:
        file.write(b"x")
    assert subprocess.run(check, cwd=copy / "dist", capture_output=True).returncode == 1


@pytest.mark.parametrize("suffix", ["", ".sha256"])
def test_another_file_of_the_same_name_stays(suffix, tmp_path):
    package(str(tmp_path))
    package(str(tmp_path))  # the same once more
    (tmp_path / f"{ZIP}{suffix}").write_text("of an earlier day")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=rf"{ZIP}{suffix}: already exists with other content; raise the version in"):
        package(str(tmp_path))
    assert tree(tmp_path) == before


def test_bundles_that_would_not_work_are_refused(tmp_path, monkeypatch):
    copy = copy_contents(tmp_path)
    weights, output = copy / "models" / "model.pt", tmp_path / "dist"
    monkeypatch.setattr(package_module, "ROOT", copy)
    weights.unlink()
    with pytest.raises(InputError, match=r"models/model.pt: no such file, but the zip needs it; train first"):
        package(str(output))
    assert not output.exists()
    state = SkipDenseSeg().state_dict()
    wrong = [{"model": state}, [1, 2], SkipDenseSeg(block_config=(4, 4, 4)).state_dict()]
    for content in wrong:
        torch.save(content, weights)
        with pytest.raises(InputError, match=r"model.pt: a checkpoint of another network: .* put the state dict"):
            package(str(output))
    torch.save(state, weights)
    require_publishable(copy)
    (copy / "configs" / "metadata.json").write_text(json.dumps(METADATA | {"version": "99.0.0"}))
    with pytest.raises(InputError, match=r"metadata.json: version 99.0.0 isn't in the changelog; add an entry"):
        package(str(output))
    (copy / "scripts" / "network.py").unlink()
    with pytest.raises(InputError, match=r"scripts/network.py: no such file, .*; get a fresh copy of the bundle"):
        package(str(output))
    assert not output.exists()


def test_model_zoo_finds_the_files_it_wants(downloaded):
    for name in ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt", "docs/README.md"):
        assert (downloaded / name).is_file(), name
    assert "_v" not in NAME  # the zoo's index splits names at it
    assert max(path.stat().st_size for path in downloaded.rglob("*")) < 25e6  # else it wants download links
    assert {"version", "changelog", "schema", "name"} <= set(METADATA)
    # what stands there would be installed as well, in place of what is required
    assert "optional_packages_version" not in METADATA


def test_hugging_face_reads_the_head_of_the_model_card(downloaded):
    card = ModelCard.load(downloaded / "README.md")
    assert card.text.lstrip().startswith("# Model overview")
    told = card.data.to_dict()
    assert set(told.pop("tags")) >= {"monai", "medical"}
    assert told == {"license": "apache-2.0", "library_name": "monai", "pipeline_tag": "image-segmentation"}
    assert "Apache License\n" in (downloaded / "LICENSE").read_text()


def test_page_speaks_of_this_version():
    stated = re.findall(rf"{NAME}_v([\d.]+)\.zip|{NAME} ([\d.]+)\n|--version ([\d.]+)", (ROOT / PAGE).read_text())
    assert len(stated) >= 5
    assert {version for versions in stated for version in versions if version} == {METADATA["version"]}
    hub = {line for line in (ROOT / "requirements/dev.txt").read_text().splitlines() if "huggingface_hub" in line}
    assert hub == set(re.findall(r"huggingface_hub==[\d.]+", (ROOT / PAGE).read_text()))


class HubOnLoopback(ThreadingHTTPServer):
    """What the tools of Hugging Face ask of its servers to keep one model repository, as far as they need it here."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Answers)
        self.files: dict[str, bytes] = {}
        self.tags: list[str] = []
        self.cards: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        server: "HubOnLoopback"
        protocol_version = "HTTP/1.1"
        commit = "c" * 40

        def answer(self) -> None:
            hub, sent = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            if path == "/api/repos/create":
                self.send({"url": f"http://127.0.0.1/someone/{NAME}"})
            elif path == "/api/validate-yaml":
                hub.cards.append(json.loads(sent)["content"])
                self.send({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                names = [file["path"] for file in json.loads(sent)["files"]]
                regular = {"uploadMode": "regular", "shouldIgnore": False}
                self.send({"files": [{"path": name, **regular} for name in names]})
            elif "/commit/" in path:
                for change in map(json.loads, sent.splitlines()):
                    if change["key"] == "file":
                        hub.files[change["value"]["path"]] = base64.b64decode(change["value"]["content"])
                    elif change["key"] == "deletedFile":
                        del hub.files[change["value"]["path"]]
                url = f"http://127.0.0.1/someone/{NAME}/commit/{self.commit}"
                self.send({"success": True, "commitOid": self.commit, "commitUrl": url, "hookOutput": ""})
            elif "/tag/" in path:
                hub.tags.append(json.loads(sent)["tag"])
                self.send({})
            elif "/revision/" in path and path.rpartition("/")[2] in ("main", *hub.tags):
                names = [{"rfilename": name} for name in hub.files]
                self.send({"id": f"someone/{NAME}", "sha": self.commit, "siblings": names})
            elif "/tree/" in path:
                ids = {name: hashlib.sha1(content).hexdigest() for name, content in hub.files.items()}
                self.send([{"type": "file", "path": n, "size": len(c), "oid": ids[n]} for n, c in hub.files.items()])
            elif "/resolve/" in path and (name := path.partition("/resolve/")[2].partition("/")[2]) in hub.files:
                self.send(hub.files[name], ETag=hashlib.sha1(hub.files[name]).hexdigest())
            else:
                self.send({"error": "not found"}, status=404)

        do_GET = do_HEAD = do_POST = answer

        def send(self, content: object, status: int = 200, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": self.commit, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Nothing on the terminal."""


@pytest.mark.slow
def test_up_to_hugging_face_and_down_again(dist, downloaded, tmp_path):
    shutil.copytree(dist, tmp_path / "dist")
    _, _, *upload = page_commands("pip install huggingface_hub")
    download = page_commands(f"python -m monai.bundle download --name {NAME} --source huggingface_hub")
    with HubOnLoopback() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        hub.files["scripts/of_an_earlier_version.py"] = b""
        address = f"http://127.0.0.1:{hub.server_port}"
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_not_a_real_token"}
        run_commands([*upload, *download], tmp_path, Path(sys.executable).parent, **settings)
        hub.shutdown()
    assert hub.files == tree(downloaded)
    assert hub.tags == [METADATA["version"]]
    assert hub.cards == [(ROOT / "docs" / "README.md").read_text()]
    files = tree(tmp_path / "bundles" / NAME)
    assert {name: content for name, content in files.items() if not name.startswith(".")} == tree(downloaded)


@pytest.fixture(scope="module")
def clean_environment(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a virtual environment that holds what the metadata in the zip name, and what that needs."""
    with zipfile.ZipFile(dist / ZIP) as archive:
        metadata = json.loads(archive.read(f"{NAME}/metadata.json"))
    named = {"numpy": metadata["numpy_version"], "monai": metadata["monai_version"]}
    named |= metadata["required_packages_version"]
    directory = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    install = [directory / "bin" / "pip", "install", "--quiet"]
    # first and alone, so that a CPU build that is at hand is taken
    subprocess.run([*install, f"torch=={metadata['pytorch_version']}"], check=True)
    subprocess.run([*install, *(f"{name}=={version}" for name, version in named.items())], check=True)
    return directory / "bin"


@pytest.fixture(scope="module")
def followed_page(dist, clean_environment, brains, tmp_path_factory) -> Path:
    """A folder that was empty but for scans, in which somebody did what the page says to download and segment."""
    home = tmp_path_factory.mktemp("home")
    for subject, labeled in (("1", True), ("9", True), ("11", False)):
        save_subject(home / "scans", subject, brains[0], labeled)
    first, last = page_commands("pip install torch"), page_commands("pip install -r")
    freeze = [f"{clean_environment}/pip freeze"]
    installed = run_commands(freeze, home, clean_environment)
    with served(dist) as address:
        told = run_commands(
            [line.replace("https://example.org", address) for line in (*first, *last)], home, clean_environment
        )
    assert hashlib.sha256((dist / ZIP).read_bytes()).hexdigest() in told
    # what the page and requirements.txt install are the versions that the metadata name
    assert run_commands(freeze, home, clean_environment) == installed
    return home


@pytest.mark.slow
def test_page_leads_from_nothing_to_a_segmentation(followed_page):
    names = {path.name for path in (followed_page / "labels").iterdir()}
    assert names == {
        "subject-11-label.nii.gz",
        "subject-11-label.png",
        "volumes.csv",
        "report.html",
        "inference-provenance.json",
    }
    assert {path.name for path in followed_page.iterdir()} == {"bundles", "labels", "scans"}


@pytest.mark.slow
def test_python_of_the_page(followed_page, clean_environment, tmp_path):
    for name in ("bundles", "scans"):
        (tmp_path / name).symlink_to(followed_page / name)
    (example,) = blocks(PAGE, "python")
    check = """
print(type(network), network.training, next(network.parameters()).sum().item())
print(workflow.check_properties())
"""
    (tmp_path / "example.py").write_text(example + check)
    printed = run_commands(["python example.py"], tmp_path, clean_environment)
    weights = torch.load(ROOT / "models" / "model.pt", weights_only=True)
    total = next(iter(weights.values())).sum().item()
    assert f"<class 'scripts.network.SkipDenseSeg'> False {total}\n[]\n" in printed
    assert f"{METADATA['version']} 1 subjects\n" in printed
    label = tmp_path / "labels" / "subject-11-label.nii.gz"
    assert label.read_bytes() == (followed_page / "labels" / label.name).read_bytes()


@pytest.mark.slow
def test_training_from_the_downloaded_bundle(followed_page, clean_environment, tmp_path):
    root = followed_page / "bundles" / NAME
    arguments = ["--config_file", root / "configs" / "train.json", "--bundle_root", root, *QUICK]
    arguments += ["--dataset_dir", followed_page / "scans", "--output_dir", "eval", "--ckpt_dir", "models"]
    command = shlex.join(map(str, ["python", "-m", "monai.bundle", "run", "training", *arguments]))
    run_commands([command], tmp_path, clean_environment)
    SkipDenseSeg().load_state_dict(torch.load(tmp_path / "models" / "model.pt", weights_only=True))


ZOO_CHECKS = """
import importlib
import pathlib
import sys

import monai.bundle
import torch

root = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(root))
network = {"meta_file": f"{root}/configs/metadata.json", "config_file": f"{root}/configs/inference.json"}
monai.bundle.verify_net_in_out("network_def", bundle_root=str(root), **network)
weights = f"{root}/models/model.pt"
monai.bundle.ckpt_export("network_def", filepath="model.ts", ckpt_file=weights, bundle_root=str(root), **network)
torch.jit.load("model.ts")
for config, kind in (("train", "train"), ("inference", "infer")):
    workflow = monai.bundle.create_workflow(
        config_file=f"{root}/configs/{config}.json", workflow_type=kind, bundle_root=str(root), dataset_dir=sys.argv[2]
    )
    print("missing properties:", workflow.check_properties())
for module in sorted((root / "scripts").glob("[!_]*.py")):
    assert importlib.import_module(f"scripts.{module.stem}").__file__ == str(module)
"""


@pytest.mark.slow
def test_model_zoo_checks_pass(followed_page, clean_environment, tmp_path):
    (tmp_path / "checks.py").write_text(ZOO_CHECKS)
    command = f"python checks.py {followed_page / 'bundles' / NAME} {followed_page / 'scans'}"
    assert run_commands([command], tmp_path, clean_environment).count("missing properties: []\n") == 2


def pinned(name: str) -> dict[str, str]:
    """Versions by package in a file of requirements, for Python 3.11 and later."""
    pattern = r'^([\w.-]+)==([\w.]+)(?: ; python_version >= "3.11")?(?: \\)?$'
    return dict(re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE))


def test_requirements_with_checksums_have_the_same_versions():
    plain, hashed = pinned("requirements.txt"), pinned("requirements/hashed.txt")
    assert plain.pop("torch")
    assert plain.items() <= hashed.items()
    entries = re.split(r"^(?=[\w.-]+==)", (ROOT / "requirements/hashed.txt").read_text(), flags=re.MULTILINE)[1:]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)


@pytest.mark.slow
def test_requirements_with_checksums_can_be_installed(tmp_path):
    """With torch, as the page has it, taken from the environment of the tests."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    (command,) = page_commands("pip install --require-hashes")
    command = command.replace("bundles/infant_brain_mri_skipdenseseg/", f"{ROOT}/")
    run_commands([command], tmp_path, tmp_path / "venv" / "bin")
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    installed = {path.name.split("-")[0].lower() for path in site.glob("*.dist-info")}
    assert {name.replace("-", "_").replace(".", "_") for name in pinned("requirements/hashed.txt")} <= installed


@pytest.mark.slow
def test_list_of_packages_lies_beside_the_zip(tmp_path):
    home, venv = copy_bundle(tmp_path / "home"), sys.prefix
    command = ["make", f"VENV={venv}", "-o", f"{venv}/.installed-dev", "package"]
    result = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    listed = json.loads((home / "dist" / ZIP.replace(".zip", ".cdx.json")).read_text())
    assert listed["bomFormat"] == "CycloneDX"
    versions = {component["name"]: component["version"] for component in listed["components"]}
    assert pinned("requirements.txt").items() <= versions.items()
    assert pinned("requirements/hashed.txt").items() <= versions.items()
