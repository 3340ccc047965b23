"""Estimators and eigenvalues from products: against dense decompositions, by coverage over many seeds, and against two other libraries."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvlab import Objective
from curvlab.curvature import (GGN, Hessian, concentration, condition_number, density, eigenpairs, exact_spectrum, frobenius_norm, hutchinson_diagonal, hutchinson_trace, hutchpp_trace,
                               spectral_norm)
from curvlab.curvature.estimators import random_probes

few = settings(max_examples=25, deadline=None)
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generic(n, seed=0):
    """Symmetric, no structure, both signs, a trace that is not zero."""
    B = torch.randn(n, n, generator=generator(seed), dtype=torch.double)
    return (B + B.T) / 2 + torch.diag(torch.linspace(-1, 3, n).double())


def with_spectrum(values, seed=0):
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator(seed), dtype=torch.double)).Q
    return (q * torch.as_tensor(values, dtype=torch.double)) @ q.T


# Estimates


def coverage(estimate, truth, repeats=400, level=0.95):
    """Share of intervals that hold the truth, entry by entry, over seeds."""
    inside = [(low <= truth) & (truth <= high) for low, high in (estimate(generator(s)).interval(level) for s in range(repeats))]
    return torch.stack(inside).double().mean(0)


A30 = generic(30)
LOW = with_spectrum(np.r_[30.0, 20.0, 10.0, np.linspace(-1, 1, 57)])
SAMPLERS = {
    "trace": (lambda g: hutchinson_trace(A30, 20, generator=g), A30.trace()),
    "trace, normal": (lambda g: hutchinson_trace(A30, 20, distribution="normal", generator=g), A30.trace()),
    "trace, five samples": (lambda g: hutchinson_trace(A30, 5, generator=g), A30.trace()),
    "trace, Stein": (lambda g: hutchinson_trace(A30, 16, target=4.0, generator=g), A30.trace()),
    "diagonal": (lambda g: hutchinson_diagonal(A30, 20, generator=g), A30.diagonal()),
    "Hutch++": (lambda g: hutchpp_trace(LOW, 60, generator=g), LOW.trace()),
    "Frobenius": (lambda g: frobenius_norm(A30, 40, generator=g), A30.norm()),
    "second moment": (lambda g: density(A30, 12, 4, generator=g).moment(2), (A30 @ A30).trace() / 30),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_error_bars_cover_the_truth(name):
    """95% intervals, 400 repetitions: the counting error of the share is 1.1%; three and a half of them are allowed, and one percent for samples that are not normal."""
    estimate, truth = SAMPLERS[name]
    share = coverage(estimate, truth)
    assert 0.90 <= share.mean() <= 0.99 and (share > 0.87).all(), share


def test_means_are_unbiased():
    for name, (estimate, truth) in SAMPLERS.items():
        if name == "Frobenius":
            continue  # the root of an unbiased square
        values = torch.stack([estimate(generator(1000 + s)).value for s in range(300)])
        assert ((values.mean(0) - truth).abs() < 4.5 * values.std(0) / 300**0.5).all(), name


def test_a_target_is_met_and_fixed_by_the_pilot_alone():
    found = [hutchinson_trace(A30, 16, target=2.0, generator=generator(s)) for s in range(50)]
    assert all(e.standard_error <= 2.0 * (1 + 1e-12) and e.degrees == 15 and e.products == e.samples for e in found)
    for s, e in enumerate(found):  # the pilot decides: its deviation over the root of all samples is the error bar
        Z = random_probes(A30, 16, "signs", generator(s))
        assert torch.allclose((Z * (A30 @ Z)).sum(0).std() / e.samples**0.5, e.standard_error)
    with pytest.warns(UserWarning, match="max_samples=100"):
        e = hutchinson_trace(A30, 16, target=1e-3, max_samples=100, generator=generator())
    assert e.samples == 100 and e.standard_error > 1e-3


def test_settings_of_the_samplers_are_checked():
    for bad in (dict(samples=1), dict(block=0), dict(distribution="cauchy"), dict(samples=8, target=1.0), dict(target=0.0), dict(target=1.0, max_samples=10)):
        with pytest.raises(ValueError):
            hutchinson_trace(A30, **bad)
    with pytest.raises(ValueError, match="square"):
        frobenius_norm(torch.randn(3, 4))
    with pytest.raises(ValueError, match="level"):
        hutchinson_trace(A30).interval(1.0)


@pytest.mark.parametrize("samples, block", [(32, 32), (33, 7), (5, 2)])
def test_blocks_do_not_change_mean_and_error(samples, block):
    """Whatever the block, mean and standard error are those of all samples together."""
    g, drawn = generator(3), []
    for start in range(0, samples, block):
        Z = random_probes(A30, min(block, samples - start), "signs", g)
        drawn.append((Z * (A30 @ Z)).sum(0))
    drawn = torch.cat(drawn)
    e = hutchinson_trace(A30, samples, block=block, generator=generator(3))
    assert torch.allclose(e.value, drawn.mean()) and torch.allclose(e.standard_error, drawn.std() / samples**0.5)


def test_nonsymmetric_and_low_precision_matrices():
    B = torch.randn(50, 50, generator=generator(1))
    for dtype, slack in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        M = B.to(dtype)
        for e, truth in ((hutchinson_trace(M, 200, generator=generator()), B.trace()), (frobenius_norm(M, 200, generator=generator()), B.norm())):
            assert e.value.dtype == dtype and abs(e.value.float() - truth) < 4 * e.standard_error.float() + slack * B.norm()


def test_zero_and_scalar_matrices():
    for f in (hutchinson_trace, hutchinson_diagonal, hutchpp_trace, frobenius_norm):
        e = f(torch.zeros(4, 4), 12)
        assert (e.value == 0).all() and (e.standard_error == 0).all()
    one = torch.tensor([[3.0]]).double()
    assert hutchinson_trace(one, 2).value == 3 and abs(hutchpp_trace(one, 6).value - 3) < 1e-12 and eigenpairs(one).values == 3 and exact_spectrum(one) == 3


# Eigenpairs

values_of = st.lists(st.floats(-10, 10), min_size=1, max_size=30)


@few
@given(values_of, st.integers(1, 30), st.sampled_from(["top", "bottom", "both"]), st.integers(1, 9), st.integers(0, 99))
def test_any_spectrum_any_block(values, k, which, block, seed):
    """Also repeated values (hypothesis likes them), zeros, more wanted than half, n = 1."""
    n = len(values)
    k = min(k, n // 2 if which == "both" else n)
    if k == 0:
        return
    A, truth = with_spectrum(values, seed), torch.tensor(sorted(values)).double()
    found = eigenpairs(A, k, which, tol=1e-9, block=block, generator=generator(seed))
    wanted = {"top": truth.flip(0)[:k], "bottom": truth[:k], "both": torch.cat([truth.flip(0)[:k], truth[:k]])}[which]
    assert torch.allclose(found.values, wanted, atol=1e-7)
    assert torch.allclose(torch.linalg.norm(A @ found.vectors - found.vectors * found.values, dim=0), found.residuals, atol=1e-12)
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(len(wanted)).double(), atol=1e-10)


HARD = {
    "five times the same": np.r_[np.linspace(-1, 1, 295), np.full(5, 2.0)],
    "tight cluster": np.r_[np.linspace(-1, 1, 294), 2 + 1e-4 * np.arange(6)],
    "slow decay": 1 / np.arange(1, 301),
    "two plateaus": np.r_[np.full(150, 1.0), np.full(150, 2.0)],
    "tiny scale": 1e-12 * np.linspace(-3, 5, 300),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("block", [1, 3, None])
def test_hard_spectra_with_restarts(name, block):
    """The basis is much smaller than n, so that restarts happen; every copy of a multiple eigenvalue is found, also by a narrow block."""
    values = np.sort(HARD[name])
    A, size = with_spectrum(values, 2), np.abs(values).max()
    found = eigenpairs(A, 5, "top", tol=1e-7, block=block, max_products=3000, generator=generator(4))
    assert found.converged and torch.allclose(found.values / size, torch.as_tensor(values[::-1][:5].copy()) / size, atol=1e-6)
    assert found.residuals.max() <= 1e-7 * size


def test_a_warm_start_can_not_mislead():
    """An eigenvector has residual zero, also the wrong one; some of the start is always random."""
    values = np.r_[np.linspace(-1, 1, 195), 3.0, 4.0, 5.0, 6.0, 7.0]
    A = with_spectrum(values, 3)
    Q = torch.linalg.eigh(A).eigenvectors
    for start in (Q[:, 0], Q[:, -2], Q[:, [-2, -3, -4]]):
        assert abs(eigenpairs(A, start=start, generator=generator(1)).values[0] - 7) < 1e-6
    assert torch.allclose(eigenpairs(A, 3, start=Q[:, 5:8], generator=generator(1)).values, torch.tensor([7.0, 6.0, 5.0]).double(), atol=1e-5)


def test_products_are_counted_limited_and_a_failure_is_said():
    A, count = with_spectrum(np.linspace(0, 1, 300)), []

    class Counting:
        shape, dtype, device = A.shape, A.dtype, A.device

        def __matmul__(self, V):
            count.append(V.shape[1] if V.ndim == 2 else 1)
            return A @ V

    found = eigenpairs(Counting(), 2, generator=generator())
    assert found.converged and found.products == sum(count)
    count.clear()
    with pytest.warns(UserWarning, match="did not converge"):
        found = eigenpairs(Counting(), 2, tol=1e-10, max_products=31, generator=generator())
    assert not found.converged and found.products == sum(count) <= 31
    count.clear()
    assert density(Counting(), 3, 10).products == sum(count) == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_products(dtype):
    """The default tolerance is reached in float32; bfloat16 products limit the accuracy, the float32 basis stays orthonormal, and the flag is honest."""
    values = np.r_[np.linspace(-1, 1, 495), 3, 4, 5, 6, 7]
    A = with_spectrum(values, 5).to(dtype)
    tol = 1e-4 if dtype == torch.float32 else 0.02
    found = eigenpairs(A, 3, tol=tol, generator=generator(2))
    assert found.converged and found.values.dtype == torch.float32
    assert torch.allclose(found.values, torch.tensor([7.0, 6.0, 5.0]), atol=2 * tol)
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(3), atol=1e-5)


def test_bad_calls_of_eigenpairs():
    A = generic(12)
    for bad in (dict(k=0), dict(k=13), dict(k=7, which="both"), dict(which="middle"), dict(tol=0.0), dict(block=0), dict(basis=4), dict(max_products=1), dict(start=torch.ones(5)), dict(start=torch.ones(12, 0))):
        with pytest.raises(ValueError):
            eigenpairs(A, **bad)
    for f in (eigenpairs, density):
        with pytest.raises(ValueError, match="square"):
            f(torch.randn(3, 4))
        with pytest.raises(FloatingPointError):
            f(torch.full((9, 9), torch.nan))
    with pytest.raises(ValueError, match="transpose"):
        exact_spectrum(torch.randn(5, 5))


@few
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=20), st.integers(0, 99))
def test_bounds_hold_the_truth(values, seed):
    A = with_spectrum(values, seed)
    norm, condition = spectral_norm(-1.0 * A, tol=1e-5, generator=generator(seed)), condition_number(A, tol=1e-5, generator=generator(seed))
    low, high = min(values), max(values)
    assert norm.lower <= high * (1 + 1e-12) and high <= norm.upper * (1 + 1e-12) and condition.lower <= high / low * (1 + 1e-9) and high / low <= condition.upper * (1 + 1e-9)
    assert condition.lower <= condition.value <= condition.upper


def test_condition_number_of_a_singular_and_an_indefinite_matrix():
    singular = condition_number(with_spectrum(np.r_[0.0, np.linspace(1, 2, 20)]), generator=generator())
    assert singular.upper == torch.inf and singular.lower > 1e3
    with pytest.raises(ValueError, match="positive definite"):
        condition_number(with_spectrum(np.linspace(-1, 2, 20)), generator=generator())


# Density


@pytest.mark.parametrize("n, steps", [(25, 1), (25, 6), (6, 6), (4, 90)])
@pytest.mark.parametrize("distribution", ["signs", "normal"])
def test_quadrature_is_exact_to_degree_2m_minus_1(n, steps, distribution):
    """For each probe by itself: v' A^j v from powers of the dense matrix."""
    A = generic(n, 1) / n**0.5
    found = density(A, 5, steps, distribution=distribution, generator=generator(8))
    V = random_probes(A, 5, distribution, generator(8))
    V = V / V.norm(dim=0)
    m, scale = min(n, steps), exact_spectrum(A).abs().max()
    assert found.nodes.shape == (5, m) and torch.allclose(found.weights.sum(1), torch.ones(5).double())
    for j in range(2 * m):
        truth = (V * (torch.linalg.matrix_power(A, j) @ V)).sum(0)
        assert torch.allclose((found.weights * found.nodes**j).sum(1), truth, atol=1e-11 * scale**j)
    if m < n:
        truth = (V * (torch.linalg.matrix_power(A, 2 * m) @ V)).sum(0)
        assert ((found.weights * found.nodes ** (2 * m)).sum(1) - truth).abs().max() > 1e-6 * truth.abs().max()


