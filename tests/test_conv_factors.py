"""Factors of convolutions without patches, against explicit patches in float64, and where K-FAC and the approximations use them."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvlab import Objective
from curvlab.curvature import capture, conv_factors, kfac
from curvlab.curvature.capture import input_gram, input_rows, layer_blocks, output_rows, patches
from curvlab.curvature.conv_factors import conv_gram, output_gram, pays, site_gram
from curvlab.curvature.products import gram
from curvlab.optim import KFAC

LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def slow_factor(module, x):
    """`sum a a^T` over examples and sites: every patch cut out by hand, one after the other."""
    x, n = capture.padded(module, x), len(module.kernel_size)
    sites = [(size - d * (k - 1) - 1) // s + 1 for size, k, d, s in zip(x.shape[2:], module.kernel_size, module.dilation, module.stride)]
    total = 0
    for site in torch.cartesian_prod(*map(torch.arange, sites)).reshape(-1, n).tolist():
        window = [slice(p * s, p * s + d * (k - 1) + 1, d) for p, s, d, k in zip(site, module.stride, module.dilation, module.kernel_size)]
        a = x[(slice(None), slice(None), *window)].unflatten(1, (module.groups, -1)).flatten(2)  # (B, groups, features)
        total = total + torch.einsum("bki,bkj->kij", a, a)
    return total


@st.composite
def convolutions(draw):
    """A layer of stride 1 and an input that has at least one site."""
    n = draw(st.sampled_from([1, 2, 2, 3]))
    many = lambda low, high: [draw(st.integers(low, high)) for _ in range(n)]
    kernel, dilation, groups, channels = many(1, 4), many(1, 2), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding = draw(st.sampled_from(["same", "valid", "numbers", "numbers"]))
    pads = many(0, 5) if padding == "numbers" else [0] * n
    mode = draw(st.sampled_from(["zeros", "zeros", "replicate", "circular"]))
    reach = [d * (k - 1) for k, d in zip(kernel, dilation)]
    most = [r for r in reach] if padding == "same" else pads
    least = [max(1, r + 1 - 2 * p, m if mode == "circular" else 1) for r, p, m in zip([0] * n if padding == "same" else reach, pads, most)]
    module = LAYERS[n](groups * channels, groups * 2, kernel, dilation=dilation, padding=tuple(pads) if padding == "numbers" else padding, groups=groups, padding_mode=mode, bias=draw(st.booleans()))
    return module.double(), (draw(st.integers(1, 3)), groups * channels, *(low + draw(st.integers(0, 4)) for low in least))


@settings(max_examples=150)
@given(convolutions(), st.integers(0, 10))
def test_equals_the_product_of_the_patches(case, seed):
    module, shape = case
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    expected = slow_factor(module, x)
    scale = 1 + float(expected.abs().max())
    assert torch.allclose(gram(patches(module, x)), expected, atol=1e-13 * scale)
    assert torch.allclose(conv_gram(module, x), expected, atol=1e-12 * scale)
    block, = layer_blocks(module)
    rows = gram(input_rows(block, module, x))
    assert torch.allclose(input_gram(block, module, x, torch.double), rows, atol=1e-12 * (1 + float(rows.abs().max())))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 2e-6)], ids=str)
def test_single_and_half_precision(dtype, bound):
    """Half-precision inputs are exact numbers, summed in float32."""
    torch.manual_seed(0)
    module, x = nn.Conv2d(8, 4, 3, padding=1), torch.randn(16, 8, 12, 11).relu().to(dtype)
    block, = layer_blocks(module)
    new = input_gram(block, module, x, torch.float32)
    expected = gram(input_rows(block, module, x.double()))
    assert new.dtype == torch.float32
    assert (new - expected).norm() < bound * expected.norm()


def test_memory_layout_does_not_matter():
    torch.manual_seed(0)
    module, x = nn.Conv2d(4, 6, 3, padding=1).double(), torch.randn(5, 6, 7, 4).double().permute(0, 3, 1, 2)
    assert torch.allclose(conv_gram(module, x), conv_gram(module, x.contiguous()), atol=1e-12)
    assert torch.allclose(conv_gram(module, x), gram(patches(module, x)), atol=1e-12)


def test_strides_are_refused():
    with pytest.raises(ValueError, match="stride"):
        conv_gram(nn.Conv2d(2, 2, 3, stride=(1, 2)), torch.randn(1, 2, 5, 5))


def test_missing_sites_are_subtracted_once():
    """With ones everywhere, an entry counts the sites at which both places lie inside the image."""
    A = site_gram(torch.ones(1, 1, 4, 5).double(), [3, 3], [1, 1], [(1, 1), (1, 1)], 1)[0, 0, :, :, 0]
    inside = lambda size, i, j: sum(0 <= p + i - 1 < size and 0 <= p + j - 1 < size for p in range(size))
    for a, b, c, d in torch.cartesian_prod(*[torch.arange(3)] * 4).tolist():
        assert float(A[a, b, c, d]) == pytest.approx(inside(4, a, c) * inside(5, b, d))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", ["convolution", "linear", "one position"])
def test_output_factor(groups, layout):
    torch.manual_seed(0)
    if layout == "linear":
        rows = torch.randn(groups, 6, 5, 3).double()
    else:
        rows = output_rows(nn.Conv1d(groups, 3 * groups, 1, groups=groups), torch.randn(6, 3 * groups, 1 if layout == "one position" else 5).double())
    expected = torch.einsum("kbti,kbtj->kij", rows, rows)
    assert torch.allclose(output_gram(rows), expected, atol=1e-12)
    before = torch.eye(3).double().repeat(groups, 1, 1)
    into = before.clone()
    assert output_gram(rows, into, torch.tensor(0.25).double()) is into
    assert torch.allclose(into, before + 0.25 * expected, atol=1e-12)


def test_when_it_pays():
    same, wide, strided = nn.Conv2d(32, 8, 3, padding=1), nn.Conv2d(32, 8, 5), nn.Conv2d(32, 8, 3, stride=2)
    assert pays(same, (64, 32, 14, 14)) and pays(wide, (64, 32, 14, 14))
    assert not pays(strided, (64, 32, 14, 14)) and not pays(same, (1, 32, 4, 4)) and not pays(wide, (4096, 32, 5, 5))


# Where it is used


def convnet(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=bias), nn.Tanh(), nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=bias), nn.Tanh(), nn.Conv2d(6, 3, 2, stride=2), nn.Flatten(), nn.Linear(27, 3)).double()


def factors(model, x, y, **settings):
    """K-FAC's factors of all layers after one step."""
    optimizer = KFAC(model, lr=0.0, **settings)
    optimizer.step(Objective(model, nn.CrossEntropyLoss()).at(x, y))
    return {f"{b.name} {k}": optimizer.state[b.weight][k].clone() for b in optimizer.blocks for k in ("A", "G")}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("curvature", ["fisher-exact", "fisher-empirical"])
