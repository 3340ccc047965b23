"Subspace searches against dense references: naive evaluation, conjugate gradients, brute force."
import pytest
import torch
from torch import nn

from curvlab import Objective, optim
from curvlab.optim import SGD, Adam, PlaneSearch
from curvlab.optim.subspace import Composition, SubspaceSearch, minimise


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def network(seed=0, n=60, d=12, h=5, classes=3):
    X, y = random(n, d, seed=seed), torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))
    W, V = random(d, h, seed=seed + 1) / d**0.5, random(h, classes, seed=seed + 2) / h**0.5
    return X, y, W, V, Composition(X, W.clone(), [V.clone()], lambda A, V: nn.functional.cross_entropy(torch.tanh(A) @ V, y))


def loss_of(X, y, W, V):
    return nn.functional.cross_entropy(torch.tanh(X @ W) @ V, y)


@pytest.mark.parametrize("search", ["line", "plane", "layers"])
@pytest.mark.parametrize("base", ["gradient", "adam", "lbfgs"])
def test_two_products_an_iteration_and_never_a_rise(base, search):
    X, y, _, _, model = network()
    optimizer, values = SubspaceSearch(model, base=base, search=search, refresh_every=1000), []
    for _ in range(25):
        values.append(float(optimizer.step()))
        assert abs(float(loss_of(X, y, *model.weights)) - float(model.g(model.A, model.weights[1]))) < 1e-12
    assert all(b <= a for a, b in zip(values, values[1:])) and values[-1] < 0.5 * values[0]
    assert model.products == 51 and (model.A - X @ model.weights[0]).abs().max() < 1e-11
    expected = {"line": 1, "plane": 2, "layers": 4}[search]
    assert len(optimizer.coefficients) == expected and optimizer.trials > 25


def test_fixed_rates_are_heavy_ball():
    X, y, W, V, model = network()
    optimizer = SubspaceSearch(model, rates=(0.3, 0.8))
    weights, previous = [W.clone(), V.clone()], [torch.zeros_like(W), torch.zeros_like(V)]
    for _ in range(20):
        grads = torch.func.grad(lambda ws: loss_of(X, y, *ws))(weights)
        previous = [0.8 * s - 0.3 * g for s, g in zip(previous, grads)]
        weights = [w + s for w, s in zip(weights, previous)]
        optimizer.step()
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(model.weights, weights)) and model.products == 41


@pytest.mark.parametrize("search", ["line", "plane", "layers"])
def test_coefficients_are_stationary(search):
    X, y, _, _, model = network(seed=4)
    optimizer = SubspaceSearch(model, search=search, tol=1e-10)
    for k in range(4):
        before = [w.clone() for w in model.weights]
        previous = optimizer.previous
        grads = torch.func.grad(lambda ws: loss_of(X, y, *ws))(before)
        optimizer.step()
        after = torch.func.grad(lambda ws: loss_of(X, y, *ws))(model.weights)
        tied = search != "layers"
        for d in [grads] + ([previous[0]] if previous is not None and search != "line" else []):
            slopes = [(a * u).sum() for a, u in zip(after, d)]
            for slope in [sum(slopes)] if tied else slopes:
                assert abs(slope) < 1e-7 * sum(u.square().sum() for u in d).sqrt(), (search, k)


