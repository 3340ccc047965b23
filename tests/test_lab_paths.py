"""Paths between solutions: places, losses against a loop that copies weights into the model, and bends that find a way around."""
import pytest
import torch
from torch import nn

from curvlab import Objective
from curvlab.curvature import flat
from curvlab.lab.paths import Path, barrier, losses_at, optimise_path, path_losses, straight


def problem(loss=None, **options):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(20, 4, dtype=torch.double), torch.randint(3, (20,))
    return Objective(net, loss or nn.CrossEntropyLoss(), **options), x, y


def slow_losses(objective, path, x, y, points):
    "Copy the weights of each place into the model and evaluate."
    params, values = objective.params, []
    kept, pieces = [p.detach().clone() for p in params], len(path.nodes) - 1
    for j in range(points):
        t = j / (points - 1) * pieces
        i = min(int(t), pieces - 1)
        theta = (1 - (t - i)) * path.nodes[i] + (t - i) * path.nodes[i + 1]
        start = 0
        for p in params:
            p.data = theta[start : start + p.numel()].view_as(p)
            start += p.numel()
        values.append(objective.at(x, y)(backward=False))
    for p, k in zip(params, kept):
        p.data = k
    return torch.stack(values)


@pytest.mark.parametrize("loss, options", [(nn.CrossEntropyLoss(), {}), (nn.CrossEntropyLoss(reduction="sum"), {}), (nn.CrossEntropyLoss(reduction="sum"), {"average": "examples"})])
@pytest.mark.parametrize("points", [2, 23])
def test_losses_equal_those_of_a_loop(loss, options, points):
    objective, x, y = problem(loss, **options)
    n = flat(objective.params).numel()
    path = Path(torch.randn(4, n, dtype=torch.double))
    before = flat(objective.params).detach().clone()
    torch.testing.assert_close(path_losses(objective, path, x, y, points), slow_losses(objective, path, x, y, points), rtol=1e-12, atol=1e-12)
    assert torch.equal(flat(objective.params), before)


def test_classes_in_the_last_dimension():
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    x, y = torch.randn(5, 7, 4, dtype=torch.double), torch.randint(3, (5, 7))
    objective = Objective(net, nn.CrossEntropyLoss(), class_dim=-1)
    path = Path(torch.randn(2, 15, dtype=torch.double))
    torch.testing.assert_close(path_losses(objective, path, x, y, 5), slow_losses(objective, path, x, y, 5))


def test_gradient_in_the_weights_is_that_of_the_model():
    objective, x, y = problem()
    theta = flat(objective.params).detach()[None].requires_grad_()
    found, = torch.autograd.grad(losses_at(objective, theta, x, y).sum(), theta)
    wanted = torch.autograd.grad(objective.loss(objective.model(x), y), objective.params)
    torch.testing.assert_close(found[0], flat(wanted))


def test_barrier_counts_from_the_higher_end():
    assert barrier(torch.tensor([1.0, 3.0, 2.0])) == 1.0 and barrier(torch.tensor([2.0, 0.5, 1.0])) == 0.0


def test_straight_path_with_bends_is_the_line():
    torch.manual_seed(1)
    a, b, t = torch.randn(9), torch.randn(9), torch.rand(50)
    torch.testing.assert_close(straight(a, b, 3).at(t), straight(a, b).at(t))
    assert torch.equal(straight(a, b, 3).at(torch.tensor([0.0, 1.0])), torch.stack([a, b]))


def test_optimised_path_is_lower_and_keeps_ends_model_and_random_state():
    objective, x, y = problem()
    torch.manual_seed(5)
    a, b = torch.randn(2, flat(objective.params).numel(), dtype=torch.double)
    line, before, random = straight(a, b, 3), flat(objective.params).detach().clone(), torch.get_rng_state()
    run = lambda: optimise_path(objective, line, x, y, steps=60, lr=0.03, batch=10, generator=torch.Generator().manual_seed(0))
    found = run()
    assert torch.equal(found.nodes[[0, -1]], line.nodes[[0, -1]]) and torch.equal(flat(objective.params), before) and torch.equal(torch.get_rng_state(), random)
    assert torch.equal(run().nodes, found.nodes)
    assert path_losses(objective, found, x, y)[10:-10].mean() < 0.7 * path_losses(objective, line, x, y)[10:-10].mean()


def test_work_is_counted():
    objective, x, y = problem()
    line = straight(*torch.randn(2, flat(objective.params).numel(), dtype=torch.double), 1)
    path_losses(objective, line, x, y, 11)
    assert objective.cost.forward == 11 * 20
    optimise_path(objective, line, x, y, steps=2, places=3, batch=5)
    assert objective.cost.backward == 2 * 3 * 5


@pytest.mark.parametrize("call, message", [
    (lambda o, x, y: Path(torch.zeros(1, 5)), "at least two"),
    (lambda o, x, y: straight(torch.zeros(4), torch.zeros(5)), "one length"),
    (lambda o, x, y: straight(torch.zeros(4), torch.zeros(4), -1), "bends=-1"),
    (lambda o, x, y: losses_at(o, torch.zeros(2, 7), x, y), r"needs \(K, 51\)"),
    (lambda o, x, y: optimise_path(o, straight(torch.zeros(51), torch.ones(51)), x, y), "bends=3"),
    (lambda o, x, y: optimise_path(o, straight(torch.zeros(51), torch.ones(51), 1), x, y, steps=0), "steps=0"),
    (lambda o, x, y: optimise_path(o, straight(torch.zeros(51), torch.ones(51), 1), x, y, batch=0), "batch=0"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*problem())


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5)])
def test_a_loss_that_is_no_function_of_the_weights_is_refused(layer):
    net = nn.Sequential(layer, nn.Linear(4, 3))
    objective, x, y = Objective(net, nn.CrossEntropyLoss()), torch.randn(6, 4), torch.randint(3, (6,))
    weights = torch.randn(2, sum(p.numel() for p in net.parameters()))
    with pytest.raises(ValueError, match="in training mode"):
        losses_at(objective, weights, x, y)
    net.eval()
    assert losses_at(objective, weights, x, y).shape == (2,)
