"K-FAC against dense references, provably exact cases, and curvlinops."
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvlab import Objective
from curvlab.curvature.capture import LayerCapture, layer_blocks, patches
from curvlab.curvature.structured import BlockTridiagonal, Kronecker
from curvlab.optim import KFAC, QuadraticModel

double = torch.double


def mlp(*widths, activation=nn.Tanh, bias=True):
    layers = []
    for i, o in zip(widths, widths[1:]):
        layers += [nn.Linear(i, o, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).to(double)


def factors_after(model, objective, batches, **kwargs):
    "State of K-FAC's blocks after one step a batch, parameters held fixed by lr=0."
    optimizer = KFAC(model, lr=0.0, momentum=0.0, kl_clip=None, **kwargs)
    for x, y in batches:
        optimizer.step(objective.at(x, y))
    return [(optimizer.state[b.weight]["A"], optimizer.state[b.weight]["G"]) for b in optimizer.blocks]


def dense_ggn_block(model, objective, x, y, params):
    "Dense GGN of the loss for the given parameters, column by column."
    closure = objective.at(x, y)
    closure.evaluate(keep_graph=True)
    places = [i for i, p in enumerate(closure.params) if any(p is q for q in params)]
    columns = []
    for i in places:
        for k in range(closure.params[i].numel()):
            v = [torch.zeros_like(p) for p in closure.params]
            v[i].view(-1)[k] = 1
            columns.append(torch.cat([closure.ggnvp(v)[j].flatten() for j in places]))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("conv", [dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2), dict(kernel_size=(2, 3), dilation=2, padding=(1, 2)), dict(kernel_size=3, groups=2, padding="same")], ids=str)
def test_single_convolution_with_a_loss_at_every_site_is_exact(conv, bias):
    # Gaussian targets at every output site: g are unit vectors, independent of the input and across sites (Grosse & Martens 2016)
    torch.manual_seed(0)
    model = nn.Conv2d(4, 6, bias=bias, **conv).to(double)
    x = torch.randn(20, 4, 6, 7, dtype=double)
    y = torch.randn_like(model(x))
    objective = Objective(model, nn.MSELoss())
    (A, G), = factors_after(model, objective, [(x, y)], curvature="ggn")
    block, = layer_blocks(model)
    dense = dense_ggn_block(model, objective, x, y, block.params)
    order = block.matrix(*[torch.arange(i, i + p.numel(), dtype=double).view(p.shape) for i, p in zip((0, model.weight.numel()), block.params)]).long()
    K = Kronecker(A, G).to_dense()
    for g, place in enumerate(order):          # groups do not interact
        where = place.flatten()
        assert torch.allclose(dense[where][:, where], K[g], rtol=1e-10, atol=1e-14)
    assert torch.allclose(torch.block_diag(*K).norm(), dense.norm(), rtol=1e-10)


def test_kfc_convention_sums_inputs_and_averages_gradients_over_sites():
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 3).to(double)
    x = torch.randn(5, 2, 9, dtype=double)
    (A, _), = factors_after(model, Objective(model, nn.MSELoss()), [(x, torch.zeros(5, 3, 7, dtype=double))], curvature="ggn")
    rows = torch.nn.functional.pad(patches(model, x)[0], (0, 1), value=1.0)
    assert torch.allclose(A[0], torch.einsum("bti,btj->ij", rows, rows) / 5)
    assert torch.allclose(A[0, -1, -1], torch.tensor(7.0, dtype=double))      # the constant coordinate counts the sites


