"""Curvature operators against dense oracles in float64: many kinds of layers, generated architectures, data sets in batches, everything a model may come with.

The oracles differentiate twice backward, row by row. (`torch.func.hessian`, through its inner `jacrev`, has second derivatives in the weight of a layer norm wrong, see the last test.)
"""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import attention, checkpointed, heads, language, mixed, twice
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvlab import Objective
from curvlab.curvature import GGN, NTK, Covariance, Fisher, Hessian, Jacobian, Preconditioned, Residual, flat, preconditioner_of, unflat
from curvlab.objective import bare
from curvlab.replay import differentiable_twice, throwaway_buffers

N = 5


def relative(a, b):
    return (torch.linalg.norm(a - b) / torch.linalg.norm(b).clamp(min=1e-300)).item()


class Oracle:
    """Jacobian, gradient and Hessian of a model on a batch, by rows; parameters as in `model.parameters()`."""

    def __init__(self, model, loss, x, y, class_dim=1):
        params = [p for p in model.parameters() if p.requires_grad]
        names = {id(p): n for n, p in model.named_parameters()}

        def outputs(v):
            values = {names[id(p)]: t for p, t in zip(params, unflat(v, params))}
            args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
            return torch.func.functional_call(model, values, args, kwargs)

        def value(f):
            return loss(f.movedim(class_dim, 1) if class_dim != 1 else f, y)

        theta = flat([p.detach() for p in params])
        with differentiable_twice(model), throwaway_buffers(model):
            self.J = torch.autograd.functional.jacobian(outputs, theta).reshape(-1, len(theta))
            f = outputs(theta).detach()
            c = torch.autograd.functional.jacobian(value, f)
            Lambda = torch.autograd.functional.hessian(value, f).reshape(f.numel(), f.numel())
            self.hessian = torch.autograd.functional.hessian(lambda v: value(outputs(v)), theta)
        self.ggn = self.J.T @ Lambda @ self.J
        rows = self.J.reshape(len(f), -1, len(theta))
        self.per_example = len(f) * torch.einsum("bcn,bc->bn", rows, c.reshape(len(f), -1))


def check(model, loss, x, y, class_dim=1, tolerance=1e-10):
    """All operators of a model against the oracle: dense, blocks, single vectors, chunks."""
    oracle, o = Oracle(model, loss, x, y, class_dim), Objective(model, loss, class_dim=class_dim)
    g = oracle.per_example
    expected = [(Hessian(o, x, y), oracle.hessian), (GGN(o, x, y), oracle.ggn), (Residual(o, x, y), oracle.hessian - oracle.ggn), (Jacobian(o, x), oracle.J),
                (Covariance(o, x, y, centred=False), g.T @ g / len(g)), (Covariance(o, x, y), torch.cov(g.T, correction=0)), (NTK(o, x), oracle.J @ oracle.J.T)]
    size = torch.linalg.norm(oracle.hessian)
    for A, dense in expected:
        what, scale = type(A).__name__, size if isinstance(A, Residual) else torch.linalg.norm(dense)
        assert A.shape == dense.shape, what
        assert torch.linalg.norm(A.to_dense() - dense) < tolerance * scale, what
        generator = torch.Generator().manual_seed(1)
        V, U = (torch.randn(k, 5, generator=generator, dtype=torch.double) for k in A.shape[::-1])
        scale = scale * torch.linalg.norm(V)
        assert torch.linalg.norm(A @ V - dense @ V) < tolerance * scale and torch.linalg.norm(A.T @ U - dense.T @ U) < tolerance * scale, what
        assert torch.linalg.norm(A @ V[:, 0] - dense @ V[:, 0]) < tolerance * scale, what
    return oracle, o


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent, self.last = kind(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.recurrent(x)[0].mean(1))


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x + self.b(torch.tanh(self.a(x))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


def vector(*middle, width=4):
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(width, 3))


KINDS = {
    "linear": (vector, (N, 3)),
    "layer norm": (lambda: vector(nn.LayerNorm(4)), (N, 3)),
    "group norm": (lambda: vector(nn.GroupNorm(2, 4)), (N, 3)),
    "batch norm, evaluation": (lambda: vector(nn.BatchNorm1d(4)).eval(), (N, 3)),
    "batch norm, training": (lambda: vector(nn.BatchNorm1d(4)), (N, 3)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(12, 3)), (N, 2, 4)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 3)), (N, 1, 4, 4)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (N, 4, 3)),
    "GRU": (lambda: Recurrent(nn.GRU), (N, 4, 3)),
    "attention": (Attention, (N, 4, 4)),
    "transformer": (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(12, 3)), (N, 3, 4)),
    "residual": (Skip, (N, 4)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3)), None),
}


