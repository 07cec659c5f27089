"""The optimiser of training: Muon for convolutions, AdamW for all else."""

from collections.abc import Callable
from typing import Any

import torch

# coefficients of the quintic iteration, and how often it is applied, as published
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# root mean square of AdamW's steps, as a share of the learning rate
STEP_SIZE = 0.2


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix of the same singular vectors whose singular values are all near 1 (0.7 to 1.2), by Newton-Schulz.

    Shapes: (rows, columns) -> (rows, columns).
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    a, b, c = NEWTON_SCHULZ
    result = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = result @ result.T
        result = a * result + (b * square + c * square @ square) @ result
    return result if wide is matrix else result.T


class MuonAdamW(torch.optim.Optimizer):
    """Muon for weights of convolutions, as matrices of their first axis by the others, and AdamW for vectors.

    torch.optim.Muon takes nothing but matrices. A step of a matrix has about the size that it has by AdamW, so one
    learning rate serves both.

    Sources: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the size of steps:
    J. Liu et al., "Muon is scalable for LLM training" (2025).

    Args:
        params: what is trained, or groups of it, as of any optimiser of torch.
        lr: learning rate.
        betas: of AdamW; the first one is the momentum of matrices too, so that a schedule moves both.
        weight_decay: decoupled weight decay of both.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 1e-2
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        vectors = [{"params": [each for each in group["params"] if each.ndim < 2]} for group in self.param_groups]
        self._adamw = torch.optim.AdamW(vectors)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update once, by the gradients that are there or that `closure` makes; returns what that returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, vectors in zip(self.param_groups, self._adamw.param_groups, strict=True):
            vectors.update({name: group[name] for name in ("lr", "betas", "weight_decay")})
            for parameter in group["params"]:
                if parameter.ndim > 1 and parameter.grad is not None:
                    self._orthogonal_step(parameter, **group)
        self._adamw.state = self.state  # one, so that it is saved and loaded whole
        self._adamw.step()
        return loss

    def _orthogonal_step(
        self, weight: torch.Tensor, lr: float, betas: tuple[float, float], weight_decay: float, **_: Any
    ) -> None:
        momentum, state = betas[0], self.state[weight]
        if not state:
            state["average"] = torch.zeros_like(weight)
        state["average"].lerp_(weight.grad, 1 - momentum)
        ahead = weight.grad.lerp(state["average"], momentum)  # Nesterov's momentum
        step = orthogonalised(ahead.flatten(1))
        weight.mul_(1 - lr * weight_decay)
        weight.add_(step.reshape(weight.shape), alpha=-lr * STEP_SIZE * max(step.shape) ** 0.5)
