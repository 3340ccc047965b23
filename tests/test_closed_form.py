"""Fisher matrices in closed form against the dense average over sampled inputs, entry by entry."""
import math

import pytest
import torch

from curvlab.curvature import CommitteeFisher, PerceptronFisher, UnitFisher

BELL = lambda u: math.sqrt(2 / math.pi) * torch.exp(-u * u / 2)
SLOPES = {"tanh": lambda u: 1 - torch.tanh(u) ** 2, "erf": BELL, "linear": torch.ones_like}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("name", SLOPES)
def test_perceptron_against_sampled_inputs(name):
    w, x = 1.3 * normal(5), normal(300_000, 5, seed=1)
    score = SLOPES[name](x @ w)[:, None] * x / 0.3
    reference = score.T @ score / len(x)
    G = PerceptronFisher(w, SLOPES[name], sigma=0.3).to_dense()
    assert (G - reference).norm() < 0.02 * G.norm()


def test_perceptron_erf_has_elementary_eigenvalues():
    """For bells the averages are Gaussian integrals: c1 = (2/pi) (1 + 2 w^2)^(-1/2), c2 = c1 / (1 + 2 w^2)."""
    w = normal(7, 4)
    metric, d = PerceptronFisher(w, BELL), 1 + 2 * (w * w).sum(-1)
    torch.testing.assert_close(metric.c1, 2 / math.pi * d**-0.5, rtol=1e-13, atol=0)
    torch.testing.assert_close(metric.c2, 2 / math.pi * d**-1.5, rtol=1e-13, atol=0)


def test_perceptron_products_and_stacks():
    w, V = normal(3, 2, 5), normal(3, 2, 5, seed=1)
    metric = PerceptronFisher(w, SLOPES["tanh"], sigma=0.7)
    G = metric.to_dense()
    torch.testing.assert_close(metric @ V, (G @ V[..., None])[..., 0])
    torch.testing.assert_close(metric.solve(V), torch.linalg.solve(G, V))
    torch.testing.assert_close(G[1, 0], PerceptronFisher(w[1, 0], SLOPES["tanh"], sigma=0.7).to_dense())


def test_perceptron_without_weights_is_isotropic():
    metric = PerceptronFisher(torch.zeros(4, dtype=torch.double), SLOPES["tanh"], sigma=0.5)
    torch.testing.assert_close(metric.to_dense(), 4 * torch.eye(4, dtype=torch.double))


def test_committee_against_sampled_inputs():
    J, x = 0.7 * normal(3, 6), normal(400_000, 6, seed=1)
    score = (BELL(x @ J.T)[:, :, None] * x[:, None, :]).flatten(1)
    reference = score.T @ score / len(x)
    F = CommitteeFisher(J).to_dense()
    assert (F - reference).norm() < 0.02 * F.norm()


@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.5])
def test_committee_solve_is_the_dense_damped_solve(damping):
    J, V = normal(2, 3, 3, 6), normal(2, 3, 3, 6, seed=1)
    F = CommitteeFisher(J, damping)
    dense = F.to_dense()
    torch.testing.assert_close(dense, dense.mT)
    ridge = damping * dense.diagonal(dim1=-2, dim2=-1).mean(-1)
    torch.testing.assert_close(F.ridge[..., 0, 0], ridge)
    reference = torch.linalg.solve(dense + ridge[..., None, None] * torch.eye(18, dtype=torch.double), V.flatten(-2))
    torch.testing.assert_close(F.solve(V).flatten(-2), reference, rtol=1e-8, atol=1e-8)


def test_committee_of_one_is_a_perceptron():
    J = normal(1, 5)
    torch.testing.assert_close(CommitteeFisher(J).to_dense(), PerceptronFisher(J[0], BELL).to_dense())


def test_as_many_units_as_inputs():
    J, V = normal(4, 4), normal(4, 4, seed=1)
    F = CommitteeFisher(J)
    torch.testing.assert_close(F.solve(V).flatten(), torch.linalg.solve(F.to_dense(), V.flatten()))


