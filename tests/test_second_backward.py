"""The quick second backward passes against PyTorch's general ones."""

import unittest.mock

import pytest
import torch
from torch import nn

from curvlab.objective import Objective
from curvlab.quick_layers import PIECE, QuickLayers, _Gelu, _LayerNorm, _MaxPool, _Softmax, by_pieces, gelu_second

CASES = {
    "strides": (nn.Conv2d, (4, 2, 9, 8), dict(stride=(2, 1))),
    "groups, no bias": (nn.Conv2d, (4, 2, 9, 8), dict(padding=1, groups=2, bias=False)),
    "dilation": (nn.Conv1d, (4, 2, 9), dict(dilation=2, padding=1)),
    "three dimensions": (nn.Conv3d, (4, 2, 4, 5, 4), dict(padding=(1, 0, 1))),
    "padding by name": (nn.Conv2d, (4, 2, 6, 5), dict(padding="same")),
    "circular": (nn.Conv2d, (4, 2, 6, 5), dict(padding=1, padding_mode="circular")),
}


def case(name):
    torch.manual_seed(0)
    kind, shape, options = CASES[name]
    x, y = torch.randn(shape, dtype=torch.double), torch.tensor([0, 2, 1, 1])
    body = nn.Sequential(kind(2, 4, 3, **options), nn.Tanh(), kind(4, 4, 2), nn.Tanh(), nn.Flatten()).double()
    return nn.Sequential(body, nn.Linear(body(x).shape[1], 3).double()), x, y


def derivatives(model, x, y, params, vs, order):
    "Gradient, Hessian product, derivative of the Hessian product, by PyTorch's general rules."
    current = [nn.functional.cross_entropy(model(x), y)]
    for k in range(order):
        current = torch.autograd.grad(current, params, vs if k else None, create_graph=True)
    return current


@pytest.mark.parametrize("frozen", [None, "0.0.weight", "0.0.bias"])
@pytest.mark.parametrize("name", CASES)
def test_hessian_products_equal_the_general_rule(name, frozen):
    model, x, y = case(name)
    for n, p in model.named_parameters():
        p.requires_grad_(n != frozen)
    params = [p for p in model.parameters() if p.requires_grad]
    vs = [torch.randn(3, *p.shape, dtype=p.dtype) for p in params]
    expected = [derivatives(model, x, y, params, [v[i] for v in vs], 2) for i in range(3)]
    objective = Objective(model, nn.CrossEntropyLoss())
    kept, chunked = objective.at(x, y), objective.at(x, y, chunk=3)
    kept.evaluate(second_order=True)
    together = objective.at(x, y).hvp(vs, batched=True)
    for i in range(3):
        one = [v[i] for v in vs]
        for a, b, c, d in zip(expected[i], kept.hvp(one), chunked.hvp(one), [t[i] for t in together]):
            for other in (b, c, d):
                assert torch.allclose(a, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["strides", "groups, no bias"])
def test_rule_can_be_differentiated_again(name):
    model, x, y = case(name)
    params = list(model.parameters())
    vs = [torch.randn_like(p) for p in params]
    expected = derivatives(model, x, y, params, vs, 3)
    with QuickLayers():
        found = derivatives(model, x, y, params, vs, 3)
    assert max(t.abs().max() for t in expected) > 1e-3
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(expected, found))


def test_quick_rule_is_used_for_hessians_only():
    "And what it replaces is there: the gradient's graph has no general convolution."
    model, x, y = case("strides")
    objective = Objective(model, nn.CrossEntropyLoss())

    def nodes(graph):
        waiting, seen = [graph.gradient()[0].grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += [n for n, _ in node.next_functions if n is not None]
        return {n.name() for n in seen}

    closure = objective.at(x, y)
    closure.evaluate(second_order=True)
    quick, general = nodes(closure._graph[1]), nodes(next(objective.at(x, y)._graphs()))
    assert "_ConvolutionBackward" in " ".join(quick) and "ConvolutionBackward0" not in quick
    assert "ConvolutionBackward0" in general and "_ConvolutionBackward" not in " ".join(general)


def test_gauss_newton_and_examples_after_a_hessian_product():
    model, x, y = case("dilation")
    objective = Objective(model, nn.CrossEntropyLoss())
    vs = [torch.randn_like(p) for p in objective.params]
    both, alone = objective.at(x, y), objective.at(x, y)
    both.hvp(vs)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(both.ggnvp(vs), alone.ggnvp(vs)))
    assert all(torch.allclose(g.mean(0), h, rtol=1e-10, atol=1e-13) for g, h in zip(both.per_example_grads(), derivatives(model, x, y, objective.params, None, 1)))


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton_products_equal_the_general_rule_and_leave_no_trace_in_hessian_products(name):
    model, x, y = case(name)
    objective = Objective(model, nn.CrossEntropyLoss())
    params = objective.params
    vs = [torch.randn(3, *p.shape, dtype=p.dtype) for p in params]
    closure = objective.at(x, y)
    closure.evaluate(keep_graph=True)
    together = closure.ggnvp(vs, batched=True)
    for i in range(3):
        one = [v[i] for v in vs]
        outputs, u = model(x), torch.zeros(4, 3, dtype=torch.double, requires_grad=True)
        pulled = torch.autograd.grad(outputs, params, u, create_graph=True)
        jv, = torch.autograd.grad(pulled, u, one)
        p = outputs.detach().softmax(1)
        expected = torch.autograd.grad(outputs, params, (p * jv - p * (p * jv).sum(1, keepdim=True)) / 4)
        for a, b, c in zip(expected, closure.ggnvp(one), [t[i] for t in together]):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-13) and torch.allclose(a, c, rtol=1e-10, atol=1e-13)
    # the graph that was kept for these products would drop terms of the Hessian
    one = [v[0] for v in vs]
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(derivatives(model, x, y, params, one, 2), closure.hvp(one)))


