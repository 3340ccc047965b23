"""Linear layers by the faster library: values and all derivatives against PyTorch's layer in double precision, and where it stands aside."""

import pytest
import torch
from torch import nn

from curvlab.curvature import GGN, Hessian, Jacobian
from curvlab.objective import Objective
from curvlab import products
from curvlab.products import WORTH, linear
from curvlab.quick_layers import QuickLayers


@pytest.fixture(autouse=True)
def every_layer_is_worth_it(monkeypatch):
    "Small layers are quick to test, and the other library is tested on every processor."
    monkeypatch.setattr(products, "held_back", lambda: True)
    monkeypatch.setattr(products, "WORTH", 0)
    monkeypatch.setattr(products, "WORK", 0)


def relative(a, b):
    a, b = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (a, b))
    return (a - b).norm() / b.norm()


def layouts(name):
    "Inputs, weights and bias of one layer, 70 to 90 features for 96 rows."
    x, W, b = torch.randn(96, 70), torch.randn(90, 70) / 8, torch.randn(90)
    if name == "three dimensions":
        x = torch.randn(4, 24, 70)
    elif name == "transposed in memory":
        x, W = torch.randn(70, 96).mT, torch.randn(70, 90).mT / 8
    elif name == "strided":
        x, W, b = torch.randn(96, 140)[:, ::2], torch.randn(180, 140)[::2, ::2] / 8, torch.randn(180)[::2]
    elif name == "no bias":
        b = None
    return [t for t in (x, W, b) if t is not None]


@pytest.mark.parametrize("name", ["plain", "three dimensions", "transposed in memory", "strided", "no bias"])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_derivatives_of_three_orders(name, frozen):
    torch.manual_seed(0)
    values = layouts(name)
    along = [torch.randn(t.shape) for t in values]

    def derivatives(layer, dtype):
        leaves = [t.to(dtype) for t in values]
        loose = [t.requires_grad_() for i, t in enumerate(leaves) if i != frozen]
        vs = [v.to(dtype) for i, v in enumerate(along) if i != frozen]
        y = layer(*leaves)
        out, current = [[y]], [y.sin().sum()]
        for k in range(3):
            current = torch.autograd.grad(current, loose, vs if k else None, create_graph=True)
            out.append(current)
        return out

    quick, exact = derivatives(linear, torch.float32), derivatives(nn.functional.linear, torch.float64)
    node = quick[0][0].grad_fn
    assert "_Linear" in (node.next_functions[0][0] if name == "three dimensions" else node).name()
    for a, b in zip(quick, exact):
        assert all(s.shape == t.shape for s, t in zip(a, b)) and relative(a, b) < 2e-6


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1), (2,), (0, 1, 2)])
@pytest.mark.parametrize("constants", [False, True])
def test_batches_of_cotangents(which, constants):
    "In the first backward pass, and of every subset of its results in the second."
    torch.manual_seed(0)
    values = layouts("plain")

    def passes(layer, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in values]
        y = layer(*leaves)
        u = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        first = torch.autograd.grad(y, leaves, torch.stack([u, u.cos()]), is_grads_batched=True, retain_graph=True)
        pulled = torch.autograd.grad(y, leaves, u, create_graph=True)
        vs = [torch.randn(3, *t.shape, generator=torch.Generator().manual_seed(2)).to(dtype) for t in leaves]
        wanted = [u] if constants else [u, leaves[0], leaves[1]]
        second = torch.autograd.grad([pulled[i] for i in which], wanted, [vs[i] for i in which], is_grads_batched=True, allow_unused=True)
        return first, [t for t in second if t is not None]

    quick, exact = passes(lambda *t: linear(*t, constants=constants), torch.float32), passes(nn.functional.linear, torch.float64)
    for a, b in zip(quick, exact):
        assert [t.shape for t in a] == [t.shape for t in b] and relative(a, b) < 2e-6


def test_constants_leave_only_the_derivative_in_the_cotangent():
    x, W, b = [t.requires_grad_() for t in layouts("plain")]
    u = torch.randn(96, 90, requires_grad=True)
    for constants in (False, True):
        to_W, = torch.autograd.grad(linear(x, W, b, constants=constants), W, u, create_graph=True)
        to_u, to_x = torch.autograd.grad(to_W, [u, x], torch.randn_like(W), allow_unused=True)
        assert to_u is not None and (to_x is None) == constants


class Subclass(torch.Tensor):
    pass


def test_small_layers_are_not_worth_it(monkeypatch):
    monkeypatch.setattr(products, "WORTH", WORTH)
    rows = WORTH // 128**2
    W = torch.randn(128, 128)
    assert linear(torch.randn(rows, 128), W) is not None and linear(torch.randn(rows - 1, 128), W) is None


