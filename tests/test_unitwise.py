"""Unitwise metrics: statistics against loops, reductions against dense inverses, and the invariances that they keep or lose."""
import pytest
import torch
from torch import nn

from curvlab import Objective
from curvlab.curvature import Fisher
from curvlab.optim import Unitwise
from curvlab.optim.unitwise import ELEMENTWISE, QuasiDiagonal, chain_of, unit_moments

LOSSES = {"softmax": nn.CrossEntropyLoss(), "Bernoulli": nn.BCEWithLogitsLoss(), "Gaussian": nn.MSELoss(), "summed": nn.CrossEntropyLoss(reduction="sum")}
BARE = {"damping": 0.0, "input_variance": 0.0, "kl_clip": None}
METRICS = ("fisher-exact", "fisher-mc", "fisher-empirical", "backpropagated")


def net(widths=(4, 5, 4, 3), activation=nn.Tanh, bias=True, seed=0):
    torch.manual_seed(seed)
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


def batch(loss="softmax", n=25, classes=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g).double() + 0.7
    y = torch.randint(0, classes, (n,), generator=g) if loss in ("softmax", "summed") else torch.rand(n, classes, generator=g).double()
    return x, y


def blocks(model, loss, x, y, curvature, structure="unitwise", **more):
    """The optimizer after one observation that moves nothing."""
    optimizer = Unitwise(model, lr=0.0, structure=structure, curvature=curvature, **{**BARE, **more})
    optimizer.step(Objective(model, LOSSES[loss]).at(x, y))
    return optimizer


def dense_blocks(model, F):
    """The units' blocks, bias last, of a matrix over all parameters."""
    out, start = [], 0
    for layer in model[::2]:
        o, i = layer.weight.shape
        bias = [[start + o * i + k] if layer.bias is not None else [] for k in range(o)]
        index = torch.tensor([[*range(start + k * i, start + (k + 1) * i), *bias[k]] for k in range(o)])
        out.append(torch.stack([F[j][:, j] for j in index]))
        start += o * i + (o if layer.bias is not None else 0)
    return out


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("curvature", ["fisher-exact", "fisher-empirical"])
@pytest.mark.parametrize("bias", [True, False])
def test_blocks_are_those_of_the_dense_matrix(loss, curvature, bias):
    model, (x, y) = net(bias=bias), batch(loss)
    optimizer = blocks(model, loss, x, y, curvature)
    F = Fisher(Objective(model, LOSSES[loss]), x, y, curvature).to_dense()
    for b, block in zip(optimizer.blocks, dense_blocks(model, F)):
        torch.testing.assert_close(optimizer.state[b.weight]["block"][0], block, rtol=1e-10, atol=1e-14)


def test_sampled_blocks_average_to_the_fisher():
    model, (x, y) = net(), batch()
    exact, sampled = (blocks(model, "softmax", x, y, c) for c in ("fisher-exact", "fisher-mc"))
    for _ in range(200):
        sampled.step(Objective(model, LOSSES["softmax"]).at(x, y))
    exact, sampled = (o.state[model[0].weight]["block"] for o in (exact, sampled))
    assert 1e-6 < (sampled - exact).norm() / exact.norm() < 0.2


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, lambda: nn.ReLU(inplace=True)])
def test_backpropagated_moduli_against_dense_products(loss, activation):
    model, (x, y) = net(activation=activation), batch(loss)
    optimizer = blocks(model, loss, x, y, "backpropagated")
    expected = [0.0] * 3
    for n in range(len(x)):
        a, z = [x[n]], []
        for layer in model[::2]:
            z.append(layer(a[-1]).detach().requires_grad_())
            a.append(model[1](z[-1].clone()))
        o = z[-1].detach()[None]
        size = {"softmax": len(x), "summed": 1}.get(loss, len(x) * 3)
        Lam = torch.autograd.functional.hessian(lambda f: LOSSES["summed"](f, y[n : n + 1]) if loss in ("softmax", "summed") else LOSSES[loss](f, y[n : n + 1]) * 3, o).reshape(3, 3) / size
        M = torch.diag(Lam.diagonal())
        for k in reversed(range(3)):
            bar = torch.cat([a[k].detach(), torch.ones(1).double()])
            expected[k] = expected[k] + M.diagonal()[:, None, None] * torch.outer(bar, bar)
            if k:
                r, = torch.autograd.grad(a[k].sum(), z[k - 1])
                W = model[2 * k].weight.detach()
                M = torch.diag((r[:, None] * (W.T @ M @ W) * r[None]).diagonal())
    for b, block in zip(optimizer.blocks, expected):
        torch.testing.assert_close(optimizer.state[b.weight]["block"][0], block, rtol=1e-10, atol=1e-14)


