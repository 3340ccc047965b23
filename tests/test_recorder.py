"""The recorder: it disturbs nothing, its numbers are those of dense matrices, and its table says what is missing and what it cost."""
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from methods import ARGUMENTS, METHODS, PER_EXAMPLE
from torch import nn

from curvlab import Objective, optim
from curvlab.curvature import GGN, Hessian, operators
from curvlab.lab import plots
from curvlab.lab.problems import problem
from curvlab.lab.recorder import (Recorder, alignment, at_parameters, decrease, decrease_plot, factor_conditions, limit_plot, preconditioned_sharpness, sharpness, spectrum,
                                  spectrum_plot, stability_limit, top_eigenvalues, torch_denominator, undisturbed)
from curvlab.lab.train import Recipe, train

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.optim.engine.FallbackWarning")


def net(norm=True):
    return nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, 10))


def task(norm=True):
    base = problem("digits-mlp", dtype=torch.double)
    return replace(base, data=base.data.first(60), build=lambda: net(norm), batch=20)


TORCH = ["torch.optim.SGD(lr=0.1, momentum=0.9)", "torch.optim.Adam(lr=0.01)", "torch.optim.AdamW(amsgrad=True)", "torch.optim.RMSprop", "torch.optim.Adagrad"]


@pytest.mark.parametrize("name", [*METHODS, *TORCH])
def test_a_run_is_the_same_to_the_last_bit_with_and_without(name):
    """Dropout and batch norm in the model, and every optimizer: parameters, buffers, records, work account, global random state."""
    recipe = name if "." in name else Recipe(name, ARGUMENTS.get(name, {}))
    measures = [sharpness(max_products=12), decrease(), spectrum(2, 3), alignment(2, max_products=12), factor_conditions()]
    settings = dict(seed=1, evaluate_every=2, label="one")
    with pytest.warns(UserWarning):   # few products on purpose
        recorder = Recorder(*measures, every=2, examples=30)
        before = torch.get_rng_state()
        watched = train(task(name not in PER_EXAMPLE), recipe, 5, watch=[recorder], **settings)
        assert torch.equal(torch.get_rng_state(), before)
    plain = train(task(name not in PER_EXAMPLE), recipe, 5, **settings)
    for mine, theirs in ((watched.at, plain.at), (watched.per_step, plain.per_step)):
        for column in mine.keys() - {"seconds"}:
            assert mine[column] == theirs[column], column
    assert all(torch.equal(a, b) for a, b in zip(watched.model.state_dict().values(), plain.model.state_dict().values()))
    assert [row["step"] for row in recorder.rows] == [0, 2, 4] and all("sharpness" in row and "trace" in row for row in recorder.rows)


def test_everything_a_measurement_touches_is_put_back():
    model = net().double()
    x, y = torch.randn(30, 64).double(), torch.randint(0, 10, (30,))
    Objective(model, nn.CrossEntropyLoss()).at(x, y)()
    model[2].eval()
    grads, modes, buffers = [p.grad for p in model.parameters()], [m.training for m in model.modules()], [(b, b.clone()) for b in model.buffers()]
    values, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
    for fail in (False, True):
        with pytest.raises(KeyError) if fail else undisturbed(model), undisturbed(model, evaluation=fail):
            torch.rand(3)
            model(x).sum().backward()
            model.train()
            if fail:
                raise KeyError
        assert all(p.grad is g for p, g in zip(model.parameters(), grads)) and [m.training for m in model.modules()] == modes
        assert all(b is mine and torch.equal(b, kept) for b, (mine, kept) in zip(model.buffers(), buffers)) and torch.equal(torch.get_rng_state(), random)
    with pytest.raises(KeyError), at_parameters(list(model.parameters()), [v + 1 for v in values]):
        raise KeyError
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values))


