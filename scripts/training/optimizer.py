"""The optimiser of training: Muon for the weights of convolutions, AdamW for batch norms and biases."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

# coefficients and number of the quintic iterations, as published
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# root mean square of AdamW's steps, as a share of the learning rate
STEP_SIZE = 0.2


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix with the same singular vectors and singular values near 1, by Newton-Schulz iteration.

    Singular values above a hundredth of the matrix's norm become 0.6 to 1.2; far smaller ones stay small.

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
    """Muon for parameters with two or more axes, as matrices of the first axis by the others; AdamW for vectors.

    So Muon updates the weights of convolutions, and AdamW updates batch norms and biases. torch.optim.Muon takes only
    matrices. Steps of a matrix are about as large as with AdamW, so one learning rate serves both.

    Sources: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the size of steps:
    J. Liu et al., "Muon is scalable for LLM training" (2025).

    Args:
        params: parameters or groups of them, as for any optimiser of torch.
        lr: learning rate.
        betas: of AdamW; the first is also the momentum of matrices, so that a schedule changes both.
        weight_decay: decoupled weight decay of both.

    Raises:
        ValueError: one of them is out of range.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 1e-2
    ) -> None:
        if not 0 <= lr < math.inf or not 0 <= weight_decay < math.inf or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr {lr}, betas {betas}, weight_decay {weight_decay}: must be 0 or above, betas below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update once, with the present gradients or those that `closure` computes; return its result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for matrix in (parameter for parameter in trained if parameter.ndim > 1):
                self._step_of_matrix(matrix, **group)
            self._step_of_vectors([parameter for parameter in trained if parameter.ndim < 2], **group)
        return loss

    def _step_of_matrix(
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

    def _step_of_vectors(
        self, vectors: list[torch.Tensor], lr: float, betas: tuple[float, float], weight_decay: float, **_: Any
    ) -> None:
        for vector in vectors:
            if not self.state[vector]:
                zeros = {name: torch.zeros_like(vector) for name in ("average", "average_of_squares")}
                self.state[vector] |= {"step": torch.tensor(0.0)} | zeros
        states = [self.state[vector] for vector in vectors]
        averages, squares, steps = ([s[name] for s in states] for name in ("average", "average_of_squares", "step"))
        adamw(
            vectors, [vector.grad for vector in vectors], averages, squares, [], steps, amsgrad=False, beta1=betas[0],
            beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=1e-8, maximize=False,
        )  # fmt: skip
