"""Natural-gradient steps in function space against dense matrices and the automatic Jacobian."""
import pytest
import torch
from torch import nn

from curvlab import Objective
from curvlab.curvature import NTK, Fisher, Jacobian
from curvlab.curvature.function_space import (STRUCTURES, NTKLinear, apply_steps, dense_fisher, factored_jacobian, natural_steps,
                                              ntk_mlp, optimal_rates, tridiagonal_weights)

N, INPUTS, WIDTH = 7, 9, 10


def net(depth=3, activation=nn.ReLU, seed=0):
    torch.manual_seed(seed)
    return ntk_mlp(INPUTS, WIDTH, depth, activation).double(), torch.randn(N, INPUTS).double(), torch.randn(N).double()


def column(steps):
    return torch.cat([s.flatten() for s in steps])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_factors_are_the_jacobian(activation):
    model, x, e = net(4, activation)
    J, objective, other = factored_jacobian(model, x), Objective(model, nn.MSELoss()), torch.randn(5, INPUTS).double()
    dense = Jacobian(objective, x).to_dense()
    torch.testing.assert_close(J.rows(), dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(J.kernels(factored_jacobian(model, other))), NTK(objective, x, other).to_dense(), rtol=0, atol=1e-11)
    v = [torch.randn_like(p) for p in model.parameters()]
    torch.testing.assert_close(J.push(v), dense @ column(v))
    torch.testing.assert_close(column(J.pull([e] * 4)), dense.T @ e)
    torch.testing.assert_close(J.outputs, model(x)[:, 0])


def test_dense_exact_is_the_fisher_of_the_loss():
    model, x, _ = net()
    fisher = Fisher(Objective(model, nn.MSELoss()), x, torch.zeros(N, 1).double()).to_dense()
    torch.testing.assert_close(2 * dense_fisher(factored_jacobian(model, x)), fisher)  # MSELoss has no half


def test_dense_approximations_keep_the_right_entries():
    model, x, _ = net(4)
    J = factored_jacobian(model, x)
    F = dense_fisher(J)
    ends = [0, INPUTS * WIDTH, INPUTS * WIDTH + WIDTH**2, INPUTS * WIDTH + 2 * WIDTH**2, len(F)]
    for structure, kept in (("block-diagonal", lambda i, j: i == j), ("block-tridiagonal", lambda i, j: abs(i - j) <= 1)):
        G = dense_fisher(J, structure)
        for i in range(4):
            for j in range(4):
                rows, columns = slice(*ends[i : i + 2]), slice(*ends[j : j + 2])
                assert torch.equal(G[rows, columns], F[rows, columns] if kept(i, j) else torch.zeros_like(F[rows, columns]))
    G = dense_fisher(J, "unit-wise")
    first = slice(INPUTS, 2 * INPUTS)  # the second unit of the first layer
    torch.testing.assert_close(G[first, first], J.a[0].T @ (J.b[0][:, 1:2] ** 2 * J.a[0]) / N)
    assert G[first].count_nonzero() == G[first, first].count_nonzero()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("depth, activation", [(3, nn.ReLU), (3, nn.Tanh), (4, nn.ReLU)])