def watch_by_hand(optimizer_of, *measures, steps=6, every=2, model=None, evaluation=False, look=None):
    """A loop without `train`; `look(step, model, optimizer, x, y)` is the reference, called where the recorder measures."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y, loss = torch.randn(40, 5).double(), torch.randint(0, 3, (40,)), nn.CrossEntropyLoss()
    optimizer = optimizer_of(model)
    recorder = Recorder(*measures, every=every, objective=Objective(model, loss), x=x, y=y, optimizer=optimizer, evaluation=evaluation)
    seen = []
    for step in range(steps + 1):
        if step:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step() if not isinstance(optimizer, optim.KFAC) else optimizer.step(Objective(model, loss).at(x, y))
        recorder(step)
        if look and step % every == 0:
            seen.append(look(model, optimizer, x, y))
    return recorder, seen


def dense(model, x, y, kind=Hessian):
    return kind(Objective(model, nn.CrossEntropyLoss()), x, y).to_dense()


def gradient(model, x, y):
    grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def test_sharpness_eigenvalues_and_alignment_equal_the_dense_ones():
    def look(model, optimizer, x, y):
        (values, Q), g = torch.linalg.eigh(dense(model, x, y)), gradient(model, x, y)
        return values[-1], values[-3:].flip(0), ((Q[:, -3:].T @ g) ** 2).sum() / (g @ g), g @ (Q * values) @ Q.T @ g / (g @ g), torch.linalg.eigvalsh(dense(model, x, y, GGN))[-1]

    measures = top_eigenvalues(3, tol=1e-8), alignment(3, tol=1e-8), sharpness(tol=1e-8), sharpness("ggn", tol=1e-8)
    recorder, seen = watch_by_hand(lambda m: torch.optim.SGD(m.parameters(), lr=0.5), *measures, look=look)
    for row, (top, three, share, along, ggn) in zip(recorder.rows, seen, strict=True):
        close = lambda name, value: abs(row[name] - float(value)) < 1e-7
        assert close("sharpness", top) and close("gradient in top 3", share) and close("curvature along gradient", along) and close("GGN sharpness", ggn)
        assert all(close(f"eigenvalue {i + 1}", v) for i, v in enumerate(three)) and row["sharpness residual"] < 1e-7


def test_trace_and_density():
    recorder, seen = watch_by_hand(lambda m: torch.optim.SGD(m.parameters(), lr=0.5), spectrum(30, 20), look=lambda m, o, x, y: dense(m, x, y).trace())
    assert all(abs(row["trace"] - float(t)) < 4 * row["trace error"] for row, t in zip(recorder.rows, seen, strict=True))
    assert "spectrum" not in recorder.columns() and recorder.rows[0]["spectrum"].nodes.shape == (30, 20)


DIAGONAL = {
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01, betas=(0.0, 0.9), eps=1e-3),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.0, 0.9), eps=1e-3, weight_decay=0.0),
    "AMSGrad": lambda ps: torch.optim.Adam(ps, lr=0.01, betas=(0.0, 0.9), eps=1e-3, amsgrad=True),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=0.01, betas=(0.0, 0.9), eps=1e-3),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, eps=1e-3),
    "RMSprop, centred": lambda ps: torch.optim.RMSprop(ps, lr=0.01, eps=1e-3, centered=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01, eps=1e-3),
}


@pytest.mark.parametrize("name", DIAGONAL)
def test_preconditioned_sharpness_of_torch_methods(name):
    """The denominator is what the step itself divided by: `lr g / (theta - theta_new)`, with the averaging of gradients switched off. The eigenvalue is a dense one."""
    state = {}

    def look(model, optimizer, x, y):
        params = list(model.parameters())
        theta, g = torch.cat([p.detach().flatten() for p in params]), gradient(model, x, y)
        expected = None
        if "theta" in state:
            measured = 0.01 * state["g"] / (state["theta"] - theta)
            assert torch.allclose(torch_denominator(optimizer, params), measured, rtol=1e-6)
            expected = torch.linalg.eigvalsh(dense(model, x, y) / measured.sqrt() / measured.sqrt()[:, None])[-1]
        state.update(theta=theta, g=g)
        return expected

    recorder, seen = watch_by_hand(lambda m: DIAGONAL[name](m.parameters()), preconditioned_sharpness(tol=1e-8), steps=4, every=1, look=look)
    assert "preconditioned sharpness" not in recorder.rows[0] and math.isnan(recorder["preconditioned sharpness"][0])
    assert all(abs(row["preconditioned sharpness"] / float(e) - 1) < 1e-5 for row, e in zip(recorder.rows[1:], seen[1:], strict=True))


def test_a_given_diagonal_and_methods_without_one():
    given = lambda optimizer, params: 4 * torch.ones(sum(p.numel() for p in params)).double()
    recorder, _ = watch_by_hand(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), preconditioned_sharpness(given, tol=1e-8), sharpness(tol=1e-8))
    assert all(abs(4 * row["preconditioned sharpness"] - row["sharpness"]) < 1e-6 for row in recorder.rows)
    with pytest.raises(TypeError, match="SGD"):
        watch_by_hand(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), preconditioned_sharpness())
    with pytest.raises(ValueError, match="take a step"):
        p = nn.Parameter(torch.ones(3))
        torch_denominator(torch.optim.Adam([p]), [p])


@pytest.mark.skipif(not hasattr(operators, "preconditioner_of"), reason="needs preconditioner_of")
@pytest.mark.parametrize("make", [lambda m: optim.Adam(m, lr=0.01), lambda m: optim.KFAC(m, lr=0.1, damping=0.1)], ids=["Adam", "KFAC"])
def test_preconditioned_sharpness_of_our_methods(make):
    def look(model, optimizer, x, y):
        if not optimizer.state:
            return None
        root = operators.preconditioner_of(optimizer, list(model.parameters())).power(-0.5).to_dense()
        return torch.linalg.eigvalsh(root @ dense(model, x, y) @ root)[-1]

    recorder, seen = watch_by_hand(make, preconditioned_sharpness(tol=1e-8), look=look)
    assert all(abs(row["preconditioned sharpness"] / float(e) - 1) < 1e-6 for row, e in zip(recorder.rows[1:], seen[1:], strict=True))


def test_decrease_by_hand():
    """Reference: gradient and dense Hessian at the old parameters, kept by the test itself."""
    old = []

    def look(model, optimizer, x, y):
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(x), y)
        old.append((torch.cat([p.detach().flatten() for p in model.parameters()]), loss, gradient(model, x, y), dense(model, x, y)))

    recorder, _ = watch_by_hand(lambda m: torch.optim.Adam(m.parameters(), lr=0.05), decrease(), steps=5, every=1, look=look)
    for row, (theta, loss, g, H), (theta_new, loss_new, _, _) in zip(recorder.rows, old, old[1:]):
        s = theta_new - theta
        assert abs(row["linear decrease"] + g @ s) < 1e-12 and abs(row["predicted decrease"] + g @ s + s @ H @ s / 2) < 1e-12 and abs(row["actual decrease"] - (loss - loss_new)) < 1e-12
        assert abs(row["loss"] - loss) < 1e-12
    assert "actual decrease" not in recorder.rows[-1]      # its next step was never taken
    sparse, _ = watch_by_hand(lambda m: torch.optim.Adam(m.parameters(), lr=0.05), decrease(), steps=5, every=2)
    assert [sparse.rows[i]["actual decrease"] for i in (0, 1)] == [recorder.rows[i]["actual decrease"] for i in (0, 2)]


def test_condition_numbers_of_factors():
    def look(model, optimizer, x, y):
        return {f"condition {n} {k}": np.linalg.cond(optimizer.state[p][k][0].numpy()) for n, p in model.named_parameters() for k in optimizer.state.get(p, {}) if k == "A" or k.startswith("gram")}

    for make in (lambda m: optim.KFAC(m, lr=0.1), lambda m: optim.Shampoo(m, lr=0.1)):
        recorder, seen = watch_by_hand(make, factor_conditions(), look=look)
        compared = 0
        for row, expected in zip(recorder.rows[1:], seen[1:], strict=True):
            for name, value in expected.items():
                compared += value < 1e8
                assert value > 1e12 if math.isinf(row[name]) else abs(row[name] / value - 1) < 1e-4
        assert compared > 5 and not any(name.startswith("condition") for name in recorder.rows[0])


def test_measurements_are_reproducible_and_know_their_mode():
    """Every measurement sees the same dropout mask; evaluation mode is another function, and does not stay on."""
    def run(evaluation):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
        recorder, _ = watch_by_hand(lambda m: torch.optim.SGD(m.parameters(), lr=0.0), sharpness(tol=1e-8), sharpness("ggn", tol=1e-8), model=model, evaluation=evaluation)
        assert model.training
        return recorder

    train_mode, eval_mode = run(False), run(True)
    assert np.ptp(train_mode["sharpness"]) < 1e-6 and np.ptp(eval_mode["sharpness"]) > 1e-6       # in evaluation mode the running statistics count, which move
    assert abs(train_mode["sharpness"][0] - eval_mode["sharpness"][0]) > 1e-3


def test_a_divergence_leaves_columns_out():
    recorder = Recorder(sharpness(), decrease(), every=1)
    run = train(task(), "torch.optim.SGD(lr=1e308)", 6, watch=[recorder])
    assert run.diverged and "sharpness" in recorder.rows[0] and "sharpness" not in recorder.rows[-1] and not math.isfinite(recorder.rows[-1]["loss"])


def test_steps_costs_and_columns():
    asked = []
    recorder = Recorder(sharpness(), every=lambda step: asked.append(step) or step in (0, 3), examples=25)
    train(task(), "SGD(lr=0.1)", 4, watch=[recorder])
    assert sorted(set(asked)) == [0, 1, 2, 3, 4] and recorder["step"].tolist() == [0, 3] and len(recorder.y) == 25
    assert recorder.cost() == {name: recorder[name].sum() for name in ("products", "recording seconds")} and recorder["products"].min() >= 7
    assert recorder.curve()[0].tolist() == [0, 3] and [*recorder.columns()][:4] == ["step", "products", "recording seconds", "loss"]
    with pytest.raises(KeyError, match="sharpness"):
        recorder["curvature"]
    assert stability_limit(0.1) == 20 and math.isclose(stability_limit(0.1, momentum=0.5), 30) and math.isclose(stability_limit(0.1, average=0.5), 60)
    for bad in (dict(every=0), dict(every=1.5), dict(examples=0), dict(objective=recorder.objective), dict(x=recorder.x, y=recorder.y)):
        with pytest.raises(ValueError):
            Recorder(**bad)
    with pytest.raises(ValueError, match="knows no model"):
        Recorder()(3)
    with pytest.raises(ValueError, match="curvature='fisher'"):
        train(task(), "SGD", 1, watch=[Recorder(sharpness("fisher"))])


@pytest.mark.parametrize("lr, momentum, average", [(0.3, 0.0, 0.0), (0.3, 0.9, 0.0), (0.3, 0.0, 0.9)])
def test_stability_limit_of_a_quadratic(lr, momentum, average):
    """Just below the limit the recursion shrinks, just above it grows."""
    for factor, stable in ((0.98, True), (1.02, False)):
        curvature, theta, m = factor * stability_limit(lr, momentum, average), 1.0, 0.0
        for _ in range(3000):
            m = momentum * m + curvature * theta if not average else average * m + (1 - average) * curvature * theta
            theta = max(min(theta - lr * m, 1e100), -1e100)
        assert (abs(theta) < 1e-3) == stable


def test_figures():
    recorder = Recorder(sharpness(), decrease(), spectrum(2, 5), every=1)
    train(task(), "SGD(lr=0.1)", 3, watch=[recorder])
    fig, axes = plt.subplots(4)
    limit_plot(axes[0], {"SGD": recorder}, limits={"SGD": 20.0})
    decrease_plot(axes[1], recorder)
    spectrum_plot(axes[2], recorder)
    plots.curves(axes[3], {"SGD": [recorder, recorder]}, y="sharpness")
    assert all(ax.get_xlabel() == "step" and ax.get_ylabel() for ax in axes) and len(axes[0].lines) == 2
    with pytest.raises(ValueError, match="spectrum"):
        spectrum_plot(axes[2], Recorder())
    plt.close(fig)