@pytest.mark.parametrize("bias", [False, True])
def test_deep_linear_net_is_exact_block_by_block(bias):
    torch.manual_seed(1)
    model = mlp(5, 4, 4, 3, activation=nn.Identity, bias=bias)
    x, y = torch.randn(30, 5, dtype=double), torch.randn(30, 3, dtype=double)
    objective = Objective(model, nn.MSELoss(reduction="sum"), average="examples")
    for block, (A, G) in zip(layer_blocks(model), factors_after(model, objective, [(x, y)], curvature="fisher-exact")):
        dense = dense_ggn_block(model, objective, x, y, block.params)
        order = block.matrix(*[torch.arange(i, i + p.numel(), dtype=double).view(p.shape) for i, p in zip((0, block.weight.numel()), block.params)]).long().flatten()
        assert torch.allclose(dense[order][:, order], Kronecker(A, G).to_dense()[0], rtol=1e-10, atol=1e-13)


def test_reduce_is_exact_where_only_the_mean_position_matters():
    torch.manual_seed(2)

    class MeanOfTokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return self.inner(x).mean(1)

    model = MeanOfTokens().to(double)
    x, y = torch.randn(25, 6, 4, dtype=double), torch.randn(25, 3, dtype=double)
    objective = Objective(model, nn.MSELoss())
    block, = layer_blocks(model)
    dense = dense_ggn_block(model, objective, x, y, block.params)
    order = block.matrix(torch.arange(12, dtype=double).view(3, 4), torch.arange(12, 15, dtype=double)).long().flatten()
    errors = {}
    for approximation in ("reduce", "expand"):
        (A, G), = factors_after(model, objective, [(x, y)], curvature="ggn", approximation=approximation)
        errors[approximation] = float((Kronecker(A, G).to_dense()[0] - dense[order][:, order]).norm() / dense.norm())
    assert errors["reduce"] < 1e-12 and errors["expand"] > 0.1


def test_running_average_is_a_plain_mean_first_and_then_exponential():
    torch.manual_seed(3)
    model = mlp(4, 3)
    objective = Objective(model, nn.CrossEntropyLoss())
    batches = [(torch.randn(8, 4, dtype=double), torch.randint(0, 3, (8,))) for _ in range(5)]
    single = [factors_after(model, objective, [b], curvature="fisher-exact")[0] for b in batches]
    expected = single[0]
    for k, new in enumerate(single[1:], 2):
        eps = min(1 - 1 / k, 0.6)
        expected = [eps * o + (1 - eps) * n for o, n in zip(expected, new)]
    averaged, = factors_after(model, objective, batches, curvature="fisher-exact", decay=0.6)
    assert all(torch.allclose(a, e, atol=1e-14) for a, e in zip(averaged, expected))


@pytest.mark.parametrize("curvature", ["fisher-exact", "ggn", "fisher-empirical"])
def test_chunks_do_not_change_the_factors(curvature):
    torch.manual_seed(4)
    model = mlp(4, 5, 3)
    x, y = torch.randn(12, 4, dtype=double), torch.randint(0, 3, (12,))
    objective = Objective(model, nn.CrossEntropyLoss())
    whole, = factors_after(model, objective, [(x, y)], curvature=curvature)[:1]
    optimizer = KFAC(model, lr=0.0, momentum=0.0, curvature=curvature)
    optimizer.step(objective.at(x, y, chunk=5))
    state = optimizer.state[optimizer.blocks[0].weight]
    assert torch.allclose(state["A"], whole[0], atol=1e-14) and torch.allclose(state["G"], whole[1], atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sampled_factors_converge_to_exact_ones(reduction):
    torch.manual_seed(5)
    model = mlp(4, 3)
    x, y = torch.randn(4000, 4, dtype=double), torch.randint(0, 3, (4000,))
    objective = Objective(model, nn.CrossEntropyLoss(reduction=reduction))
    (_, exact), = factors_after(model, objective, [(x, y)], curvature="fisher-exact")
    (_, sampled), = factors_after(model, objective, [(x, y)] * 5, curvature="fisher-mc")
    (_, empirical), = factors_after(model, objective, [(x, y)], curvature="fisher-empirical")
    error = lambda M: float((M - exact).norm() / exact.norm())
    assert error(sampled) < 0.03 < error(empirical)


@pytest.mark.parametrize("damping_in", ["factored", "eigenbasis"])
def test_damped_solution_solves_the_dense_system(damping_in):
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).to(double)
    x, y = torch.randn(9, 2, 3, 3, dtype=double), torch.randint(0, 3, (9,))
    objective = Objective(model, nn.CrossEntropyLoss())
    optimizer = KFAC(model, lr=1.0, momentum=0.0, damping=0.05, curvature="fisher-exact", damping_in=damping_in, kl_clip=None)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(objective.at(x, y))
    moved = {id(p): b - p.detach() for p, b in zip(model.parameters(), before)}
    for block in optimizer.blocks:
        A, G = optimizer.state[block.weight]["A"], optimizer.state[block.weight]["G"]
        K = Kronecker(A, G).damped(0.05).to_dense() if damping_in == "factored" else Kronecker(A, G).to_dense() + 0.05 * torch.eye(A.shape[-1] * G.shape[-1])
        V = block.matrix(*[p.grad for p in block.params]).flatten(1)
        U = block.matrix(*[moved[id(p)] for p in block.params]).flatten(1)
        assert torch.allclose(torch.linalg.solve(K, V[..., None])[..., 0], U, atol=1e-10)


