import copy

import pytest
import torch
from torch import nn

from scripts.training.optimizer import MuonAdamW, orthogonalised


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
    assert turned.diagonal().max() < 1.2
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-3


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"lr": float("nan")}, {"betas": (1.0, 0.9)}, {"weight_decay": -0.1}]
)
def test_what_would_lead_away_from_the_minimum_is_refused(settings):
    with pytest.raises(ValueError, match="must be 0 or above"):
        MuonAdamW(network().parameters(), **settings)


def test_gradient_of_nothing_moves_nothing():
    assert orthogonalised(torch.zeros(3, 5)).tolist() == torch.zeros(3, 5).tolist()


def two_groups(parameters):
    first, *others = parameters
    return [{"params": [first], "lr": 0.03, "weight_decay": 0.4}, {"params": others, "lr": 0.01, "betas": (0.8, 0.99)}]


def steps_under_a_schedule(make, parameters, gradients):
    """Take a step by each of the gradients, while OneCycleLR changes the learning rate and the momentum."""
    optimizer = make(two_groups(parameters))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.03, 0.01], total_steps=len(gradients) + 1)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.reshape(parameter.shape)
        optimizer.step()
        schedule.step()


def test_vectors_move_as_by_adamw():
    torch.manual_seed(0)
    gradients = torch.randn(6, 3, 5)
    ours, theirs = ([torch.ones(5) for _ in range(3)] for _ in range(2))
    steps_under_a_schedule(MuonAdamW, ours, gradients)
    steps_under_a_schedule(torch.optim.AdamW, theirs, gradients)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert not torch.equal(mine, torch.ones(5))


def test_convolutions_move_as_matrices_by_the_muon_of_torch():
    """Which orthogonalises in bfloat16, so the steps are alike to two digits; its momentum has no schedule."""
    torch.manual_seed(0)
    gradients = torch.randn(6, 3, 4, 54) * torch.logspace(0, -1, 4)[:, None]
    # momentum and Nesterov's look ahead show where the gradients differ from step to step
    start = torch.randn(3, 4, 54)
    ours = [weight.reshape(4, 2, 3, 3, 3).clone() for weight in start]
    theirs = [weight.clone() for weight in start]
    muon = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, momentum=0.85, adjust_lr_fn="match_rms_adamw")
    optimizer = MuonAdamW([{"params": ours[:1]}, {"params": ours[1:]}], lr=0.02, betas=(0.85, 0.9), weight_decay=0.3)
    for step in gradients:
        for weight, matrix, gradient in zip(ours, theirs, step, strict=True):
            weight.grad, matrix.grad = gradient.reshape(weight.shape), gradient.clone()
        optimizer.step()
        muon.step()
    for weight, matrix, before in zip(ours, theirs, start, strict=True):
        moved = matrix - before
        assert (weight.flatten(1) - matrix).norm() < 0.02 * moved.norm()


def test_a_schedule_moves_the_momentum_and_the_rate_of_convolutions():
    torch.manual_seed(0)
    gradients = torch.randn(5, 2, 4, 6)
    weights = [torch.zeros(4, 6) for _ in range(2)]
    steps_under_a_schedule(MuonAdamW, weights, gradients)
    by_hand = [torch.zeros(4, 6) for _ in range(2)]
    for number, (weight, highest, decay) in enumerate(zip(by_hand, (0.03, 0.01), (0.4, 0.01), strict=True)):
        model = torch.optim.SGD([torch.zeros(1)], lr=highest, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(model, max_lr=highest, total_steps=6)
        average = torch.zeros(4, 6)
        for gradient in gradients[:, number]:
            rate, momentum = (model.param_groups[0][name] for name in ("lr", "momentum"))
            average = momentum * average + (1 - momentum) * gradient
            step = orthogonalised(momentum * average + (1 - momentum) * gradient)
            weight.copy_((1 - rate * decay) * weight - rate * 0.2 * 6**0.5 * step)
            model.step()
            schedule.step()
    for weight, expected in zip(weights, by_hand, strict=True):
        assert torch.allclose(weight, expected, atol=1e-6)


def test_copy_and_further_parameters_are_trained():
    weight, vector = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = copy.deepcopy(MuonAdamW([weight]))
    optimizer.add_param_group({"params": [vector]})
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((parameter < 1).all() for parameter in trained)


def test_a_step_of_a_convolution_is_orthogonal_and_as_large_as_one_of_adamw():
    made = network()
    before = made[0].weight.detach().clone()
    gradient = torch.randn(8, 81) * torch.logspace(0, -2, 8)[:, None]
    made[0].weight.grad = gradient.reshape(before.shape)
    MuonAdamW(made.parameters(), lr=0.01, weight_decay=0).step()
    moved = (made[0].weight.detach() - before).flatten(1)
    # AdamW's steps have a root mean square of about 0.2 times the learning rate
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.25)
    assert (moved * gradient).sum() < 0
    spread = [values.max() / values.min() for values in map(torch.linalg.svdvals, (moved, gradient))]
    assert spread[0] < 1.8
    assert spread[1] > 30


def test_weights_decay():
    made = network()
    before = made[0].weight.detach().clone()
    made.zero_grad()
    made[0].weight.grad = torch.zeros_like(made[0].weight)
    MuonAdamW(made.parameters(), lr=0.1, weight_decay=0.3).step()
    assert torch.allclose(made[0].weight, 0.97 * before)


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
