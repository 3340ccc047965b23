"Margins and their certificates against slow references, and gradients whose every probability has underflowed, in float64 on random data."
import pytest
import torch
from scipy.optimize import minimize

from curvlab import optim
from curvlab.lab.margins import adam_rule, curvature_features, gradient_rule, margin_path, max_margin, multiclass_margin, pair_margins, pair_matrices, scaled_ce_grad, scaled_loss, separable_classes, steepest_rule
from curvlab.optim.normalized_descent import dual_norm, step_norm

NORMS = ["max", "fro", "spectral", 1.5, 3.0]


def data(seed=0, **options):
    return separable_classes(**{"k": 3, "d": 8, "n": 15, "seed": seed, **options})


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_margins_are_those_of_a_loop():
    x, y = data()
    W = random(3, 8)
    pairs = [[float(W[y[i]] @ x[i] - W[c] @ x[i]) if c != y[i] else float("inf") for c in range(3)] for i in range(15)]
    assert torch.allclose(pair_margins(W, x, y).mT, torch.tensor(pairs, dtype=torch.double))
    assert float(multiclass_margin(W, x, y)) == pytest.approx(min(min(row) for row in pairs))
    products = (pair_matrices(x, y, 3) * W).sum((-2, -1))
    assert torch.allclose(products.sort().values, torch.tensor([p for row in pairs for p in row if p < float("inf")], dtype=torch.double).sort().values)


def test_stacks_are_separate_problems():
    problems = [data(seed) for seed in range(3)]
    x, y = (torch.stack(part) for part in zip(*problems))
    W = random(3, 3, 8)
    one = [scaled_ce_grad(W[i], *problems[i]) for i in range(3)]
    for together, apart in zip(scaled_ce_grad(W, x, y), zip(*one)):
        assert torch.allclose(together, torch.stack(apart), rtol=1e-12)
    assert torch.allclose(multiclass_margin(W, x, y), torch.stack([multiclass_margin(W[i], *problems[i]) for i in range(3)]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(3))
def test_largest_margin_is_certified(norm, seed):
    """The lower bound is reached by a matrix, the upper one comes from the dual; nothing that a random search or a shifted solution finds is better."""
    x, y = data(seed)
    best = max_margin(x, y, norm)
    assert best.gap < 1e-8
    assert float(step_norm(best.W, norm)) == pytest.approx(1, abs=1e-9)
    assert float(multiclass_margin(best.W, x, y)) == pytest.approx(best.margin, rel=1e-9)
    for size in (1e-3, 1e-1, 10.0):
        others = best.W + size * random(500, 3, 8, seed=seed)
        assert (multiclass_margin(others, x, y) / step_norm(others, norm)).max() <= best.upper * (1 + 1e-12)


@pytest.mark.parametrize("norm", ["fro", 1.5, 3.0])
def test_largest_margin_against_a_general_solver(norm):
    x, y = data()
    A, power = pair_matrices(x, y, 3).flatten(1).numpy(), 2.0 if norm == "fro" else norm
    size = abs(A).max()
    found = minimize(lambda w: (abs(w) ** power).sum() / power, random(24).numpy(), jac=lambda w: abs(w) ** (power - 1) * (2 * (w > 0) - 1), method="SLSQP",
                     constraints={"type": "ineq", "fun": lambda w: A @ w / size - 1, "jac": lambda w: A / size}, options={"maxiter": 2000, "ftol": 1e-14})
    assert size / (abs(found.x) ** power).sum() ** (1 / power) == pytest.approx(max_margin(x, y, norm).margin, rel=1e-5)


def test_spectral_margin_against_a_long_run():
    x, y = data()
    path = margin_path(x, y, steepest_rule("spectral"), lambda t: t**-0.5, [3000])[0]
    best = max_margin(x, y, "spectral")
    assert 0.9 * best.margin < multiclass_margin(path, x, y) / step_norm(path, "spectral") <= best.upper


def test_max_norm_is_the_limit_of_large_exponents():
    x, y = data()
    largest = max_margin(x, y, "max").margin
    shares = [max_margin(x, y, p).margin / largest for p in (2.0, 4.0, 16.0)]
    assert shares == sorted(shares) and shares[0] < 0.8 < shares[2] < 1


@pytest.mark.parametrize("norm", ["fro", 1.5, 3.0])
def test_curvature_features_are_a_factor_of_the_hessian(norm):
    Z, A = random(3, 6), random(18, 3, 6, seed=1)
    H = torch.func.hessian(lambda z: dual_norm(z, norm) ** 2 / 2)(Z).reshape(18, 18)
    F = curvature_features(Z, A, norm)
    assert torch.allclose(F @ F.T, A.flatten(1) @ H @ A.flatten(1).T, rtol=1e-9, atol=1e-9)


def test_data_that_cannot_be_separated_are_refused():
    x, y = data(n=200, noise=5.0)
    for norm in NORMS:
        with pytest.raises(ValueError, match="separates"):
            max_margin(x, y, norm)
    with pytest.raises(ValueError, match="norm='l2'"):
        max_margin(x, y, "l2")


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_scaled_gradient_is_the_gradient(scale):
    x, y = data()
    W = (scale * random(3, 8)).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ W.T, y)
    loss.backward()
    found = scaled_ce_grad(W.detach(), x, y)
    factor = (-found.shift).exp()
    proxy = (1 - torch.softmax(x @ W.detach().T, 1).gather(1, y[:, None])).mean()
    assert torch.allclose(found.grad * factor, W.grad, rtol=1e-10, atol=1e-14)
    assert float(scaled_loss(W.detach(), x, y, found.shift) * factor) == pytest.approx(float(loss.detach()), rel=1e-12) and float(found.proxy * factor) == pytest.approx(float(proxy), rel=1e-12)


