"""Exported networks (TorchScript, ONNX) in the place of a checkpoint; docs/exporting.md says how to make them."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from scripts.errors import InputError, ran_out_of_memory
from scripts.tissues import Tissue

logger = logging.getLogger(__name__)

# as tested; also in requirements/dev.txt
ONNXRUNTIME = "onnxruntime==1.32.0"

Run = Callable[[torch.Tensor], torch.Tensor]


def is_exported(path: str) -> bool:
    """Whether a file is, by its name, an exported network and not a checkpoint."""
    return Path(path).suffix.lower() in LOADERS


def _torchscript(path: str, device: torch.device) -> Run:
    logger.info("%s: by TorchScript", path)
    return torch.jit.load(path, map_location=device).eval()


def _onnx(path: str, device: torch.device) -> Run:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"{path}: needs ONNX Runtime; pip install {ONNXRUNTIME}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    logger.info("%s: in float32 by ONNX Runtime (%s)", path, session.get_providers()[0])
    name = session.get_inputs()[0].name

    def run(patch: torch.Tensor) -> torch.Tensor:
        logits = session.run(None, {name: patch.float().contiguous().cpu().numpy()})[0]
        return torch.from_numpy(logits).to(patch.device)

    return run


LOADERS = {".ts": _torchscript, ".onnx": _onnx}


def _reason(error: Exception) -> str:
    """The first sentence of what went wrong, in one line; TorchScript says it after its traceback."""
    return " ".join(str(error).rsplit("Error: ", 1)[-1].split()).split(". ")[0]


class ExportedNetwork:
    """A network in a file, called like a module: float32 (B, 2, X, Y, Z) -> logits (B, 4, X, Y, Z).

    TorchScript computes under autocast as a module does. ONNX is computed by ONNX Runtime in float32, on a GPU where
    the patch lies on one and the package installed can use it, else on the CPU. Neither is changed or copied.

    Args:
        path: `.ts` or `.onnx`. The first is a program, of which loading may run parts: only from whom you trust.
        device: where the patches will lie.

    Raises:
        InputError: the file isn't there or can't be read, or `onnxruntime` isn't installed; when called, if the network
            can't take such a patch or gives something else than logits of the four classes.
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
        except Exception as error:  # what is raised for a damaged file depends on where the damage is
            kind = {".ts": "TorchScript", ".onnx": "ONNX"}[suffix]
            raise InputError(f"{path}: can't be read as {kind} ({_reason(error)}); copy or export it again") from error

    def __call__(self, patch: torch.Tensor) -> torch.Tensor:
        batch, channels, *size = patch.shape
        given = f"{batch} of {channels} channels and {' x '.join(map(str, size))} voxels"
        try:
            logits = self.run(patch)
        except Exception as error:  # each kind has its own
            if ran_out_of_memory(error):  # no fault of the network
                raise
            if "Failed to allocate memory" in str(error):  # as ONNX Runtime says it, by an error of no kind of its own
                raise MemoryError(_reason(error)) from error
            raise InputError(
                f"{self.path}: can't be given {given} ({_reason(error)}); export a network that takes T1 and T2 of any "
                f"size, or set --window_size to the size that this one takes"
            ) from error
        expected = (batch, 1 + len(Tissue), *size)
        shape = tuple(getattr(logits, "shape", ()))
        if shape != expected:
            raise InputError(
                f"{self.path}: makes {shape or type(logits).__name__} of {given}, not {expected}; export a network "
                f"that gives logits of background, {', '.join(tissue.name for tissue in Tissue)}"
            )
        return logits
