"""Hessian-free optimization against a slow reading of the paper with dense matrices, in float64."""
import math

import pytest
import torch
from torch import nn

from curvlab import Objective
from curvlab.optim import HessianFree
from curvlab.optim.hessian_free import sparse_init_


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(n=12, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g).double(), torch.randint(0, 3, (n,), generator=g)


class Dense:
    """Loss, gradient, Gauss-Newton matrix and Hessian as functions of a flat vector, by torch.func."""

    def __init__(self, net, x, y, decay):
        self.names, self.shapes = zip(*[(n, p.shape) for n, p in net.named_parameters()])
        self.net, self.x, self.y, self.decay = net, x, y, decay

    def outputs(self, t, x=None):
        parts = t.split([s.numel() for s in self.shapes])
        return torch.func.functional_call(self.net, {n: p.view(s) for n, p, s in zip(self.names, parts, self.shapes)}, (self.x if x is None else x,))

    def f(self, t):
        return nn.functional.cross_entropy(self.outputs(t), self.y) + self.decay / 2 * t @ t

    def gradient(self, t):
        return torch.func.grad(self.f)(t)

    def curvature(self, t, kind):
        if kind == "hessian":
            return torch.func.hessian(self.f)(t)
        J, out = torch.func.jacrev(self.outputs)(t), self.outputs(t)
        p = out.softmax(1)
        G = sum(Jb.T @ (torch.diag(pb) - torch.outer(pb, pb)) @ Jb for Jb, pb in zip(J, p)) / len(p)
        return G + self.decay * torch.eye(len(t), dtype=t.dtype)

    def squares(self, t):
        each = [torch.func.grad(lambda s: nn.functional.cross_entropy(self.outputs(s, xb[None]), yb[None]))(t) for xb, yb in zip(self.x, self.y)]
        return sum(g * g for g in each) / len(each)


def reference_step(theta, state, full, part, kind, decay, precondition, warm, in_model, max_iter, ratio):
    """One step in plain steps: explicit B, every iterate kept, the rules as printed in the paper."""
    lam = state["damping"]
    g = full.gradient(theta)
    B = part.curvature(theta, kind) + lam * torch.eye(len(theta), dtype=theta.dtype)
    M = (part.squares(theta) + lam + decay) ** 0.75 if precondition else torch.ones_like(g)
    q = lambda p: g @ p + p @ B @ p / 2
    p = warm * state["seed"]
    r = B @ p + g
    d = -r / M
    iterates, values = [p], [q(p)]
    for i in range(1, max_iter + 1):
        if d @ B @ d <= 0:
            break
        alpha = (r @ (r / M)) / (d @ B @ d)
        p, r_new = p + alpha * d, r + alpha * B @ d
        d = -r_new / M + (r_new @ (r_new / M)) / (r @ (r / M)) * d
        r = r_new
        iterates.append(p)
        values.append(q(p))
        k = max(10, math.ceil(0.1 * i))
        if i > k and values[i] < 0 and (values[i] - values[i - k]) / values[i] < k * 5e-4:
            break
    last = len(iterates) - 1
    kept = sorted({math.ceil(ratio**j) for j in range(60)} & set(range(1, last + 1)) | {last}) if ratio else [last]
    best = kept[-1]
    for index in reversed(kept[:-1]):
        if part.f(theta + iterates[index]) >= part.f(theta + iterates[best]):
            break
        best = index
    p = iterates[best]
    promised = q(p) - (0 if in_model else lam / 2 * p @ p)
    rho = (part.f(theta + p) - part.f(theta)) / promised if promised < 0 else -math.inf
    size = next((0.8**j for j in range(60) if g @ p < 0 and full.f(theta + 0.8**j * p) <= full.f(theta) + 0.01 * 0.8**j * g @ p), 0.0)
    rho = rho if size else -math.inf
    state["damping"] = lam * (1.5 if rho < 0.25 else 2 / 3 if rho > 0.75 else 1)
    state["seed"] = iterates[-1] if size else torch.zeros_like(p)
    state["seen"].append((last, best, size, rho))
    return theta + size * p


def synchronise(net, optimizer, theta, seed):
    """Put the reference's numbers into the network, so that each step is compared by itself."""
    start = 0
    for p in net.parameters():
        with torch.no_grad():
            p.copy_(theta[start : start + p.numel()].view_as(p))
        optimizer.state[p]["seed"] = seed[start : start + p.numel()].view_as(p).clone()
        start += p.numel()


