"Non-monotone and Wolfe searches against definitions and a small numpy reference."
import numpy as np
import pytest
import torch
from torch import nn

from curvlab import Objective, optim
from curvlab.optim import SGD, Adam, Armijo, NonMonotone, Wolfe
from curvlab.optim.line_searches import cubic_minimum, wolfe

DIRECTIONS = ["SGD", "Adam", "AMSGrad", "AdaGrad", "SignDescent", "KFAC", "Shampoo", "AdaHessian"]


def task(seed=0):
    "A small classification problem that the net can fit."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(24, 6, dtype=torch.double), torch.randint(0, 3, (24,))
    return model, Objective(model, nn.CrossEntropyLoss()), x, y


def ponos(x, y, index, c=0.5, beta=0.5, xi=1.0, polyak=0.1, max_step=10.0, min_step=1e-6, reset=True, f_star=0.0):
    "PoNoS for logistic regression in numpy, written from the algorithm: iterates, steps, backtracks, evaluations."
    f = lambda w, i: np.mean(np.logaddexp(0, x[i] @ w) - y[i] * (x[i] @ w))
    w, C, Q, shrink, path, steps, tries = np.zeros(x.shape[1]), 0.0, 0.0, 0, [], [], []
    for i in index:
        g, value = x[i].T @ (1 / (1 + np.exp(-(x[i] @ w))) - y[i]) / len(i), f(w, i)
        Q_next = xi * Q + 1
        C = (xi * Q * C + value) / Q_next
        Q, R = Q_next, max(C, value)
        eta, b = max(min(beta**shrink * (value - f_star) / (polyak * g @ g), max_step), min_step), 0
        while f(w - eta * g, i) > R - c * eta * (g @ g):
            eta, b = eta * beta, b + 1
        shrink = max(shrink + b - 1, 0) if reset else 0
        w = w - eta * g
        path.append(w), steps.append(eta), tries.append(b)
    return np.array(path), steps, tries


@pytest.mark.parametrize("options", [{}, {"xi": 0.5, "c": 0.3}, {"xi": 0.0, "beta": 0.8}, {"reset": False}, {"max_step": 0.7, "polyak": 0.2}, {"f_star": 0.05}], ids=str)
def test_non_monotone_equals_the_numpy_reference(options):
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(120, 7, dtype=torch.double, generator=generator)
    y = (x @ torch.randn(7, 1, dtype=torch.double, generator=generator) + 2 * torch.randn(120, 1, dtype=torch.double, generator=generator) > 0).double()
    model = nn.Linear(7, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    index = [torch.randperm(120, generator=generator)[:20] for _ in range(40)]
    optimizer, objective, path, steps, tries = SGD(model, step_rule=NonMonotone(**options)), Objective(model, nn.BCEWithLogitsLoss()), [], [], []
    for i in index:
        optimizer.step(objective.at(x[i], y[i]))
        state = optimizer.param_groups[0]["step_rule"]
        path.append(model.weight.detach().numpy().ravel().copy()), steps.append(state["step"]), tries.append(state["backtracks"])
    expected, expected_steps, expected_tries = ponos(x.numpy(), y.numpy().ravel(), [i.numpy() for i in index], **options)
    np.testing.assert_allclose(path, expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(steps, expected_steps, rtol=1e-8)
    assert tries == expected_tries and len(set(tries)) > 1
    assert state["evaluations"] == sum(tries) + 40 and objective.cost.evaluations == sum(tries) + 80


@pytest.mark.parametrize("name", DIRECTIONS)
def test_non_monotone_trains_along_every_direction(name):
    model, objective, x, y = task()
    optimizer = getattr(optim, name)(model, step_rule=NonMonotone(xi=0.5))
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    losses = [float(optimizer.step(objective.at(x, y))) for _ in range(40)]
    state = optimizer.param_groups[0]["step_rule"]
    assert min(losses) < 0.5 * losses[0] and objective.cost.evaluations == 40 + state["evaluations"]


@pytest.mark.parametrize("name", DIRECTIONS)
def test_wolfe_conditions_hold_along_every_direction(name):
    model, objective, x, y = task()
    optimizer = getattr(optim, name)(model, step_rule=Wolfe(c2=0.5), momentum=0.0, **({"kl_clip": None} if name == "KFAC" else {}))
    params = list(model.parameters())
    for _ in range(10):
        before, closure = [p.detach().clone() for p in params], objective.at(x, y)
        loss = optimizer.step(closure)
        grads, step = [p.grad.clone() for p in params], optimizer.param_groups[0]["step_rule"]["step"]
        move = [p.detach() - b for p, b in zip(params, before)]
        after = objective.at(x, y)()
        slope, there = (sum((g * m).sum() for g, m in zip(gs, move)) for gs in (grads, [p.grad for p in params]))
        assert slope < 0 and after <= loss + 1e-4 * slope + 1e-14 and there.abs() <= 0.5 * slope.abs() + 1e-12 and there - slope > 0
        assert step != 0
    assert optimizer.param_groups[0]["step_rule"]["failures"] == 0


class Turned(SGD):
    "A random direction, turned round on demand."

    sign = 1.0

    def direction(self, group, params, grads):
        generator = torch.Generator().manual_seed(group["steps"])
        return [self.sign * torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in grads]


def test_a_negative_step_is_the_positive_one_along_minus_d():
    ends, signs = [], []
    for sign in (1.0, -1.0):
        model, objective, x, y = task(3)
        optimizer = Turned(model, step_rule=Wolfe())
        optimizer.sign = sign
        steps = []
        for _ in range(12):
            optimizer.step(objective.at(x, y))
            steps.append(optimizer.param_groups[0]["step_rule"]["step"])
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()])), signs.append(steps)
    assert torch.equal(*ends) and signs[0] == [-t for t in signs[1]] and min(signs[0]) < 0 < max(signs[0])


