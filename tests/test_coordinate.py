"""Two-coordinate descent: each rule against an obvious version of it, on random problems with coordinates at their bounds."""
import math

import pytest
import torch

from curvlab.optim.coordinate import gs_1, gs_1_reference, gs_q, gs_s, minimise_quadratic, pair_lipschitz, random_pair, step_model


def instance(n, seed):
    "Gradient, point with a third of its coordinates at each bound, bounds."
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(n, dtype=torch.double, generator=g)
    lo, hi, at, between = -draw(), draw(), draw(), draw()
    x = torch.where(at < 1 / 3, lo, torch.where(at < 2 / 3, hi, lo + between * (hi - lo)))
    return 3 * torch.randn(n, dtype=torch.double, generator=g), x, lo, hi


def problem(n=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    A, b = torch.randn(8, n, dtype=torch.double, generator=g), torch.randn(n, dtype=torch.double, generator=g)
    return A.T @ A / 8 + 0.1 * torch.eye(n, dtype=torch.double), b


def test_lipschitz_constant_by_enumeration():
    H, _ = problem(7)
    pairs = [torch.eye(7, dtype=torch.double)[i] - torch.eye(7, dtype=torch.double)[j] for i in range(7) for j in range(7)]
    assert float(pair_lipschitz(H)) == pytest.approx(max(float(e @ H @ e) / 2 for e in pairs))
    d = torch.randn(2000, 7, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    d = d - d.mean(1, keepdim=True)
    assert ((d @ H * d).sum(1) <= pair_lipschitz(H) / 2 * d.abs().sum(1) ** 2 + 1e-12).all()


@pytest.mark.parametrize("seed", range(12))
def test_gs_1_is_optimal(seed):
    g, x, lo, hi = instance(8, seed)
    d = gs_1(g, x, lo, hi, 0.7)
    assert abs(float(d.sum())) < 1e-12 and (x + d >= lo - 1e-12).all() and (x + d <= hi + 1e-12).all()
    assert float(step_model(g, d, 0.7)) == pytest.approx(gs_1_reference(g, x, lo, hi, 0.7), abs=1e-7)
    assert step_model(g, d, 0.7) <= step_model(g, gs_q(g, x, lo, hi, 0.7), 0.7) + 1e-12


def clipped_pair(g, x, lo, hi, L2, i, j):
    t = min(max(float(g[i] - g[j]), 0) / (2 * L2), float(x[i] - lo[i]), float(hi[j] - x[j]))
    return t, L2 * t * t - t * float(g[i] - g[j])


@pytest.mark.parametrize("seed", range(4))
def test_gs_q_tries_all_pairs(seed):
    g, x, lo, hi = instance(9, seed)
    best = min(clipped_pair(g, x, lo, hi, 0.7, i, j)[1] for i in range(9) for j in range(9) if i != j)
    assert float(step_model(g, gs_q(g, x, lo, hi, 0.7), 0.7)) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_gs_s_is_the_largest_violation(seed):
    g, x, lo, hi = instance(9, seed)
    i = max((k for k in range(9) if x[k] > lo[k]), key=lambda k: g[k])
    j = min((k for k in range(9) if x[k] < hi[k]), key=lambda k: g[k])
    d = gs_s(g, x, lo, hi, 0.7)
    assert float(-d[i]) == pytest.approx(clipped_pair(g, x, lo, hi, 0.7, i, j)[0]) and float(d[j]) == pytest.approx(float(-d[i]))


def test_without_bounds_gs_1_is_the_greedy_pair():
    g, x, *_ = instance(11, 3)
    wide = torch.full_like(g, math.inf)
    torch.testing.assert_close(gs_1(g, x, -wide, wide, 2.0), gs_s(g, x, -wide, wide, 2.0))


def test_no_step_at_the_optimum_and_where_nothing_can_move():
    g, x, lo, hi = instance(6, 0)
    assert (gs_1(torch.ones_like(g), x, lo, hi, 1.0) == 0).all()
    assert (gs_1(g, x, x, x, 1.0) == 0).all()


@pytest.mark.parametrize("rule", [gs_s, gs_q, gs_1, random_pair(torch.Generator().manual_seed(0))])
def test_descent_keeps_sum_and_bounds_and_decreases(rule):
    H, b = problem()
    wall = torch.full_like(b, 0.4)
    path, values = minimise_quadratic(H, b, rule, 100, torch.zeros_like(b), -wall, wall)
    assert path.sum(1).abs().max() < 1e-12 and path.abs().max() <= 0.4
    assert (values[1:] <= values[:-1] + 1e-13).all() and values[-1] < values[0]
    torch.testing.assert_close(values, ((path @ H) * path).sum(1) / 2 - path @ b)


def test_unbounded_minimum_is_that_of_the_linear_system():
    H, b = problem(10)
    one = torch.ones(10, 1, dtype=torch.double)
    system = torch.cat([torch.cat([H, one], 1), torch.cat([one.T, torch.zeros(1, 1, dtype=torch.double)], 1)])
    star = torch.linalg.solve(system, torch.cat([b, torch.zeros(1, dtype=torch.double)]))[:10]
    path, _ = minimise_quadratic(H, b, gs_1, 2000, torch.zeros_like(b))
    torch.testing.assert_close(path[-1], star, rtol=1e-5, atol=1e-6)


def test_a_start_outside_is_refused():
    H, b = problem()
    with pytest.raises(ValueError, match="x: 30 coordinates"):
        minimise_quadratic(H, b, gs_1, 1, torch.ones_like(b), -b.abs() * 0, b.abs() * 0)
