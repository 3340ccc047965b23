"Every step rule works along every direction, and counts what it evaluates."
import pytest
import torch
from torch import nn

from curvlab import Objective, optim
from curvlab.optim import Armijo, Polyak

DIRECTIONS = ["SGD", "Adam", "AMSGrad", "AdaGrad", "SignDescent", "KFAC", "Shampoo", "AdaHessian"]


def task():
    "A small classification problem that the net can fit: interpolation, where both rules are at home."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(24, 6, dtype=torch.double), torch.randint(0, 3, (24,))
    return model, Objective(model, nn.CrossEntropyLoss()), x, y


@pytest.mark.parametrize("name", DIRECTIONS)
def test_armijo_decreases_the_batch_loss_in_every_step(name):
    model, objective, x, y = task()
    optimizer = getattr(optim, name)(model, step_rule=Armijo(c=0.1, init=1.0))
    for group in optimizer.param_groups:
        group["momentum"] = 0.0                       # the search promises a decrease along the direction, not along a velocity
    losses = [float(optimizer.step(objective.at(x, y))) for _ in range(40)]
    rule = optimizer.param_groups[0]["step_rule"]
    failed = rule.get("failures", 0)
    assert sum(b > a for a, b in zip(losses, losses[1:])) <= failed
    assert losses[-1] < 0.5 * losses[0]
    assert rule["evaluations"] >= 40 - failed
    assert objective.cost.evaluations == 40 + rule["evaluations"]


@pytest.mark.parametrize("name", DIRECTIONS)
def test_polyak_steps_train_without_a_search(name):
    model, objective, x, y = task()
    optimizer = getattr(optim, name)(model, step_rule=Polyak(c=1.0, max_step=10.0))
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    losses = [float(optimizer.step(objective.at(x, y))) for _ in range(40)]
    assert min(losses) < 0.5 * losses[0]
    assert objective.cost.evaluations == 40           # no search: one evaluation a step


@pytest.mark.parametrize("name", ["SGD", "KFAC", "Shampoo"])
def test_the_learning_rate_plays_no_part_in_a_polyak_step(name):
    moved = []
    for lr in (1e-3, 7.0):
        model, objective, x, y = task()
        options = {"kl_clip": None} if name == "KFAC" else {}
        optimizer = getattr(optim, name)(model, lr=lr, momentum=0.0, step_rule=Polyak(max_step=10.0), **options)
        for _ in range(3):
            optimizer.step(objective.at(x, y))
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*moved)
