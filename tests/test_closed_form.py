"""Fisher matrices in closed form against the dense average over sampled inputs, entry by entry."""
import math

import pytest
import torch

from curvlab.curvature import CommitteeFisher, PerceptronFisher

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
