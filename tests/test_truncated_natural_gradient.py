"""Truncated natural gradient and its conjugate directions against dense formulas: Krylov spaces by hand, damping by hand, a plane by hand."""
import nets
import pytest
import torch
from methods import Problem

from curvlab.curvature import Fisher
from curvlab.optim import HessianFree, NaturalConjugateGradient, NaturalGradient, TruncatedNaturalGradient


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def put(params, vector):
    with torch.no_grad():
        for p, part in zip(params, vector.split([p.numel() for p in params])):
            p.copy_(part.view_as(p))


def update(make, problem, *closures):
    """Change of the weights in one step; the weights are put back."""
    params = list(problem.model.parameters())
    before = flat(params)
    optimizer = make(problem.model)
    optimizer.step(problem.closure(), *closures)
    change = flat(params) - before
    put(params, before)
    return change, optimizer


def gradient(problem):
    problem.closure()()
    return flat([p.grad for p in problem.model.parameters()])


@pytest.mark.parametrize("solver", ["cg", "minres"])
def test_truncated_step_minimizes_over_the_krylov_space(solver):
    """k iterations: the best point of span{g, .., A^{k-1} g}, for CG of the quadratic model, for MINRES of the residual."""
    problem = nets.mlp(torch.double)
    A = Fisher(problem.objective(), problem.x, problem.y).to_dense()
    A, g = A + 0.05 * torch.eye(len(A), dtype=torch.double), gradient(problem)
    K = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(A, j) @ g for j in range(4)], 1)).Q
    best = K @ torch.linalg.solve(K.T @ A @ K, K.T @ g) if solver == "cg" else K @ torch.linalg.lstsq(A @ K, g[:, None]).solution[:, 0]
    change, _ = update(lambda m: TruncatedNaturalGradient(m, lr=0.3, damping=0.05, solver=solver, max_iter=4, tol=0.0), problem)
    torch.testing.assert_close(change, -0.3 * best, rtol=1e-8, atol=1e-11)
    whole, _ = update(lambda m: NaturalGradient(m, lr=0.3, damping=0.05), problem)
    assert (change - whole).norm() > 1e-3 * whole.norm()


def test_each_part_has_its_own_batch():
    """Metric from the inputs of the second closure without its labels, damping from the loss of the third."""
    problem = nets.mlp(torch.double)
    objective = problem.objective()
    x2, x3 = nets.inputs(30, 4, seed=5, dtype=torch.double), nets.inputs(20, 4, seed=6, dtype=torch.double)
    labels = lambda n, seed: torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed))
    F, g, y3 = Fisher(objective, x2, labels(30, 0)).to_dense(), gradient(problem), labels(20, 1)
    make = lambda m: TruncatedNaturalGradient(m, lr=0.5, damping=0.1, max_iter=200, tol=1e-13)
    change, optimizer = update(make, problem, objective.at(x2, labels(30, 2)), objective.at(x3, y3))
    torch.testing.assert_close(change, -0.5 * torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=torch.double), g), rtol=1e-8, atol=1e-10)
    params = list(problem.model.parameters())
    before, start = float(objective.at(x3, y3)(backward=False)), flat(params)
    put(params, start + change)
    after = float(objective.at(x3, y3)(backward=False))
    assert optimizer.rho == pytest.approx((after - before) / float(g @ change), rel=1e-9)


@pytest.mark.parametrize("lr, factor", [(1e-3, 1 / 1.5), (0.5, 1 / 1.5), (1.0, 1.0), (1.9, 1.5)])
def test_damping_of_a_quadratic(lr, factor):
    """Undamped steps on a quadratic have the linear ratio 1 - lr / 2."""
    line, x = torch.nn.Linear(3, 1, bias=False).double(), nets.inputs(20, 3, dtype=torch.double)
    problem = Problem(line, torch.nn.MSELoss(), x, nets.inputs(20, 1, seed=2, dtype=torch.double))
    _, optimizer = update(lambda m: TruncatedNaturalGradient(m, lr=lr, damping=1e-12, tol=1e-13), problem)
    assert optimizer.rho == pytest.approx(1 - lr / 2, abs=1e-6)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-12 * factor)


def test_hessian_free_without_safeguards_is_the_same_step():
    problem = nets.mlp(torch.double)
    ours, _ = update(lambda m: TruncatedNaturalGradient(m, damping=0.3, solver="cg", max_iter=5, tol=0.0, weight_decay=0.01), problem)
    free, _ = update(lambda m: HessianFree(m, damping=0.3, max_iter=5, tol=0.0, warm_start=0.0, preconditioner=None, store_ratio=None, line_search=False, weight_decay=0.01), problem)
    torch.testing.assert_close(ours, free)


def test_plane_search_combines_and_never_loses_to_the_plain_step():
    problem = nets.mlp(torch.double)
    params, objective = list(problem.model.parameters()), problem.objective()
    loss = lambda: float(objective.at(problem.x, problem.y)(backward=False))
    optimizer = NaturalConjugateGradient(problem.model, lr=0.7, damping=2.0)
    plain, directions = TruncatedNaturalGradient(problem.model, lr=0.7, damping=2.0), []
    for k in range(4):
        before, damping = flat(params), optimizer.param_groups[0]["damping"]
        plain.param_groups[0]["damping"] = damping
        plain.step(problem.closure())
        r, plain_loss = (before - flat(params)) / 0.7, loss()
        put(params, before)
        optimizer.step(problem.closure())
        assert optimizer.rho == pytest.approx(plain.rho) and len(optimizer.chosen) == (1 if k == 0 else 2)
        expected = optimizer.chosen[0] * r + (optimizer.chosen[1] * directions[-1] if k else 0)
        torch.testing.assert_close(before - flat(params), 0.7 * expected, rtol=1e-7, atol=1e-10)
        assert loss() <= plain_loss + 1e-12
        directions.append(expected)
    assert loss() < plain_loss


def test_bad_arguments_and_refusals():
    problem = nets.mlp()
    for arguments, message in ((dict(solver="lu"), "solver='lu'"), (dict(max_iter=0), "max_iter=0"), (dict(tol=1.0), "tol=1.0"), (dict(damping_factor=0.5), "damping_factor=0.5"),
                               (dict(damping=-1.0), "damping=-1.0"), (dict(maximize=True), "maximize=True")):
        with pytest.raises(ValueError, match=message):
            TruncatedNaturalGradient(problem.model, **arguments)
    with pytest.raises(ValueError, match="evaluations=2"):
        NaturalConjugateGradient(problem.model, evaluations=2)
    with pytest.raises(TypeError, match="evaluation_closure is a"):
        TruncatedNaturalGradient(problem.model).step(problem.closure(), None, lambda: 0)


def test_a_stationary_point_stays():
    problem = nets.mlp(torch.double)
    optimizer = NaturalConjugateGradient(problem.model, damping=1.0)
    with torch.no_grad():
        for p in problem.model.parameters():
            p.zero_()
    balanced = Problem(problem.model, torch.nn.CrossEntropyLoss(), torch.zeros(3, 4).double(), torch.arange(3))
    optimizer.step(balanced.closure())
    assert optimizer.param_groups[0]["damping"] == 1.0 and float(flat(problem.model.parameters()).abs().max()) == 0.0