def make(kind):
    torch.manual_seed(3)
    build, shape = KINDS[kind]
    model = build().double()
    for m in model.modules():  # generic scales and shifts
        if isinstance(m, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d)):
            nn.init.normal_(m.weight, 1.0, 0.3), nn.init.normal_(m.bias)
    x = torch.randint(0, 5, (N, 2)) if shape is None else torch.randn(shape, dtype=torch.double)
    return model, x, torch.randint(0, 3, (N,))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind):
    model, x, y = make(kind)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    check(model, nn.CrossEntropyLoss(), x, y)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum"), nn.HuberLoss(delta=0.4), nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 2.0]).double())], ids=lambda l: type(l).__name__)
def test_losses_with_and_without_likelihood(loss):
    model, x, y = make("linear")
    check(model, loss, x, y if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(N, 3).double())


@pytest.mark.parametrize("problem", [lambda: twice(tied=True), lambda: language(torch.double), lambda: mixed(torch.double), lambda: attention(torch.double), lambda: checkpointed(True)], ids=["tied", "tied embedding", "bare parameters", "attention and LSTM", "checkpointed"])
def test_awkward_models(problem):
    p = problem()
    o = Objective(p.model, p.loss, **p.options)
    V = torch.randn(Hessian(o, p.x, p.y).shape[0], 5, dtype=torch.double)
    h, g, r = (kind(o, p.x, p.y) @ V for kind in (Hessian, GGN, Residual))
    assert relative(g + r, h) < 1e-12
    for kind in (Hessian, GGN, Covariance):
        A = kind(o, p.x, p.y)
        assert relative(torch.stack([A @ v for v in V.T], 1), A @ V) < 1e-12 and relative(kind(o, p.x, p.y, chunk=5) @ V, A @ V) < 1e-12
    J = Jacobian(o, p.x)
    U = torch.randn(J.shape[0], 5, dtype=torch.double)
    assert abs(((J @ V) * U).sum() - ((J.T @ U) * V).sum()) < 1e-10 * (J @ V).norm() * U.norm() and relative(J.to_dense() @ V, J @ V) < 1e-12


def test_layers_without_gradient_and_frozen_parameters():
    p = heads(torch.double)
    o = Objective(p.model, p.loss)
    for A in (Hessian(o, p.x, p.y), GGN(o, p.x, p.y), Residual(o, p.x, p.y), Covariance(o, p.x, p.y)):
        assert A.layer("b").to_dense().abs().max() == 0 and A.layer("trunk").to_dense().abs().max() > 0
    whole = GGN(o, p.x, p.y)
    trunk = whole.layer("trunk").to_dense()
    for name in ("a", "b"):
        getattr(p.model, name).requires_grad_(False)
    assert relative(GGN(Objective(p.model, p.loss), p.x, p.y).to_dense(), trunk) < 1e-14


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(2, 3)

    def forward(self, left, right):
        return torch.tanh(self.a(left)) * self.b(right)


def test_tuples_and_dictionaries():
    torch.manual_seed(0)
    model, y = Keywords().double(), torch.randint(0, 3, (N,))
    left, right = torch.randn(N, 3).double(), torch.randn(N, 2).double()
    oracle, o = check(model, nn.CrossEntropyLoss(), (left, right), y)
    check(model, nn.CrossEntropyLoss(), {"right": right, "left": left}, y)
    batches = [({"left": left[i : i + 2], "right": right[i : i + 2]}, y[i : i + 2]) for i in range(0, N, 2)]
    assert relative(GGN(o, batches).to_dense(), oracle.ggn) < 1e-12 and relative(Jacobian(o, batches).to_dense(), oracle.J) < 1e-12
    assert relative(NTK(o, (left, right), (left[:2], right[:2]), chunk=2).to_dense(), oracle.J @ oracle.J[:6].T) < 1e-12


def test_compiled_model_and_half_precision():
    model, x, y = make("linear")
    v = torch.randn(GGN(Objective(model, nn.CrossEntropyLoss()), x, y).shape[0], 6).double()
    plain, compiled = ([kind(Objective(m, nn.CrossEntropyLoss()), x, y) @ v for kind in (Hessian, GGN)] for m in (model, torch.compile(model, backend="eager")))
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled))
    half = vector().to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    exact = vector().double()
    exact.load_state_dict(half.state_dict())
    x16 = x.to(torch.bfloat16)
    for kind in (Hessian, GGN, Covariance):
        A = kind(Objective(half, nn.CrossEntropyLoss()), x16, y)
        assert A.dtype == torch.bfloat16 and (A @ v.to(A.dtype)).dtype == A.dtype
        assert relative((A @ v.to(A.dtype)).double(), kind(Objective(exact, nn.CrossEntropyLoss()), x16.double(), y) @ v.to(A.dtype).double()) < 0.05