def test_tridiagonal_step_equals_the_dense_chain_inverse():
    torch.manual_seed(7)
    model = mlp(5, 4, 3, 3)
    x, y = torch.randn(50, 5, dtype=double), torch.randint(0, 3, (50,))
    optimizer = KFAC(model, lr=1.0, momentum=0.0, damping=0.1, curvature="fisher-exact", structure="tridiagonal", kl_clip=None)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(Objective(model, nn.CrossEntropyLoss()).at(x, y))
    states = [optimizer.state[b.weight] for b in optimizer.blocks]
    K = [Kronecker(s["A"], s["G"]).damped(0.1) for s in states]
    chain = BlockTridiagonal.of([k.A[0] for k in K], [k.G[0] for k in K], [s["A_next"][0] for s in states[:-1]], [s["G_next"][0] for s in states[:-1]])
    moved = {id(p): b - p.detach() for p, b in zip(model.parameters(), before)}
    join = lambda source: torch.cat([b.matrix(*[source(p) for p in b.params]).flatten() for b in optimizer.blocks])
    assert torch.allclose(chain.to_dense() @ join(lambda p: p.grad), join(lambda p: moved[id(p)]), atol=1e-10)


def test_levenberg_marquardt_moves_the_damping_both_ways():
    torch.manual_seed(8)
    model = mlp(6, 5, 3)
    x, y = torch.randn(64, 6, dtype=double), torch.randint(0, 3, (64,))
    objective = Objective(model, nn.CrossEntropyLoss())
    optimizer = KFAC(model, momentum=0.0, damping=10.0, kl_clip=None, refresh_every=1, step_rule=QuadraticModel(adapt_every=1))
    for _ in range(10):
        optimizer.step(objective.at(x, y))
    assert 0 < float(optimizer.param_groups[0]["damping"]) < 10.0          # far too careful: the model's promise is kept, damping falls
    rule = QuadraticModel(adapt_every=1)
    from curvlab.optim.step_rules import Search
    groups = [{"damping": 1.0, "weight_decay": 0.0}]
    closure = objective.at(x, y)
    loss = closure()
    search = Search(closure, loss, [], [], [], 1.0, None, {"model": torch.tensor(-100.0, dtype=double), "loss": loss}, groups)
    rule.after(search)                                                     # promised far more than happened: damping rises
    assert torch.allclose(torch.as_tensor(groups[0]["damping"]), torch.tensor(1 / 0.95, dtype=double))


