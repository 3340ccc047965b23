"Quasi-Newton matrices against dense textbook updates, and Newton's directions against dense solves."
import pytest
import torch
from torch import nn

from curvlab import Objective
from curvlab.optim import LBFGS, SR1, Newton, Wolfe
from curvlab.optim.quasi_newton import MODIFICATIONS, lbfgs_product, modified, sr1_update, sr1_vectors


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def dense_bfgs(S, Y):
    "The inverse BFGS matrix of pairs with positive products, from gamma * I of the newest."
    n, good = S.shape[1], [i for i in range(len(S)) if S[i] @ Y[i] > 0]
    I = torch.eye(n, dtype=S.dtype)
    H = I * (S[good[-1]] @ Y[good[-1]]) / (Y[good[-1]] @ Y[good[-1]]) if good else I
    for i in good:
        V = I - torch.outer(Y[i], S[i]) / (S[i] @ Y[i])
        H = V.T @ H @ V + torch.outer(S[i], S[i]) / (S[i] @ Y[i])
    return H


@pytest.mark.parametrize("seed", range(5))
def test_two_loops_equal_the_dense_update(seed):
    S, Y, g = random(6, 11, seed=seed), random(6, 11, seed=seed + 50), random(11, seed=seed + 90)
    assert torch.allclose(lbfgs_product(S, Y, g), dense_bfgs(S, Y) @ g, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_limited_sr1_equals_the_dense_update(seed):
    S, Y, H = random(6, 11, seed=seed), random(6, 11, seed=seed + 50), torch.eye(11, dtype=torch.double)
    S[2] = Y[2]                                        # a pair that teaches I nothing, in a matrix that is no longer I
    for s, y in zip(S, Y):
        H = sr1_update(H, s, y)
        assert torch.allclose(H @ y, s, atol=1e-8)     # the secant equation
    U, w = sr1_vectors(S, Y)
    assert torch.allclose(torch.eye(11, dtype=torch.double) + (U.T * w) @ U, H, atol=1e-7)


def test_sr1_skips_what_it_cannot_use():
    H = sr1_update(torch.eye(4, dtype=torch.double), random(4), random(4, seed=1))
    y = random(4, seed=2)
    direction = random(4, seed=3)
    u = direction - (direction @ y) / (y @ y) * y      # u is orthogonal to y: the denominator vanishes
    assert torch.equal(sr1_update(H, H @ y + u, y), H) or torch.allclose(sr1_update(H, H @ y + u, y), H, atol=1e-6)
    assert torch.equal(sr1_update(H, torch.zeros(4).double(), torch.zeros(4).double()), H)


class Own(nn.Module):
    "0.5 x^T A x + sum of x^4 / 12 as a model whose output is its own loss; A is indefinite."

    def __init__(self, n=7, seed=0):
        super().__init__()
        self.A = random(n, n, seed=seed)
        self.A = self.A + self.A.T
        self.a, self.b = nn.Parameter(random(3, seed=seed + 1)), nn.Parameter(random(n - 3, seed=seed + 2))

    def forward(self, _):
        x = torch.cat([self.a, self.b])
        return (0.5 * x @ self.A @ x + (x**4).sum() / 12)[None]

    def point(self):
        return torch.cat([self.a, self.b]).detach()

    def hessian(self):
        return self.A + torch.diag(self.point() ** 2)


def closure(model):
    return Objective(model, lambda f, y: f.sum()).at(torch.zeros(1), torch.zeros(1))


def solve(values, Q, g):
    return Q @ ((Q.T @ g) / values)


@pytest.mark.parametrize("modification", MODIFICATIONS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_newton_direction_is_the_dense_solve(modification, weight_decay):
    model = Own()
    x, H = model.point(), model.hessian() + weight_decay * torch.eye(7)
    optimizer = Newton(model, lr=1.0, modification=modification, delta=0.05, step_rule=None, weight_decay=weight_decay, block=3)
    optimizer.step(closure(model))
    g = model.A @ x + x**3 / 3 + weight_decay * x
    values, Q = torch.linalg.eigh(H)
    changed = {"none": values, "shift": values + 0.05 - values[0], "abs": values.abs(), "clip": values.clamp(min=0.05)}[modification]
    assert values[0] < 0 and torch.allclose(x - model.point(), solve(changed, Q, g), rtol=1e-7)
    if modification == "none":
        assert torch.allclose(x - model.point(), torch.linalg.solve(H, g), rtol=1e-7)


def test_modified_eigenvalues_are_as_named():
    values = torch.tensor([-2.0, 1e-6, 3.0])
    for name, expected in {"none": [-2.0, 0.5, 3.0], "shift": [0.5, 2.500001, 5.5], "abs": [2.0, 0.5, 3.0], "clip": [0.5, 0.5, 3.0]}.items():
        assert torch.allclose(modified(values, name, 0.5), torch.tensor(expected))


@pytest.mark.parametrize("memory", [None, 40])
def test_sr1_iterates_equal_a_dense_reference_with_steps_of_both_signs(memory):
    model = Own(seed=5)
    optimizer = SR1(model, memory=memory)
    H, last, backward = torch.eye(7, dtype=torch.double), None, 0
    for _ in range(12):
        x = model.point()
        g = model.A @ x + x**3 / 3
        if last is not None:
            H = sr1_update(H, x - last[0], g - last[1])
        last = x, g
        optimizer.step(closure(model))
        t = optimizer.param_groups[0]["step_rule"]["step"]
        assert torch.allclose(x - model.point(), t * (H @ g), rtol=1e-6, atol=1e-8)
        assert t * (g @ H @ g) > 0
        backward += t < 0
    assert backward > 0 and backward == optimizer.param_groups[0]["step_rule"]["backward"]


@pytest.mark.parametrize("indefinite", ["reset", "gradient", "abs"])
def test_repairs_never_step_backward(indefinite):
    model = Own(seed=5)
    optimizer, losses = SR1(model, memory=None, indefinite=indefinite), []
    for _ in range(40):
        losses.append(float(optimizer.step(closure(model))))
    assert optimizer.param_groups[0]["step_rule"]["backward"] == 0 and all(b <= a for a, b in zip(losses, losses[1:])) and losses[-1] < losses[0]


@pytest.mark.parametrize("make", [LBFGS, SR1, lambda m: Newton(m)])
def test_local_convergence_is_fast(make):
    model = Own(seed=1)
    optimizer = make(model)
    for _ in range(60):
        optimizer.step(closure(model))
    x = model.point()
    assert (model.A @ x + x**3 / 3).norm() < 1e-7 and torch.linalg.eigvalsh(model.hessian())[0] > 0


def test_memory_starts_afresh_with_other_parameters():
    model = Own(seed=1)
    optimizer = SR1(model, memory=None)
    for _ in range(3):
        optimizer.step(closure(model))
    model.a.requires_grad_(False)
    optimizer.step(closure(model))
    assert "H" not in optimizer.state[model.a] and optimizer.state[model.b]["H"].shape == (4, 4)
    assert torch.equal(optimizer.state[model.b]["H"], torch.eye(4, dtype=torch.double))


def test_bad_arguments_are_named():
    for make, name in ((lambda: SR1(Own(), indefinite="up"), "indefinite"), (lambda: SR1(Own(), indefinite="abs"), "memory"), (lambda: Newton(Own(), modification="x"), "modification"),
                       (lambda: Newton(Own(), delta=0.0), "delta"), (lambda: LBFGS(Own(), memory=0), "memory"), (lambda: Newton(Own(), block=0), "block")):
        with pytest.raises(ValueError, match=name):
            make()


def test_without_a_rule_the_gradient_is_enough():
    model = nn.Linear(3, 1).double()
    optimizer = LBFGS(model, lr=0.1, step_rule=None)
    x, y = random(20, 3), random(20, 1, seed=1)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    assert not optimizer.needs_closure and LBFGS(model, step_rule=Wolfe()).needs_closure
    X = torch.cat([x, torch.ones(20, 1).double()], 1)
    best = (X @ torch.linalg.lstsq(X, y).solution - y).square().mean()
    assert nn.functional.mse_loss(model(x), y) - best < 0.02