def test_dropout_is_one_fixed_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double()
    o, x, y = Objective(model, nn.CrossEntropyLoss()), torch.randn(12, 3).double(), torch.randint(0, 3, (12,))
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    V = torch.randn(sum(p.numel() for p in model.parameters()), 6).double()
    for data in ((x, y), (loader,)):
        state = torch.get_rng_state()
        G, H = GGN(o, *data), Hessian(o, *data)
        for A in (G, H):
            assert torch.equal(A @ V, A @ V) and relative(torch.stack([A @ u for u in V.T], 1), A @ V) < 1e-13
            dense = A.to_dense()
            assert relative(dense, dense.T) < 1e-13
        assert torch.equal(torch.get_rng_state(), state)
        assert relative(G @ V + Residual(o, *data) @ V, H @ V) < 1e-12  # made at the same random numbers: the same masks
        torch.rand(1)
        assert relative(GGN(o, *data) @ V, G @ V) > 1e-3  # at others, others


# Generated architectures


@st.composite
def architectures(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    layers = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b, bias=draw(st.booleans())), draw(st.sampled_from([nn.Tanh, nn.Softplus, nn.Sigmoid, nn.GELU, nn.Identity]))()]
        if draw(st.booleans()) and b > 1:
            layers.append(nn.LayerNorm(b))
    classes = draw(st.integers(2, 4))
    layers.append(nn.Linear(sizes[-1], classes))
    n, chunk = draw(st.integers(1, 7)), draw(st.sampled_from([None, 1, 2, 3]))
    loss = draw(st.sampled_from([nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss]))(reduction=draw(st.sampled_from(["mean", "sum"])))
    return layers, sizes[0], classes, n, chunk, loss, draw(st.integers(0, 2**16))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(architectures())
def test_identities_hold_for_any_architecture(case):
    layers, inputs, classes, n, chunk, loss, seed = case
    torch.manual_seed(seed)
    model = nn.Sequential(*layers).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.7)
    x = torch.randn(n, inputs).double()
    y = torch.randint(0, classes, (n,)) if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(n, classes).double()
    o = Objective(model, loss)
    H, G, R, J, C = Hessian(o, x, y, chunk=chunk), GGN(o, x, y, chunk=chunk), Residual(o, x, y, chunk=chunk), Jacobian(o, x, chunk=chunk), Covariance(o, x, y, chunk=chunk)
    size = H.shape[0]
    V, W, U = torch.randn(size, 5).double(), torch.randn(size, 5).double(), torch.randn(J.shape[0], 5).double()
    near = lambda a, b, scale: torch.linalg.norm(a - b) <= 1e-10 * (1e-3 + scale)
    for A in (H, G, R, C, Fisher(o, x, y, "fisher-mc", chunk=chunk)):
        dense = A.to_dense(block=7)
        norm = torch.linalg.norm(dense)
        assert near(dense, dense.T, norm) and near(A @ (2 * V - W), 2 * (A @ V) - A @ W, norm * 10)                   # symmetry, linearity
        assert near(A @ V, dense @ V, norm * 10) and near(torch.stack([A @ v for v in V.T], 1), A @ V, norm * 10)    # dense, blocks
    assert near(H @ V, G @ V + R @ V, torch.linalg.norm(H @ V) + torch.linalg.norm(G @ V))
    assert abs((U * (J @ V)).sum() - ((J.T @ U) * V).sum()) <= 1e-10 * (1e-3 + torch.linalg.norm(U) * torch.linalg.norm(J @ V))
    assert torch.linalg.eigvalsh(G.to_dense()).min() > -1e-10 * (1e-3 + torch.linalg.norm(G.to_dense()))
    assert near(Hessian(o, [(x[i : i + 2], y[i : i + 2]) for i in range(0, n, 2)]) @ V, H @ V, torch.linalg.norm(H @ V))


# Data sets in batches


