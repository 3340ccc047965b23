"""The jobs of the optimizer benchmark, the products that methods need, and the adapters of other libraries."""
import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from curvlab import Objective
from curvlab.lab.peers import PEERS, train_step
from curvlab.lab.problems import Attention, Transformer
from curvlab.lab.workloads import (
    EIGEN_ROOT, WORKLOADS, FusedAttention, Layer, Product, backward_pass, forward_pass, fused_transformer, ggn_product, hessian_product, input_chain, kfac_factors, kfac_floor, layers, operations, price, product_call, shampoo_parts, shape_class, ways,
)
from curvlab.ledger.benchmark import version_of


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def mlp():
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 3)), torch.randn(6, 7)


def conv_net():
    return nn.Sequential(nn.Conv2d(2, 5, (3, 2), padding=1), nn.Tanh(), nn.Conv2d(5, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3)), torch.randn(6, 2, 10, 12)


# The count


def test_layers_note_shapes():
    model, x = conv_net()
    a, b, c = layers(model, x)
    assert (a.kind, a.rows, a.inputs, a.outputs, a.first, a.kernel, a.step) == ("conv", 6 * 10 * 13, 2 * 3 * 2, 5, True, (3, 2), False)
    assert (b.rows, b.inputs, b.outputs, b.first, b.step) == (6 * 4 * 6, 45, 4, False, True)
    assert (c.kind, c.rows, c.inputs, c.outputs, c.bias, c.first) == ("linear", 6, 96, 3, True, False)


@pytest.mark.parametrize("net", [mlp, conv_net])
def test_passes_count_what_torch_counts(net):
    model, x = net()
    ls, params = layers(model, x), list(model.parameters())
    outputs = model(x)
    assert operations(forward_pass(ls)) == counted(lambda: model(x))
    assert operations(backward_pass(ls)) == counted(lambda: torch.autograd.grad(outputs.sum(), params, retain_graph=True))


def test_chain_counts_what_torch_counts():
    model, x = mlp()
    taps, outputs = [], x
    for layer in model:
        outputs = layer(outputs)
        if isinstance(layer, nn.Linear):
            taps.append(outputs)
    assert operations(input_chain(layers(model, x))) == counted(lambda: torch.autograd.grad(outputs.sum(), taps, retain_graph=True))


def test_hessian_product_counts_what_torch_counts():
    model, x = mlp()
    params = list(model.parameters())
    loss = nn.CrossEntropyLoss()(model(x), torch.tensor([0, 1, 2, 0, 1, 2]))
    grads = torch.autograd.grad(loss, params, create_graph=True)
    seen = counted(lambda: torch.autograd.grad(grads, params, [torch.randn_like(p) for p in params]))
    assert operations(hessian_product(layers(model, x))) == seen


def test_ggn_product_counts_what_a_kept_graph_executes():
    model, x = mlp()
    closure = Objective(model, nn.CrossEntropyLoss()).at(x, torch.tensor([0, 1, 2, 0, 1, 2]))
    v = [torch.randn_like(p) for p in model.parameters()]
    closure.ggnvp(v)  # builds the graph
    assert operations(ggn_product(layers(model, x))) == counted(lambda: closure.ggnvp(v))


def test_attention_counts_half_of_what_the_written_one_executes():
    """The mask leaves half of every product; torch's counter does not know the fused kernel and counts whole products of the written one."""
    ls = layers(fused_transformer(11, 6, 8, 2), torch.randint(11, (3, 6)))
    linear, attention = ([l for l in ls if (l.kind == "attention") == wanted] for wanted in (False, True))
    assert [(l.rows, l.inputs, l.copies) for l in attention] == [(6, 4, 6)] * 2
    whole = lambda passes: operations(passes(linear)) + 2 * operations(passes(attention))
    written, x = Transformer(11, 6, 8, 2), torch.randint(11, (3, 6))
    params, loss = list(written.parameters()), written(x).square().sum()
    grads = torch.autograd.grad(loss, params, create_graph=True)
    assert whole(forward_pass) == counted(lambda: written(x))
    assert whole(backward_pass) == counted(lambda: torch.autograd.grad(loss, params, retain_graph=True))
    assert whole(hessian_product) == counted(lambda: torch.autograd.grad(grads, params, [torch.randn_like(p) for p in params]))


