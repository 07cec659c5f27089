"""The bundle as the zip that MONAI downloads."""

import hashlib
import io
import zipfile
from pathlib import Path

from monai.bundle import ConfigParser

from scripts.errors import InputError
from scripts.weights import read_checkpoint, require_fit
from scripts.writers import add_to_zip, whole_files

ROOT = Path(__file__).parents[1]
NAME = "infant_brain_mri_skipdenseseg"
WEIGHTS = "models/model.pt"

# by name, so that nothing else that lies in these folders gets in
CONTENTS = (
    "LICENSE",
    "requirements/hashed.txt",
    "requirements/monailabel-no-deps.txt",
    "requirements/monailabel.txt",
    "requirements.txt",
    "configs/comparison.json",
    "configs/demo.json",
    "configs/evaluate.json",
    "configs/inference.json",
    "configs/logging.conf",
    "configs/metadata.json",
    "configs/multi_gpu_evaluate.json",
    "configs/multi_gpu_inference.json",
    "configs/multi_gpu_train.json",
    "configs/onnx_export.json",
    "configs/recipes/mindspore.json",
    "configs/recipes/original.json",
    "configs/recipes/robust.json",
    "configs/train.json",
    "docs/README.md",
    "docs/annotating_in_3d_slicer.md",
    "docs/bids.md",
    "docs/cloud_storage.md",
    "docs/coming_from_mindspore_or_pytorch.md",
    "docs/cross_validation.md",
    "docs/data_license.txt",
    "docs/examples/segment_with_onnx.py",
    "docs/experiment_tracking.md",
    "docs/exporting.md",
    "docs/federated_learning.md",
    "docs/from_python.md",
    "docs/packaging.md",
    "docs/probabilities_and_uncertainty.md",
    "docs/reading_the_report.md",
    "docs/reliability.md",
    "docs/settings.md",
    "docs/several_devices.md",
    "docs/synthetic_scans.md",
    "docs/training_recipe.md",
    "docs/unseen_brain.png",
    "models/model.pt",
    "scripts/__init__.py",
    "scripts/__main__.py",
    "scripts/bench.py",
    "scripts/bids.py",
    "scripts/bids_derivative.py",
    "scripts/compare_recipes.py",
    "scripts/cross_validation.py",
    "scripts/datasets.py",
    "scripts/distributed.py",
    "scripts/errors.py",
    "scripts/exported.py",
    "scripts/hdf5.py",
    "scripts/html_report.py",
    "scripts/import_weights.py",
    "scripts/inferers.py",
    "scripts/metrics.py",
    "scripts/network.py",
    "scripts/optimizer.py",
    "scripts/package.py",
    "scripts/phantom.py",
    "scripts/probabilities.py",
    "scripts/profiling.py",
    "scripts/provenance.py",
    "scripts/registration.py",
    "scripts/report.html.jinja",
    "scripts/report.py",
    "scripts/report_pictures.py",
    "scripts/report_plots.py",
    "scripts/report_viewer.js",
    "scripts/report_warnings.py",
    "scripts/resume.py",
    "scripts/robustness.py",
    "scripts/segment.py",
    "scripts/storage.py",
    "scripts/subjects.py",
    "scripts/submission.py",
    "scripts/synthesis.py",
    "scripts/synthesize.py",
    "scripts/tracking.py",
    "scripts/transforms.py",
    "scripts/weights.py",
    "scripts/workflow.py",
    "scripts/writers.py",
)

# what stands at the top once more: where the model zoo and Hugging Face look for it
AT_THE_TOP = {"README.md": "docs/README.md", "metadata.json": "configs/metadata.json"}


def require_publishable(root: Path) -> None:
    """Refuse a bundle that wouldn't work for those who download it.

    Args:
        root: the folder of the bundle.

    Raises:
        InputError: a file is missing, the weights don't fit the network of `configs/inference.json`, or the version
            isn't in the changelog.
    """
    for name in CONTENTS:
        if not (root / name).is_file():
            remedy = "train first, or copy the weights there" if name == WEIGHTS else "get the bundle anew"
            raise InputError(f"{root / name}: no such file, and it belongs in the zip; {remedy}")
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
            f"{root / 'configs' / 'metadata.json'}: version {metadata['version']} isn't in the changelog; "
            f"add what is new in it"
        )


def zipped(root: Path) -> bytes:
    """A zip of the bundle in one folder, `infant_brain_mri_skipdenseseg`. Like content gives the same bytes anywhere.

    Args:
        root: the folder of the bundle.
    """
    sources = {name: name for name in CONTENTS} | AT_THE_TOP
    content = io.BytesIO()
    # stored, since two versions of zlib need not compress to the same bytes; the weights hardly get smaller anyway
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(sources):
            add_to_zip(archive, f"{NAME}/{name}", (root / sources[name]).read_bytes())
    return content.getvalue()


def package(output_dir: str) -> None:
    """Pack the bundle, weights included, into `infant_brain_mri_skipdenseseg_v<version>.zip`, its SHA-256 beside it.

    The version is that of `configs/metadata.json`. What goes in is `CONTENTS`, and the model card and metadata at the
    top once more. Like content gives the same bytes.

    Args:
        output_dir: the folder to write to.

    Raises:
        InputError: as `require_publishable`, or the folder has a zip or checksum of this version that differs.
    """
    require_publishable(ROOT)
    version = ConfigParser.load_config_file(ROOT / "configs" / "metadata.json")["version"]
    name, content = f"{NAME}_v{version}.zip", zipped(ROOT)
    files = {name: content, f"{name}.sha256": f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode()}
    output = Path(str(output_dir))
    for file in files:
        if (output / file).exists() and (output / file).read_bytes() != files[file]:
            raise InputError(
                f"{output / file}: is there already with other content; raise the version in configs/metadata.json, "
                f"or choose another --output_dir"
            )
    with whole_files(output) as temporary:
        for file in files:
            (temporary / file).write_bytes(files[file])
    print(f"{output / name}, {len(content):,} bytes; its checksum: {output / name}.sha256")