def test_density_of_special_matrices():
    """An exhausted Krylov space goes on with weight zero; degenerate spectra give the right shares."""
    two = density(with_spectrum(np.r_[np.full(12, -1.0), np.full(28, 3.0)]), 60, 20, generator=generator(1))
    e = two.histogram(torch.tensor([-2.0, 0.0, 4.0]).double())
    assert torch.allclose(e.value.sum(), torch.tensor(1.0).double()) and abs(e.value[0] - 0.3) < 4 * e.standard_error[0]
    spread = (two.nodes - torch.where(two.nodes < 1, -1.0, 3.0)).abs() * two.weights
    assert spread.max() < 1e-10
    zero = density(torch.zeros(8, 8), 3, 20)
    assert torch.equal(zero.cdf(torch.tensor([-1e-9, 1e-9])).value, torch.tensor([0.0, 1.0]).double())
    grid, e = zero.smooth()
    assert e.value.isfinite().all() and e.value.argmax() in (199, 200)


def householder_lanczos(A, v, steps):
    """Nodes and weights of the tridiagonal matrix in a basis that is orthogonalised by a QR factorisation of everything at each step: slow and safe."""
    Q = (v / v.norm())[:, None]
    for _ in range(steps - 1):
        Q = torch.linalg.qr(torch.cat([Q, A @ Q[:, -1:]], 1)).Q
    values, s = torch.linalg.eigh(Q.T @ A @ Q)
    return values, s[0] ** 2