def test_one_layer_by_hand():
    inner = Layer("inner", "linear", rows=7, inputs=4, outputs=3, bias=True)
    parts = {}
    for p in kfac_floor([inner], sampled=True, observe_every=2, refresh_every=5):
        parts[p.part] = parts.get(p.part, 0) + operations([p])
    R, i, o = 7, 4, 3
    assert parts == pytest.approx({
        "forward": 2 * R * i * o, "backward": 4 * R * i * o, "sampled backward": 2 * R * i * o / 2, "factor A": R * (i + 1) ** 2 / 2, "factor G": R * o**2 / 2,
        "inverse": ((i + 1) ** 3 + o**3) / 5, "application": 2 * (o * o * (i + 1) + o * (i + 1) ** 2),
    })
    first = Layer("first", "linear", rows=7, inputs=4, outputs=3, first=True)
    assert not input_chain([first]) and not [p for p in kfac_floor([first], sampled=False) if p.part == "sampled backward"]
    assert operations(hessian_product([first])) == 2 * 2 * R * i * o and operations(hessian_product([inner])) == 6 * 2 * R * i * o


def test_offsets_of_a_kernel():
    """Pairs of kernel positions, told apart by their difference alone."""
    layer = Layer("c", "conv", rows=10, inputs=4 * 15, outputs=3, kernel=(3, 5))
    sites = list(itertools.product(range(3), range(5)))
    differences = {(a[0] - b[0], a[1] - b[1]) for a in sites for b in sites}
    (product,) = [p for p in kfac_factors([layer]) if p.route == "offsets"]
    assert (product.batch, product.m, product.k, product.n) == (len(differences), 4, 10, 4)
    strided = Layer("c", "conv", rows=10, inputs=60, outputs=3, kernel=(3, 5), step=True)
    assert [p.route for p in kfac_factors([strided])] == ["", ""]


def test_shampoo_by_hand():
    """A 5 x 3 matrix in blocks of 2: sides 2, 2, 1 and 2, 1; a vector has no part."""
    params = [torch.zeros(5, 3), torch.zeros(7)]
    expected = 0.0
    for n, m in itertools.product((2, 2, 1), (2, 1)):
        for side, rest in ((n, m), (m, n)):
            expected += side**2 * rest + 2 * EIGEN_ROOT * side**3 / 10 + 2 * side**2 * rest
    assert operations(shampoo_parts(params, None, 2)) == pytest.approx(expected)


# The price


def test_price_takes_the_cheapest_route_and_scales_long_sides():
    long = Product("p", "l", 10, 3 * 4096, 20)
    assert shape_class(long) == ("any", 1, 10, 4096, 20)
    assert price([long], {shape_class(long): 2.0})["p", "l"] == pytest.approx(6.0)
    a, b = Product("p", "l", 8, 8, 8), Product("p", "l", 4, 4, 4, share=0.5, every=2, route="b")
    seconds = {shape_class(a): 1.0, shape_class(b): 2.0}
    assert price([a, b], seconds) == {("p", "l"): pytest.approx(0.5)}
    other = Product("p", "l", 8, 8, 8, task="weight")  # another task is another product, at torch's speed
    assert price([a, b, other], seconds | {shape_class(other): 3.0}) == {("p", "l"): pytest.approx(3.5)}


