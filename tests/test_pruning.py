"""Pruning as a step in a metric: the surgeon against the constrained minimum written out, and the special cases that need no correction."""
import pytest
import torch

from curvlab.curvature import Kronecker, Surgeon, kronecker_saliencies


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def metric(n, seed=0):
    """A generic positive definite matrix."""
    root = normal(n, n + 3, seed=seed)
    return root @ root.T


def constrained(F, w, gone):
    """Change of weights that removes `gone` at the smallest distance, and that distance, from the Lagrange equations."""
    n, k = len(w), len(gone)
    E = torch.eye(n, dtype=w.dtype)[:, gone]
    system = torch.cat([torch.cat([F, E], 1), torch.cat([E.T, torch.zeros(k, k, dtype=w.dtype)], 1)])
    delta = torch.linalg.solve(system, torch.cat([torch.zeros(n, dtype=w.dtype), -w[gone]]))[:n]
    return delta, float(0.5 * delta @ F @ delta)


@pytest.mark.parametrize("q", range(7))
def test_one_removal_is_the_constrained_minimum(q):
    F, w = metric(7), normal(7, seed=1)
    surgeon = Surgeon(w, [torch.linalg.inv(F)])
    delta, minimum = constrained(F, w, [q])
    assert float(surgeon.saliencies()[q]) == pytest.approx(minimum, rel=1e-10)
    assert surgeon.remove(q) == pytest.approx(minimum, rel=1e-10)
    torch.testing.assert_close(surgeon.weights, w + delta, rtol=1e-10, atol=1e-12)
    assert surgeon.weights[q] == 0 and surgeon.removed.nonzero().tolist() == [[q]]


def test_removals_one_after_another_equal_all_at_once():
    F, w = metric(9), normal(9, seed=2)
    surgeon = Surgeon(w, [torch.linalg.inv(F)])
    total = sum(surgeon.remove() for _ in range(5))
    delta, minimum = constrained(F, w, surgeon.removed.nonzero()[:, 0].tolist())
    torch.testing.assert_close(surgeon.weights, w + delta, rtol=1e-9, atol=1e-11)
    assert total == pytest.approx(minimum, rel=1e-9)


def test_inverse_after_removals_is_the_inverse_of_the_metric_that_is_left():
    F, w = metric(8), normal(8, seed=3)
    surgeon = Surgeon(w, [torch.linalg.inv(F)])
    for q in (5, 0, 3):
        surgeon.remove(q)
    left = ~surgeon.removed
    torch.testing.assert_close(surgeon.inverse[0][left][:, left], torch.linalg.inv(F[left][:, left]))
    assert not surgeon.inverse[0][~left].any() and not surgeon.inverse[0][:, ~left].any()


def test_each_step_takes_the_cheapest_weight():
    F, w = metric(8, seed=4), normal(8, seed=5)
    surgeon = Surgeon(w, [torch.linalg.inv(F)])
    for _ in range(4):
        free = (~surgeon.removed).nonzero()[:, 0].tolist()
        left = F[free][:, free]
        costs = [constrained(left, surgeon.weights[free], [i])[1] for i in range(len(free))]
        assert surgeon.remove() == pytest.approx(min(costs), rel=1e-9)
        assert surgeon.removed[free[costs.index(min(costs))]]


def test_blocks_equal_the_block_diagonal_matrix():
    A, B, d, w = metric(4, seed=6), metric(5, seed=7), normal(3, seed=8).square() + 0.1, normal(12, seed=9)
    blocks = Surgeon(w, [torch.linalg.inv(A), 1 / d, torch.linalg.inv(B)])
    whole = Surgeon(w, [torch.linalg.inv(torch.block_diag(A, d.diag(), B))])
    for _ in range(8):
        assert blocks.remove() == pytest.approx(whole.remove(), rel=1e-9)
    torch.testing.assert_close(blocks.weights, whole.weights)
    assert torch.equal(blocks.removed, whole.removed)


def test_identity_is_magnitude_pruning_and_moves_nothing_else():
    w = normal(10, seed=10)
    surgeon = Surgeon(w, [torch.ones(10, dtype=torch.double)])
    for _ in range(4):
        surgeon.remove()
    assert set(surgeon.removed.nonzero()[:, 0].tolist()) == set(w.abs().argsort()[:4].tolist())
    assert torch.equal(surgeon.weights[~surgeon.removed], w[~surgeon.removed])


def test_scale_of_the_metric_changes_costs_only():
    F, w = metric(8, seed=11), normal(8, seed=12)
    one, ten = Surgeon(w, [torch.linalg.inv(F)]), Surgeon(w, [torch.linalg.inv(10 * F)])
    for _ in range(5):
        assert ten.remove() == pytest.approx(10 * one.remove(), rel=1e-9)
    torch.testing.assert_close(one.weights, ten.weights)


def test_weights_that_are_not_prunable_stay_but_move():
    F, w = metric(6, seed=13), normal(6, seed=14)
    prunable = torch.tensor([True, False, True, False, True, True])
    surgeon = Surgeon(w, [torch.linalg.inv(F)], prunable)
    for _ in range(4):
        surgeon.remove()
    assert torch.equal(surgeon.removed, prunable)
    assert (surgeon.weights[~prunable] != w[~prunable]).all()
    with pytest.raises(ValueError, match="nothing is left"):
        surgeon.remove()


def test_saliencies_of_a_kronecker_product():
    X, D, W = metric(4, seed=15), metric(3, seed=16), normal(3, 4, seed=17)
    inverse = torch.linalg.inv(Kronecker(X, D).to_dense())
    torch.testing.assert_close(kronecker_saliencies(W, X, D).flatten(), W.flatten() ** 2 / (2 * inverse.diagonal()))
    assert not torch.allclose(kronecker_saliencies(W, X, D), W**2 * torch.outer(D.diagonal(), X.diagonal()) / 2)  # the diagonal of the metric is another thing


def test_arguments_are_not_changed():
    F, w = metric(5, seed=18), normal(5, seed=19)
    inverse, before = torch.linalg.inv(F), w.clone()
    kept = inverse.clone()
    Surgeon(w, [inverse]).remove()
    assert torch.equal(w, before) and torch.equal(inverse, kept)


def test_bad_arguments_name_themselves():
    w, inverse = normal(5), torch.linalg.inv(metric(5))
    with pytest.raises(ValueError, match="inverse has blocks"):
        Surgeon(w, [inverse[:4, :4]])
    with pytest.raises(ValueError, match="inverse has blocks"):
        Surgeon(w, [inverse[:, :4]])
    with pytest.raises(ValueError, match="not positive"):
        Surgeon(w, [-inverse])
    with pytest.raises(ValueError, match="prunable"):
        Surgeon(w, [inverse], torch.ones(5))
    surgeon = Surgeon(w, [inverse])
    surgeon.remove(2)
    state = surgeon.weights.clone()
    with pytest.raises(ValueError, match="q=2"):
        surgeon.remove(2)
    with pytest.raises(ValueError, match="q=5"):
        surgeon.remove(5)
    assert torch.equal(surgeon.weights, state)