def test_kfac_has_the_same_factors_and_makes_no_patches(monkeypatch, bias, curvature):
    x, y = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 1, 0])
    expected = factors(convnet(bias), x, y, curvature=curvature)
    monkeypatch.setattr(conv_factors, "SMALL", 0)
    made = []
    monkeypatch.setattr(capture, "patches", lambda module, *rest: made.append(module.stride) or patches(module, *rest))
    found = factors(convnet(bias), x, y, curvature=curvature)
    assert made == [(2, 2)]
    assert all(torch.allclose(found[k], expected[k], atol=1e-12) for k in expected)


def test_approximations_use_it_too(monkeypatch):
    x, y = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 1, 0])
    dense = lambda: kfac(Objective(convnet(), nn.CrossEntropyLoss()), [(x[:2], y[:2]), (x[2:], y[2:])], "fisher-exact").to_dense()
    expected = dense()
    monkeypatch.setattr(conv_factors, "SMALL", 0)
    monkeypatch.setattr(capture, "patches", lambda module, *rest: patches(module, *rest) if max(module.stride) > 1 else pytest.fail("patches were made"))
    assert torch.allclose(dense(), expected, atol=1e-12)


def test_shared_convolutions_and_chunks(monkeypatch):
    """A layer that is used twice, on images of two sizes, and a batch in parts."""
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x):
            h = nn.functional.avg_pool2d(torch.tanh(self.conv(x)), 2)
            return self.last(nn.functional.avg_pool2d(torch.tanh(self.conv(h)), 2).flatten(1))

    x, y, results = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 1, 0]), []
    for small in (math.inf, 0):
        monkeypatch.setattr(conv_factors, "SMALL", small)
        for chunk in (None, 2):
            torch.manual_seed(0)
            model = Twice().double()
            optimizer = KFAC(model, lr=0.0, curvature="fisher-exact")
            optimizer.step(Objective(model, nn.CrossEntropyLoss()).at(x, y, chunk))
            results.append(optimizer.state[model.conv.weight])
    for r in results[1:]:
        assert torch.allclose(r["A"], results[0]["A"], atol=1e-12) and torch.allclose(r["G"], results[0]["G"], atol=1e-12)


# Fewer positions


@pytest.mark.parametrize("small", [math.inf, 0], ids=["patches", "shifts"])
def test_offsets_cover_all_positions_in_turn(monkeypatch, small):
    """The average over as many observations of one batch as positions are skipped is the full factor; a single one is not."""
    monkeypatch.setattr(conv_factors, "SMALL", small)
    x, y = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 1, 0])
    expected, model = factors(convnet(), x, y, curvature="fisher-exact"), convnet()
    optimizer, objective = KFAC(model, lr=0.0, curvature="fisher-exact", positions=3), Objective(model, nn.CrossEntropyLoss())
    state = lambda: {f"{b.name} {k}": optimizer.state[b.weight][k].clone() for b in optimizer.blocks for k in ("A", "G")}
    optimizer.step(objective.at(x, y))
    exact_at_once = {k for k, M in state().items() if torch.allclose(M, expected[k], rtol=1e-6)}
    assert exact_at_once == {"6 A", "6 G"} | ({"0 A", "2 A"} if small == 0 else set())  # the last layer has one position
    for _ in range(2):
        optimizer.step(objective.at(x, y))
    assert all(torch.allclose(M, expected[k], atol=1e-12) for k, M in state().items())


def test_few_positions_are_all_kept():
    rows = torch.randn(1, 3, 4, 2)
    assert capture.thinned(rows, slice(5, None, 6), torch.float64)[0].shape[2] == 4
    kept, before, factor = capture.thinned(rows, slice(1, None, 3), torch.float64, None, 0.5)
    assert torch.equal(kept, rows[:, :, [1]].double()) and before is None and factor == 2.0


@pytest.mark.parametrize("settings", [dict(positions=0), dict(positions=2, approximation="reduce"), dict(positions=2, structure="tridiagonal")], ids=str)
def test_positions_are_checked(settings):
    with pytest.raises(ValueError, match="positions"):
        KFAC(nn.Linear(2, 2), **settings)