def block(n, seed=0, rows=40):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, n, generator=g).double() @ torch.randn(n, n, generator=g).double() + torch.randn(n, generator=g).double()
    bar = torch.cat([a, torch.ones(rows, 1).double()], 1)
    return (bar * torch.rand(rows, 1, generator=g).double()).T @ bar


def test_quasi_diagonal_solve_is_its_dense_inverse():
    As = torch.stack([block(5, seed) for seed in range(3)])
    quasi = QuasiDiagonal(As.diagonal(dim1=1, dim2=2)[:, :-1], As[:, -1, -1:], As[:, -1, :-1])
    dense, V = quasi.to_dense(), torch.randn(3, 6).double()
    torch.testing.assert_close(quasi.solve(V), torch.linalg.solve(dense, V))
    torch.testing.assert_close(dense[:, -1], As[:, -1])
    torch.testing.assert_close(dense.diagonal(dim1=1, dim2=2), As.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(quasi.variance, quasi.diagonal - quasi.row**2 / quasi.corner)
    assert (torch.linalg.solve(As, V) - quasi.solve(V)).norm() > 0.1 * quasi.solve(V).norm()
    assert (torch.linalg.eigvalsh(dense) > 0).all()
    plain, free = QuasiDiagonal(quasi.diagonal, quasi.corner), QuasiDiagonal(quasi.diagonal)
    torch.testing.assert_close(plain.solve(V), V / As.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(free.solve(V[:, :-1]), torch.linalg.solve(free.to_dense(), V[:, :-1]))


def test_one_input_is_exact():
    A, V = block(1), torch.randn(1, 2).double()
    torch.testing.assert_close(QuasiDiagonal(A[:1, :1], A[1:, 1:], A[1:, :1]).solve(V)[0], torch.linalg.solve(A, V[0]))


def test_nothing_to_divide_by_means_no_step():
    quasi = QuasiDiagonal(torch.tensor([[4.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0, 0.5], [0.0, 0.0]]))
    d = quasi.solve(torch.tensor([[2.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))       # a constant input; a dead unit
    assert d.isfinite().all() and d[0, 0] == 0 and d[0, 1] != 0 and (d[1] == 0).all()


@pytest.mark.parametrize("structure", ["quasi-diagonal", "diagonal", "unitwise"])
def test_moments_against_loops(structure):
    torch.manual_seed(0)
    a, phi = torch.cat([torch.randn(2, 7, 3), torch.ones(2, 7, 1)], -1).double(), torch.rand(2, 7, 5).double()
    sums = unit_moments(a, phi, structure, True)
    for group in range(2):
        for unit in range(5):
            A = sum(phi[group, r, unit] * torch.outer(a[group, r], a[group, r]) for r in range(7))
            torch.testing.assert_close(sums["modulus"][group, unit], A[-1, -1:])
            if structure == "unitwise":
                torch.testing.assert_close(sums["block"][group, unit], A)
            else:
                torch.testing.assert_close(sums["diagonal"][group, unit], A.diagonal()[:-1])
            if structure == "quasi-diagonal":
                torch.testing.assert_close(sums["row"][group, unit], A[-1, :-1])


def gap(structure, curvature, M, c, steps=8, **more):
    """Largest difference of the outputs of twins on x and on M x + c after some steps."""
    x, y = batch(n=60)
    outputs = []
    for recode in (False, True):
        model, inputs = net(), x
        if recode:
            inputs = x @ M.T + c
            with torch.no_grad():
                model[0].weight.copy_(model[0].weight @ torch.linalg.inv(M))
                model[0].bias.sub_(model[0].weight @ c)
        optimizer, objective = Unitwise(model, lr=0.05, structure=structure, curvature=curvature, **{**BARE, **more}), Objective(model, LOSSES["softmax"])
        for k in range(steps):
            part = slice(20 * (k % 3), 20 * (k % 3) + 20)
            optimizer.step(objective.at(inputs[part], y[part]))
        outputs.append(model(inputs).detach())
    return float((outputs[0] - outputs[1]).abs().max())


SCALE, SHIFT = torch.diag(torch.tensor([0.5, 2.0, 3.0, 1.3])).double(), torch.tensor([1.0, -2.0, 0.3, 0.7]).double()


@pytest.mark.parametrize("curvature", METRICS)
def test_invariance(curvature):
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(5)).double() + torch.eye(4).double()
    assert gap("quasi-diagonal", curvature, SCALE, SHIFT) < 1e-9
    assert gap("unitwise", curvature, mix, SHIFT) < 1e-8
    assert gap("quasi-diagonal", curvature, mix, SHIFT) > 1e-2
    assert gap("diagonal", curvature, SCALE, 0 * SHIFT) < 1e-9
    assert gap("diagonal", curvature, SCALE, SHIFT) > 1e-2


@pytest.mark.parametrize("structure", ["quasi-diagonal", "unitwise"])
def test_input_variance_respects_shifts_and_damping_does_not(structure):
    one = torch.eye(4).double()
    assert gap(structure, "fisher-exact", one, SHIFT, input_variance=0.1) < 1e-9
    assert gap(structure, "fisher-exact", SCALE, SHIFT, input_variance=0.1) > 1e-3
    assert gap(structure, "fisher-exact", one, SHIFT, damping=0.01) > 1e-3


def test_regularisation_enters_as_described():
    model, (x, y) = net(), batch()
    optimizer = blocks(model, "softmax", x, y, "fisher-exact", "unitwise", damping=0.3, input_variance=0.2)
    b = optimizer.blocks[0]
    A = optimizer.state[b.weight]["block"][0]
    expected = A + 0.3 * torch.eye(5).double() + 0.2 * torch.diag_embed(A[:, -1:, -1] * torch.tensor([1, 1, 1, 1, 0]).double())
    torch.testing.assert_close(optimizer.metric(b)[0], expected)
    V = b.matrix(model[0].weight.grad, model[0].bias.grad)[0]
    torch.testing.assert_close(torch.cat([d.reshape(5, -1) for d in optimizer._solve(b, [model[0].weight.grad, model[0].bias.grad])], 1), torch.linalg.solve(expected, V))
    reduced = blocks(net(), "softmax", x, y, "fisher-exact", "quasi-diagonal", damping=0.3, input_variance=0.2)
    dense = reduced.metric(reduced.blocks[0]).to_dense()[0]
    torch.testing.assert_close(dense.diagonal(dim1=1, dim2=2), expected.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(dense[:, -1], expected[:, -1])


def test_average_is_plain_at_first():
    model = net()
    optimizer = Unitwise(model, lr=0.0, curvature="fisher-empirical", decay=0.75, **BARE)
    seen = []
    for k in range(6):
        x, y = batch(seed=k)
        optimizer.step(Objective(model, LOSSES["softmax"]).at(x, y))
        seen.append(blocks(model, "softmax", x, y, "fisher-empirical", "quasi-diagonal").state[model[0].weight]["row"])
    expected = torch.stack(seen[:4]).mean(0)
    for row in seen[4:]:
        expected = 0.75 * expected + 0.25 * row
    torch.testing.assert_close(optimizer.state[model[0].weight]["row"], expected)


def test_chunks_do_not_change_the_metric():
    model, (x, y) = net(), batch()
    for curvature in ("fisher-exact", "fisher-empirical", "backpropagated"):
        whole = blocks(model, "softmax", x, y, curvature).state[model[2].weight]["block"]
        optimizer = Unitwise(model, lr=0.0, structure="unitwise", curvature=curvature, **BARE)
        optimizer.step(Objective(model, LOSSES["softmax"]).at(x, y, chunk=7))
        torch.testing.assert_close(optimizer.state[model[2].weight]["block"], whole)


def test_backpropagated_skips_frozen_layers_and_refuses_what_is_no_chain():
    model, (x, y) = net(), batch()
    model[2].requires_grad_(False)
    frozen = blocks(model, "softmax", x, y, "backpropagated")
    assert len(frozen.blocks) == 2
    twin = net()
    torch.testing.assert_close(frozen.state[model[0].weight]["block"], blocks(twin, "softmax", x, y, "backpropagated").state[twin[0].weight]["block"])
    assert len(chain_of(net())) == 3 and nn.Softmax not in ELEMENTWISE
    for bad, word in ((nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2)), "LayerNorm"), (nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "end"), (nn.Linear(2, 2), "Linear")):
        with pytest.raises(TypeError, match=word):
            Unitwise(bad, curvature="backpropagated")



@pytest.mark.parametrize("curvature", METRICS)
@pytest.mark.parametrize("structure", ["quasi-diagonal", "diagonal", "unitwise"])
def test_what_is_averaged_over_processes_is_contiguous(curvature, structure):
    """A collective reads a strided view as if it were contiguous, without an error."""
    model, (x, y) = net(), batch()
    closure, seen = Objective(model, LOSSES["softmax"]).at(x, y), []
    plain = closure.mean_
    closure.mean_ = lambda tensors: seen.extend(tensors) or plain(tensors)
    optimizer = Unitwise(model, structure=structure, curvature=curvature)
    optimizer.step(closure)
    assert len(seen) >= 6 + 2 * 3 and all(t.is_contiguous() for t in seen)