def test_positive_only_search_stays_where_it_is_on_ascent():
    model, objective, x, y = task(3)
    optimizer = Turned(model, step_rule=Wolfe(negative=False))
    moved = 0
    for _ in range(12):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer.step(objective.at(x, y))
        moved += not torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))
    state = optimizer.param_groups[0]["step_rule"]
    assert 0 < moved < 12 and state["failures"] == 12 - moved and state["backward"] == 0


def test_search_leaves_gradients_and_counts():
    model, objective, x, y = task()
    optimizer = SGD(model, lr=50.0, step_rule=Wolfe(normalise_first=False))
    closure = objective.at(x, y)
    closure()
    expected = [p.grad.clone() for p in model.parameters()]
    optimizer.step(closure)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected))
    assert objective.cost.evaluations == 2 + optimizer.param_groups[0]["step_rule"]["evaluations"]


def test_wolfe_meets_a_wall_of_nan():
    "A loss that does not exist beyond a point: -log(1 - t) has its minimum at 0.5 with the linear term."
    phi = lambda t: (float("nan"), float("nan")) if t >= 1 else (-np.log(1 - t) - 2 * t, 1 / (1 - t) - 2)
    t, trials, ok = wolfe(phi, *phi(0.0), t=64.0, c2=0.01)
    assert ok and abs(t - 0.5) < 0.01 and trials > 5
    t, trials, ok = wolfe(lambda t: (float("inf"), float("nan")), 1.0, -1.0, max_trials=10)
    assert not ok and t == 0 and trials == 10


def test_cubic_minimum_is_exact_for_cubics():
    cubic = np.polynomial.Polynomial([0.3, -1.0, 0.2, 0.4])
    root = max(cubic.deriv().roots().real)
    for a, b in ((0.0, 1.5), (1.5, 0.0)):
        assert abs(cubic_minimum(a, cubic(a), cubic.deriv()(a), b, cubic(b), cubic.deriv()(b)) - root) < 1e-12


@pytest.mark.parametrize("rule, bad", [(NonMonotone, b) for b in (dict(c=0.0), dict(beta=1.0), dict(xi=1.5), dict(polyak=0.0), dict(min_step=20.0), dict(max_trials=0), dict(least_norm=-1.0))]
                         + [(Wolfe, b) for b in (dict(c1=0.0), dict(c2=1.0), dict(c2=1e-5), dict(max_trials=0))], ids=str)
def test_bad_arguments_are_named(rule, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        rule(**bad)


@pytest.mark.parametrize("rule", [lambda: NonMonotone(xi=0.7), Wolfe])
def test_resume_is_exact(rule, tmp_path):
    (model, objective, x, y), (other, objective2, *_) = task(), task()
    optimizer, resumed = Adam(model, step_rule=rule()), Adam(other, step_rule=rule())
    for _ in range(6):
        optimizer.step(objective.at(x, y))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "s.pt")
    weights, state = torch.load(tmp_path / "s.pt", weights_only=True)
    other.load_state_dict(weights), resumed.load_state_dict(state)
    for _ in range(6):
        optimizer.step(objective.at(x, y)), resumed.step(objective2.at(x, y))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_a_group_that_stands_still_may_come_first():
    model, objective, x, y = task()
    still = list(model[0].parameters())
    optimizer = SGD(model, groups=[{"params": still, "lr": 0.0}], step_rule=Armijo())
    before, last = [p.detach().clone() for p in still], model[2].weight.detach().clone()
    optimizer.step(objective.at(x, y))
    assert all(torch.equal(p, b) for p, b in zip(still, before)) and not torch.equal(model[2].weight, last)
