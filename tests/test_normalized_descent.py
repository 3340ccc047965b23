"Steepest directions against a search over the unit ball and the dual norm, the polar factor by products against the decomposition, and the optimizer against its formula; float64, random matrices."
import pytest
import torch
from torch import nn

from curvlab import optim
from curvlab.optim.normalized_descent import as_matrices, dual_norm, polar_products, polar_svd, steepest_direction, step_norm

NORMS = ["max", "fro", "spectral", 1.5, 3.0]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1)])
def test_unit_length_and_dual_gain(norm, shape):
    G = random(20, *shape)
    D = steepest_direction(G, norm)
    assert torch.allclose(step_norm(D, norm), torch.ones(20, dtype=torch.double), rtol=1e-12)
    assert torch.allclose((G * D).sum((-2, -1)), dual_norm(G, norm), rtol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_no_unit_step_gains_more(norm):
    """A slow reference: ascent of `<G, D> / |D|` from random starts by a general method reaches the dual norm and does not pass it."""
    G, best = random(3, 4), 0.0
    for seed in range(4):
        D = random(3, 4, seed=seed + 1).requires_grad_()
        optimizer = torch.optim.Adam([D], lr=0.03)
        for k in range(1500):
            optimizer.param_groups[0]["lr"] = 0.03 * (1 - k / 1500)
            optimizer.zero_grad()
            gain = (G * D).sum() / step_norm(D, norm)
            (-gain).backward()
            optimizer.step()
            best = max(best, float(gain.detach()))
    expected = float(dual_norm(G, norm))
    assert 0.98 * expected < best <= expected * (1 + 1e-9)


def test_entrywise_formula():
    G, q = random(3, 4), 1.5
    expected = G.abs() ** (q - 1) * G.sign() / (G.abs() ** q).sum() ** ((q - 1) / q)
    assert torch.allclose(steepest_direction(G, 3.0), expected, rtol=1e-12)
    assert torch.allclose(steepest_direction(G, 2.0), G / G.norm(), rtol=1e-12)
    assert torch.equal(steepest_direction(G, float("inf")), G.sign())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e150])
def test_the_scale_does_not_matter(norm, scale):
    G = random(2, 3, 4)
    for polar in ("svd", "products"):
        assert torch.allclose(steepest_direction(scale * G, norm, polar), steepest_direction(G, norm, polar), atol=1e-9)


def test_polar_factors_agree_also_without_full_rank():
    for G in (random(10, 3, 9), random(10, 9, 3), random(6, 4, 2) @ random(6, 2, 7, seed=1), random(10, 4, 9) - random(10, 4, 9).mean(1, keepdim=True)):
        assert (polar_products(G) - polar_svd(G)).abs().max() < 1e-9
    G = random(4, 2) @ random(2, 7)
    D = polar_svd(G)
    assert torch.allclose(torch.linalg.svdvals(D), torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.double), atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradients_give_zero_steps(norm):
    G = torch.cat([torch.zeros(1, 3, 4, dtype=torch.double), random(1, 3, 4)])
    for polar in ("svd", "products"):
        D = steepest_direction(G, norm, polar)
        assert not D[0].any() and D.isfinite().all() and D[1].any()


def test_bad_arguments_are_named():
    for norm in ("l2", 1, 0.5, True, None):
        with pytest.raises(ValueError, match="norm="):
            steepest_direction(random(2, 2), norm)
    with pytest.raises(ValueError, match="polar='qr'"):
        optim.NormalizedSteepestDescent(nn.Linear(2, 2), polar="qr")
    with pytest.raises(ValueError, match="average=1"):
        optim.NormalizedSteepestDescent(nn.Linear(2, 2), average=1.0)
    with pytest.raises(ValueError, match="norm=0.5"):
        optim.NormalizedSteepestDescent(nn.Linear(2, 2), norm=0.5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("average, momentum", [(0.0, 0.0), (0.8, 0.0), (0.8, 0.5)])
def test_steps_are_the_formula(norm, average, momentum):
    shapes = [(3, 4), (5,), (2, 3, 2, 2), ()]
    params = [nn.Parameter(random(*s, seed=i)) for i, s in enumerate(shapes)]
    expected = [p.detach().clone() for p in params]
    averages, buffers = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    optimizer = optim.NormalizedSteepestDescent(params, lr=0.1, norm=norm, average=average, momentum=momentum, polar="svd")
    for t in range(6):
        grads = [10.0**-t * random(*s, seed=10 * t + i) for i, s in enumerate(shapes)]
        for p, g in zip(params, grads):
            p.grad = g.clone()
        optimizer.step()
        for i, g in enumerate(grads):
            averages[i] = average * averages[i] + (1 - average) * g
            matrix = averages[i].reshape(len(g), -1) if g.ndim > 1 else averages[i].reshape(1, -1)
            buffers[i] = momentum * buffers[i] + steepest_direction(matrix, norm).reshape(g.shape)
            expected[i] = expected[i] - 0.1 * buffers[i]
    for p, e in zip(params, expected):
        assert torch.allclose(p, e, rtol=0, atol=1e-12)


def test_relatives():
    """Sign descent is the max norm; with one tensor normalised gradient descent is the Frobenius norm."""
    def after(make):
        p = nn.Parameter(random(3, 4))
        optimizer = make([p])
        for t in range(5):
            p.grad = random(3, 4, seed=t + 1)
            optimizer.step()
        return p.detach()

    assert torch.equal(after(lambda p: optim.NormalizedSteepestDescent(p, 0.1, "max", average=0.9)), after(lambda p: optim.SignDescent(p, 0.1, average=0.9)))
    assert torch.allclose(after(lambda p: optim.NormalizedSteepestDescent(p, 0.1, "fro", momentum=0.9)), after(lambda p: optim.NormalizedGD(p, 0.1, momentum=0.9)), rtol=1e-12)


def test_groups_have_norms_of_their_own():
    a, b = nn.Parameter(random(3, 4)), nn.Parameter(random(3, 4))
    optimizer = optim.NormalizedSteepestDescent([{"params": [a], "norm": "max"}, {"params": [b], "norm": 3.0}], lr=0.1)
    before = [a.detach().clone(), b.detach().clone()]
    a.grad, b.grad = random(3, 4, seed=1), random(3, 4, seed=2)
    optimizer.step()
    moves = as_matrices([a.detach() - before[0], b.detach() - before[1]])
    assert float(step_norm(moves[0], "max")) == pytest.approx(0.1) and float(step_norm(moves[1], 3.0)) == pytest.approx(0.1)