# Conjugate gradients magnify rounding, by orders of magnitude an iteration where the damping is small. So runs to the stopping rule
# have some damping, and runs with little damping have few iterations: the tolerance can then be tight.
SETTINGS = [
    dict(damping=0.5),
    dict(damping=0.3, warm=1.0, precondition=False),
    dict(damping=0.3, in_model=False, decay=0.1),
    dict(damping=0.5, ratio=None, warm=0.0),
    dict(damping=1e-3, max_iter=9),
    dict(damping=1e-3, max_iter=7, in_model=False, decay=1e-3),
    dict(damping=1e-4, max_iter=8, ratio=1.6, warm=1.0),
    dict(damping=0.0, max_iter=8, precondition=False),
    dict(damping=0.02, max_iter=9, kind="hessian", precondition=False),
    dict(damping=1e-3, max_iter=9, two=True),
    dict(damping=0.3, two=True, decay=0.1),
]


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_equals_dense_reference(setting, chunk):
    s = {"damping": 0.1, "kind": "ggn", "decay": 0.0, "precondition": True, "warm": 0.95, "in_model": True, "max_iter": 250, "ratio": 1.3, **setting}
    two = s.pop("two", False)
    net, (x, y) = mlp(), data()
    part_of = slice(0, 6) if two else slice(None)
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])
    state = {"damping": s.pop("damping"), "seed": torch.zeros_like(theta), "seen": []}
    optimizer = HessianFree(net, damping=state["damping"], curvature=s["kind"], weight_decay=s["decay"], preconditioner="empirical-fisher" if s["precondition"] else None,
                            warm_start=s["warm"], damping_in_model=s["in_model"], max_iter=s["max_iter"], store_ratio=s["ratio"])
    objective = Objective(net, nn.CrossEntropyLoss())
    full, part = Dense(mlp(), x, y, s["decay"]), Dense(mlp(), x[part_of], y[part_of], s["decay"])
    for _ in range(4):
        before = theta
        theta = reference_step(theta, state, full, part, **s)
        optimizer.step(objective.at(x, y, chunk), objective.at(x[part_of], y[part_of], chunk) if two else None)
        ours = torch.cat([p.detach().flatten() for p in net.parameters()])
        iterations, chosen, size, _ = state["seen"][-1]
        assert (optimizer.report.iterations, optimizer.report.chosen) == (iterations, chosen) and optimizer.report.step == pytest.approx(size)
        assert optimizer.param_groups[0]["damping"] == pytest.approx(state["damping"], rel=1e-12)
        assert (ours - theta).norm() <= 1e-9 * (theta - before).norm()
        synchronise(net, optimizer, theta, state["seed"])
    assert (theta - torch.cat([p.detach().flatten() for p in mlp().parameters()])).norm() > 0.1


def test_settings_exercise_every_branch():
    """The reference runs above are worth something only if they backtrack, cut steps, and move the damping both ways."""
    seen, dampings = [], set()
    for setting in SETTINGS:
        s = {"damping": 0.1, "kind": "ggn", "decay": 0.0, "precondition": True, "warm": 0.95, "in_model": True, "max_iter": 250, "ratio": 1.3, **setting}
        s.pop("two", None)
        x, y = data()
        dense = Dense(mlp(), x, y, s["decay"])
        theta = torch.cat([p.detach().flatten() for p in mlp().parameters()])
        state = {"damping": s.pop("damping"), "seed": torch.zeros_like(theta), "seen": []}
        for _ in range(4):
            old = state["damping"]
            theta = reference_step(theta, state, dense, dense, **s)
            dampings.add((state["damping"] > old) - (state["damping"] < old))
        seen += state["seen"]
    assert any(best < last for last, best, _, _ in seen) and any(0 < size < 1 for _, _, size, _ in seen) and any(size == 1 for _, _, size, _ in seen)
    assert dampings == {-1, 0, 1}


def test_sum_and_mean_agree():
    """The summed loss with n times the damping takes the same steps: preconditioner, penalty and line search are scaled with the loss."""
    x, y = data()
    ends = []
    for reduction, scale in (("mean", 1), ("sum", len(x))):
        net = mlp()
        optimizer = HessianFree(net, damping=0.01 * scale, weight_decay=0.1 * scale)
        for _ in range(3):
            optimizer.step(Objective(net, nn.CrossEntropyLoss(reduction=reduction)).at(x, y))
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert (ends[0] - ends[1]).norm() < 1e-7 * ends[0].norm()


def test_batch_norm_goes_on_without_preconditioner(caplog):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = data(30)
    optimizer, objective = HessianFree(net), Objective(net, nn.CrossEntropyLoss())
    losses = [optimizer.step(objective.at(x, y)).item() for _ in range(5)]
    assert losses[-1] < 0.8 * losses[0]
    assert sum("without preconditioner" in r.message for r in caplog.records) == 1


def test_a_step_that_cannot_improve_is_skipped():
    """A loss that rises on every side of a kink: nothing moves, the damping grows, the seed is dropped."""
    class Kink(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1).double())
        def forward(self, x):
            return torch.cat([self.w.abs() + 1e-3 * self.w, self.w.abs()]).expand(len(x), 2)
    net = Kink()
    x, y = torch.zeros(2, 1).double(), torch.full((2, 2), -1.0).double()
    optimizer = HessianFree(net, damping=1.0)
    optimizer.step(Objective(net, nn.MSELoss()).at(x, y))
    assert net.w.item() == 0 and optimizer.report.step == 0 and optimizer.param_groups[0]["damping"] == 1.5
    assert optimizer.state[net.w]["seed"].abs().sum() == 0


def test_sparse_init_is_seeded_and_counts():
    make = lambda: sparse_init_(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 4)), incoming=7, generator=torch.Generator().manual_seed(1))
    a, b = make(), make()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert all(((layer.weight != 0).sum(1) == 7).all() for layer in a)
    with pytest.raises(ValueError, match="incoming"):
        sparse_init_(nn.Linear(3, 2), incoming=0)
