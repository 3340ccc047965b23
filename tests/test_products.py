"""Products, symmetric products and inverses: the quick ways through other libraries against the plain ones."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlab.curvature.structured import KEPT, LEAST, NARROW, gram, product, spd_inverse, transposed


@settings(deadline=None, max_examples=25)
@given(m=st.integers(1, 150), k=st.integers(1, 150), n=st.integers(1, 150), flips=st.tuples(st.booleans(), st.booleans()), cut=st.booleans())
def test_product_of_any_layout(m, k, n, flips, cut):
    "Contiguous, transposed and strided operands, below and above the side where the library changes."
    make = lambda a, b, flip: torch.randn(b + cut, a + cut).mT[cut:, cut:] if flip else torch.randn(a + cut, b + cut)[cut:, cut:]
    X, Y = make(m, k, flips[0]), make(k, n, flips[1])
    exact = X.double() @ Y.double()
    for got in (product(X, Y), product(X[None], Y[None])[0]):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5 * max(1, exact.abs().max()))


def test_product_for_autograd_and_errors():
    X, Y = torch.randn(80, 70, requires_grad=True), torch.randn(70, 90)
    product(X, Y).sum().backward()
    torch.testing.assert_close(X.grad, Y.sum(1).expand(80, 70))
    with pytest.raises(RuntimeError):
        product(torch.randn(80, 70), torch.randn(80, 90))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [3, NARROW, NARROW + 1, 2 * NARROW + 77])
def test_gram_against_the_definition(width, dtype):
    rows, more = (torch.randn(1, 5, 41, width, dtype=dtype) for _ in range(2))
    exact = torch.einsum("kbti,kbtj->kij", rows.double(), rows.double())
    total = exact + 0.25 * torch.einsum("kbti,kbtj->kij", more.double(), more.double())
    close = dict(rtol=0, atol=(1e-3 if dtype == torch.float32 else 1e-11))
    start = gram(rows)
    torch.testing.assert_close(start.double(), exact, **close)
    assert gram(more, start, 0.25) is start
    torch.testing.assert_close(start.double(), total, **close)


@pytest.mark.parametrize("n", [5, LEAST, LEAST + 1, 3 * LEAST + 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spd_inverse_by_either_library(n, dtype):
    X = torch.randn(2, n, 2 * n, dtype=torch.double)
    M = (X @ X.mT / n).to(dtype)
    before = M.clone()
    got = spd_inverse(M)
    torch.testing.assert_close(got.double(), torch.linalg.inv(M.double()), rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-10)
    assert torch.equal(got, got.mT) or n < LEAST
    assert torch.equal(M, before)


@pytest.mark.parametrize("n", [6, LEAST + 6])
def test_spd_inverse_of_what_has_none(n):
    "Rounding below zero is raised; an entry that is not finite, or a matrix that is really indefinite, gives NaN in its own place only."
    Q = torch.linalg.qr(torch.randn(n, n))[0]
    values = torch.linspace(1, 2, n)
    values[0] = -1e-7
    near, well = (Q * values) @ Q.mT, (Q * values.clamp(min=0.5)) @ Q.mT
    assert spd_inverse(near).isfinite().all()
    broken = well.clone()
    broken[1, 0] = broken[0, 1] = torch.nan
    out = spd_inverse(torch.stack([well, broken, -well]))
    torch.testing.assert_close(out[0], torch.linalg.inv(well), rtol=1e-3, atol=1e-3)
    assert out[1].isnan().any() and out[2].isnan().any()


def test_kept_memory_is_reused_and_results_are_not_in_it():
    first, second = torch.randn(1, 4, 90, 300), torch.randn(1, 4, 70, 280)
    one = gram(first)
    copy = one.clone()
    gram(second)
    assert torch.equal(one, copy)
    a = transposed(first[0, 0])
    assert torch.equal(a, first[0, 0].mT) and transposed(second[0, 0]).data_ptr() == a.data_ptr()
    assert torch.equal(transposed(first[0, 0].double()), first[0, 0].mT.double())
    with torch.inference_mode():
        gram(first)
    torch.testing.assert_close(gram(first), copy)
    wide = torch.zeros(2, KEPT // 2 + 1)
    assert transposed(wide).data_ptr() != transposed(first[0, 0]).data_ptr()
