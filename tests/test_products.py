"""Products, symmetric products and inverses: the quick ways against the definitions in float64."""
import pytest
import torch
from fake_device import DEVICE, fake_device, no_host_reads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvlab import products
from curvlab.curvature import products as curvature_products
from curvlab.curvature.capture import input_gram, input_rows, layer_blocks
from curvlab.curvature.products import KEPT, LEAST, NARROW, OWN_STRIP, OWN_WIDE, STRIP, add_gram_, gram, product, spd_inverse, transposed

maker_asked = products.held_back


@pytest.fixture(autouse=True, scope="module", params=[False, True], ids=["own", "other"])
def either_library(request):
    "Every test by both libraries, whoever made this processor."
    with pytest.MonkeyPatch.context() as patch:
        for module in (products, curvature_products):
            patch.setattr(module, "held_back", lambda: request.param)
        yield


def test_both_libraries_are_met(either_library):
    X = torch.randn(300, 300)
    assert products.other_library(X, X) == products.held_back()


def test_who_made_the_processor(monkeypatch, tmp_path):
    "MKL is held back on another maker's processor, and only MKL."
    maker_asked.cache_clear()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for maker, answer in (("GenuineIntel", False), ("AuthenticAMD", True)):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
        monkeypatch.setattr(products, "Path", lambda _: tmp_path / "cpuinfo")
        assert maker_asked() is answer
        maker_asked.cache_clear()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert maker_asked() is False
    maker_asked.cache_clear()


@settings(deadline=None, max_examples=25)
@given(m=st.integers(1, 250), k=st.integers(1, 250), n=st.integers(1, 250), flips=st.tuples(st.booleans(), st.booleans()), cut=st.booleans())
def test_product_of_any_layout(m, k, n, flips, cut):
    "Contiguous, transposed and strided operands, below and above the side where the library changes."
    make = lambda a, b, flip: torch.randn(b + cut, a + cut).mT[cut:, cut:] if flip else torch.randn(a + cut, b + cut)[cut:, cut:]
    X, Y = make(m, k, flips[0]), make(k, n, flips[1])
    exact = X.double() @ Y.double()
    for got in (product(X, Y), product(X[None], Y[None])[0], *product(torch.stack([X, X]), Y.expand(2, *Y.shape))):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5 * max(1, exact.abs().max()))


def test_product_for_autograd_and_errors():
    X, Y = torch.randn(180, 170, requires_grad=True), torch.randn(170, 190)
    product(X, Y).sum().backward()
    torch.testing.assert_close(X.grad, Y.sum(1).expand(180, 170))
    with pytest.raises(RuntimeError):
        product(torch.randn(180, 170), torch.randn(180, 190))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [3, NARROW, NARROW + 1, 2 * NARROW + 77])
def test_gram_against_the_definition(width, dtype):
    rows, more = (torch.randn(1, 5, 61, width, dtype=dtype) for _ in range(2))
    exact = torch.einsum("kbti,kbtj->kij", rows.double(), rows.double())
    total = exact + 0.25 * torch.einsum("kbti,kbtj->kij", more.double(), more.double())
    close = dict(rtol=0, atol=(1e-3 if dtype == torch.float32 else 1e-11))
    start = gram(rows)
    torch.testing.assert_close(start.double(), exact, **close)
    assert gram(more, start, 0.25) is start
    torch.testing.assert_close(start.double(), total, **close)


@pytest.mark.parametrize("width", [OWN_STRIP, OWN_STRIP + 1, 3 * OWN_STRIP + 5])
@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_gram_of_many_rows(width, alpha):
    "Long enough for strips; what is added to is symmetric and stays so."
    M, before = torch.randn(2, 1500, width).mT, torch.randn(2, width, 40)
    out = before @ before.mT
    out = 0.5 * (out + out.mT)
    exact = out.double() + 0.3 * M.double() @ M.double().mT
    assert add_gram_(out, M, alpha) is out
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-3)
    assert (out - out.mT).abs().max() < 1e-4


