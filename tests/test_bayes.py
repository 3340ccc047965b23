"""Weight perturbation against a slow numpy reference, in exact cases, and where it must refuse."""
import numpy as np
import pytest
import torch
from torch import nn

from curvlab import Objective
from curvlab.optim import NonFiniteError, VOGN, Vadam, VadaGrad, Vprop

DATA = (Vadam, VOGN, Vprop)
N, D = 12, 4


def problem(seed=0):
    """Logistic regression without bias: gradients that numpy can write down."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, D)), rng.integers(0, 2, N).astype(float), rng.standard_normal(D)


def model_of(w):
    model = nn.Linear(D, 1, bias=False).double()
    model.weight.data = torch.tensor(w)[None].clone()
    return model


def objective_of(model):
    return Objective(model, nn.BCEWithLogitsLoss())


def noise(optimizer, samples):
    """The draws of the coming step, from the optimizer's own generator."""
    g = optimizer.generator()
    return [torch.randn(1, D, generator=g, dtype=torch.double).numpy()[0] for _ in range(samples)]


def reference(kind, X, y, mu, steps, draw, *, lr, b1=0.9, b2=0.9, lam=2.0, init=2.0, size=100, samples=2, growth=0.5):
    """Khan et al. (2018), one line a line; `draw(t)` gives the standard normal vectors of step t."""
    s = np.full(D, (init - lam) / size)
    s0, m, prior = s.copy(), np.zeros(D), lam / size
    for t in range(1, steps + 1):
        g, h = np.zeros(D), np.zeros(D)
        for eps in draw(t):
            w = mu + eps / np.sqrt(size * s + lam)
            each = (1 / (1 + np.exp(-X @ w)) - y)[:, None] * X
            g += each.mean(0) / samples
            h += ((each**2).mean(0) if kind is VOGN else each.mean(0) ** 2) / samples
        if kind is VadaGrad:
            s = s + growth * h
            mu = mu - lr * g / np.sqrt(s)
            continue
        s = b2 * s + (1 - b2) * h
        if kind is Vadam:
            m = b1 * m + (1 - b1) * (g + prior * mu)
            corrected = (s - b2**t * s0) / (1 - b2**t)
            mu = mu - lr * m / (1 - b1**t) / (np.sqrt(corrected) + prior)
        else:
            mu = mu - lr * (g + prior * mu) / ((s if kind is VOGN else np.sqrt(s)) + prior)
    return mu, 1 / np.sqrt(size * s + lam)


@pytest.mark.parametrize("init", [2.0, 30.0])
@pytest.mark.parametrize("kind", [Vadam, VOGN, Vprop, VadaGrad])
def test_against_reference(kind, init):
    X, y, w = problem()
    model = model_of(w)
    size, lam = (1, 0.0) if kind is VadaGrad else (100, 2.0)
    own = {Vadam: {"betas": (0.9, 0.9)}, VadaGrad: {"growth": 0.5}}.get(kind, {"beta": 0.9})
    shared = {} if kind is VadaGrad else {"train_size": size, "prior_precision": lam}
    optimizer = kind(model, lr=0.05, initial_precision=init, samples=2, seed=5, **shared, **own)
    objective, draws = objective_of(model), []
    for _ in range(9):
        draws.append(noise(optimizer, 2))
        optimizer.step(objective.at(torch.tensor(X), torch.tensor(y)[:, None]))
    mean, std = reference(kind, X, y, w, 9, lambda t: draws[t - 1], lr=0.05, size=size, lam=lam, init=init)
    assert np.abs(model.weight.detach().numpy()[0] - mean).max() < 1e-12
    assert np.abs(optimizer.posterior_std()[0].numpy()[0] / std - 1).max() < 1e-12
    other, _ = reference(VOGN if kind is Vprop else Vprop, X, y, w, 9, lambda t: draws[t - 1], lr=0.05, size=100, init=30.0)
    assert np.abs(other - mean).max() > 1e-4, "the reference cannot tell the methods apart"


@pytest.mark.parametrize("kind", DATA)
def test_noise_off_finds_the_penalised_optimum(kind):
    """Without perturbation all preconditioners share one fixed point: the ridge-penalised maximum likelihood."""
    X, y, w = problem()
    model = model_of(w)
    optimizer = kind(model, train_size=N, prior_precision=3.0, temperature=0.0, lr=0.05)
    for _ in range(1500):
        optimizer.step(objective_of(model).at(torch.tensor(X), torch.tensor(y)[:, None]))
    mu = model.weight.detach().numpy()[0]
    gradient = X.T @ (1 / (1 + np.exp(-X @ mu)) - y) + 3.0 * mu
    assert np.abs(gradient).max() < 1e-6
    assert np.abs(X.T @ (1 / (1 + np.exp(-X @ mu)) - y)).max() > 0.1, "the prior has no part in this fixed point"


def regression(size, prior=2.0, rows=20):
    """Residuals of `size` times the noise that the likelihood assumes, sampled weights included; the exact mean-field optimum."""
    rng = np.random.default_rng(3)
    X = rng.standard_normal((rows, 3))
    precision = (X**2).sum(0) + prior
    r = size * rng.choice([-1.0, 1.0], rows) * np.sqrt(1 - (X**2 / precision).sum(1))
    mean = X.T @ r / prior
    return torch.tensor(X), torch.tensor(X @ mean + r)[:, None], mean, precision


