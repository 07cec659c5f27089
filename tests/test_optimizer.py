import copy

import pytest
import torch
from torch import nn

from scripts.optimizer import MuonAdamW, orthogonalised


def network():
    """A convolution and a batch norm, with gradients."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8))
    made(torch.randn(2, 3, 6, 6, 6)).square().sum().backward()
    return made


@pytest.mark.parametrize("shape", [(8, 81), (32, 864), (112, 40), (4, 4)])
def test_singular_values_near_one_of_the_same_singular_vectors(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[1]))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ orthogonalised(matrix) @ right.T
    large = values > 0.05 * values[0]
    assert turned.diagonal()[large].min() > 0.6
    assert turned.diagonal().max() < 1.3
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-3


def test_gradient_of_nothing_moves_nothing():
    assert orthogonalised(torch.zeros(3, 5)).tolist() == torch.zeros(3, 5).tolist()


def test_vectors_move_as_by_adamw_and_gradients_stay():
    ours, theirs = network(), network()
    for optimizer in (MuonAdamW(ours.parameters(), lr=0.01), torch.optim.AdamW(theirs.parameters(), lr=0.01)):
        optimizer.step()
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name))
    assert not torch.equal(ours[0].weight, theirs[0].weight)
    assert torch.equal(ours[0].weight.grad, theirs[0].weight.grad)


def test_a_step_of_a_convolution_is_orthogonal_and_as_large_as_one_of_adamw():
    made = network()
    before = made[0].weight.detach().clone()
    gradient = torch.randn(8, 81) * torch.logspace(0, -2, 8)[:, None]
    made[0].weight.grad = gradient.reshape(before.shape)
    MuonAdamW(made.parameters(), lr=0.01, weight_decay=0).step()
    moved = (made[0].weight.detach() - before).flatten(1)
    # AdamW's steps have a root mean square of about 0.2 times the learning rate
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.25)
    spread = [values.max() / values.min() for values in map(torch.linalg.svdvals, (moved, gradient))]
    assert spread[0] < 1.8
    assert spread[1] > 30


def test_weights_decay():
    made = network()
    before = made[0].weight.detach().clone()
    made.zero_grad()
    made[0].weight.grad = torch.zeros_like(made[0].weight)
    MuonAdamW(made.parameters(), lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(made[0].weight, 0.95 * before)


def test_layer_without_a_gradient_stays():
    made = network()
    made[0].weight.grad = None
    before = made[0].weight.detach().clone()
    MuonAdamW(made.parameters(), lr=0.1).step()
    assert torch.equal(made[0].weight, before)


def test_gradients_of_a_closure():
    made = network()
    optimizer = MuonAdamW(made.parameters(), lr=0.01)
    image = torch.randn(2, 3, 6, 6, 6)

    def closure():
        optimizer.zero_grad()
        loss = (made(image) - 1).square().mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


def test_goes_on_from_a_saved_state(tmp_path):
    made = network()
    optimizer = MuonAdamW(made.parameters(), lr=0.01)
    optimizer.step()
    torch.save({"network": made.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    gradients = [parameter.grad for parameter in made.parameters()]
    optimizer.step()

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = network()
    other.load_state_dict(state["network"])
    again = MuonAdamW(other.parameters(), lr=0.5)
    again.load_state_dict(copy.deepcopy(state["optimizer"]))
    for parameter, gradient in zip(other.parameters(), gradients, strict=True):
        parameter.grad = gradient
    again.step()
    for ours, theirs in zip(made.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
