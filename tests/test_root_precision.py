"""Statistics of the sides of a tensor, and roots in their precision: against decompositions written out in float64."""
import pytest
import torch
from torch import nn

from curvlab.curvature.roots import eigendecomposition, inverse_root, power, root_residual
from curvlab.curvature.shaping import add_mode_gram_, mode_gram
from curvlab.optim.shampoo import Shampoo


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_gradients_pass():
    A = (random(4, 9) @ random(4, 9).T).requires_grad_()
    power(A, -0.5).trace().backward()
    assert torch.allclose(A.grad, -0.5 * power(A.detach(), -1.5), rtol=1e-8)  # d tr f(A) = tr(f'(A) dA)


def test_running_statistics_of_every_mode():
    stack = random(3, 4, 5, 6)
    for mode, n in enumerate((4, 5, 6)):
        out = random(3, n, n, seed=mode)
        expected = out + 0.2 * mode_gram(stack, mode)
        assert torch.allclose(add_mode_gram_(out, stack, mode, 0.2), expected)


def spd(n, kappa, seed):
    q = torch.linalg.qr(random(n, n, seed=seed)).Q
    return (q * torch.logspace(0, -torch.tensor(kappa).log10().item(), n, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("p", [1, 2, 4, 6])
@pytest.mark.parametrize("kappa", [1e1, 1e3, 1e5, 5e5])
@pytest.mark.parametrize("n", [24, 150])
def test_float32_roots_are_as_good_as_float32_statistics(p, kappa, n):
    """The bound of the notebook, (1 - 8 u kappa)^(-1/p) - 1 and a multiple of sqrt(n) u. The residual of the definition is p times that."""
    u = torch.finfo(torch.float32).eps
    bound = (1 - 8 * u * kappa) ** (-1 / p) - 1 + 2 * n**0.5 * u
    for seed in range(2):
        M = spd(n, kappa, seed).float()
        found, exact = inverse_root(M, p, dtype=torch.float32), inverse_root(M.double(), p)
        error = torch.linalg.matrix_norm(found.double() - exact, 2) / torch.linalg.matrix_norm(exact, 2)
        assert error < bound, error
        assert root_residual(found, M, p) < (1 + bound) ** p - 1
        assert torch.equal(found, found.mT)
    if kappa < 5e5:  # and a bound that a wrong root does not meet
        wrong = inverse_root(M, p, 0.1, dtype=torch.float32).double()
        assert torch.linalg.matrix_norm(wrong - exact, 2) / torch.linalg.matrix_norm(exact, 2) > bound


def test_float64_is_tried_where_float32_does_not_converge(monkeypatch):
    plain, seen = torch.linalg.eigh, []

    def stubborn(A):
        seen.append(A.dtype)
        if A.dtype == torch.float32 or len(seen) > 2:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return plain(A)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    M = spd(5, 10.0, 0).float()
    values, vectors = eigendecomposition(M, torch.float32)
    assert seen == [torch.float32, torch.float64] and values.dtype == vectors.dtype == torch.float32
    assert torch.allclose((vectors * values) @ vectors.T, M, atol=1e-6)
    with pytest.raises(torch.linalg.LinAlgError):
        eigendecomposition(M)


def test_roots_of_unchanged_statistics_are_not_renewed(monkeypatch):
    a, b = (nn.Parameter(torch.zeros(4, 3)) for _ in range(2))
    optimizer, count = Shampoo([a, b], refresh_every=1, refresh_growth=float("inf"), observe_every=3), []
    factorise = Shampoo.factorise
    monkeypatch.setattr(Shampoo, "factorise", lambda self, pairs: factorise(self, [count.append(p) or (g, p) for g, p in pairs]))
    for step in range(7):
        a.grad, b.grad = random(4, 3, dtype=torch.float32, seed=step), random(4, 3, dtype=torch.float32, seed=50 + step)
        optimizer.step()
    assert len(count) == 6  # two parameters, statistics at steps 0, 3 and 6


@pytest.mark.parametrize("shape", [(40, 30), (12, 10, 8), (50,)])
def test_a_float32_run_follows_the_float64_run(shape):
    """Ridge 1e-4 of the largest eigenvalue: the steps agree to what float32 statistics allow."""
    steps = {}
    for dtype, root_dtype in ((torch.float64, None), (torch.float32, None), (torch.float32, torch.float64)):
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = Shampoo([p], lr=0.1, eps=1e-4, ridge="max", decay=0.95, graft="sgd", refresh_every=2, root_dtype=root_dtype)
        for step in range(20):
            p.grad = random(*shape, seed=step).to(dtype)
            optimizer.step()
        steps[dtype, root_dtype] = p.detach().double()
    exact = steps.pop((torch.float64, None))
    gaps = {key: (found - exact).norm() / exact.norm() for key, found in steps.items()}
    assert 0 < gaps[torch.float32, torch.float64] and gaps[torch.float32, None] < 8 * torch.finfo(torch.float32).eps * 1e4 / 4
    assert gaps[torch.float32, torch.float64] < torch.finfo(torch.float32).eps * 1e4 / 4
