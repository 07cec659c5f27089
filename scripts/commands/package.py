"""The bundle as the zip that MONAI downloads."""

import hashlib
import io
import subprocess
import zipfile
from fnmatch import fnmatch
from pathlib import Path

from monai.bundle import ConfigParser

from scripts.errors import InputError
from scripts.files import ROOT, add_to_zip, whole_files
from scripts.results.provenance import NAME
from scripts.weights import read_checkpoint, require_fit

WEIGHTS, BRAIN_WEIGHTS = "models/model.pt", "models/brain.pt"
# what the zip holds: all that is not hidden in these folders, but only the published weights
CONTENTS = (
    *("LICENSE", "CHANGELOG.md", "CITATION.cff", "requirements*.txt", "requirements/*.txt"),
    *("configs/**/*", "docs/**/*", "scripts/**/*", WEIGHTS, BRAIN_WEIGHTS),
)
LEFT_OUT = ("requirements*dev*.txt", "*/__pycache__/*")
# files that the bundle can't be used or published without
REQUIRED = (
    *("LICENSE", "docs/README.md", "scripts/__init__.py", "scripts/network.py", "scripts/workflow.py"),
    *(WEIGHTS, BRAIN_WEIGHTS),
    *(f"configs/{name}.json" for name in ("train", "evaluate", "inference", "metadata")),
)
# copies at the top, where the model zoo and Hugging Face look for them
AT_THE_TOP = {"README.md": "docs/README.md", "metadata.json": "configs/metadata.json"}


def contents(root: Path) -> list[str]:
    """Return the names of the files that go into the zip, without the copies at the top.

    Args:
        root: the folder of the bundle. In a git checkout, only tracked files go in: others may be private.
    """
    paths = (path for pattern in CONTENTS for path in root.glob(pattern) if path.is_file())
    names = {path.relative_to(root).as_posix() for path in paths}
    if (root / ".git").exists():
        tracked = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True)
        names &= {*tracked.stdout.split("\0")}
    return sorted(name for name in names if "/." not in name and not any(fnmatch(name, each) for each in LEFT_OUT))


def require_publishable(root: Path) -> None:
    """Refuse a bundle that wouldn't work after the download.

    Args:
        root: the folder of the bundle.

    Raises:
        InputError: a required file is missing, the weights don't fit the network of `configs/inference.json`, or the
            changelog lacks the version.
    """
    for name in REQUIRED:
        if not (root / name).is_file():
            remedy = "train first, or copy the weights there" if name == WEIGHTS else "get a fresh copy of the bundle"
            raise InputError(f"{root / name}: no such file, but the zip needs it; {remedy}")
    config = ConfigParser(ConfigParser.load_config_file(root / "configs" / "inference.json"))
    state = read_checkpoint(str(root / WEIGHTS))
    require_fit(
        state if isinstance(state, dict) else {},
        config.get_parsed_content("network_def"),
        str(root / WEIGHTS),
        "put the state dict there that training writes for network_def of configs/inference.json",
    )
    metadata = ConfigParser.load_config_file(root / "configs" / "metadata.json")
    if metadata["version"] not in metadata["changelog"]:
        raise InputError(
            f"{root / 'configs' / 'metadata.json'}: version {metadata['version']} isn't in the changelog; add an entry"
        )


def zipped(root: Path) -> bytes:
    """Return a zip of the bundle in one folder, NAME; equal contents give equal bytes on any machine.

    Args:
        root: the folder of the bundle.
    """
    sources = {name: name for name in contents(root)} | AT_THE_TOP
    content = io.BytesIO()
    # not compressed: two versions of zlib may write different bytes, and weights hardly shrink
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(sources):
            add_to_zip(archive, f"{NAME}/{name}", (root / sources[name]).read_bytes())
    return content.getvalue()


def package(output_dir: str) -> None:
    """Pack the bundle with its weights into `infant_brain_mri_skipdenseseg_v<version>.zip`, and write its SHA-256.

    The version is that of `configs/metadata.json`. The zip holds `CONTENTS`, and copies of the model card and the
    metadata at the top. Equal contents give equal bytes.

    Args:
        output_dir: the folder to write to.

    Raises:
        InputError: as `require_publishable`, or the folder has another zip or checksum of this version.
    """
    require_publishable(ROOT)
    version = ConfigParser.load_config_file(ROOT / "configs" / "metadata.json")["version"]
    name, content = f"{NAME}_v{version}.zip", zipped(ROOT)
    files = {name: content, f"{name}.sha256": f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode()}
    output = Path(str(output_dir))
    for file in files:
        if (output / file).exists() and (output / file).read_bytes() != files[file]:
            raise InputError(
                f"{output / file}: already exists with other content; raise the version in configs/metadata.json, "
                f"or choose another --output_dir"
            )
    with whole_files(output) as temporary:
        for file in files:
            (temporary / file).write_bytes(files[file])
    print(f"{output / name}, {len(content):,} bytes; its checksum: {output / name}.sha256")
