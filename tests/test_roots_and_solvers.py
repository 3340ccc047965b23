"""Matrix roots and Krylov solvers on random generic matrices, against plain linear algebra in float64."""
import math

import pytest
import torch
from fake_device import DEVICE, fake_device, no_host_reads
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlab.curvature.roots import METHODS, RIDGES, eigendecomposition, grouped, inverse_root, power, root_residual
from curvlab.curvature.solvers import cg, lanczos, martens_stop, minres

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


signed = st.lists(st.one_of(st.floats(-5, -0.05), st.floats(0.05, 5)), min_size=1, max_size=20)


@few
@given(signed, st.integers(0, 99))
def test_minres_solves_indefinite_systems(spectrum, seed):
    A, n = spd(spectrum, seed), len(spectrum)
    b = torch.randn(n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.double)
    found = minres(lambda v: A @ v, b, tol=1e-10)
    assert found.converged and torch.linalg.norm(b - A @ found.x) <= 2e-10 * torch.linalg.norm(b) + 1e-12
    assert all(later <= earlier for earlier, later in zip(found.residuals, found.residuals[1:]))


def test_minres_is_the_best_point_of_every_krylov_space():
    """Iterate k minimises |b - Ax| over span(b, ..., A^(k-1) b), by dense least squares; so does SciPy's."""
    from scipy.sparse.linalg import minres as scipy_minres

    A = spd([float(v) for v in torch.linspace(-2, 3, 25)], 3)
    b = torch.randn(25, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    krylov = torch.stack([torch.linalg.matrix_power(A, j) @ b for j in range(8)], 1)
    for k in range(1, 9):
        found = minres(lambda v: A @ v, b, max_iter=k, tol=0.0)
        Q = torch.linalg.qr(krylov[:, :k]).Q
        best = Q @ torch.linalg.lstsq(A @ Q, b[:, None]).solution[:, 0]
        theirs, _ = scipy_minres(A.numpy(), b.numpy(), maxiter=k, rtol=1e-300)
        assert torch.allclose(found.x, best, atol=1e-8) and torch.allclose(found.x, torch.as_tensor(theirs), atol=1e-8)
        assert abs(found.residuals[-1] - torch.linalg.norm(b - A @ best)) < 1e-8 and found.iterations == k


def test_minres_on_a_singular_matrix():
    """A solution where there is one; else the least residual, and the flag."""
    A = spd([0.0, 0.0, -1.0, 0.5, 2.0, 3.0], 4)
    b = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    consistent = minres(lambda v: A @ v, A @ b, tol=1e-9)
    assert consistent.converged and not consistent.least_squares and torch.allclose(A @ consistent.x, A @ b, atol=1e-7)
    without = minres(lambda v: A @ v, b, tol=1e-9)
    assert without.least_squares and not without.converged and torch.linalg.norm(A @ (b - A @ without.x)) < 1e-7
    assert minres(lambda v: 0 * v, b).least_squares and minres(lambda v: v, torch.zeros(3)).converged


def test_minres_takes_lists_and_refuses_what_is_wrong():
    A = spd([-1.0, 0.3, 0.7, 2.0, 5.0], 0).float()
    b = torch.randn(5, generator=torch.Generator().manual_seed(1))
    as_list = lambda v: [v[:2].clone(), v[2:].clone()]
    listed = minres(lambda vs: as_list(A @ torch.cat(vs)), as_list(b), tol=1e-4)
    assert listed.converged and torch.allclose(torch.cat(listed.x), torch.linalg.solve(A, b), atol=1e-2)
    for bad in (dict(max_iter=0), dict(tol=-1.0)):
        with pytest.raises(ValueError):
            minres(lambda v: v, b, **bad)
    with pytest.raises(FloatingPointError):
        minres(lambda v: v * torch.nan, b)


@pytest.mark.parametrize("seed", range(3))
def test_single_precision_lapack_gives_up_and_double_precision_goes_on(seed):
    """Entries over forty orders of magnitude: LAPACK in float32 fails on most such matrices, with an error or with NaN."""
    torch.manual_seed(seed)
    x = torch.randn(8, 128) * torch.logspace(0, -22, 128)
    A = x.T @ x
    values, vectors = eigendecomposition(A, torch.float32)
    assert values.isfinite().all() and ((vectors * values) @ vectors.T - A).norm() < 1e-5 * A.norm()


def test_nan_without_an_error_is_noticed(monkeypatch):
    torch.manual_seed(0)
    A, eigh = torch.randn(2, 5, 5), torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: (eigh(M)[0] * torch.nan, eigh(M)[1]) if M.dtype == torch.float32 else eigh(M))
    values, _ = eigendecomposition(A @ A.mT, torch.float32)
    assert torch.allclose(values, eigh((A @ A.mT).double())[0].float(), rtol=1e-4, atol=1e-5)