def plain_lanczos(A, v, steps):
    """The three-term recurrence alone."""
    q, before, b, a, off = v / v.norm(), torch.zeros_like(v), 0.0, [], []
    for _ in range(steps):
        w = A @ q - b * before
        a.append(q @ w)
        w = w - a[-1] * q
        b = w.norm()
        off.append(b)
        q, before = w / b, q
    return torch.linalg.eigvalsh(torch.diag(torch.stack(a)) + torch.diag(torch.stack(off[:-1]), 1) + torch.diag(torch.stack(off[:-1]), -1))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_orthogonalisation_leaves_no_ghosts(dtype, tolerance):
    """Outliers converge early, and then a recurrence without orthogonalisation finds them again and again."""
    A = with_spectrum(np.r_[1000.0, 300.0, -100.0, 30.0, np.random.default_rng(0).uniform(-1, 2, 196)])
    found = density(A.to(dtype), 3, 40, generator=generator(4))
    V = random_probes(A.to(dtype), 3, "signs", generator(4)).double()
    for k in range(3):
        nodes, weights = householder_lanczos(A, V[:, k], 40)
        assert torch.allclose(found.nodes[k], nodes, rtol=0, atol=1000 * tolerance / 20) and ((found.nodes[k] - 1000).abs() < 1).sum() == 1
        for outlier in (0, 36 + 1, 38, 39):
            assert abs(found.weights[k, outlier] - weights[outlier]) < tolerance * max(weights[outlier], 1e-2)
    assert ((plain_lanczos(A.float(), V[:, 0].float(), 40).double() - 1000).abs() < 1).sum() > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_exhausted_space_adds_nothing(dtype):
    """Three different eigenvalues far from zero, or one: all weight on them, the probe's shares, and no node outside, however long the chain goes on."""
    values = torch.tensor([5.0] * 7 + [6.5] * 20 + [9.0] * 13).double()
    Q = torch.linalg.qr(torch.randn(40, 40, generator=generator(2), dtype=torch.double)).Q
    A = ((Q * values) @ Q.T).to(dtype)
    found, eps = density(A, 4, 12, generator=generator(1)), torch.finfo(dtype).eps
    shares = (Q.T @ random_probes(A, 4, "signs", generator(1)).double()) ** 2 / 40
    away = (found.nodes[..., None] - values).abs().amin(-1) > 1e3 * eps
    assert (found.weights * away).max() < 1e-30 and found.nodes.min() > 5 - 1e3 * eps and found.nodes.max() < 9 + 1e3 * eps
    for value in (5.0, 6.5, 9.0):
        at = (found.nodes - value).abs() < 1e3 * eps
        assert torch.allclose((found.weights * at).sum(1), shares[values == value].sum(0), atol=1e4 * eps)
    one = density(torch.eye(9, dtype=dtype) * 5, 2, 6)
    assert one.nodes.allclose(torch.full((2, 6), 5.0).double(), rtol=eps)