def test_adam_directions_are_the_optimizers():
    X, y, W, V, model = network(seed=2)
    module = nn.Sequential(nn.Linear(12, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
    with torch.no_grad():
        module[0].weight.copy_(W.T), module[2].weight.copy_(V.T)
    adam, ours, objective = Adam(module, lr=0.05), SubspaceSearch(model, base="adam", search="line", rates=(0.05, 0.0)), Objective(module, nn.CrossEntropyLoss())
    for _ in range(8):
        adam.step(objective.at(X, y)), ours.step()
    assert torch.allclose(module[0].weight.T, model.weights[0], rtol=1e-8)


def quadratic(seed=0, n=50, d=20):
    X, y = random(n, d, seed=seed) * torch.logspace(0, 1, d, dtype=torch.double), random(n, 1, seed=seed + 1)
    return X, y


def conjugate_gradients(Q, b, steps):
    x, r = torch.zeros_like(b), b.clone()
    p, path = r.clone(), []
    for _ in range(steps):
        alpha = (r * r).sum() / (p * (Q @ p)).sum()
        x, new = x + alpha * p, r - alpha * Q @ p
        p, r = new + (new * new).sum() / (r * r).sum() * p, new
        path.append(x)
    return path


def test_both_plane_searches_are_conjugate_gradients():
    X, y = quadratic()
    path = conjugate_gradients(X.T @ X / len(y), X.T @ y / len(y), 12)
    model = Composition(X, torch.zeros(20, 1).double(), [], lambda A: 0.5 * (A - y).square().mean())
    fast, net = SubspaceSearch(model), nn.Linear(20, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    rule, objective = SGD(net, step_rule=PlaneSearch()), Objective(net, nn.MSELoss())
    for x in path:
        fast.step(), rule.step(objective.at(X, y))
        for w in (model.weights[0], net.weight.detach().T):
            assert (w - x).norm() < 1e-7 * x.norm()


def test_the_rule_counts_decay_and_leaves_the_gradient():
    X, y, W, V, _ = network(seed=3)
    net = nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer, objective = SGD(net, weight_decay=0.1, step_rule=PlaneSearch(tol=1e-10)), Objective(net, nn.CrossEntropyLoss())
    penalised = lambda: float(objective.at(X, y)(backward=False) + 0.05 * sum(p.detach().square().sum() for p in net.parameters()))
    for k in range(5):
        before, closure = penalised(), objective.at(X, y)
        previous = [optimizer.state[p].get("previous") for p in net.parameters()]
        previous = None if previous[0] is None else [u.clone() for u in previous]
        closure()
        first = [p.grad.clone() for p in net.parameters()]
        descent = [g + 0.1 * p.detach() for g, p in zip(first, net.parameters())]
        optimizer.step(closure)
        assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), first)) and penalised() < before
        objective.at(X, y)()
        after = [p.grad + 0.1 * p.detach() for p in net.parameters()]
        for d in [descent] + ([previous] if previous else []):
            assert abs(sum((a * u).sum() for a, u in zip(after, d))) < 1e-8
    assert optimizer.param_groups[0]["step_rule"]["products"] > optimizer.param_groups[0]["step_rule"]["evaluations"]


def test_minimise_is_exact_on_quadratics_and_never_worse():
    B, b = random(4, 4), random(4, seed=1)
    B = B @ B.T + torch.eye(4)
    c, value, trials = minimise(lambda c: (0.5 * c @ B @ c - b @ c, B @ c - b, B), torch.zeros(4).double())
    assert torch.allclose(c, torch.linalg.solve(B, b)) and trials <= 3
    wild = lambda c: (torch.sin(5 * c).sum() + 0.1 * c.square().sum(), 5 * torch.cos(5 * c) + 0.2 * c, torch.diag(-25 * torch.sin(5 * c) + 0.2))
    for seed in range(20):
        start = 3 * random(3, seed=seed)
        c, value, trials = minimise(wild, start, max_trials=60)
        assert value <= wild(start)[0] and trials <= 60 and wild(c)[1].norm() < 1e-6
    infinite = lambda c: (torch.where(c[0] > 0.5, torch.inf, (c[0] - 1) ** 2), torch.stack([2 * (c[0] - 1)]), torch.full((1, 1), 2.0).double())
    c, value, _ = minimise(infinite, torch.zeros(1).double())
    assert 0 < c <= 0.5 and value < 1


def test_refresh_removes_drift():
    X, y, W, V, model = network()
    model.A = model.A + 1e-6
    optimizer = SubspaceSearch(model, refresh_every=5)
    for _ in range(5):
        optimizer.step()
    assert torch.equal(model.A, X @ model.weights[0]) and model.products == 1 + 10 + 1


def test_bad_arguments_are_named():
    model = network()[-1]
    for options in (dict(base="x"), dict(search="x"), dict(memory=0), dict(max_trials=0), dict(refresh_every=0)):
        with pytest.raises(ValueError, match=next(iter(options))):
            SubspaceSearch(model, **options)
    with pytest.raises(ValueError, match="W="):
        Composition(random(5, 3), random(4, 2), [], lambda A: A.sum())
    for options in (dict(tol=0.0), dict(max_trials=0)):
        with pytest.raises(ValueError, match=next(iter(options))):
            PlaneSearch(**options)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AMSGrad", "AdaGrad", "SignDescent", "KFAC", "Shampoo", "AdaHessian", "LBFGS", "SR1"])
def test_the_plane_search_goes_with_every_direction(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(24, 6, dtype=torch.double), torch.randint(0, 3, (24,))
    objective = Objective(model, nn.CrossEntropyLoss())
    optimizer = getattr(optim, name)(model, step_rule=PlaneSearch(tol=1e-4))
    losses = [float(optimizer.step(objective.at(x, y))) for _ in range(15)]
    assert all(b <= a + 1e-12 for a, b in zip(losses, losses[1:])) and losses[-1] < 0.5 * losses[0]
    assert objective.cost.evaluations == 15 + optimizer.param_groups[0]["step_rule"]["evaluations"]