def test_scaled_gradient_beyond_underflow():
    """With margins in the thousands, against arithmetic of any exponent."""
    mpmath = pytest.importorskip("mpmath")
    x, y = data()
    W = 40000 * max_margin(x, y, "max").W + 100 * random(3, 8)
    found = scaled_ce_grad(W, x, y)
    assert multiclass_margin(W, x, y) > 1000 and found.grad.abs().max() > 0
    odds = [[mpmath.exp(-mpmath.mpf(float(m))) if m < float("inf") else mpmath.mpf(0) for m in row] for row in pair_margins(W, x, y).mT]
    factor = mpmath.exp(mpmath.mpf(float(found.shift))) / len(x)
    p = [[o / (1 + sum(row)) for o in row] for row in odds]
    grad = [[factor * sum((p[i][c] if c != y[i] else -sum(p[i])) * float(x[i, j]) for i in range(15)) for j in range(8)] for c in range(3)]
    assert torch.allclose(found.grad, torch.tensor([[float(v) for v in row] for row in grad], dtype=torch.double), rtol=1e-8, atol=1e-14)
    assert float(found.proxy) == pytest.approx(float(factor * sum(map(sum, p))), rel=1e-9)
    assert float(scaled_loss(W, x, y, found.shift)) == pytest.approx(float(factor * sum(mpmath.log1p(sum(row)) for row in odds)), rel=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_proxy_bounds(norm):
    x, y = data()
    upper, B = max_margin(x, y, norm).upper, float(x.abs().sum(1).max())
    for scale in (0.0, 0.1, 10.0, 1e4):
        W = scale * random(3, 8)
        found = scaled_ce_grad(W, x, y)
        assert dual_norm(found.grad, norm) >= upper * found.proxy * (1 - 1e-9)
        assert dual_norm(found.grad, "max") <= 2 * B * found.proxy * (1 + 1e-9)
        assert found.proxy <= scaled_loss(W, x, y, found.shift) * (1 + 1e-9)


def run_by_optimizer(make, x, y, lr, steps):
    """The library's optimizer on the true gradient."""
    model = torch.nn.Linear(x.shape[1], int(y.max()) + 1, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    optimizer = make(model)
    for t in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr(t)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.weight.detach()


RULES = {
    "sign": (steepest_rule("max"), lambda m: optim.SignDescent(m), 1e-12),
    "spectral, averaged": (steepest_rule("spectral", 0.9), lambda m: optim.NormalizedSteepestDescent(m, norm="spectral", average=0.9, polar="svd"), 1e-9),
    "p = 3, averaged": (steepest_rule(3.0, 0.9), lambda m: optim.NormalizedSteepestDescent(m, norm=3.0, average=0.9), 1e-9),
    "gradient": (gradient_rule(), lambda m: optim.SGD(m), 1e-12),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_are_the_optimizers(name):
    x, y = data(scale=1.0)
    rule, make, tolerance = RULES[name]
    lr = lambda t: 0.1 * t**-0.5
    expected = run_by_optimizer(make, x, y, lr, 60)
    assert torch.allclose(margin_path(x, y, rule, lr, [60])[0], expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_adam_in_scaled_units(eps):
    """The library's Adam corrects for its zero start; the same steps follow when step size and eps undo that."""
    x, y = data(scale=1.0)
    corrected = lambda t: (1 - 0.9**t) / (1 - 0.95**t) ** 0.5

    def make(model):
        optimizer = optim.Adam(model, betas=(0.9, 0.95), eps=eps)
        inner = optimizer.step

        def step():
            t = optimizer.param_groups[0]["steps"] + 1
            optimizer.param_groups[0]["eps"] = eps / (1 - 0.95**t) ** 0.5
            return inner()

        optimizer.step = step
        return optimizer

    lr = lambda t: 0.1 * t**-0.5
    expected = run_by_optimizer(make, x, y, lambda t: lr(t) * corrected(t), 60)
    assert torch.allclose(margin_path(x, y, adam_rule(eps=eps), lr, [60])[0], expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