def test_bad_arguments_name_themselves():
    model = mlp(3, 2)
    for kwargs, word in [({"damping": -1.0}, "damping"), ({"curvature": "hessian"}, "curvature"), ({"decay": 1.0}, "decay"), ({"damping_in": "none"}, "damping_in"), ({"approximation": "x"}, "approximation"), ({"refresh_every": 0}, "refresh_every")]:
        with pytest.raises(ValueError, match=word):
            KFAC(model, **kwargs)
    with pytest.raises(TypeError, match="module"):
        KFAC(model.parameters())
    with pytest.raises(ValueError, match="tridiagonal"):
        KFAC(nn.Conv2d(1, 1, 2), structure="tridiagonal")
    with pytest.raises(TypeError, match="objective.at"):
        KFAC(model).step(lambda: torch.tensor(1.0))
    with pytest.raises(TypeError, match="likelihood"):
        KFAC(model).step(Objective(model, lambda f, y: f.sum()).at(torch.randn(2, 3, dtype=double), torch.zeros(2)))


@pytest.mark.parametrize("fisher,ours", [("type-2", "fisher-exact"), ("empirical", "fisher-empirical")])
def test_factors_agree_with_curvlinops(fisher, ours):
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(9)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).to(double)
    x, y = torch.randn(7, 1, 4, 4, dtype=double), torch.randint(0, 4, (7,))
    loss = nn.CrossEntropyLoss()
    params = dict(model.named_parameters())
    try:
        operator = curvlinops.KFACLinearOperator(model, loss, params, [(x, y)], fisher_type=fisher, separate_weight_and_bias=False)
    except (TypeError, AttributeError):
        operator = curvlinops.KFACLinearOperator(model, loss, list(params.values()), [(x, y)], fisher_type=fisher, separate_weight_and_bias=False)
    theirs = operator @ torch.eye(sum(p.numel() for p in params.values()), dtype=double)
    optimizer = KFAC(model, lr=0.0, momentum=0.0, curvature=ours)
    optimizer.step(Objective(model, loss).at(x, y))
    start = 0
    for block in optimizer.blocks:
        n = sum(p.numel() for p in block.params)
        order = block.matrix(*[torch.arange(i, i + p.numel(), dtype=double).view(p.shape) for i, p in zip((0, block.weight.numel()), block.params)]).long().flatten()
        mine = Kronecker(optimizer.state[block.weight]["A"], optimizer.state[block.weight]["G"]).to_dense()[0]
        part = theirs[start : start + n, start : start + n]
        assert torch.allclose(part[order][:, order], mine, rtol=1e-8, atol=1e-12)
        start += n


def test_capture_leaves_no_hooks_and_ignores_recomputation():
    from torch.utils.checkpoint import checkpoint
    torch.manual_seed(10)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(checkpoint(lambda z: torch.tanh(self.a(z)), x, use_reentrant=False))

    model = Checkpointed().to(double)
    uses = []
    capture = LayerCapture(layer_blocks(model), "fisher-exact", lambda samples, w, first: uses.append([s.block.name for s in samples]))
    Objective(model, nn.CrossEntropyLoss()).at(torch.randn(6, 4, dtype=double), torch.randint(0, 3, (6,))).evaluate([capture])
    assert uses == [["a", "b"]] * 3                    # three classes, each layer once
    assert not any(m._forward_hooks for m in model.modules())


def test_extra_backward_pass_forms_no_gradient_of_weights_or_inputs():
    "Sampled targets are pulled back to the layers' outputs: one product a layer but the first, and convolutions are asked for their input's gradient alone."
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            seen.append((name, args[-1] if name == "convolution_backward" else None))
            return func(*args, **(kwargs or {}))

    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5))
    capture = LayerCapture(layer_blocks(model), "fisher-mc", lambda samples, weight, first: None)
    closure = Objective(model, torch.nn.CrossEntropyLoss()).at(torch.randn(6, 2, 6, 6), torch.randint(5, (6,)))
    with capture.recording():
        evaluation, _ = closure._forward(0, 1.0, True)
    with Watch():
        capture.observe(evaluation)
    assert [name for name, _ in seen].count("mm") == 2
    assert [mask for name, mask in seen if name == "convolution_backward"] == [[True, False, False]]