@pytest.mark.parametrize("make, word", [
    (lambda: PerceptronFisher(normal(3), BELL, sigma=0.0), "sigma"), (lambda: PerceptronFisher(normal(3), BELL, nodes=3), "nodes"),
    (lambda: CommitteeFisher(normal(4, 3)), "J has shape"), (lambda: CommitteeFisher(normal(2, 3), damping=-1.0), "damping"),
])
def test_bad_arguments_are_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def stack_of_units(seed=0):
    "Three units with five inputs: weights, biases, means and variances of the inputs, all generic."
    w, bias, mean = (normal(3, k, seed=10 * seed + j) for j, k in enumerate((5, 1, 5)))
    return w, bias, mean, 0.2 + normal(3, 5, seed=10 * seed + 4).abs()


@pytest.mark.parametrize("name", [*SLOPES, "relu"])
def test_unit_against_sampled_inputs(name):
    slope = {**SLOPES, "relu": lambda u: (u > 0).double()}[name]
    w, bias, mean, variance = stack_of_units()
    F = UnitFisher(w, bias, slope, mean, variance, nodes=4001).to_dense()
    for k in range(3):
        x = torch.cat([mean[k] + variance[k].sqrt() * normal(300_000, 5, seed=k), torch.ones(300_000, 1, dtype=torch.double)], 1)
        score = slope(x[:, :5] @ w[k] + bias[k])[:, None] * x
        assert (F[k] - score.T @ score / len(x)).norm() < 0.02 * F[k].norm()


def test_unit_erf_has_elementary_averages():
    """For bells, N(0, 1) times f'^2 is a Gaussian again: variance tau = 1 / (1 + 2 l^2), centre -2 l mu tau, mass (2/pi) sqrt(tau) exp(-mu^2 tau)."""
    w, bias, mean, variance = stack_of_units(1)
    F = UnitFisher(w, bias, BELL, mean, variance)
    l, mu = (w**2 * variance).sum(1, keepdim=True).sqrt(), bias + (w * mean).sum(1, keepdim=True)
    tau = 1 / (1 + 2 * l * l)
    mass, centre = 2 / math.pi * tau.sqrt() * torch.exp(-mu * mu * tau), -2 * l * mu * tau
    torch.testing.assert_close(F.a0, mass, rtol=1e-12, atol=0)
    torch.testing.assert_close(F.b1, mass * centre, rtol=1e-11, atol=0)
    torch.testing.assert_close(F.b2, mass * (tau + centre**2), rtol=1e-11, atol=0)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_unit_products_and_solves(damping):
    w, bias, mean, variance = stack_of_units(2)
    F, V = UnitFisher(w, bias, SLOPES["tanh"], mean, variance), normal(3, 6, seed=9)
    dense = F.to_dense()
    C = torch.eye(6, dtype=torch.double).repeat(3, 1, 1)
    C[:, :5, 5] = mean
    torch.testing.assert_close(F @ V, (dense @ V[..., None])[..., 0])
    torch.testing.assert_close(F.solve(V, damping), torch.linalg.solve(dense + damping * C @ C.mT, V))
    each = torch.tensor([[0.1], [0.2], [0.4]], dtype=torch.double)
    torch.testing.assert_close(F.solve(V, each), torch.linalg.solve(dense + each[..., None] * C @ C.mT, V))


def test_unit_without_bias_is_the_perceptron_and_shared_moments_are_allowed():
    w, bias, mean, variance = stack_of_units(3)
    block = UnitFisher(w, 0 * bias, SLOPES["tanh"]).to_dense()
    torch.testing.assert_close(block[:, :5, :5], PerceptronFisher(w, SLOPES["tanh"]).to_dense())
    shared = UnitFisher(w, bias, SLOPES["tanh"], mean[0], variance[0])
    repeated = UnitFisher(w, bias, SLOPES["tanh"], mean[0].expand(3, 5), variance[0].expand(3, 5))
    torch.testing.assert_close(shared.to_dense(), repeated.to_dense())
    torch.testing.assert_close(shared.solve(w.new_ones(3, 6)), repeated.solve(w.new_ones(3, 6)))


def test_unit_refuses_wrong_shapes():
    w, bias, *_ = stack_of_units()
    with pytest.raises(ValueError, match="bias has shape"):
        UnitFisher(w, bias[:, 0], SLOPES["tanh"])
    with pytest.raises(ValueError, match="nodes=3"):
        UnitFisher(w, bias, SLOPES["tanh"], nodes=3)
