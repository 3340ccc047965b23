"Stochastic acceleration against its recursion and against Nesterov's method, the expected loss against its bounds by dense second moments, and what is refused; float64, random problems."
import math

import numpy as np
import pytest
import torch
from torch import nn

from curvlab import optim
from curvlab.optim.accelerated import coefficients

MODES = ("momentum", "conservative", "semi_stochastic")


def problem(d, seed):
    "Rows and solution of a random least squares problem."
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3 * d, d, generator=generator, dtype=torch.double), torch.randn(d, generator=generator, dtype=torch.double)


def transcription(X, target, w, batches, eta, mu, gamma, rho, mode):
    "The generalised scheme (Mishkin, Pilanci, Schmidt 2024), with the root of alpha's equation by `numpy.roots`; yields (y_k, w_{k+1})."
    grad = lambda y, rows: X[rows].T @ (X[rows] @ (y - target)) / len(rows)
    v = w.clone()
    for rows in batches:
        scale = eta / (rho if mode == "conservative" else 1.0)
        alpha = max(np.roots([1.0, scale * (gamma - mu), -scale * gamma]).real)
        following = (1 - alpha) * gamma + alpha * mu
        y = w + alpha * gamma / (gamma + alpha * mu) * (v - w)
        g = grad(y, rows)
        slow = grad(y, range(len(X))) if mode == "semi_stochastic" else g
        w, v = y - eta * g, ((1 - alpha) * gamma * v + alpha * mu * y - alpha * slow) / following
        gamma = following
        yield y, w


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mu, gamma", [(0.3, None), (0.3, 1.7), (0.0, None), (0.0, 0.4)])
def test_against_the_recursion(mode, mu, gamma):
    d, eta, rho = 7, 0.02, 3.0
    X, target = problem(d, seed=1)
    rng, start = np.random.default_rng(2), torch.randn(d, dtype=torch.double)
    batches = [rng.integers(0, 3 * d, 4) for _ in range(40)]
    theta = nn.Parameter(start.clone())
    full = (lambda: [X.T @ (X @ (theta.detach() - target)) / len(X)]) if mode == "semi_stochastic" else None
    optimizer = optim.StochasticNesterov([theta], lr=eta, mu=mu, rho=rho, gamma=gamma, mode=mode, full_gradient=full)
    for rows, (y, w) in zip(batches, transcription(X, target, start, batches, eta, mu, gamma or mu or 1 / eta, rho, mode)):
        torch.testing.assert_close(theta.detach(), y, rtol=1e-10, atol=1e-12)
        theta.grad = X[rows].T @ (X[rows] @ (theta.detach() - target)) / len(rows)
        optimizer.step()
        torch.testing.assert_close(optimizer.primal()[0], w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_without_noise_it_is_nesterovs_method(mode):
    "Constant momentum (1 - sqrt(mu / L)) / (1 + sqrt(mu / L)) in torch's convention, to 1e-12."
    h = torch.linspace(0.05, 1, 9, dtype=torch.double)
    start = torch.randn(9, dtype=torch.double)
    theta, w, y = nn.Parameter(start.clone()), start.clone(), start.clone()
    q = math.sqrt(0.05)
    full = (lambda: [h * theta.detach()]) if mode == "semi_stochastic" else None
    optimizer = optim.StochasticNesterov([theta], lr=1.0, mu=0.05, mode=mode, full_gradient=full)
    for _ in range(200):
        theta.grad = h * theta.detach()
        optimizer.step()
        new = y - h * y
        y, w = new + (1 - q) / (1 + q) * (new - w), new
        assert (optimizer.primal()[0] - w).abs().max() < 1e-12 * start.abs().max()


def second_moments(h, eta, mu, rho, mode):
    "(start, matrix) of E[(w, v)(w, v)'] of one coordinate with curvature h under the coin, as Kronecker products."
    alpha, gamma, tau = coefficients(eta, mu, mu, rho if mode == "conservative" else 1.0)
    y = np.array([1 - tau, tau])

    def transition(g, slow):
        return np.stack([y - eta * g * h * y, (1 - alpha) * np.array([0, 1]) + alpha * y - alpha / mu * slow * h * y])

    pairs = [(1 / rho, transition(rho, 1.0 if mode == "semi_stochastic" else rho)), (1 - 1 / rho, transition(0.0, 1.0 if mode == "semi_stochastic" else 0.0))]
    return sum(p * np.kron(M, M) for p, M in pairs)


@pytest.mark.parametrize("rho", [1.0, 5.0, 25.0])
def test_expected_loss_against_its_bounds(rho):
    "Semi-stochastic and conservative keep their bounds at every step, exactly; with the step of the first and the gradients of the second the expectation explodes."
    mu, eta = 1e-3, 1 / rho
    hs = np.linspace(math.sqrt(mu), 1, 20) ** 2
    start = 0.5 * sum(h for h in hs) + 0.5 * mu * len(hs)
    for mode, factor in (("semi_stochastic", 1 - math.sqrt(mu * eta)), ("conservative", 1 - math.sqrt(mu) / rho), ("momentum", 1 - math.sqrt(mu * eta))):
        steps = [second_moments(h, eta, mu, rho, mode) for h in hs]
        moments, ratios = [np.ones(4) for _ in hs], []
        for k in range(1, 400):
            moments = [M @ m for M, m in zip(steps, moments)]
            ratios.append(sum(0.5 * h * m[0] for h, m in zip(hs, moments)) / (factor**k * start))
        if mode == "momentum" and rho > 1:
            assert ratios[-1] > 1e6 and max(abs(np.linalg.eigvals(M)).max() for M in steps) > 1
        else:
            assert max(ratios) <= 1


def test_state_survives_and_refused_steps_leave_no_trace():
    torch.manual_seed(0)
    theta = nn.Parameter(torch.randn(4))
    optimizer = optim.StochasticNesterov([theta], lr=0.1)
    for _ in range(3):
        theta.grad = torch.randn(4)
        optimizer.step()
    before = {"theta": theta.detach().clone(), "v": optimizer.state[theta]["v"].clone(), "gamma": optimizer.param_groups[0]["gamma"]}
    theta.grad = torch.tensor([1.0, math.nan, 0.0, 0.0])
    with pytest.raises(optim.NonFiniteError):
        optimizer.step()
    assert torch.equal(theta, before["theta"]) and torch.equal(optimizer.state[theta]["v"], before["v"]) and optimizer.param_groups[0]["gamma"] == before["gamma"]


def test_what_is_refused():
    model = nn.Linear(2, 2)
    for arguments, word in (({"mode": "nesterov"}, "mode"), ({"mu": -1.0}, "mu"), ({"rho": 0.5}, "rho"), ({"gamma": 0.0}, "gamma"), ({"lr": 2.0, "mu": 1.0}, "lr")):
        with pytest.raises(ValueError, match=word):
            optim.StochasticNesterov(model, **arguments)
    for arguments in ({"mode": "semi_stochastic"}, {"full_gradient": lambda: []}):
        with pytest.raises(TypeError, match="full_gradient"):
            optim.StochasticNesterov(model, **arguments)
    for arguments, word in (({"weight_decay": 0.1}, "weight_decay"), ({"maximize": True}, "maximize")):
        with pytest.raises(ValueError, match=word):
            optim.StochasticNesterov(model, mode="semi_stochastic", full_gradient=lambda: [], **arguments)
    with pytest.raises(ValueError, match="momentum"):
        optim.StochasticNesterov([{"params": model.parameters(), "momentum": 0.9}])
    optimizer, before = optim.StochasticNesterov(model, mode="semi_stochastic", full_gradient=lambda: [torch.zeros(2)]), [p.detach().clone() for p in model.parameters()]
    model(torch.randn(3, 2)).sum().backward()
    with pytest.raises(ValueError, match="full_gradient"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before)) and not optimizer.state


def test_groups_have_their_own_numbers():
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = optim.StochasticNesterov([{"params": [a], "mu": 0.2}, {"params": [b], "lr": 0.0}], lr=0.1)
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    alone = nn.Parameter(torch.ones(3))
    alone.grad = torch.ones(3)
    optim.StochasticNesterov([alone], lr=0.1, mu=0.2).step()
    assert torch.equal(a, alone) and torch.equal(b, torch.ones(3)) and torch.equal(optimizer.primal()[1], b)