def test_where_it_stands_aside():
    x, W, b = layouts("plain")
    assert linear(x, W, b) is not None and linear(x, nn.Parameter(W), nn.Parameter(b)) is not None
    assert linear(x.double(), W.double(), b.double()) is None
    assert linear(x, W.double(), b) is None and linear(x, W, b.double()) is None
    assert linear(x[:63], W, b) is None and linear(x, W[:63], b[:63]) is None and linear(x[:, :63], W[:, :63], b) is None
    assert linear(x[0], W, b) is None and linear(x, W[:, :69], b) is None and linear(x, W[0]) is None
    assert linear(x.as_subclass(Subclass), W, b) is None and linear(x, W.as_subclass(Subclass), b) is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert linear(x, W, b) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, W, b) is None
    seen = []
    torch.func.vmap(lambda t: seen.append(linear(t, W, b)) or t)(x[None])
    torch.func.grad(lambda t: seen.append(linear(t, W, b)) or t.sum())(x)
    assert seen == [None, None]


def test_the_context_leaves_alone_what_it_does_not_know():
    x, W, b = layouts("plain")
    with QuickLayers() as mode:
        y = nn.functional.linear(input=x, weight=W, bias=b)
        many = torch.func.vmap(lambda t: nn.functional.linear(t, W, b))(x[None])
        with pytest.raises(RuntimeError):
            nn.functional.linear(x, W[:, 1:], b)
        assert not mode.changed
        quick = nn.functional.linear(x, W, b)
    assert mode.changed and torch.equal(y, nn.functional.linear(x, W, b))
    torch.testing.assert_close(many[0], y)
    torch.testing.assert_close(quick, y)


class Problem:
    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(66, 80), nn.Tanh(), nn.Linear(80, 70, bias=False), nn.Tanh(), nn.Linear(70, 5))
        self.x, self.y = torch.randn(130, 66).to(dtype), torch.randint(0, 5, (130,))
        self.objective = Objective(self.model.to(dtype), nn.CrossEntropyLoss())
        self.vs = [torch.randn(3, *p.shape).to(dtype) for p in self.objective.params]

    def at(self, **options):
        return self.objective.at(self.x, self.y, **options)


def test_products_of_a_closure():
    "One by one and together, kept and chunked; Hessian products stay right after Gauss-Newton products, whose graph drops terms."
    quick, exact = Problem(), Problem(torch.float64)
    one = lambda p: [v[0] for v in p.vs]
    for name in ("hvp", "ggnvp"):
        expected = getattr(exact.at(), name)(one(exact))
        for closure in (quick.at(), quick.at(chunk=65), quick.at(chunk=50)):
            closure.evaluate(second_order=name == "hvp", keep_graph=name == "ggnvp")
            assert relative(getattr(closure, name)(one(quick)), expected) < 5e-6
            assert relative([t[0] for t in getattr(closure, name)(quick.vs, batched=True)], expected) < 5e-6
    closure = quick.at()
    closure.ggnvp(one(quick))
    assert closure._graph[1].linear
    assert relative(closure.hvp(one(quick)), exact.at().hvp(one(exact))) < 5e-6


@pytest.mark.parametrize("make", [Hessian, GGN, lambda o, x, y: Jacobian(o, x), lambda o, x, y: Jacobian(o, x).T])
@pytest.mark.parametrize("columns", [1, 5])
def test_operators(make, columns):
    quick, exact = Problem(), Problem(torch.float64)
    A, B = make(quick.objective, quick.x, quick.y), make(exact.objective, exact.x, exact.y)
    V = torch.randn(A.shape[1], columns)
    assert relative([A @ V], [B @ V.double()]) < 5e-6


def test_all_evaluations_are_the_same_function_to_the_last_bit():
    p = Problem()
    closure = p.at()
    losses, gradients = [], []
    for options in ({}, {"second_order": True}, {"keep_graph": True}, {}):
        losses.append(closure.evaluate(**options))
        gradients.append([q.grad.clone() for q in closure.params])
    losses += [closure(backward=False), next(closure._graphs()).loss.detach(), next(p.at()._graphs("hvp")).loss.detach()]
    assert all(torch.equal(losses[0], other) for other in losses)
    assert all(torch.equal(a, b) for other in gradients for a, b in zip(gradients[0], other))


def test_compiled_models_keep_their_layers():
    p = Problem()
    expected = p.at()()
    p.objective.model = torch.compile(p.model, backend="eager")
    closure = p.at()
    assert torch.allclose(closure(), expected, rtol=1e-5) and torch.allclose(closure(backward=False), expected, rtol=1e-5)
    inner = nn.Sequential(torch.compile(p.model[0], backend="eager"), *p.model[1:])
    closure = Objective(inner, nn.CrossEntropyLoss()).at(p.x, p.y)
    assert torch.allclose(closure(), expected, rtol=1e-5) and torch.allclose(closure.evaluate(second_order=True), expected, rtol=1e-5)
