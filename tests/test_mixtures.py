"""Mixtures as exponential families: every closed form against densities, automatic differentiation or enumeration, at generic points."""
import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from curvlab.lab.mixtures import Bernoullis, Gaussians, Mixture, expectation_maximization, textbook_em_step


def generic(d, K, N=60, seed=0):
    "A Gaussian mixture at a generic point: weights, means, covariances, points."
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.double, generator=g)
    root = normal(K, d, d)
    return torch.softmax(normal(K), 0), normal(K, d), root @ root.mT + 0.3 * torch.eye(d, dtype=torch.double), 2 * normal(N, d)


def gaussian(d, K, **options):
    pi, m, covariance, x = generic(d, K, **options)
    mixture = Mixture(Gaussians(d), K)
    return mixture, mixture.natural(mixture.join(pi, mixture.family.moments(m, covariance))), x, (pi, m, covariance)


def bernoulli(d=5, K=3, N=40, seed=1):
    g = torch.Generator().manual_seed(seed)
    mixture = Mixture(Bernoullis(d), K)
    theta = torch.randn(K - 1 + K * d, dtype=torch.double, generator=g)
    return mixture, theta, (torch.rand(N, d, dtype=torch.double, generator=g) < 0.4).double()


@pytest.mark.parametrize("d, K", [(1, 3), (3, 2)])
def test_loss_is_the_mean_negative_log_density(d, K):
    mixture, theta, x, (pi, m, covariance) = gaussian(d, K)
    density = torch.logsumexp(pi.log() + MultivariateNormal(m, covariance).log_prob(x[:, None]), 1)
    torch.testing.assert_close(mixture.loss(theta, mixture.family.statistics(x)), -density.mean())


def test_bernoulli_loss_by_hand():
    mixture, theta, x = bernoulli()
    pi, p = mixture.split(mixture.mean(theta))
    likelihood = [sum(float(pi[k]) * math.prod(float(p[k, j] if row[j] else 1 - p[k, j]) for j in range(5)) for k in range(3)) for row in x]
    assert float(mixture.loss(theta, x)) == pytest.approx(-sum(map(math.log, likelihood)) / len(x), rel=1e-12)


@pytest.mark.parametrize("make", [lambda: gaussian(2, 3)[:3], bernoulli])
def test_means_statistics_and_ways_back(make):
    mixture, theta, x = make()
    S = mixture.family.statistics(x)
    torch.testing.assert_close(mixture.mean(theta), torch.func.grad(mixture.log_partition)(theta))
    torch.testing.assert_close(mixture.natural(mixture.mean(theta)), theta, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(torch.func.grad(mixture.loss)(theta, S), mixture.mean(theta) - mixture.expected_statistics(theta, S))
    torch.testing.assert_close(mixture.fisher(theta), torch.func.hessian(mixture.log_partition)(theta), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(mixture.mirror_step(theta, S), mixture.em_step(theta, S), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("d, K", [(1, 3), (3, 2)])
def test_em_step_is_the_textbooks(d, K):
    mixture, theta, x, usual = gaussian(d, K)
    new = mixture.em_step(theta, mixture.family.statistics(x))
    pi, m, covariance = textbook_em_step(*usual, x)
    torch.testing.assert_close(mixture.mean(new), mixture.join(pi, mixture.family.moments(m, covariance)), rtol=1e-10, atol=1e-12)


def test_joint_kl_of_gaussian_mixtures_is_the_closed_form():
    mixture, theta, _, (pi, m, covariance) = gaussian(2, 3)
    _, other, _, (pi_, m_, covariance_) = gaussian(2, 3, seed=5)
    parts = torch.distributions.kl_divergence(MultivariateNormal(m, covariance), MultivariateNormal(m_, covariance_))
    torch.testing.assert_close(mixture.kl(theta, other), (pi * (torch.log(pi / pi_) + parts)).sum())


def test_decrease_is_the_joint_kl_and_the_posterior_kl():
    mixture, theta, x, _ = gaussian(2, 3)
    S = mixture.family.statistics(x)
    new = mixture.em_step(theta, S)
    r, r_new = mixture.posterior(theta, S), mixture.posterior(new, S)
    hidden = (r * (r.log() - r_new.log())).sum(1).mean()
    decrease = mixture.loss(theta, S) - mixture.loss(new, S)
    torch.testing.assert_close(decrease, mixture.kl(new, theta) + hidden)
    assert abs(float(decrease - mixture.kl(theta, new) - hidden)) > 1e-3


def test_many_runs_at_once():
    mixture, theta, x, _ = gaussian(2, 3)
    S = mixture.family.statistics(x)
    starts = torch.stack([theta, gaussian(2, 3, seed=4)[1]])
    both = expectation_maximization(mixture, starts, S, 4)
    assert both.shape == (5, 2, len(theta))
    torch.testing.assert_close(both[:, 1], expectation_maximization(mixture, starts[1], S, 4))
    torch.testing.assert_close(mixture.kl(both[1:], both[:-1])[2, 0], mixture.kl(both[3, 0], both[2, 0]))
    torch.testing.assert_close(mixture.mirror_step(starts, S), both[1], rtol=1e-8, atol=1e-10)


def test_outside_the_domain_there_is_no_loss():
    family = Gaussians(2)
    eta = torch.tensor([0.3, 0.1, 0.5, 0.0, 0.5]).double()  # a precision of minus the identity: two negative eigenvalues, positive determinant
    assert family.log_partition(eta).isnan()


def test_errors_name_what_to_do():
    mixture, theta, x, _ = gaussian(2, 3)
    S = mixture.family.statistics(x)
    with pytest.raises(ValueError, match="theta has 16 numbers"):
        expectation_maximization(mixture, theta[1:], S, 1)
    with pytest.raises(ValueError, match="S has 2 columns"):
        expectation_maximization(mixture, theta, x, 1)
    with pytest.raises(ValueError, match="degenerate after 1 steps"):
        expectation_maximization(mixture, theta, mixture.family.statistics(torch.ones_like(x)), 2)
