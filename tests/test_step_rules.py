"Step rules: line searches and Polyak steps along any direction, against closed forms and a small numpy reference."
import copy

import numpy as np
import pytest
import torch
from torch import nn

from curvlab import Objective
from curvlab.optim import SGD, AdaGrad, Adam, AMSGrad, Armijo, EstimatedPolyak, Polyak

DIRECTIONS = {
    "SGD": lambda model, rule: SGD(model, step_rule=rule),
    "AMSGrad": lambda model, rule: AMSGrad(model, betas=(0.0, 0.99), step_rule=rule),
    "Adam": lambda model, rule: Adam(model, betas=(0.0, 0.99), step_rule=rule),
    "AdaGrad": lambda model, rule: AdaGrad(model, step_rule=rule),
}


def logistic(seed=0, n=120, d=7):
    "A zero linear model, inputs (n, d) and targets (n, 1) in {0, 1} that no plane separates (losses and slopes stay well above rounding)."
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.double, generator=generator)
    y = (x @ torch.randn(d, 1, dtype=torch.double, generator=generator) + torch.randn(n, 1, dtype=torch.double, generator=generator) > 0).double()
    model = nn.Linear(d, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model, x, y


def batches(n, size, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(n, generator=generator)[:size] for _ in range(steps)]


def reference(x, y, index, base, c, beta, init, growth, along="direction", heavy_ball=0.0):
    "Adaptive methods with Armijo search on logistic regression in numpy (Vaswani et al. 2020, algorithm 1): iterates, steps, evaluations."
    f = lambda w, i: np.mean(np.logaddexp(0, x[i] @ w) - y[i] * (x[i] @ w))
    w, v, biggest, eta, evaluations, path, previous = np.zeros(x.shape[1]), 0.0, 0.0, init, 0, [], np.zeros(x.shape[1])
    for t, i in enumerate(index, 1):
        g = x[i].T @ (1 / (1 + np.exp(-(x[i] @ w))) - y[i]) / len(i)
        v = v + g * g if base == "AdaGrad" else 0.99 * v + 0.01 * g * g
        biggest = np.maximum(biggest, v)
        scaled = {"SGD": 1.0, "AdaGrad": v, "Adam": v / (1 - 0.99**t), "AMSGrad": biggest / (1 - 0.99**t)}[base]
        d = g / (np.sqrt(scaled) + (0 if base == "SGD" else 1e-8))
        searched = d if along == "direction" else g
        eta = eta if t == 1 else eta * growth
        for _ in range(100):
            evaluations += 1
            if f(w - eta * searched, i) <= f(w, i) - c * eta * (g @ searched):
                break
            eta *= beta
        previous = heavy_ball * previous - eta * d
        w = w + previous
        path.append(w)
    return np.array(path), eta, evaluations


@pytest.mark.parametrize("base", DIRECTIONS)
@pytest.mark.parametrize("options", [{}, {"along": "gradient", "init": 30.0, "growth": 1.0}, {"heavy_ball": 0.25}, {"c": 0.5, "beta": 0.7}], ids=str)
def test_armijo_equals_the_numpy_reference(base, options):
    model, x, y = logistic()
    # the conservative search promises nothing for the preconditioned step: Adam soon diverges with it, and rounding is amplified
    index = batches(120, 20, 12 if "along" in options else 40)
    settings = {"c": 0.1, "beta": 0.9, "init": 1.0, "growth": 2 ** (1 / 6), **options}
    optimizer, objective, path = DIRECTIONS[base](model, Armijo(**settings)), Objective(model, nn.BCEWithLogitsLoss()), []
    for i in index:
        optimizer.step(objective.at(x[i], y[i]))
        path.append(model.weight.detach().numpy().ravel().copy())
    expected, eta, evaluations = reference(x.numpy(), y.numpy().ravel(), [i.numpy() for i in index], base, **settings)
    state = optimizer.param_groups[0]["step_rule"]
    np.testing.assert_allclose(np.array(path), expected, rtol=1e-9, atol=1e-12)
    assert abs(state["step"] - eta) < 1e-12 * eta and state["evaluations"] == evaluations
    assert objective.cost.evaluations == evaluations + len(index)
    assert evaluations > len(index)  # some searches did shrink: the comparison has seen the inner loop


@pytest.mark.parametrize("base", DIRECTIONS)
def test_every_accepted_step_satisfies_the_condition(base):
    model, x, y = logistic(seed=1)
    optimizer, objective = DIRECTIONS[base](model, Armijo(c=0.3, beta=0.8)), Objective(model, nn.BCEWithLogitsLoss())
    for i in batches(120, 15, 40):
        before, closure = model.weight.detach().clone(), objective.at(x[i], y[i])
        loss = optimizer.step(closure)
        decrease = (model.weight.grad * (before - model.weight)).sum().item()
        assert decrease > 0 and closure(backward=False) <= loss - 0.3 * decrease + 1e-14


def test_growth_one_never_grows_and_none_restarts():
    for growth in (1.0, None):
        model, x, y = logistic(seed=2)
        optimizer, objective, steps = SGD(model, step_rule=Armijo(init=50.0, growth=growth, c=0.5)), Objective(model, nn.BCEWithLogitsLoss()), []
        for i in batches(120, 5, 30):
            optimizer.step(objective.at(x[i], y[i]))
            steps.append(optimizer.param_groups[0]["step_rule"]["step"])
        rising = np.diff(steps) > 0
        assert not rising.any() if growth == 1.0 else rising.any()


def test_max_step_bounds_every_step():
    model, x, y = logistic()
    optimizer, objective = AMSGrad(model, betas=(0.0, 0.99), step_rule=Armijo(init=10.0, growth=2.0, max_step=0.05)), Objective(model, nn.BCEWithLogitsLoss())
    for i in batches(120, 20, 20):
        optimizer.step(objective.at(x[i], y[i]))
        assert optimizer.param_groups[0]["step_rule"]["step"] <= 0.05


class Noisy(nn.Module):
    "A net with dropout and batch norm."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).double()

    def forward(self, x):
        return self.net(x)