def test_density_in_blocks_and_in_float32():
    A = generic(60, 2)
    whole, parts = density(A, 6, 15, generator=generator(1)), density(A, 6, 15, block=4, generator=generator(1))
    assert torch.allclose(whole.nodes, parts.nodes, atol=1e-9) and whole.products == parts.products == 90
    single = density(A.float(), 6, 15, generator=generator(1))
    assert single.nodes.dtype == torch.float64 and (single.moment(2).value - whole.moment(2).value).abs() < 1e-4 * whole.moment(2).value


def test_density_functions_agree_with_each_other():
    """Smoothing conserves mass and mean; the histogram is the difference of the distribution function; `mean` reads functions with one and with many values."""
    d = density(generic(40), 8, 20, generator=generator(1))
    grid, e = d.smooth(sigma=0.3)
    width = grid[1] - grid[0]
    assert abs(e.value.sum() * width - 1) < 1e-3 and abs((e.value * grid).sum() * width - d.moment(1).value) < 1e-2
    edges = torch.linspace(-20, 20, 9).double()
    assert torch.allclose(d.histogram(edges).value, d.cdf(edges).value.diff())
    many = d.mean(lambda x: torch.stack([x, x**2], -1))
    for j in (1, 2):
        one = d.moment(j)
        assert one.value.shape == () and torch.allclose(many.value[j - 1], one.value) and torch.allclose(many.standard_error[j - 1], one.standard_error)
    for bad in (dict(probes=1), dict(steps=0), dict(block=0), dict(distribution="cauchy")):
        with pytest.raises(ValueError):
            density(A30, **bad)


