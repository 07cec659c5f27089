"""`python -m scripts import_weights`: published checkpoints of the authors and of MindSpore's 3D_DenseNet.

Sources: github.com/tbuikr/3D-SkipDenseSeg; github.com/mindspore-ai/models, research/cv/3D_DenseNet.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scripts.errors import InputError
from scripts.files import whole_files
from scripts.network import SkipDenseSeg
from scripts.weights import read_checkpoint, require_fit

# network_def settings of each published variant
VARIANTS: dict[str, dict[str, Any]] = {
    "compact": {},
    "paper": {"block_config": [4, 4, 4, 4], "grouped_upsampling": True, "bias": True},
}
# MindSpore names a cell when it is added to its parent. The published code adds blocks to lists that are already
# attributes, so the first dense block, transition and upsampling are all called `0`. MindSpore (seen in 2.10) guesses
# the place of the second block and names it after a layer of the first. Plain numbers and full names work too.
DENSE_LAYER = re.compile(
    r"(?:dense_blocks\.|0\.cells_list\.0\.cells_list\.)?(\d+)\.cells_list\.(\d+)\.cells_list\.([0235])\.(.+)"
)
TRANSITION = re.compile(r"(?:transit_blocks\.)?(\d+)\.features\.(.+)")
UPSAMPLING = re.compile(r"(?:upsampling_blocks\.)?(\d+)\.weight")
DENSE_LAYER_PARTS = {"0": "norm1", "2": "conv1", "3": "norm2", "5": "conv2"}
BATCH_NORM_PARTS = {
    "bn2d.gamma": "weight",
    "bn2d.beta": "bias",
    "bn2d.moving_mean": "running_mean",
    "bn2d.moving_variance": "running_var",
}


def name_from_mindspore(name: str) -> str:
    """Return SkipDenseSeg's name for MindSpore's `name`; unknown names are returned unchanged and rejected later."""
    for theirs, ours in BATCH_NORM_PARTS.items():
        if name.endswith(f".{theirs}"):
            name = name.removesuffix(theirs) + ours
    if match := DENSE_LAYER.fullmatch(name):
        block, layer, part, rest = match.groups()
        return f"dense_blocks.{block}.denselayer{int(layer) + 1}.{DENSE_LAYER_PARTS[part]}.{rest}"
    if match := TRANSITION.fullmatch(name):
        return f"transit_blocks.{match[1]}.{match[2]}"
    if match := UPSAMPLING.fullmatch(name):
        return f"upsampling_blocks.{match[1]}.weight"
    return name


def _from_mindspore(path: str) -> tuple[dict[str, torch.Tensor], int]:
    """The network's tensors by our names, and the number of skipped entries, which belong to training."""
    os.environ.setdefault("GLOG_v", "4")  # else MindSpore also logs the errors that are raised here
    try:
        import mindspore
    except ImportError as error:
        raise InputError(f"{path}: a MindSpore checkpoint needs MindSpore ({error}); pip install mindspore") from error
    try:
        entries = mindspore.load_checkpoint(path)
    except Exception as error:  # the kind of error depends on where the file is damaged
        raise InputError(f"{path}: MindSpore can't read it; copy the file again, with the suffix .ckpt") from error
    state: dict[str, torch.Tensor] = {}
    skipped = 0
    for name, entry in entries.items():
        # of training: counters, text, and the optimiser's state of each parameter as `<state>.<parameter>`
        if isinstance(entry, str) or entry.size == 1 or name.partition(".")[2] in entries:
            skipped += 1
            continue
        if (ours := name_from_mindspore(name)) in state:
            raise InputError(
                f"{path}: has {ours} under two names, the second {name}; give the checkpoint of one network"
            )
        values = entry.asnumpy()
        if values.dtype.kind not in "biuf":
            raise InputError(f"{path}: {name} holds {values.dtype}, not real numbers; give the published file")
        state[ours] = torch.tensor(values, dtype=torch.float32)
    return state, skipped


def _from_torch(path: str) -> dict[str, torch.Tensor]:
    """The first state dict in the file: its content or one of its entries."""
    content = read_checkpoint(path)
    candidates = (content, *content.values()) if isinstance(content, Mapping) else ()
    for state in candidates:
        if not isinstance(state, Mapping) or not state:
            continue
        if all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
            # torch also saves the names of modules, and the authors' network has no module for dropout
            if any(name.endswith("denselayer1.dropout") for name in getattr(state, "_metadata", ())):
                print(
                    f"warning: {path} was saved from this bundle's own network; if the bundle trained or imported it, "
                    f"use that file: this import turns its kernels wrongly"
                )
            return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    raise InputError(f"{path}: holds no state dict; give the file saved by the authors' training")


def import_weights(checkpoint: str, output: str) -> None:
    """Convert a published checkpoint to a checkpoint of the bundle.

    Both published pipelines feed the network arrays with axes (z, x, y); ours have (x, y, z). The kernels are turned,
    so that the same scan gives the same logits.

    Args:
        checkpoint: the authors' PyTorch `.pth` (a state dict, or a dict that holds one; names may begin with
            DataParallel's `module.`), or a `.ckpt` of MindSpore's 3D_DenseNet, which needs the package mindspore.
        output: the file to write, `model.pt` in a folder for `--ckpt_dir`.

    Raises:
        InputError: the checkpoint can't be read, could run code, isn't one of the two published variants or holds NaN,
            or `output` exists.
    """
    checkpoint, output = str(checkpoint), str(output)
    if not Path(checkpoint).is_file():
        raise InputError(f"{checkpoint}: no such file; is --checkpoint right?")
    if Path(output).exists():
        raise InputError(f"{output}: already exists; choose another --output")
    with Path(checkpoint).open("rb") as file:
        beginning = file.read(2)
    skipped = 0
    if beginning.startswith((b"PK", b"\x80")):  # a zip archive, or the pickle of torch before 1.6
        state = _from_torch(checkpoint)
    elif beginning.startswith(b"\n"):  # the first field of a protocol buffer
        state, skipped = _from_mindspore(checkpoint)
    else:
        raise InputError(f"{checkpoint}: neither a PyTorch nor a MindSpore checkpoint; give the published file")

    variant = "paper" if any(name.startswith("dense_blocks.2.") for name in state) else "compact"
    network = SkipDenseSeg(**VARIANTS[variant])
    for name, tensor in network.state_dict().items():
        if name.endswith(".num_batches_tracked"):  # torch before 0.4.1 and MindSpore don't count batches
            state.setdefault(name, tensor)
    require_fit(state, network, checkpoint, "give a checkpoint of the compact or the paper variant of 3D-SkipDenseSeg")
    for name, tensor in state.items():
        if tensor.ndim == 5:
            state[name] = tensor.permute(0, 1, 3, 4, 2)
    network.load_state_dict(state)
    with whole_files(Path(output).parent) as temporary:
        torch.save(network.state_dict(), temporary / Path(output).name)

    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{variant} variant, {parameters:,} parameters, in {output}; kernels turned from (z, x, y) to (x, y, z)")
    if skipped:
        print(f"{skipped} entries ignored that belong to training, not to the network")
    is_where_configs_look = Path(output).name == "model.pt"
    folder = Path(output).parent if is_where_configs_look else "FOLDER"
    options = [f"--ckpt_dir {folder}"]
    for name, value in VARIANTS[variant].items():
        text = f'"{value}"'.replace(" ", "") if isinstance(value, list) else value
        options.append(f"--network_def#{name} {text}")
    print(f"{'' if is_where_configs_look else 'as FOLDER/model.pt, '}every config loads it by {' '.join(options)}")
