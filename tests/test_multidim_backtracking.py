"""Multidimensional backtracking against a flat transcription of the paper's formulas, and its cuts against valid step sizes."""
import nets
import numpy as np
import pytest
import torch
from methods import train
from scipy.optimize import minimize
from torch import nn

from curvlab import Objective
from curvlab.optim import MultidimBacktracking
from curvlab.optim.multidim_backtracking import candidate, cut, optimal_diagonal

SHAPES = pytest.mark.parametrize("shape", ["box", "ellipsoid"])


def reference(f, x, shape, steps, bound, growth):
    """Iterates and reaches, with the set as in the paper: upper corner `b`, or the matrix diagonal `a` of `sum a_i q_i^2 <= 1`."""
    d, cuts = len(x), 0
    b, a = np.full(d, bound), np.full(d, 1 / (d * bound**2))
    for _ in range(steps):
        fx, g = f(x)
        while True:
            p = b / (2 * d) if shape == "box" else (g**2 / a) / np.sqrt((g**4 / a).sum()) / np.sqrt(2 * d)
            y = x - p * g
            fy, gy = f(y)
            if fy - fx + 0.5 * g @ (p * g) <= 0:
                break
            u = np.maximum((0.5 * g**2 - g * gy) / (fx - fy - gy @ (p * g)), 0)
            cuts += 1
            if shape == "box":
                b = np.minimum(b, 1 / np.maximum(u, 1e-300))
            else:
                l = (u**2 / a).sum()
                lam = l / d * (d - 1) / (l - 1)
                a = lam * a + (1 - lam) * u**2
        x, b, a = y, b * growth, a / growth**2
    return x, b if shape == "box" else 1 / np.sqrt(d * a), cuts


class Net(nn.Module):
    """A linear model whose weights lie in two tensors of different shapes."""

    def __init__(self, d):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(d - 2).double()), nn.Parameter(torch.zeros(1, 2).double())

    def forward(self, x):
        return x @ torch.cat([self.first, self.second[0]])


def logistic(n=40, d=6, decay=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g).double() * torch.logspace(-1, 1, d).double()
    y = (torch.rand(n, generator=g) < 0.5).double()

    def f(w):
        z, s = x.numpy() @ w, 2 * y.numpy() - 1
        p = 1 / (1 + np.exp(np.clip(s * z, -700, 700)))
        return np.logaddexp(0, -s * z).mean() + decay / 2 * w @ w, -(x.numpy() * (s * p)[:, None]).mean(0) + decay * w

    return x, y, f


@SHAPES
@pytest.mark.parametrize("growth", [1.0, 1.3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_follows_the_paper(shape, growth, decay):
    x, y, f = logistic(decay=decay)
    model = Net(6)
    # not 1e10: far out the loss is nearly linear, and the denominators of the cuts would lose the digits that are compared here
    optimizer = MultidimBacktracking(model, bound=1e2, set=shape, growth=growth, weight_decay=decay, max_trials=500)
    objective = Objective(model, nn.BCEWithLogitsLoss())
    for _ in range(12):
        optimizer.step(objective.at(x, y))
    expected, reach, cuts = reference(f, np.zeros(6), shape, 12, 1e2, growth)
    flat = lambda ts: torch.cat([t.detach().flatten() for t in ts]).numpy()
    counts = optimizer.param_groups[0]["search"]
    assert counts == {"trials": 12 + cuts, "cuts": cuts, "halvings": 0, "held": 0} and cuts >= 2
    np.testing.assert_allclose(flat(model.parameters()), expected, rtol=1e-7)
    np.testing.assert_allclose(flat([optimizer.state[p]["reach"] for p in model.parameters()]), reach, rtol=1e-5)   # differences of values near the minimum cost digits


@SHAPES
@pytest.mark.parametrize("d", [1, 2, 9])
def test_cut_contains_what_the_half_space_leaves(shape, d):
    """Random points of the old set below the plane lie in the new one; the failed candidate does not matter any more"""
    rng = np.random.default_rng(d)
    draw = lambda *s: torch.from_numpy(rng.uniform(0.05, 1, s))
    inside = lambda q, b: (q / b).amax(-1) <= 1 + 1e-12 if shape == "box" else (q / b).square().mean(-1) <= 1 + 1e-12
    for _ in range(20):
        b, g, u = draw(d), draw(d), draw(d) ** 4
        [p] = candidate(shape, [b], [g])
        u = u / (u @ p) * float(draw(1)) ** -0.5   # <u, p> from 1 upwards
        [after] = cut(shape, [b], [u])
        q = draw(4000, d) * b * (1 if shape == "box" else d**0.5)
        q = q * draw(4000, 1) ** 2
        kept = inside(q, b) & (q @ u <= 1)
        assert kept.sum() > 5 and inside(q[kept], after).all()
        [worst] = [(u @ p)]
        assert worst >= 1 - 1e-12


def test_candidate_of_the_ellipsoid_is_the_best_point():
    rng = np.random.default_rng(0)
    b, g = (torch.from_numpy(rng.uniform(0.1, 2, 5)) for _ in range(2))
    p = torch.cat(candidate("ellipsoid", [b[:2], b[2:]], [g[:2], g[2:]]))
    assert float((p / b).square().mean()) == pytest.approx(1 / (2 * 5))
    others = torch.from_numpy(rng.normal(size=(5000, 5))).abs() * b
    others = others / ((others / b).square().mean(1, keepdim=True) * 10).sqrt()
    assert (others @ g.square() <= p @ g.square()).all()


@SHAPES
def test_candidate_in_single_precision(shape):
    """Reaches and gradients whose squares overflow float32"""
    b, g = torch.full((3,), 1e25), torch.tensor([1e20, 1e10, 0.0])
    [p], [q] = candidate(shape, [b], [g]), candidate(shape, [b.double()], [g.double()])
    assert p.isfinite().all() and torch.allclose(p.double(), q, rtol=1e-5, atol=0)
    [p] = candidate(shape, [b], [torch.zeros(3)])
    assert p.isfinite().all()


def test_a_step_leaves_the_gradient_and_counts_its_work():
    x, y, _ = logistic()
    model = Net(6)
    objective = Objective(model, nn.BCEWithLogitsLoss())
    closure = objective.at(x, y)
    closure()
    before = [p.grad.clone() for p in model.parameters()]
    spent = objective.cost.evaluations
    optimizer = MultidimBacktracking(model)
    optimizer.step(objective.at(x, y))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before))
    counts = optimizer.param_groups[0]["search"]
    assert objective.cost.evaluations - spent == 1 + counts["trials"] + counts["cuts"]