# A network, and other libraries


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    return net, nn.CrossEntropyLoss(), torch.randn(40, 5).double(), torch.randint(0, 3, (40,))


def test_hessian_of_a_network():
    net, loss, x, y = network()
    H = Hessian(Objective(net, loss), x, y)
    truth = torch.linalg.eigvalsh(H.to_dense())
    assert torch.allclose(exact_spectrum(H), truth, atol=1e-12)
    found = eigenpairs(H, 3, "both", tol=1e-8, generator=generator())
    assert torch.allclose(found.values, torch.cat([truth.flip(0)[:3], truth[:3]]), atol=1e-8)
    e = density(H, 40, 30, generator=generator()).moment(2)
    assert abs(e.value - (truth**2).mean()) < 4 * e.standard_error


def test_trace_and_eigenvalues_equal_hessian_eigenthings():
    other = pytest.importorskip("hessian_eigenthings")
    net, loss, x, y = network()
    H = Hessian(Objective(net, loss), x, y)
    theirs = other.HessianOperator(net, [(x, y)], other.supervised_loss(loss))
    top = other.lanczos(theirs, k=2, max_iter=30, which="LA").eigenvalues
    ours = eigenpairs(H, 2, tol=1e-8, generator=generator())
    assert np.allclose(sorted(float(v) for v in top), sorted(float(v) for v in ours.values), rtol=1e-6)
    trace = hutchinson_trace(H, 64, generator=generator())
    assert abs(other.hutchinson(theirs, num_samples=400, seed=1).estimate - trace.value) < 5 * trace.standard_error
    their_density = other.spectral_density(theirs, num_runs=60, lanczos_steps=40, num_grid_points=300, sigma=0.05, seed=0)
    _, curve = density(H, 60, 40, generator=generator()).smooth(torch.as_tensor(their_density.grid), sigma=0.05)
    assert ((torch.as_tensor(their_density.density) - curve.value).abs() < 6 * 2**0.5 * curve.standard_error + 0.02 * curve.value.max()).all()