def test_steps_equal_the_pseudo_inverse(structure, depth, activation):
    model, x, e = net(depth, activation, seed=1)
    J = factored_jacobian(model, x)
    G = dense_fisher(J, structure)
    expected = torch.linalg.pinv(G, hermitian=True, rtol=1e-11) @ (J.rows().T @ e) / N
    torch.testing.assert_close(column(natural_steps(J, e, structure)), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("structure", ["exact", "block-diagonal", "K-FAC", "unit-wise"])
def test_steps_with_dependent_examples(structure):
    model, x, e = net(3, seed=4)
    x = torch.cat([x[:-1], x[:1]])  # the first example twice, with different residuals
    J = factored_jacobian(model, x)
    expected = torch.linalg.pinv(dense_fisher(J, structure), hermitian=True, rtol=1e-11) @ (J.rows().T @ e) / N
    torch.testing.assert_close(column(natural_steps(J, e, structure)), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_damped_unit_wise_steps():
    model, x, e = net()
    J = factored_jacobian(model, x)
    G, ridge = dense_fisher(J, "unit-wise"), []
    for a, b in zip(J.a, J.b):
        traces = [(b[:, i : i + 1] * a).square().sum() / N for i in range(b.shape[1])]
        ridge += [0.01 * sum(traces) / len(traces) / N] * (a.shape[1] * b.shape[1])
    expected = torch.linalg.solve(G + torch.diag(torch.stack(ridge)), J.rows().T @ e / N)
    torch.testing.assert_close(column(natural_steps(J, e, "unit-wise", damping=0.01)), expected)


@pytest.mark.parametrize("depth", [3, 4])
@pytest.mark.parametrize("structure", STRUCTURES[:4])
def test_optimal_rates_fit_the_targets_to_first_order(structure, depth):
    model, x, e = net(depth, seed=2)
    J = factored_jacobian(model, x)
    change = J.push([r * s for r, s in zip(optimal_rates(structure, N, depth), natural_steps(J, e, structure))])
    torch.testing.assert_close(change, e, rtol=1e-6, atol=1e-7)


def test_tridiagonal_weights_solve_their_system_or_are_refused():
    for depth in range(1, 13):
        T = torch.ones(depth, depth).triu(-1).tril(1).double()
        singular = torch.linalg.svdvals(T)[-1] < 1e-10
        if singular:
            with pytest.raises(ValueError, match=f"depth={depth}"):
                tridiagonal_weights(depth)
        else:
            torch.testing.assert_close(T @ torch.tensor(tridiagonal_weights(depth)).double(), torch.ones(depth).double())


def test_tridiagonal_step_solves_the_block_system():
    model, x, e = net(4)
    J, L = factored_jacobian(model, x), 4
    K = J.kernels()
    M = torch.cat([torch.cat([K[j] if abs(i - j) <= 1 else torch.zeros_like(K[j]) for j in range(L)], 1) for i in range(L)])
    expected = J.pull(torch.linalg.solve(M, e.repeat(L)).split(N))
    torch.testing.assert_close(column(natural_steps(J, e, "block-tridiagonal")), column(expected), rtol=1e-6, atol=1e-8)


def test_a_step_moves_the_weights():
    model, x, e = net()
    before, steps = [p.clone() for p in model.parameters()], natural_steps(factored_jacobian(model, x), e)
    apply_steps(model, steps, [0.1, 0.2, 0.3])
    for p, old, s, rate in zip(model.parameters(), before, steps, (0.1, 0.2, 0.3)):
        torch.testing.assert_close(p, old - rate * s)


def test_bad_input():
    model, x, e = net(5)
    J = factored_jacobian(model, x)
    for call, word in ((lambda: natural_steps(J, e, "diagonal"), "structure"), (lambda: natural_steps(J, e[:3]), "e has shape"), (lambda: natural_steps(J, e, damping=0.1), "damping"),
                       (lambda: natural_steps(J, e, "unit-wise", damping=-1.0), "damping"), (lambda: natural_steps(J, e, "block-tridiagonal"), "depth=5"),
                       (lambda: optimal_rates("unit-wise", 3, 3), "width"), (lambda: ntk_mlp(3, 4, 1), "depth"), (lambda: NTKLinear(0, 3), "n_in"),
                       (lambda: factored_jacobian(nn.Linear(INPUTS, 1).double(), x), "NTKLinear"), (lambda: factored_jacobian(NTKLinear(INPUTS, 2).double(), x), "one output")):
        with pytest.raises(ValueError, match=word):
            call()


def test_undamped_unit_wise_kernel_counts_active_units():
    torch.manual_seed(3)
    model, x = ntk_mlp(INPUTS, 2 * WIDTH, 4).double(), torch.randn(N, INPUTS).double()
    J = factored_jacobian(model, x)
    assert all(torch.linalg.matrix_rank(a) == N for a in J.a)  # else a unit's projection is not the whole of its active examples
    K = torch.stack([J.push(natural_steps(J, e, "unit-wise")) for e in torch.eye(N).double()], 1)
    active, h = torch.ones(N).double(), x
    for layer in model[:-1]:
        h = layer(h)
        active += (h > 0).sum(1) * isinstance(layer, nn.ReLU)
    torch.testing.assert_close(K, torch.diag(active), rtol=1e-7, atol=1e-7)
    assert optimal_rates("unit-wise", N, 4, WIDTH) == [1 / (0.5 * 3 * WIDTH + 1)] * 4