def test_without_convexity_or_finite_values_the_set_is_halved():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)
    log = Objective(model, lambda f, y: -f.clamp(min=-1).add(1).log().mean() + f.square().mean())   # infinite at and below -1
    optimizer = MultidimBacktracking(model, bound=1e3)
    one = torch.ones(1, 1).double()
    for _ in range(20):
        optimizer.step(log.at(one, one))
    counts = optimizer.param_groups[0]["search"]
    assert counts["halvings"] > 0 and model.weight.item() == pytest.approx((3**0.5 - 1) / 2, abs=1e-6)


def test_held_at_the_minimum():
    """Rounding near the minimum neither moves the parameters nor cuts the set"""
    x, y, _ = logistic(decay=0.1)
    model = Net(6)
    optimizer, objective = MultidimBacktracking(model, weight_decay=0.1), Objective(model, nn.BCEWithLogitsLoss())
    for _ in range(300):
        optimizer.step(objective.at(x, y))
    counts = dict(optimizer.param_groups[0]["search"])
    before = [p.clone() for p in model.parameters()]
    optimizer.step(objective.at(x, y))
    after = optimizer.param_groups[0]["search"]
    assert after["held"] == counts["held"] + 1 and after["cuts"] == counts["cuts"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@SHAPES
def test_joining_parameters(shape):
    """A group added later starts from its own bound and leaves the reaches of the others; with the mean in the ellipsoid's definition the joint set contains the old one times the new box"""
    problem = nets.mlp(torch.double)
    last = problem.model[2].requires_grad_(False)
    optimizer = MultidimBacktracking(problem.model, set=shape, max_trials=1)
    train(optimizer, problem, 2)
    old = [optimizer.state[p]["reach"].clone() for p in problem.model[0].parameters()]
    last.requires_grad_(True)
    optimizer.add_param_group({"params": list(last.parameters()), "bound": 1e9})
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(optimizer, problem, 1)
    assert all(torch.equal(optimizer.state[p]["reach"], b) for p, b in zip(problem.model[0].parameters(), old))
    assert all((optimizer.state[p]["reach"] == 1e9).all() for p in last.parameters())


@pytest.mark.parametrize("d", [2, 5])
def test_optimal_diagonal(d):
    """Against a search without derivatives; and the step sizes are valid and attain kappa"""
    W = torch.from_numpy(np.random.default_rng(d).normal(size=(d, d + 2)))
    H = W @ W.T
    p, kappa = optimal_diagonal(H)
    e = torch.linalg.eigvalsh(p.sqrt()[:, None] * H * p.sqrt())
    assert float(e[-1]) == pytest.approx(1, rel=1e-9) and float(e[-1] / e[0]) == pytest.approx(kappa, rel=1e-9)
    condition = lambda t: np.linalg.cond(np.exp(t / 2)[:, None] * H.numpy() * np.exp(t / 2))
    least = min(minimize(condition, t, method="Nelder-Mead", options={"maxfev": 5000, "xatol": 1e-9, "fatol": 1e-10}).fun for t in (np.zeros(d), p.log().numpy()))
    assert kappa == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("bad", [{"set": "ball"}, {"growth": 0.9}, {"max_trials": 0}, {"resolution": -1.0}, {"bound": 0.0}, {"bound": 1e31}, {"step_rule": object()}])
def test_bad_arguments(bad):
    [name] = bad
    with pytest.raises(ValueError, match=name):
        MultidimBacktracking(Net(3), **bad)