def test_estimates_agree_with_curvlinops():
    """Both within their error from one another and from the truth (theirs takes fewer products than rows, so that its error is the larger one)."""
    other = pytest.importorskip("curvlinops")
    net, loss, x, y = network()
    G = GGN(Objective(net, loss), x, y)
    theirs = other.GGNLinearOperator(net, loss, list(net.parameters()), [(x, y)], check_deterministic=False)
    dense = G.to_dense()
    torch.manual_seed(0)
    ours, plus = hutchinson_trace(G, 300, generator=generator()), hutchpp_trace(G, 90, generator=generator())
    assert abs(float(other.hutchinson_trace(theirs, 60, "rademacher")) - ours.value) < 5 * ours.standard_error * 6**0.5
    assert abs(float(other.hutchpp_trace(theirs, 63, "rademacher")) - plus.value) < 0.02 * dense.trace()
    e = frobenius_norm(G, 300, generator=generator())
    assert abs(float(other.hutchinson_squared_fro(theirs, 60, "rademacher")) ** 0.5 - e.value) < 5 * e.standard_error * 2**0.5
    d = hutchinson_diagonal(G, 300, generator=generator())
    both = torch.as_tensor(other.hutchinson_diag(theirs, 60, "rademacher"))
    assert ((both - d.value).abs() < 6 * d.standard_error * 6**0.5 + 1e-12).all() and ((d.value - dense.diagonal()).abs() < 5 * d.standard_error + 1e-12).all()


# Share of a vector in a subspace


@few
@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 99))
def test_concentration_equals_an_explicit_projection(n, k, seed):
    Q, k = torch.linalg.qr(torch.randn(n, n, generator=generator(seed)).double()).Q, min(n, k)
    V = Q[:, :k]
    G = torch.randn(n, 3, generator=generator(seed + 1)).double()
    P = V @ torch.linalg.inv(V.T @ V) @ V.T
    truth = torch.stack([torch.dot(P @ c, P @ c) / torch.dot(c, c) for c in G.T])
    assert torch.allclose(concentration(G, V), truth) and torch.allclose(concentration(G[:, 0], V), truth[0])
    assert torch.allclose(concentration(G, V) + concentration(G, Q[:, k:]), torch.ones(3).double())


def test_concentration_of_tiny_zero_and_wrong_vectors():
    V = torch.linalg.qr(torch.randn(20, 4, generator=generator())).Q
    assert abs(concentration(1e-30 * V[:, 0], V) - 1) < 1e-5 and abs(concentration(1e30 * V[:, 0], V) - 1) < 1e-5
    assert concentration(torch.zeros(20), V).isnan()
    assert concentration(V.double(), V).dtype == torch.float64
    for g, basis in ((torch.ones(19), V), (torch.ones(20), V[:, 0]), (torch.ones(20, 1, 1), V)):
        with pytest.raises(ValueError, match="shape"):
            concentration(g, basis)