def fitted(kind, size, steps=250, **options):
    X, t, mean, precision = regression(size)
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data = torch.tensor(mean)[None].clone()
    optimizer = kind(model, train_size=len(X), prior_precision=2.0, lr=0.05, beta=0.95, samples=5, initial_precision=precision.min(), **options)
    objective, ratios = Objective(model, lambda out, target: 0.5 * ((out - target) ** 2).mean()), []
    for k in range(steps):
        optimizer.step(objective.at(X, t))
        if k > steps // 3:
            ratios.append(optimizer.posterior_std()[0].numpy()[0] ** -2 / precision)
    return np.mean(ratios, 0), np.abs(model.weight.detach().numpy()[0] - mean).max()


def test_vogn_finds_the_exact_mean_field_optimum():
    ratio, gap = fitted(VOGN, 1.0)
    assert np.abs(ratio - 1).max() < 0.04 and gap < 0.15
    assert fitted(VOGN, 2.0)[0].min() > 1.5, "squared gradients follow the residuals, not the curvature"
    assert fitted(Vprop, 1.0)[0].max() < 0.6, "squares of full-batch gradients miss most of the precision"


def test_kl():
    model = model_of(np.arange(4.0))
    optimizer = Vadam(model, train_size=10, prior_precision=2.0, initial_precision=5.0)
    q = torch.distributions.Normal(*(t[0] for t in optimizer.posterior()))
    p = torch.distributions.Normal(torch.zeros_like(q.mean[0]), torch.full_like(q.mean[0], 2.0**-0.5))
    assert float(optimizer.kl()) == pytest.approx(float(torch.distributions.kl_divergence(q, p).sum()), rel=1e-12)
    assert all(t.max() == pytest.approx(5.0**-0.5) for t in optimizer.posterior_std())


def test_samples_share_the_batch_and_average():
    """Two samples of one step cost two evaluations of one batch; dropout masks are replayed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2)).double()
    x, y = torch.randn(40, 6, dtype=torch.double), torch.randint(0, 2, (40,))
    objective = Objective(model, nn.CrossEntropyLoss())
    optimizer = Vadam(model, train_size=40, temperature=0.0, samples=3, lr=0.0)
    loss = optimizer.step(closure := objective.at(x, y))
    assert objective.cost.evaluations == 3 and objective.cost.backward == 3 * 40
    assert float(loss) == pytest.approx(float(closure(backward=False)), rel=1e-12), "without noise, same masks mean same loss"
    assert float(loss) != pytest.approx(float(objective.at(x, y)(backward=False)), rel=1e-6)


def test_sampled_restores_also_after_an_error():
    model = model_of(problem()[2])
    optimizer = Vadam(model, train_size=N)
    before = model.weight.detach().clone()
    with pytest.raises(KeyError):
        with optimizer.sampled(seed=0):
            first = model.weight.detach().clone()
            raise KeyError
    assert torch.equal(model.weight, before) and not torch.equal(first, before)
    with optimizer.sampled(seed=1):
        assert not torch.equal(model.weight, first)
    with optimizer.sampled(seed=0):
        assert torch.equal(model.weight, first)


@pytest.mark.parametrize("kind", DATA)
def test_refuses_nonfinite_and_restores(kind):
    X, y, w = problem()
    model = model_of(w)
    optimizer = kind(model, train_size=N)
    X[0, 0] = np.nan
    with pytest.raises(NonFiniteError):
        optimizer.step(objective_of(model).at(torch.tensor(X), torch.tensor(y)[:, None]))
    assert torch.equal(model.weight, torch.tensor(w)[None]) and not optimizer.state


def test_groups_without_spread():
    """`precondition=False` and frozen parameters are points."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    optimizer = VOGN(model, train_size=8, groups=[{"params": model[2].parameters(), "precondition": False}])
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.sampled(seed=0):
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before)]
    assert moved == [True, False, False, False]
    spread = {id(p): s for p, s in zip((p for g in optimizer.param_groups for p in g["params"]), optimizer.posterior_std())}
    assert spread[id(model[2].weight)].abs().max() == 0 and spread[id(model[0].weight)].min() > 0


@pytest.mark.parametrize("argument, value", [("train_size", 0), ("prior_precision", 0.0), ("initial_precision", 0.5), ("samples", 0), ("temperature", -1.0), ("weight_decay", 0.1), ("betas", (0.9, 1.0))])
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=argument):
        Vadam(nn.Linear(2, 1), **{"train_size": 10, argument: value})


def test_refuses_a_sum():
    model = model_of(problem()[2])
    x, y = torch.zeros(3, D, dtype=torch.double), torch.zeros(3, 1, dtype=torch.double)
    optimizer = Vadam(model, train_size=3)
    with pytest.raises(ValueError, match="reduction='sum'"):
        optimizer.step(Objective(model, nn.BCEWithLogitsLoss(reduction="sum")).at(x, y))
    optimizer.step(Objective(model, nn.BCEWithLogitsLoss(reduction="sum"), average="examples").at(x, y))


def test_batch_norm_has_no_per_example_gradients():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = [t.clone() for t in model.state_dict().values()]
    with pytest.raises(ValueError, match="batch norm"):
        VOGN(model, train_size=8).step(Objective(model, nn.CrossEntropyLoss()).at(torch.randn(8, 3), torch.randint(0, 2, (8,))))
    parameters = dict(model.named_parameters())
    assert all(torch.equal(t, b) for (n, t), b in zip(model.state_dict().items(), before) if n in parameters)
