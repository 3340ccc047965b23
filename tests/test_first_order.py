"First-order methods against transcriptions of their formulas on one flat vector, in float64, on random gradients."
import pytest
import torch
from torch import nn

from curvlab import optim

STEPS, LR = 20, 0.01


def gradients(seed=0):
    "Random gradients of three tensors, of very different sizes, with coordinates that are zero at times."
    g = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), (2, 3)]
    rows = [[torch.randn(s, generator=g, dtype=torch.double) * 10 ** (2 * torch.randn(s, generator=g, dtype=torch.double)) for s in shapes] for _ in range(STEPS)]
    for row in rows:
        row[1][0] *= 0.0
        row[0][0, 0] *= float(torch.rand((), generator=g) > 0.5)
    return rows


def parameters():
    g = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=g, dtype=torch.double)) for s in [(3, 4), (5,), (2, 3)]]


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def ours(make, rows):
    params = parameters()
    optimizer = make(params)
    for row in rows:
        for p, g in zip(params, row):
            p.grad = g.clone()
        optimizer.step()
    return flat(params)


def adamax(theta, g, memory, t, b1=0.9, b2=0.7, eps=1e-8):
    m, u = memory.get("m", 0 * theta), memory.get("u", 0 * theta)
    memory["m"], memory["u"] = m, u = b1 * m + (1 - b1) * g, torch.maximum(b2 * u, g.abs() + eps)
    return theta - LR / (1 - b1**t) * m / u


def nadamw(theta, g, memory, t, b1=0.9, b2=0.7, eps=1e-8, decay=0.3):
    theta = theta * (1 - LR * decay)
    memory["m"] = m = b1 * memory.get("m", 0) + (1 - b1) * g
    memory["v"] = v = b2 * memory.get("v", 0) + (1 - b2) * g**2
    return theta - LR * ((b1 * m + (1 - b1) * g) / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)


def normalised(theta, g, memory, t, mu=0.9):
    memory["b"] = b = mu * memory.get("b", 0) + g / g.square().sum().sqrt()
    return theta - LR * b


def rescaled_sign(theta, g, memory, t, mu=0.9):
    memory["b"] = b = mu * memory.get("b", 0) + g.abs().sum() * g.sign()
    return theta - LR * b


def sign_then_momentum(theta, g, memory, t, mu=0.9):
    memory["b"] = b = mu * memory.get("b", 0) + g.sign()
    return theta - LR * b


def signum(theta, g, memory, t, b=0.9):
    memory["m"] = m = b * memory.get("m", 0) + (1 - b) * g
    return theta - LR * m.sign()


def nesterov(theta, g, memory, t, mu=0.9):
    memory["b"] = b = mu * memory.get("b", 0) + g
    return theta - LR * (g + mu * b)


PAIRS = {
    "AdaMax": (lambda p: optim.AdaMax(p, lr=LR, betas=(0.9, 0.7)), adamax),
    "NAdamW": (lambda p: optim.NAdamW(p, lr=LR, betas=(0.9, 0.7), weight_decay=0.3), nadamw),
    "NormalizedGD": (lambda p: optim.NormalizedGD(p, lr=LR, momentum=0.9), normalised),
    "RescaledSign": (lambda p: optim.RescaledSign(p, lr=LR, momentum=0.9), rescaled_sign),
    "SignDescent, momentum after": (lambda p: optim.SignDescent(p, lr=LR, momentum=0.9), sign_then_momentum),
    "SignDescent, average before": (lambda p: optim.SignDescent(p, lr=LR, average=0.9), signum),
    "SGD, Nesterov": (lambda p: optim.SGD(p, lr=LR, momentum=0.9, nesterov=True), nesterov),
}


def by_formula(step, rows):
    theta, memory = flat(parameters()), {}
    for t, row in enumerate(rows, start=1):
        theta = step(theta, flat(row), memory, t)
    return theta


@pytest.mark.parametrize("name", PAIRS)
def test_steps_are_the_formula(name):
    rows = gradients()
    make, formula = PAIRS[name]
    expected = by_formula(formula, rows)
    assert (expected - flat(parameters())).abs().max() > 0.05
    assert (ours(make, rows) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_the_order_of_sign_and_momentum_matters():
    rows = gradients()
    assert (by_formula(sign_then_momentum, rows) / 10 - by_formula(signum, rows) / 10).abs().max() > 1e-3


def test_adamax_without_eps_ignores_coordinates_that_never_had_a_gradient():
    rows = gradients()
    moved = ours(lambda p: optim.AdaMax(p, eps=0.0), rows) - flat(parameters())
    assert moved.isfinite().all() and moved[12] == 0 and (moved[1:12] != 0).all()


def test_groups_share_one_norm_unless_they_opt_out():
    rows = gradients()

    def in_groups(params, **second):
        return optim.NormalizedGD([{"params": params[:1]}, {"params": params[1:], **second}], lr=LR, momentum=0.9, fallback="sgd", fallback_scale=1.0)

    assert torch.equal(ours(in_groups, rows), ours(lambda p: optim.NormalizedGD(p, lr=LR, momentum=0.9), rows))
    apart = ours(lambda p: in_groups(p, precondition=False), rows)
    assert torch.allclose(apart[:12], ours(lambda p: optim.NormalizedGD(p[:1], lr=LR, momentum=0.9), rows)[:12])
    assert torch.allclose(apart[12:], ours(lambda p: optim.SGD(p, lr=LR, momentum=0.9), rows)[12:])


@pytest.mark.parametrize("method", ["NormalizedGD", "RescaledSign"])
def test_a_zero_gradient_gives_no_step(method):
    zeros = [[torch.zeros(s, dtype=torch.double) for s in [(3, 4), (5,), (2, 3)]]]
    assert torch.equal(ours(lambda p: getattr(optim, method)(p), zeros), flat(parameters()))
