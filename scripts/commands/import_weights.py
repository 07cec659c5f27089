"""Published checkpoints in: the authors' PyTorch files and those of the MindSpore model zoo's 3D_DenseNet.

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

# what each published variant sets in network_def
VARIANTS: dict[str, dict[str, Any]] = {
    "compact": {},
    "paper": {"block_config": [4, 4, 4, 4], "grouped_upsampling": True, "bias": True},
}
# MindSpore names a cell by where it was when it was added. The published code adds blocks to lists that are attributes
# already, so the first dense block, transition and upsampling are all called `0`, and the second block, whose place
# MindSpore (seen in 2.10) guesses, after a layer of the first. Plain numbers and full names are taken too.
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
    """SkipDenseSeg's name of what MindSpore calls `name`; what is no name there is none here."""
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
    """The network's tensors by our names, and how many entries of training were left out."""
    os.environ.setdefault("GLOG_v", "4")  # else MindSpore logs what is raised here as well
    try:
        import mindspore
    except ImportError as error:
        raise InputError(
            f"{path}: a MindSpore checkpoint, for which MindSpore is needed ({error}); pip install mindspore"
        ) from error
    try:
        entries = mindspore.load_checkpoint(path)
    except Exception as error:  # what MindSpore raises for a damaged file depends on where the damage is
        raise InputError(f"{path}: MindSpore can't read it; copy the file again, under a name in .ckpt") from error
    state: dict[str, torch.Tensor] = {}
    left_out = 0
    for name, entry in entries.items():
        # training leaves counters and text, and the optimiser's state of each parameter as `<state>.<parameter>`
        if isinstance(entry, str) or entry.size == 1 or name.partition(".")[2] in entries:
            left_out += 1
            continue
        if (ours := name_from_mindspore(name)) in state:
            raise InputError(f"{path}: has {ours} under two names, the second {name}; give that of one network")
        values = entry.asnumpy()
        if values.dtype.kind not in "biuf":
            raise InputError(f"{path}: {name} isn't of real numbers, but of {values.dtype}; give the published file")
        state[ours] = torch.tensor(values, dtype=torch.float32)
    return state, left_out


def _from_torch(path: str) -> dict[str, torch.Tensor]:
    """The first state dict in the file, be it the file's content or one of its entries."""
    content = read_checkpoint(path)
    candidates = (content, *content.values()) if isinstance(content, Mapping) else ()
    for state in candidates:
        if not isinstance(state, Mapping) or not state:
            continue
        if all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
            # torch keeps the names of the modules too, and the authors' network has no module for dropout
            if any(name.endswith("denselayer1.dropout") for name in getattr(state, "_metadata", ())):
                print(
                    f"warning: {path} was saved from this bundle's own network; if it was trained or imported by the "
                    f"bundle, use it as it is: the result of this import is wrong then"
                )
            return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    raise InputError(f"{path}: holds no state dict; give the file that the authors' training saved")


def import_weights(checkpoint: str, output: str) -> None:
    """Bring a published checkpoint into the bundle.

    Both published pipelines feed the network arrays with axes (z, x, y), ours have (x, y, z): the kernels are turned,
    so that the same scan gives the same logits.

    Args:
        checkpoint: the authors' PyTorch `.pth` (a state dict, or a dict that holds one; names may begin with
            DataParallel's `module.`), or a `.ckpt` of MindSpore's 3D_DenseNet, for which the package mindspore must be
            installed.
        output: the file to write, `model.pt` in a folder for `--ckpt_dir`.

    Raises:
        InputError: the checkpoint can't be read, could run code, isn't one of the two published variants or holds NaN,
            or `output` is there already.
    """
    checkpoint, output = str(checkpoint), str(output)
    if not Path(checkpoint).is_file():
        raise InputError(f"{checkpoint}: no such file; is --checkpoint right?")
    if Path(output).exists():
        raise InputError(f"{output}: is there already; choose another --output")
    with Path(checkpoint).open("rb") as file:
        beginning = file.read(2)
    left_out = 0
    if beginning.startswith((b"PK", b"\x80")):  # a zip archive, or the pickle of torch before 1.6
        state = _from_torch(checkpoint)
    elif beginning.startswith(b"\n"):  # the first field of a protocol buffer
        state, left_out = _from_mindspore(checkpoint)
    else:
        raise InputError(f"{checkpoint}: neither a PyTorch nor a MindSpore checkpoint; give the published file")

    variant = "paper" if any(name.startswith("dense_blocks.2.") for name in state) else "compact"
    network = SkipDenseSeg(**VARIANTS[variant])
    for name, tensor in network.state_dict().items():
        if name.endswith(".num_batches_tracked"):  # torch before 0.4.1 and MindSpore don't count batches
            state.setdefault(name, tensor)
    require_fit(state, network, checkpoint, "give one of the compact or the paper variant of 3D-SkipDenseSeg")
    for name, tensor in state.items():
        if tensor.ndim == 5:
            state[name] = tensor.permute(0, 1, 3, 4, 2)
    network.load_state_dict(state)
    with whole_files(Path(output).parent) as temporary:
        torch.save(network.state_dict(), temporary / Path(output).name)

    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{variant} variant, {parameters:,} parameters, in {output}; kernels turned from (z, x, y) to (x, y, z)")
    if left_out:
        print(f"{left_out} entries ignored that belong to training, not to the network")
    is_where_configs_look = Path(output).name == "model.pt"
    folder = Path(output).parent if is_where_configs_look else "FOLDER"
    options = [f"--ckpt_dir {folder}"]
    for name, value in VARIANTS[variant].items():
        shown = f'"{value}"'.replace(" ", "") if isinstance(value, list) else value
        options.append(f"--network_def#{name} {shown}")
    print(f"{'' if is_where_configs_look else 'as FOLDER/model.pt, '}every config loads it by {' '.join(options)}")