def test_pooling_in_the_quicker_layout_has_the_same_second_derivatives():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(2, 9, 3, padding=1), nn.Tanh(), nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(9, 8, 2), nn.Softplus(), nn.MaxPool2d(2)).double()
    x, parameters = torch.randn(3, 2, 11, 12).double(), list(net.parameters())
    direction = [torch.randn_like(p) for p in parameters]

    def all_derivatives():
        y = net(x)
        gradient = torch.autograd.grad(y.pow(3).sum(), parameters, create_graph=True)
        return [y.detach(), *gradient, *torch.autograd.grad(gradient, parameters, direction)]

    usual = all_derivatives()
    with QuickLayers() as quick, unittest.mock.patch("curvlab.quick_layers._MaxPool.apply", wraps=_MaxPool.apply) as pooled:
        quickly = all_derivatives()
    assert pooled.call_count == 2
    for a, b in zip(usual, quickly, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def gauss_newton_product(net, x, y, v):
    "`J^T H J v` of the mean cross-entropy, classes in dimension 1, by forward mode."
    names, params = zip(*net.named_parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jv = torch.func.jvp(lambda *ps: torch.func.functional_call(net, dict(zip(names, ps)), (x,)), params, tuple(v))[1]
        outputs = net(x)
    p = outputs.detach().softmax(1)
    return torch.autograd.grad(outputs, params, ((p * jv - p * (p * jv).sum(1, keepdim=True)) / y.numel()).detach())


def gelu_net():
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6), nn.GELU(approximate="tanh"), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)).double()
    return net, torch.randn(4, 5, dtype=torch.double) * 2, torch.tensor([0, 2, 1, 1])


def test_gelu_has_its_derivatives_up_to_the_fourth():
    net, x, y = gelu_net()
    params = list(net.parameters())
    vs = [torch.randn_like(p) for p in params]
    for order in (1, 2, 3, 4):
        expected = derivatives(net, x, y, params, vs, order)
        with QuickLayers(), unittest.mock.patch("curvlab.quick_layers._Gelu.apply", wraps=_Gelu.apply) as used:
            found = derivatives(net, x, y, params, vs, order)
        assert used.call_count == 2                      # the approximation with tanh is another function
        assert max(t.abs().max() for t in expected) > 1e-4
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(expected, found))


def test_gelu_hessian_and_gauss_newton_products_one_by_one_together_and_in_chunks():
    net, x, y = gelu_net()
    objective = Objective(net, nn.CrossEntropyLoss())
    vs = [torch.randn(3, *p.shape, dtype=p.dtype) for p in objective.params]
    closure = objective.at(x, y)
    closure.evaluate(keep_graph=True)
    hessian, chunked, ggn = objective.at(x, y).hvp(vs, batched=True), objective.at(x, y, chunk=3).hvp([v[1] for v in vs]), closure.ggnvp(vs, batched=True)
    for i in range(3):
        one = [v[i] for v in vs]
        assert all(torch.allclose(a, b[i], rtol=1e-10, atol=1e-13) for a, b in zip(derivatives(net, x, y, objective.params, one, 2), hessian))
        expected = gauss_newton_product(net, x, y, one)
        assert all(torch.allclose(a, b[i], rtol=1e-9, atol=1e-12) for a, b in zip(expected, ggn))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(derivatives(net, x, y, objective.params, [v[1] for v in vs], 2), chunked))


