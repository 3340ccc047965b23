"""The spiked Wigner limit against its master equation by quadrature and against dense matrices; noise and batch size against enumeration."""
import itertools

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

from curvlab.curvature.random_matrices import effective_batch, noise_level, semicircle, spiked_wigner

close = torch.testing.assert_close


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def wigner(P, sigma, g):
    E = torch.randn(P, P, generator=g, dtype=torch.double)
    return torch.triu(E, 1) * sigma / P**0.5 + torch.triu(E, 1).T * sigma / P**0.5 + torch.diag(E.diagonal()) * sigma / P**0.5


def stieltjes(z, sigma, power=1):
    "Integral of the semicircle over (z - x)^power, in the angle, where the integrand is smooth."
    density = lambda t: float(semicircle(torch.tensor(2 * sigma * t, dtype=torch.double), sigma))
    return quad(lambda t: density(t) / (z - 2 * sigma * t) ** power * 2 * sigma, -1, 1, limit=500)[0]


@pytest.mark.parametrize("sigma", [0.3, 1.7])
@pytest.mark.parametrize("share", [1.1, 1.6, 4.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_limit_solves_the_master_equation(sigma, share, sign):
    spike = sign * share * sigma
    value, overlap = spiked_wigner(torch.tensor(spike, dtype=torch.double), sigma)
    f = lambda z: stieltjes(z, sigma) - 1 / abs(spike)
    root = sign * brentq(f, 2.001 * sigma, 20 * sigma)
    close(value, torch.tensor(root, dtype=torch.double), rtol=1e-6, atol=0)
    close(overlap, torch.tensor(1 / (spike**2 * stieltjes(abs(root), sigma, 2)), dtype=torch.double), rtol=1e-5, atol=0)


def test_below_the_threshold_only_the_edge_is_left():
    value, overlap = spiked_wigner(torch.tensor([0.5, 1.0, 0.0, -0.9, -1.0]), 1.0)
    close(value, torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0]))
    close(overlap, torch.zeros(5))


def test_continuous_at_the_threshold_and_exact_without_noise():
    spikes = torch.tensor([0.7 * (1 - 1e-9), 0.7 * (1 + 1e-9)], dtype=torch.double)
    close(*spiked_wigner(spikes, 0.7).value)
    value, overlap = spiked_wigner(torch.tensor([2.0, -3.0]), 0.0)
    close(value, torch.tensor([2.0, -3.0]))
    close(overlap, torch.ones(2))


def test_noise_levels_broadcast():
    spikes, sigma = torch.tensor([1.0, -4.0], dtype=torch.double), torch.tensor([[0.5], [2.0]], dtype=torch.double)
    both = spiked_wigner(spikes, sigma)
    for i, s in enumerate(sigma.flatten().tolist()):
        close(both.value[i], spiked_wigner(spikes, s).value)
        close(both.overlap[i], spiked_wigner(spikes, s).overlap)


def test_dense_matrices_approach_the_limit():
    """Two spikes of different sign, not orthogonal to the axes, in a generic matrix."""
    g, P, spikes = generator(1), 700, torch.tensor([2.5, -1.8], dtype=torch.double)
    u = torch.linalg.qr(torch.randn(P, 2, generator=g, dtype=torch.double)).Q
    found = []
    for _ in range(3):
        values, vectors = torch.linalg.eigh(wigner(P, 0.9, g) + (u * spikes) @ u.T)
        found.append(torch.stack([values[[-1, 0]], (u * vectors[:, [-1, 0]]).sum(0) ** 2]))
    value, overlap = spiked_wigner(spikes, 0.9)
    mean = torch.stack(found).mean(0)
    close(mean[0], value, rtol=0.03, atol=0)
    close(mean[1], overlap, rtol=0, atol=0.06)


def test_semicircle_is_a_density_with_the_right_variance():
    x = torch.linspace(-3, 3, 200_001, dtype=torch.double)
    rho = semicircle(x, 1.3)
    close(torch.trapezoid(rho, x), torch.ones((), dtype=torch.double), rtol=1e-6, atol=0)
    close(torch.trapezoid(rho * x**2, x), torch.tensor(1.3**2, dtype=torch.double), rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_effective_batch_by_all_subsets(batch):
    x = torch.randn(6, generator=generator(2), dtype=torch.double)
    means = torch.stack([x[list(rows)].mean() for rows in itertools.combinations(range(6), batch)])
    close(means.var(correction=0), x.var() / effective_batch(batch, 6))
    close(effective_batch(torch.tensor([float(batch)], dtype=torch.double), 6), torch.tensor([effective_batch(batch, 6)], dtype=torch.double))


def test_the_whole_data_set_has_no_noise():
    assert effective_batch(6, 6) == float("inf")


def test_noise_level_is_the_frobenius_norm():
    g = generator(3)
    A, E = torch.randn(40, 40, generator=g, dtype=torch.double), wigner(40, 0.6, g)
    A = A + A.T
    exact = E.square().sum() / 40
    estimate = noise_level(A + E, A, 400, g)
    assert abs(estimate.value - exact) < 4 * estimate.standard_error < 0.2 * exact
    assert estimate.products == 800


@pytest.mark.parametrize("call, words", [
    (lambda: spiked_wigner(torch.ones(1), -0.1), "sigma=-0.1"),
    (lambda: spiked_wigner(torch.ones(1), float("nan")), "sigma=nan"),
    (lambda: effective_batch(0, 5), "batch=0"),
    (lambda: effective_batch(6, 5), "batch=6"),
    (lambda: noise_level(torch.eye(3), torch.eye(4)), "one model"),
    (lambda: noise_level(torch.eye(3), torch.eye(3), 1), "probes=1"),
])
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