@pytest.mark.parametrize("width", [OWN_WIDE, OWN_WIDE + 1, 2 * OWN_WIDE + 77])
def test_gram_of_many_columns(width):
    "Wide enough for halves, and halves of halves."
    M, out = torch.randn(1, 130, width, dtype=torch.double).mT, torch.full((1, width, width), torch.nan, dtype=torch.double)
    torch.testing.assert_close(add_gram_(out, M, 0.3, fresh=True), 0.3 * M @ M.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(add_gram_(out, M, -0.1), 0.2 * M @ M.mT, rtol=0, atol=1e-10)


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


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


WIDE = NARROW + 3 * STRIP + 9  # five strips, the last one incomplete
LAYOUTS = {
    "rows": lambda dtype: random(2, WIDE, 190, dtype=dtype), "columns": lambda dtype: random(2, 190, WIDE, dtype=dtype).mT, "slice": lambda dtype: random(2, 800, 300, dtype=dtype)[..., 30:220],
    "slice of columns": lambda dtype: random(2, 190, 900, dtype=dtype)[..., 30:830].mT, "every second": lambda dtype: random(2, 1600, 380, dtype=dtype)[:, ::2, ::2], "one column": lambda dtype: random(2, 270, 1, dtype=dtype),
    "one column of many": lambda dtype: random(2, 70, 7, dtype=dtype)[..., 3:4], "none": lambda dtype: random(2, 70, 0, dtype=dtype), "one row": lambda dtype: random(2, 1, 9, dtype=dtype), "small": lambda dtype: random(2, 6, 9, dtype=dtype),
}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_symmetric_products_of_any_layout(layout, dtype, tensor, fresh):
    M = LAYOUTS[layout](dtype)
    n, before = M.shape[1], random(2, M.shape[1] + 1, M.shape[1] + 1, dtype=dtype, seed=1)
    before = before + before.mT
    whole = before.clone()
    out = whole[:, :n, :n]  # in the corner of a larger matrix
    expected = before.double().clone()
    if fresh:
        out.fill_(torch.nan)
        expected[:, :n, :n] = 0
    assert add_gram_(out, M, torch.tensor(0.3, dtype=dtype) if tensor else 0.3, fresh) is out
    expected[:, :n, :n] += 0.3 * M.double() @ M.double().mT
    assert (whole.double() - expected).abs().max() < {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 1.0}[dtype]
    assert M.shape[-1] == 0 or (whole - before).abs().max() > 0.05


def test_shapes_that_do_not_fit_change_nothing():
    M = random(2, 6, 9)
    for out in (random(2, 9, 9), random(6, 6), random(2, 6, 6, dtype=torch.float32), random(1, 6, 6)):
        before = out.clone()
        with pytest.raises(ValueError, match="own dtype"):
            add_gram_(out, M)
        assert torch.equal(out, before)


@pytest.mark.parametrize("n", [3, WIDE])
def test_gradients_of_symmetric_products(n):
    M = random(1, n, 190).requires_grad_()
    add_gram_(torch.zeros(1, n, n, dtype=torch.float64), M)[0, 2, 0].backward()
    assert torch.allclose(M.grad[0, 2], M.detach()[0, 0]) and torch.allclose(M.grad[0, 0], M.detach()[0, 2])


def test_nothing_is_read_from_a_device():
    with fake_device():
        out, M, alpha = torch.zeros(2, 300, 300), torch.zeros(2, 300, 90), torch.ones(())
        with no_host_reads():
            assert add_gram_(add_gram_(out, M, 0.5), M, alpha).device == DEVICE
            assert product(M, out.new_zeros(2, 90, 70)).device == DEVICE


def test_kept_memory_is_reused_and_results_are_not_in_it():
    first, second = torch.randn(1, 4, 120, 300), torch.randn(1, 4, 118, 280)
    one = gram(first)
    copy = one.clone()
    gram(second)
    assert torch.equal(one, copy)
    a = transposed(first[0, 0], "rows")
    assert torch.equal(a, first[0, 0].mT) and transposed(second[0, 0], "rows").data_ptr() == a.data_ptr()
    assert transposed(second[0, 0], "strip").data_ptr() != a.data_ptr()
    assert torch.equal(transposed(first[0, 0].double(), "rows"), first[0, 0].mT.double())
    with torch.inference_mode():
        gram(first)
    torch.testing.assert_close(gram(first), copy)
    wide = torch.zeros(2, KEPT // 2 + 1)
    assert transposed(wide, "rows").data_ptr() != transposed(first[0, 0], "rows").data_ptr()


@pytest.mark.parametrize("shape", [(7,), (5, 7), (5, 6, 7), (4, 3, 2, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_input_factor_of_a_linear_layer_without_longer_rows(shape, bias):
    "The border is the sum of the inputs and their number; some positions stand for all."
    layer, x = nn.Linear(7, 3, bias=bias), random(*shape)
    block, = layer_blocks(layer)
    rows = input_rows(block, layer, x)
    total = input_gram(block, layer, x, torch.double)
    torch.testing.assert_close(total, gram(rows))
    assert input_gram(block, layer, x, torch.double, total, slice(1, None, 2)) is total
    kept = rows[:, :, 1::2] if rows.shape[2] > 1 else rows
    torch.testing.assert_close(total, gram(rows) + rows.shape[2] / kept.shape[2] * gram(kept))