def test_convolutions_are_priced_as_convolutions_too():
    model, x = conv_net()
    products = [p for p in forward_pass(layers(model, x)) + backward_pass(layers(model, x)) if p.conv]
    assert [(p.task, p.layer) for p in products] == [("forward", "0"), ("forward", "2"), ("weight", "0"), ("weight", "2"), ("input", "2")]
    shapes = {"forward": (6, 4, 4, 6), "weight": (4, 5, 3, 3), "input": (6, 5, 10, 13)}
    for p in products:
        if p.layer == "2":
            out = product_call(shape_class(p))()
            assert next(t for t in (out if isinstance(out, tuple) else [out]) if t is not None).shape == shapes[p.task]
    a, b, c, d = (Product("p", "l", 2, 3, 5, task="forward"), Product("p", "l", 2, 3, 5, route="convolution", task="forward", conv=("forward", 1)),
                  Product("p", "l", 5, 2, 3, task="weight"), Product("p", "l", 5, 2, 3, route="convolution", task="weight", conv=("weight", 1)))
    seconds = {shape_class(a): 1.0, shape_class(b): 2.0, shape_class(c): 7.0, shape_class(d): 4.0}
    assert price([a, b, c, d], seconds) == {("p", "l"): pytest.approx(5.0)}


@pytest.mark.parametrize("shape", [("any", 1, 7, 5, 3), ("torch", 1, 70, 130, 90), ("any", 1, 70, 130, 90), ("torch", 4, 6, 5, 3)])
def test_products_are_products(shape):
    """All libraries multiply the same two matrices, and the chosen one executes the shape that was asked for."""
    _, batch, m, k, n = shape
    a, b = torch.randn(m, k), torch.randn(k, n)
    for way in ways(a, b):
        assert torch.allclose(torch.as_tensor(way()).double(), a.double() @ b.double(), atol=1e-3)
    assert torch.as_tensor(product_call(shape)()).shape in ((m, n), (batch, m, n))


# The jobs


@pytest.mark.parametrize("name, parameters, batch", [("autoencoder", 2_837_314, 512), ("convnet", 458_570, 128), ("transformer", 429_664, 32)])
def test_jobs(name, parameters, batch):
    problem = WORKLOADS[name]("cpu")
    assert sum(p.numel() for p in problem.make_model().parameters()) == parameters and len(problem.data) == problem.batch == batch
    small = WORKLOADS[name]("smoke")
    model, (x, y) = small.make_model(), small.data.train
    assert small.loss(model(x), y).isfinite()
    if name == "autoencoder":
        assert 0 <= y.min() and y.max() <= 1


def test_fused_attention_is_attention():
    written, fused = Attention(12, 3).double(), FusedAttention(12, 3).double()
    fused.load_state_dict(written.state_dict())
    x = torch.randn(4, 9, 12, dtype=torch.float64)
    assert torch.allclose(written(x), fused(x), atol=1e-12)


def test_refuses_what_it_cannot_count():
    class Seeing(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    with pytest.raises(ValueError, match="is_causal=True"):
        layers(Seeing(), torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="groups=2"):
        layers(nn.Conv2d(4, 4, 3, groups=2), torch.randn(1, 4, 5, 5))


# The peers


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: f"{p.name}-{p.method}".replace(" ", "-"))
def test_peer_takes_steps(peer):
    if peer.library != "torch" and version_of(peer.library) is None:
        pytest.skip(f"{peer.library} is not installed")
    assert peer.work in ("equal", "less", "more", "other") and (peer.note or peer.work == "equal")
    torch.manual_seed(0)
    model, x, y = mlp()[0], torch.randn(6, 7), torch.tensor([0, 1, 2, 0, 1, 2])
    before = [p.clone() for p in model.parameters()]
    step = peer.make(model, nn.CrossEntropyLoss(), x, y, *peer.settings[0])
    for _ in range(11):
        out = step()
    if peer.method == "Hessian-free iteration":
        assert out.numel() == sum(p.numel() for p in before) and out.isfinite().all()
        return
    assert all(p.isfinite().all() for p in model.parameters())
    assert all((p - b).abs().max() > 0 for p, b in zip(model.parameters(), before))


def test_train_step_with_a_graph():
    model, x = mlp()
    seen = []

    class Look(torch.optim.SGD):
        def step(self):
            seen.append(next(model.parameters()).grad.requires_grad)

    for graph in (False, True):
        train_step(model, nn.CrossEntropyLoss(), x, torch.tensor([0, 1, 2, 0, 1, 2]), Look(model.parameters(), 0.1), graph)()
    assert seen == [False, True] and model(x).isfinite().all()