def test_padding_weighs_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(11, 4, 3).double(), torch.randint(0, 3, (11, 4))
    y[:3, 1:], y[4:8] = -100, -100
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 2.0]).double())):
        o = Objective(model, loss, class_dim=-1)
        loader = DataLoader(TensorDataset(x, y), batch_size=4)  # the second batch is nothing but padding
        for kind in (Hessian, GGN, Residual, Covariance):
            assert relative(kind(o, loader).to_dense(), kind(o, x, y).to_dense()) < 1e-12
            assert relative(kind(o, loader, chunk=3).to_dense(), kind(o, x, y).to_dense()) < 1e-12


def test_a_data_set_that_changes_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    o, data = Objective(model, nn.CrossEntropyLoss()), TensorDataset(torch.randn(30, 3).double(), torch.randint(0, 3, (30,)))

    class Augmented(list):
        def __iter__(self):
            return ((x + 0.01 * torch.randn_like(x), y) for x, y in list.__iter__(self))

    for bad in (DataLoader(data, batch_size=7, shuffle=True), Augmented(DataLoader(data, batch_size=7))):
        for kind in (GGN, Jacobian):
            with pytest.raises(ValueError, match="list\\(loader\\)"):
                kind(o, bad)

    class Longer(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return iter([*list.__iter__(self), *([self[0]] if self.reads > 3 else [])])

    batches = Longer(DataLoader(data, batch_size=7))
    A = Hessian(o, batches)
    with pytest.raises(RuntimeError, match="more than the 5 batches"):
        for _ in range(3):
            A @ torch.ones(A.shape[0]).double()


@pytest.mark.parametrize("kind", ["conv2d", "layer norm"])
def test_blocks_of_any_width_and_layout(kind):
    """A block is cut in slices, given as columns or as rows: the products are those of its vectors."""
    model, x, y = make(kind)
    o = Objective(model, nn.CrossEntropyLoss())
    for make_one in (Hessian, GGN, Residual, Covariance, lambda *a: Fisher(*a, "fisher-mc", samples=2), lambda o, x, y: Jacobian(o, x), lambda o, x, y: Jacobian(o, x).T):
        A = make_one(o, x, y)
        V = torch.randn(A.shape[1], 9, dtype=torch.double)
        columns = torch.stack([A @ v for v in V.T], 1)
        layouts = V, V.T.contiguous().T, torch.cat([V, V], 1)[:, :9], V.repeat_interleave(2, 0)[::2]
        for width, layouts in ((1, layouts[:1]), (4, layouts), (32, layouts[1:2])):
            getattr(A, "a", A)._width = width
            for W in layouts:
                assert relative(A @ W, columns) < 1e-13


def test_large_activations_go_alone_and_the_data_are_read_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 600), nn.Tanh(), nn.Linear(600, 2))
    o, y = Objective(model, nn.MSELoss()), torch.randn(1000, 2)
    x, V = torch.randn(1000, 2), torch.randn(sum(p.numel() for p in model.parameters()), 6)
    small, large = GGN(o, x[:5], y[:5]), GGN(o, x, y)
    small @ V, large @ V
    assert (small._width, large._width) == (32, 1)

    class Counting(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return list.__iter__(self)

    batches = Counting([(x[:300], y[:300]), (x[300:], y[300:])])
    A = GGN(o, batches)
    before = batches.reads
    product = A @ V
    assert batches.reads == before + 1 and relative(product, large @ V) < 1e-5


def test_cost_counts_every_column():
    model, x, y = make("linear")
    o = Objective(model, nn.CrossEntropyLoss())
    G, H, J = GGN(o, x, y), Hessian(o, x, y), Jacobian(o, x)
    before = o.cost.copy()
    G @ torch.ones(G.shape[0], 20).double(), H @ torch.ones(G.shape[0]).double(), J @ torch.ones(G.shape[0], 2).double()
    assert (o.cost.ggnvp - before.ggnvp, o.cost.hvp - before.hvp) == (22 * N, N)


# Other libraries


def test_curvlinops_on_several_batches():
    other = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = torch.randn(13, 1, 4, 4).double(), torch.randint(0, 3, (13,))
    batches, params = list(zip(x.split(5), y.split(5))), list(model.parameters())
    for reduction in ("mean", "sum"):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        o = Objective(model, loss)
        pairs = [(Hessian(o, batches), other.HessianLinearOperator), (GGN(o, batches), other.GGNLinearOperator), (Fisher(o, batches, curvature="fisher-empirical"), other.EFLinearOperator)]
        for ours, theirs in pairs:
            assert relative(ours.to_dense(), theirs(model, loss, params, batches) @ torch.eye(ours.shape[0]).double()) < 1e-10
    theirs = other.JacobianLinearOperator(model, params, batches) @ torch.eye(ours.shape[0]).double()
    assert relative(Jacobian(o, batches).to_dense(), theirs) < 1e-10


def test_hessian_eigenthings_on_several_batches():
    other = pytest.importorskip("hessian_eigenthings")
    model, x, y = make("linear")
    batches, loss = [(x[:2], y[:2]), (x[2:4], y[2:4])], nn.CrossEntropyLoss()
    o = Objective(model, loss)
    v = torch.randn(Hessian(o, batches).shape[0]).double()
    assert relative(Hessian(o, batches) @ v, other.HessianOperator(model, batches, other.supervised_loss(loss)) @ v) < 1e-10
    assert relative(GGN(o, batches) @ v, other.GGNOperator(model, batches, other.supervised_forward, other.supervised_loss_of_output(loss)) @ v) < 1e-10


# Preconditioned curvature


def test_preconditioned_sharpness_bounds_the_step():
    """Gradient descent with Adam's frozen preconditioner on a quadratic is stable below 2 / eigenvalue and unstable above."""
    from curvlab.optim import Adam

    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    x, y = torch.randn(30, 4).double() * torch.tensor([10.0, 1.0, 1.0, 0.1]).double(), torch.randn(30, 1).double()
    o = Objective(model, nn.MSELoss())
    optimizer = Adam(model, lr=1e-3)
    for _ in range(5):
        optimizer.step(o.at(x, y))
    P, H = preconditioner_of(optimizer), Hessian(o, x, y)
    top = torch.linalg.eigvalsh(Preconditioned(H, P.power(-0.5)).to_dense())[-1]
    assert abs(top - torch.linalg.eigvals(P.solve(H.to_dense())).real.max()) < 1e-10 * top
    growth = torch.linalg.matrix_power(torch.eye(4).double() - 2 / top * 1.02 * P.solve(H.to_dense()), 200).norm()
    decay = torch.linalg.matrix_power(torch.eye(4).double() - 2 / top * 0.98 * P.solve(H.to_dense()), 200).norm()
    assert growth > 100 and decay < 10


def test_half_precision_optimizer_states():
    from curvlab.optim import Adam

    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(torch.bfloat16)
    o = Objective(model, nn.CrossEntropyLoss())
    optimizer = Adam(model)
    optimizer.step(o.at(torch.randn(6, 4).to(torch.bfloat16), torch.randint(0, 3, (6,))))
    P = preconditioner_of(optimizer, o.params)
    assert P.dtype == torch.float32 and bare(model) is model and P.solve(torch.ones(15)).isfinite().all()


def test_second_derivatives_in_the_weight_of_a_layer_norm():
    """Finite differences decide, for single vectors and for wide blocks."""
    model, x, y = make("layer norm")
    o = Objective(model, nn.CrossEntropyLoss())
    H, v, h = Hessian(o, x, y), torch.randn(Hessian(o, x, y).shape[0]).double(), 1e-3

    def gradient(shift):
        with torch.no_grad():
            torch._foreach_add_(o.params, unflat(shift * v, o.params))
        o.at(x, y)()
        with torch.no_grad():
            torch._foreach_sub_(o.params, unflat(shift * v, o.params))
        return flat([p.grad for p in o.params])

    difference = sum(c * (gradient(k * h) - gradient(-k * h)) for k, c in ((1, 45), (2, -9), (3, 1))) / (60 * h)
    assert relative(H @ v, difference) < 1e-9
    wide = H @ torch.stack([v] * 20, 1)
    assert relative(wide[:, 7], difference) < 1e-9


def test_a_backward_pass_that_cannot_be_differentiated_again_is_refused():
    """Where unused inputs are allowed, PyTorch leaves such a part out of the Hessian without an error."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.outer(Cube.apply(self.inner(x)) + self.inner(x))

    torch.manual_seed(0)
    net, x, y = Net().double(), torch.randn(6, 4).double(), torch.randn(6, 2).double()
    objective = Objective(net, nn.MSELoss())
    v = torch.randn(sum(p.numel() for p in net.parameters())).double()
    for A in (Hessian(objective, x, y), Residual(objective, x, y)):
        with pytest.raises(TypeError, match="once_differentiable"):
            A @ v
        with pytest.raises(TypeError, match="once_differentiable"):
            A @ torch.stack([v, v], 1)
    with pytest.raises(TypeError, match="once_differentiable"):
        objective.at(x, y).hvp([torch.randn_like(p) for p in net.parameters()])
