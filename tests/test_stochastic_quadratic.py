"""Exact moments of preconditioned SGD on a quadratic, against recursions of full covariance matrices."""
import pytest
import torch

from curvlab.lab.stochastic_quadratic import averaged_excess, decaying_limit, last_excess, modes, moment_recursion, scheduled_excess, simulate, stacked

close = torch.testing.assert_close


def spd(d, generator, condition=20.0):
    "A random positive definite matrix with the given condition number."
    Q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.double, generator=generator))
    return Q @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10(), d, dtype=torch.double)) @ Q.T


@pytest.fixture(params=[0, 1, 2])
def problem(request):
    "H, S, B and a start; nothing commutes with anything."
    g = torch.Generator().manual_seed(request.param)
    return spd(4, g), spd(4, g), spd(4, g, 5.0), torch.randn(4, dtype=torch.double, generator=g)


@pytest.mark.parametrize("share", [0.1, 1.0, 1.9])
def test_fixed_step_equals_the_recursion(problem, share):
    H, S, B, start = problem
    m, k = modes(H, S, B, start), torch.arange(1, 61)
    lr = share / float(m.rates[-1])
    last, averaged = moment_recursion(H, S, B, lr, 60, start)
    close(last_excess(m, lr, k), last, rtol=1e-9, atol=0)
    close(averaged_excess(m, lr, k), averaged, rtol=1e-9, atol=0)


def test_schedule_equals_the_recursion(problem):
    H, S, B, start = problem
    lr = lambda k: 0.8 / (k + 1) ** 0.7
    close(scheduled_excess(modes(H, S, B, start), lr, 60), moment_recursion(H, S, B, lr, 60, start)[0], rtol=1e-9, atol=0)


def test_stacked_problems_are_the_single_ones(problem):
    H, S, B, start = problem
    several = [modes(H, S, None, start), modes(H, S, B, start)]
    factor = torch.tensor([[0.3], [0.9]], dtype=torch.double)
    both = scheduled_excess(stacked(several), lambda k: factor / (k + 1), 20)
    for i, m in enumerate(several):
        close(both[:, i], scheduled_excess(m, lambda k: float(factor[i]) / (k + 1), 20))


def test_the_limit_of_averages_belongs_to_the_problem_not_to_the_preconditioner(problem):
    H, S, B, start = problem
    expected = torch.trace(torch.linalg.solve(H, S)) / 2
    for matrix in (None, H.diag().diag(), B, H):
        m, k = modes(H, S, matrix, start), torch.tensor([10**7])
        close(m.limit, expected)
        close(k * averaged_excess(m, 1 / float(m.rates[-1]), k), expected[None], rtol=1e-3, atol=0)


def test_the_hessian_decouples_at_once(problem):
    H, S, _, start = problem
    k = torch.tensor([1, 7, 100])
    m = modes(H, S, H, start)
    close(k * averaged_excess(m, 1.0, k), m.limit.expand(3), rtol=1e-9, atol=0)
    close(torch.arange(1, 101) * scheduled_excess(m, lambda j: 1 / (j + 1), 100), m.limit.expand(100), rtol=1e-9, atol=0)


def test_decaying_steps_reach_their_limit(problem):
    H, S, B, start = problem
    m = modes(H, S, B, start)
    beta = 3 / float(m.rates[0])
    k = 20000
    close(k * scheduled_excess(m, lambda j: beta / (j + 1 + 5 * beta * float(m.rates[-1])), k)[-1], decaying_limit(m, beta), rtol=0.05, atol=0)
    assert decaying_limit(m, 0.4 / float(m.rates[0])) == float("inf")
    betas = torch.tensor([beta, 2 * beta], dtype=torch.double)
    close(decaying_limit(m, betas), torch.stack([decaying_limit(m, b) for b in betas]))


def test_simulation_agrees(problem):
    H, S, B, start = problem
    lr = 1 / float(modes(H, S, B).rates[-1])
    last, averaged = moment_recursion(H, S, B, lr, 30, start)
    for runs, exact in zip(simulate(H, S, B, lr, 30, start, 4000, torch.Generator().manual_seed(5)), (last[-1], averaged[-1])):
        assert abs(runs.mean() - exact) < 4 * runs.std() / 4000**0.5


def test_bad_input_is_named(problem):
    H, S, B, start = problem
    with pytest.raises(ValueError, match="B is not positive definite"):
        modes(H, S, -B)
    with pytest.raises(ValueError, match="H has the eigenvalue"):
        modes(-H, S, B)
    m = modes(H, S, B)
    for lr in (0.0, -1.0, 2.01 / float(m.rates[-1])):
        with pytest.raises(ValueError, match="settle only for"):
            averaged_excess(m, lr, torch.tensor([3]))