def test_search_replays_dropout_and_leaves_batch_norm_alone():
    torch.manual_seed(0)
    model, x, y = Noisy(), torch.randn(40, 6, dtype=torch.double), torch.randint(3, (40,))
    objective = Objective(model, nn.CrossEntropyLoss())
    optimizer = SGD(model, step_rule=Armijo(init=100.0, c=0.5))
    closure = objective.at(x, y)
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    loss = optimizer.step(closure)
    state, norm = optimizer.param_groups[0]["step_rule"], model.net[1]
    assert state["evaluations"] > 3 and "failures" not in state
    assert norm.num_batches_tracked == 1  # one training pass, however many trials
    decrease = sum((p.grad * (before[f"{n}"] - p)).sum() for n, p in model.named_parameters())
    assert closure(backward=False) <= loss - 0.5 * decrease + 1e-14  # the accepted value is that of the same masks
    fresh = objective.at(x, y)(backward=False)  # control: other masks give another value
    assert abs(fresh - closure(backward=False)) > 1e-6
    assert norm.num_batches_tracked == 1 and all(p.requires_grad for p in parameters)


def test_random_stream_is_not_disturbed_by_the_search():
    after = []
    for rule in (Armijo(init=1.0), Armijo(init=100.0)):  # few and many trials
        torch.manual_seed(0)
        model, x, y = Noisy(), torch.randn(40, 6, dtype=torch.double), torch.randint(3, (40,))
        optimizer = SGD(model, step_rule=rule)
        optimizer.step(Objective(model, nn.CrossEntropyLoss()).at(x, y))
        after.append((optimizer.param_groups[0]["step_rule"]["evaluations"], torch.rand(4)))
    assert after[0][0] != after[1][0] and torch.equal(after[0][1], after[1][1])


@pytest.mark.parametrize("rule", [lambda: Armijo(growth=1.2), lambda: Armijo(heavy_ball=0.25), lambda: Polyak(growth=1.3, init=0.1)])
def test_resume_is_exact(rule, tmp_path):
    model, x, y = logistic(seed=3)
    index, objective = batches(120, 20, 20), None
    optimizer = DIRECTIONS["AMSGrad"](model, rule())
    for i in index[:10]:
        optimizer.step(Objective(model, nn.BCEWithLogitsLoss()).at(x[i], y[i]))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other, *_ = logistic(seed=3)
    other.load_state_dict(saved["model"])
    resumed = DIRECTIONS["AMSGrad"](other, rule())
    resumed.load_state_dict(saved["optimizer"])
    for net, opt in ((model, optimizer), (other, resumed)):
        objective = Objective(net, nn.BCEWithLogitsLoss())
        for i in index[10:]:
            opt.step(objective.at(x[i], y[i]))
    assert torch.equal(model.weight, other.weight)
    assert resumed.param_groups[0]["step_rule"]["step"] == optimizer.param_groups[0]["step_rule"]["step"]


class Uphill(SGD):
    "A method whose direction is the wrong way round."

    def direction(self, group, params, grads):
        return [-g for g in grads]


def test_ascent_directions_are_refused():
    model, x, y = logistic()
    objective = Objective(model, nn.BCEWithLogitsLoss())
    searching = Uphill(model, step_rule=Armijo(floor=1e-6))
    closure = objective.at(x, y)
    loss = searching.step(closure)
    assert searching.param_groups[0]["step_rule"] == {"failures": 1, "step": 1e-6} and objective.cost.evaluations == 1
    assert 0 <= closure(backward=False) - loss < 1e-5
    before = model.weight.detach().clone()
    Uphill(model, step_rule=Polyak()).step(objective.at(x, y))
    assert torch.equal(before, model.weight)


