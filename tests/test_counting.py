"""Counts of launches and bytes against counts by hand, and exponents against known powers."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from curvlab.lab.counting import FACTORISATIONS, factorisations, fit_exponent, launches, peak_bytes, tensor_bytes


def test_launches_by_hand():
    a, b = torch.randn(3, 4), torch.randn(4, 3)
    assert launches(lambda: None) == launches(lambda: torch.empty_like(a)) == {}
    assert launches(lambda: a.T.reshape(2, 6)) == {"clone": 1} and launches(lambda: a.reshape(2, 6)) == {}  # the first must copy
    assert launches(lambda: a.detach().view(12)[3:]) == {}
    assert launches(lambda: (a @ b).tanh_()) == {"mm": 1, "tanh_": 1}
    assert launches(lambda: torch._foreach_mul([a] * 50, 2.0)) == {"_foreach_mul": 1}


def test_launches_sees_the_backward_pass_and_second_derivatives():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    forward = launches(lambda: model(x).sin().sum())
    both = launches(lambda: model(x).sin().sum().backward())
    assert forward["addmm"] == both["addmm"] == 1 and both["cos"] == 1 and both["mm"] == 1 and "cos" not in forward

    def twice():
        g = torch.autograd.grad(model(x).sin().sum(), model.weight, create_graph=True)[0]
        torch.autograd.grad(g.sum(), model.weight)

    assert launches(twice)["mm"] > both["mm"]


@pytest.mark.parametrize("factorise", [torch.linalg.eigh, torch.linalg.cholesky_ex, torch.linalg.svd, torch.linalg.qr, torch.linalg.inv, lambda M: torch.linalg.solve(M, M), torch.linalg.lu_factor])
def test_every_factorisation_is_one(factorise):
    stack = torch.eye(3).expand(5, 3, 3) + 0.1
    assert factorisations(launches(lambda: factorise(stack))) == 1
    assert factorisations(launches(lambda: stack @ stack + 1)) == 0 < len(FACTORISATIONS)


@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from([torch.float32, torch.float64, torch.bfloat16])), min_size=1, max_size=6))
def test_bytes_of_a_state(parts):
    tensors = [torch.zeros(n, dtype=dtype) for n, dtype in parts]
    size = sum(n * dtype.itemsize for n, dtype in parts)
    assert tensor_bytes(tensors) == tensor_bytes({"a": tensors, "b": (tensors[0].view(-1), 3, "x")}) == size
    assert tensor_bytes([tensors, [t.clone() for t in tensors]]) == 2 * size


def test_peak_bytes_by_hand():
    x = torch.ones(1000, requires_grad=True)
    y = torch.ones(1000)
    assert peak_bytes(lambda: y.mul_(2).add_(1)) == 0
    assert peak_bytes(lambda: torch.cat([y, y])) == 8000
    assert peak_bytes(lambda: [(y + i).sum() for i in range(5)]) == 4000 + 5 * 4
    # sin keeps its input, exp its output: two saved tensors and the sum, then one gradient after the other
    forward = peak_bytes(lambda: x.sin().exp().sum())
    assert 8000 <= forward <= 8004
    assert peak_bytes(lambda: x.sin().exp().sum().backward()) > forward
    assert peak_bytes(lambda: x.sin().exp().sum().backward()) == peak_bytes(lambda: x.sin().exp().sum().backward()), "the same in every run"


def test_memory_given_back_is_used_again():
    """A storage that died must not be taken for a new one at the same address."""
    def many():
        for _ in range(50):
            torch.ones(1000).add_(1)

    assert peak_bytes(many) == 4000


@given(st.floats(-2, 4), st.floats(0.01, 100))
def test_exponents_are_found(exponent, scale):
    sizes = [3, 5, 20, 70]
    slope, error = fit_exponent(sizes, [scale * n**exponent for n in sizes])
    assert slope == pytest.approx(exponent, abs=1e-9) and error < 1e-9


def test_error_of_an_exponent():
    """Against the textbook formula, through numpy's covariance."""
    import numpy as np

    sizes, costs = [1, 2, 4, 8, 16], [1.0, 2.3, 3.6, 9.0, 15.0]
    coefficients, covariance = np.polyfit(np.log(sizes), np.log(costs), 1, cov=True)
    slope, error = fit_exponent(sizes, costs)
    assert slope == pytest.approx(coefficients[0]) and error == pytest.approx(math.sqrt(covariance[0, 0]))


@pytest.mark.parametrize("sizes, costs", [([1], [1]), ([2, 2], [1, 3]), ([1, 2], [1, 0]), ([1, 2], [1]), ([0, 2], [1, 1])])
def test_bad_fits_are_refused(sizes, costs):
    with pytest.raises(ValueError, match="sizes="):
        fit_exponent(sizes, costs)
