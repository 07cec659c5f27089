"""`python -m scripts mix_weights`: a network between two others, by a weighted mean of their weights."""

from pathlib import Path

import torch

from scripts.errors import InputError, require_share
from scripts.files import whole_files
from scripts.weights import read_checkpoint, unwrapped


def mix_weights(first: str, second: str, share: float, output: str) -> None:
    """Write the weighted mean of two checkpoints of one network, one trained from the other.

    Such a mean keeps most of what the second training brought and loses less of what the first had.

    Args:
        first, second: the checkpoints.
        share: of the second, from 0 to 1.
        output: the file to write.

    Raises:
        InputError: `share` isn't from 0 to 1, a file can't be read, the two have other tensors, or `output` exists.
    """
    require_share(share=share)
    if Path(output).exists():
        raise InputError(f"{output}: already exists; choose another --output")
    states = []
    for path in (first, second):
        if not Path(path).is_file():
            raise InputError(f"{path}: no such checkpoint; train first, or name another")
        states.append(unwrapped(read_checkpoint(path)))
    one, other = ({name: getattr(tensor, "shape", None) for name, tensor in state.items()} for state in states)
    if one != other or not one or None in one.values():
        raise InputError(f"{second}: has other tensors than {first}; give two checkpoints of one network")
    mixed = {
        name: torch.lerp(states[0][name].double(), tensor.double(), share).to(tensor.dtype)
        for name, tensor in states[1].items()
    }
    with whole_files(Path(output).parent) as temporary:
        torch.save(mixed, temporary / Path(output).name)
    print(f"{share:.0%} of {second} and {1 - share:.0%} of {first}, in {output}")
