"""Exported networks (TorchScript, ONNX) instead of a checkpoint; docs/exporting.md shows how to export one."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from scripts.errors import InputError, ran_out_of_memory
from scripts.tissues import Tissue

logger = logging.getLogger(__name__)

# the tested version; also in requirements/dev.txt
ONNXRUNTIME = "onnxruntime==1.32.0"

Run = Callable[[torch.Tensor], torch.Tensor]


def is_exported(path: str) -> bool:
    """Return whether a file name is that of an exported network."""
    return Path(path).suffix.lower() in LOADERS


def _torchscript(path: str, device: torch.device) -> Run:
    logger.info("%s: run by TorchScript", path)
    return torch.jit.load(path, map_location=device).eval()


def _onnx(path: str, device: torch.device) -> Run:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"{path}: needs ONNX Runtime; pip install {ONNXRUNTIME}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    logger.info("%s: run in float32 by ONNX Runtime (%s)", path, session.get_providers()[0])
    name = session.get_inputs()[0].name

    def run(patch: torch.Tensor) -> torch.Tensor:
        logits = session.run(None, {name: patch.float().contiguous().cpu().numpy()})[0]
        return torch.from_numpy(logits).to(patch.device)

    return run


LOADERS = {".ts": _torchscript, ".onnx": _onnx}


def _reason(error: Exception) -> str:
    """The first sentence of an error message, in one line; TorchScript has it after its traceback."""
    return " ".join(str(error).rsplit("Error: ", 1)[-1].split()).split(". ")[0]


class ExportedNetwork:
    """A network in a file, called like a module: float32 (B, 2, X, Y, Z) -> logits (B, 4, X, Y, Z).

    TorchScript follows autocast like a module. ONNX Runtime computes in float32, on a GPU if the patch is there and the
    installed package supports it, else on the CPU. Neither is changed or copied.

    Args:
        path: `.ts` or `.onnx`. TorchScript is a program, and loading may run parts of it: use trusted files only.
        device: the device of the patches.

    Raises:
        InputError: the file doesn't exist or can't be read, or `onnxruntime` isn't installed; when called, if the
            network doesn't take the patch or doesn't return logits of the four classes.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; export a network first, or correct --checkpoints")
        self.path = path
        suffix = Path(path).suffix.lower()
        self.always_float32 = suffix == ".onnx"
        try:
            self.run = LOADERS[suffix](path, device)
        except InputError:
            raise
        except Exception as error:  # the kind depends on where the file is damaged
            kind = {".ts": "TorchScript", ".onnx": "ONNX"}[suffix]
            raise InputError(f"{path}: can't be read as {kind} ({_reason(error)}); copy or export it again") from error

    def __call__(self, patch: torch.Tensor) -> torch.Tensor:
        batch, channels, *size = patch.shape
        given = f"{batch} of {channels} channels and {' x '.join(map(str, size))} voxels"
        try:
            logits = self.run(patch)
        except Exception as error:  # each runtime has its own kinds
            if ran_out_of_memory(error):  # not the network's fault
                raise
            if "Failed to allocate memory" in str(error):  # ONNX Runtime has no error class for it
                raise MemoryError(_reason(error)) from error
            raise InputError(
                f"{self.path}: doesn't take {given} ({_reason(error)}); export a network that takes T1 and T2 of any "
                f"size, or set --window_size to the size that this one takes"
            ) from error
        expected = (batch, 1 + len(Tissue), *size)
        shape = tuple(getattr(logits, "shape", ()))
        if shape != expected:
            raise InputError(
                f"{self.path}: returns {shape or type(logits).__name__} for {given}, not {expected}; export a network "
                f"that returns logits of background, {', '.join(tissue.name for tissue in Tissue)}"
            )
        return logits