@pytest.mark.parametrize("dtype", [torch.double, torch.float32])
def test_pieces_of_the_second_derivative_of_gelu_are_the_whole(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y_bar, x_ddot = (torch.randn(9, PIECE // 4, generator=generator, dtype=dtype) for _ in range(3))
    a = x.double().requires_grad_()
    first, = torch.autograd.grad(nn.functional.gelu(a), a, y_bar.double(), create_graph=True)
    expected, = torch.autograd.grad(first, a, x_ddot.double())
    tolerance = 1e-12 if dtype == torch.double else 1e-5
    torch.testing.assert_close(by_pieces(gelu_second, x, y_bar, x_ddot)[0].double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(by_pieces(gelu_second, x.mT, y_bar.mT, x_ddot.mT)[0].mT.double(), expected, rtol=tolerance, atol=tolerance)   # strides are free


class Attends(nn.Module):
    "Two layer norms, causal and plain attention, GELU: what a transformer is made of."

    def __init__(self):
        super().__init__()
        self.first, self.mix, self.second, self.out = nn.LayerNorm(6, eps=1e-2), nn.Linear(6, 18), nn.LayerNorm((3, 6)), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.mix(self.first(x)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        attend = nn.functional.scaled_dot_product_attention
        mixed = attend(q, k, v, is_causal=True) + attend(k, q, v, scale=0.7)
        return self.out(nn.functional.gelu(self.second(mixed.transpose(1, 2).flatten(2)))).transpose(1, 2)


def attending():
    torch.manual_seed(5)
    net = Attends().double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net, torch.randn(4, 3, 6, dtype=torch.double), torch.randint(3, (4, 3))


def test_transformer_layers_have_the_same_hessian_products_and_all_are_replaced():
    net, x, y = attending()
    params = list(net.parameters())
    vs = [torch.randn_like(p) for p in params]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = derivatives(net, x, y, params, vs, 2)
    patched = {c: unittest.mock.patch.object(c, "apply", wraps=c.apply) for c in (_Gelu, _LayerNorm, _Softmax)}
    with QuickLayers(), patched[_Gelu] as gelu, patched[_LayerNorm] as norm, patched[_Softmax] as softmax:
        found = derivatives(net, x, y, params, vs, 2)
    assert gelu.call_count == 1 and norm.call_count >= 2 and softmax.call_count == 2         # the second pass of a layer norm calls it again
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(expected, found))


def test_third_derivatives_of_transformer_layers_by_finite_differences():
    "PyTorch's own third derivative of a layer norm is wrong, so it is no reference."
    net, x, y = attending()
    params = list(net.parameters())
    vs = [torch.randn_like(p) for p in params]

    def hessian_product(t):
        with torch.no_grad():
            for p, v in zip(params, vs):
                p.add_(t * v)
        with QuickLayers():
            out = derivatives(net, x, y, params, vs, 2)
        with torch.no_grad():
            for p, v in zip(params, vs):
                p.sub_(t * v)
        return [o.detach() for o in out]

    with QuickLayers():
        found = derivatives(net, x, y, params, vs, 3)
    step = 1e-4
    for ahead, behind, exact in zip(hessian_product(step), hessian_product(-step), found):
        torch.testing.assert_close((ahead - behind) / (2 * step), exact, rtol=1e-4, atol=1e-5)


def test_gauss_newton_products_of_transformer_layers():
    net, x, y = attending()
    objective = Objective(net, nn.CrossEntropyLoss())
    vs = [torch.randn(3, *p.shape, dtype=p.dtype) for p in objective.params]
    closure = objective.at(x, y)
    closure.evaluate(keep_graph=True)
    together = closure.ggnvp(vs, batched=True)
    for i in range(3):
        one = [v[i] for v in vs]
        expected = gauss_newton_product(net, x, y, one)
        for a, b, c in zip(expected, closure.ggnvp(one), together):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12) and torch.allclose(a, c[i], rtol=1e-9, atol=1e-12)


def test_layers_without_a_quick_version_are_left_alone():
    x = torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True)
    f = nn.functional
    masked = dict(attn_mask=torch.ones(3, 3, dtype=torch.bool).tril())
    cases = [lambda: f.layer_norm(x, (6,)), lambda: f.layer_norm(x, (6,), torch.ones(6).double()), lambda: f.gelu(x, approximate="tanh"), lambda: f.gelu(x.half()), lambda: f.scaled_dot_product_attention(x, x, x, **masked)]
    for call in cases:
        with QuickLayers() as quick:
            out = call()
        assert not quick.changed and torch.equal(out, call())
