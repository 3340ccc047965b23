"""Matrix roots and Krylov solvers on random generic matrices, against plain linear algebra in float64."""
import math

import pytest
import torch
from fake_device import DEVICE, fake_device, no_host_reads
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlab.curvature.roots import METHODS, RIDGES, grouped, inverse_root, power, root_residual
from curvlab.curvature.solvers import cg, lanczos, martens_stop

few = settings(max_examples=25, deadline=None)


def spd(spectrum, seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=g, dtype=torch.double)).Q
    return (q * torch.as_tensor(spectrum, dtype=torch.double)) @ q.T


spectra = st.lists(st.floats(-4, 0), min_size=1, max_size=12).map(lambda logs: [10**e for e in logs])


@few
@given(spectra, st.integers(1, 8), st.integers(0, 99), st.floats(1e-6, 1e6))
def test_both_methods_invert_their_power(spectrum, p, seed, scale):
    M = scale * spd(spectrum, seed)
    for method in METHODS:
        assert root_residual(inverse_root(M, p, method=method), M, p) < 1e-9
    assert torch.allclose(power(M, 1 / p).matrix_power(p), M, rtol=1e-9, atol=1e-9 * scale)


@few
@given(spectra, st.sampled_from(RIDGES), st.floats(1e-6, 1.0), st.integers(0, 99))
def test_ridge_means_what_it_says(spectrum, ridge, eps, seed):
    M = spd(spectrum, seed)
    n = len(spectrum)
    size = {"absolute": eps, "mean": eps * M.trace() / n, "max": eps * torch.linalg.eigvalsh(M)[-1]}[ridge]
    expected = torch.linalg.inv(M + size * torch.eye(n).double())
    # the largest eigenvalue is replaced by an upper bound at most n^(1/128) too large
    slack = n ** (1 / 128) - 1 + 1e-9
    for method in METHODS:
        assert torch.linalg.norm(inverse_root(M, 1, eps, method, ridge=ridge) - expected) <= slack * torch.linalg.norm(expected)


def test_scale_of_the_matrix_does_not_matter_under_a_relative_ridge():
    M = spd([1e-9, 1e-3, 1.0], 0)
    for method in METHODS:
        a, b = inverse_root(M, 4, 1e-6, method, ridge="max"), inverse_root(1e20 * M, 4, 1e-6, method, ridge="max")
        assert torch.allclose(a, 1e5 * b, rtol=1e-10)


def test_a_broken_matrix_does_not_spoil_its_neighbours():
    good, bad = spd([1.0, 2.0, 3.0], 1), torch.full((3, 3), torch.nan).double()
    for method in METHODS:
        first, second = grouped(inverse_root, [good, bad], 2, method=method)
        assert torch.allclose(first, inverse_root(good, 2, method=method)) and second.isnan().any()


@pytest.mark.parametrize("method", METHODS)
def test_roots_read_nothing_from_the_device(method):
    with fake_device():
        stack = torch.zeros(3, 5, 5)
        with no_host_reads():
            assert inverse_root(stack, 4, 1e-6, method, ridge="max").device == DEVICE


@few
@given(spectra, st.integers(0, 99))
def test_conjugate_gradients_solve_and_never_raise_the_model(spectrum, seed):
    A = spd([1e-2 + s for s in spectrum], seed)
    g = torch.Generator().manual_seed(seed + 1)
    b, x0 = torch.randn(2, len(spectrum), generator=g, dtype=torch.double)
    found = cg(lambda v: A @ v, b, x0, tol=1e-10)
    assert found.converged and torch.allclose(found.x, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-8)
    assert all(later <= earlier + 1e-12 * abs(earlier) for earlier, later in zip(found.values, found.values[1:]))


def test_one_product_an_iteration():
    A, b, count = spd([10.0**-i for i in range(8)], 0), torch.ones(8).double(), []
    found = cg(lambda v: count.append(1) or A @ v, b, tol=1e-12)
    assert len(count) == found.iterations
    count.clear()
    found = cg(lambda v: count.append(1) or A @ v, b, 0.5 * b, tol=1e-12)
    assert len(count) == found.iterations + 1


def test_martens_rule_by_hand():
    """q falls by a constant factor: the rule fires at the first i with the printed inequality, and a zero tolerance never does."""
    values = [-1 + 0.8**i for i in range(80)]
    def printed(i):
        k = max(10, 0.1 * i)
        return i > k and values[i] < 0 and (values[i] - values[i - math.ceil(k)]) / values[i] < math.ceil(k) * 5e-4
    for i in range(80):
        assert martens_stop(values[: i + 1]) == printed(i)
    assert not martens_stop(values, tol=0.0) and any(map(printed, range(80))) and not printed(11)


@few
@given(spectra, st.integers(0, 99))
def test_lanczos_finds_every_eigenvalue(spectrum, seed):
    A = spd(spectrum, seed)
    start = torch.randn(len(spectrum), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.double)
    found = lanczos(lambda v: A @ v, start, len(spectrum))
    assert torch.allclose(found.values, torch.linalg.eigvalsh(A), atol=1e-10)
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(len(spectrum)).double(), atol=1e-10)