@pytest.mark.parametrize("base", DIRECTIONS)
@pytest.mark.parametrize("c", [0.5, 1.0])
def test_polyak_is_the_formula(base, c):
    model, x, y = logistic(seed=4)
    optimizer, objective = DIRECTIONS[base](model, Polyak(c=c, f_star=0.01)), Objective(model, nn.BCEWithLogitsLoss())
    for i in batches(120, 20, 10):
        before = model.weight.detach().clone()
        loss = optimizer.step(objective.at(x[i], y[i])).item()
        move = before - model.weight
        # whatever the direction, the linear model of the loss along the move falls by (f - f*) / c
        assert abs((model.weight.grad * move).sum().item() - (loss - 0.01) / c) < 1e-12


def test_polyak_solves_one_equation_in_one_step():
    generator = torch.Generator().manual_seed(5)
    model, x, y = nn.Linear(6, 1, bias=False).double(), torch.randn(1, 6, dtype=torch.double, generator=generator), torch.randn(1, 1, dtype=torch.double, generator=generator)
    SGD(model, step_rule=Polyak(c=0.5)).step(Objective(model, nn.MSELoss()).at(x, y))
    # the loss of a single example is quadratic along its gradient: half the denominator's scale jumps on to its solution (Kaczmarz)
    assert (model(x) - y).abs().item() < 1e-14


def test_polyak_caps():
    steps = {}
    for name, rule in {"free": Polyak(), "max": Polyak(max_step=0.3), "growth": Polyak(growth=1.5, init=0.01)}.items():
        model, x, y = logistic(seed=6)
        optimizer, objective = SGD(model, step_rule=rule), Objective(model, nn.BCEWithLogitsLoss())
        steps[name] = []
        for i in batches(120, 20, 8):
            optimizer.step(objective.at(x[i], y[i]))
            steps[name].append(float(optimizer.param_groups[0]["step_rule"]["step"]))
    assert min(steps["free"]) > 0.3 and max(steps["max"]) == 0.3
    np.testing.assert_allclose(steps["growth"], 0.01 * 1.5 ** np.arange(1, 9), rtol=1e-12)


def test_coupled_weight_decay_belongs_to_the_searched_function():
    model, x, y = logistic(seed=7)
    with torch.no_grad():
        model.weight.fill_(3.0)
    optimizer, objective = SGD(model, weight_decay=2.0, step_rule=Armijo(c=0.4)), Objective(model, nn.BCEWithLogitsLoss())
    value = lambda: (objective.at(x, y)(backward=False) + model.weight.square().sum()).item()  # 2.0 / 2 * |w|^2
    before, start = model.weight.detach().clone(), value()
    optimizer.step(objective.at(x, y))
    gradient = model.weight.grad + 2.0 * before
    assert value() <= start - 0.4 * (gradient * (before - model.weight)).sum().item() + 1e-12 < start


@pytest.mark.parametrize("bad", [dict(c=0.0), dict(c=1.0), dict(beta=1.0), dict(init=0.0), dict(growth=0.9), dict(max_step=0.0), dict(heavy_ball=1.0), dict(along="sideways"), dict(max_trials=0)], ids=str)
def test_bad_arguments_are_named(bad):
    (name, value), = bad.items()
    with pytest.raises(ValueError, match=name):
        Armijo(**bad)
    if name in ("c", "growth", "max_step", "init", "heavy_ball") and bad != dict(c=1.0):
        with pytest.raises(ValueError, match=name):
            Polyak(**bad)


def test_a_gradient_alone_is_not_enough():
    model, x, y = logistic()
    nn.functional.binary_cross_entropy_with_logits(model(x), y).backward()
    with pytest.raises(TypeError, match="objective.at"):
        SGD(model, step_rule=Armijo()).step()


def test_estimated_polyak_equals_a_numpy_reference():
    generator = torch.Generator().manual_seed(8)
    x, y = torch.randn(40, 5, dtype=torch.double, generator=generator), torch.randn(40, 1, dtype=torch.double, generator=generator)
    model = nn.Linear(5, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer, objective = SGD(model, weight_decay=0.1, step_rule=EstimatedPolyak(lower=-0.2, every=7, c=1.5)), Objective(model, nn.MSELoss())
    X, Y, w, level, best = x.numpy(), y.numpy()[:, 0], np.zeros(5), -0.2, np.inf
    for k in range(60):
        f, g = np.square(X @ w - Y).mean() + 0.05 * w @ w, 2 * X.T @ (X @ w - Y) / 40 + 0.1 * w
        best = min(best, f)
        if k and k % 7 == 0:
            level = (level + best) / 2
        w = w - max(f - level, 0) / (1.5 * g @ g) * g
        optimizer.step(objective.at(x, y))
        if k < 30:  # later the steps bounce around the minimum and amplify rounding
            np.testing.assert_allclose(model.weight.detach().numpy()[0], w, rtol=1e-6, atol=1e-9)
    least = np.linalg.eigvalsh(X.T @ X / 20 + 0.1 * np.eye(5))[0]
    solution = np.linalg.solve(2 * X.T @ X / 40 + 0.1 * np.eye(5), 2 * X.T @ Y / 40)
    lowest = np.square(X @ solution - Y).mean() + 0.05 * solution @ solution
    assert least > 0 and best - lowest < 1e-2 * lowest and level > -0.2
    with pytest.raises(ValueError, match="every"):
        EstimatedPolyak(every=0)
