"""Structured approximations of a network's curvature: exact cases, dense references, data and its scale, unsupported layers, and two other libraries."""
import pickle

import pytest
import torch
from torch import nn

from curvlab import Objective
from curvlab.curvature import GGN, Fisher, block_diagonal, curvature_blocks, diagonal, ekfac, kfac, kronecker_error, layer_blocks
from curvlab.optim import KFAC

double = torch.double


def normal(*shape):
    return torch.randn(*shape, dtype=double)


class Zoo(nn.Module):
    """Every kind of layer: a table, bare positions, an encoder layer, a recurrent layer, a shared layer, a head."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.batch_first = batch_first
        self.embed, self.positions = nn.Embedding(7, 4), nn.Parameter(torch.randn(5, 4))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=batch_first)
        self.rnn, self.shared, self.head = nn.GRU(4, 3, batch_first=batch_first), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, tokens):
        h = self.embed(tokens) + self.positions
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.rnn(self.encoder(h))[0].mean(1 if self.batch_first else 0)
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(h)))))


def zoo(n=6, batch_first=True):
    torch.manual_seed(0)
    model = Zoo(batch_first).to(double)
    return Objective(model, nn.CrossEntropyLoss()), torch.randint(0, 7, (n, 5)), torch.randint(0, 3, (n,))


def convnet(n=6):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).to(double)
    with torch.no_grad():
        for m in model.modules():
            for p in m.parameters(recurse=False):
                p.copy_(torch.randn_like(p) * 0.5)
    model(normal(20, 2, 6, 6))      # running statistics of its own
    return Objective(model.eval(), nn.CrossEntropyLoss()), normal(n, 2, 6, 6), torch.randint(0, 3, (n,))


PROBLEMS = {"zoo": zoo, "convnet": convnet}


def assert_blocks_of(operator, dense):
    """The operator is `dense` on its blocks and zero elsewhere."""
    inside = torch.zeros(dense.shape, dtype=torch.bool)
    for name, index in operator.index.items():
        D = operator.blocks[name].to_dense()
        for places in index.reshape(-1, D.shape[-1]):
            inside[places[:, None], places] = True
    mine = operator.to_dense()
    assert torch.allclose(mine[inside], dense[inside], rtol=1e-9, atol=1e-13) and bool((mine[~inside] == 0).all())


@pytest.mark.parametrize("problem", PROBLEMS)
def test_places_are_made_when_needed_and_once(problem):
    """Also after the model has changed, in what is derived from the operator, and in a copy on disk."""
    objective, x, y = PROBLEMS[problem]()
    K = kfac(objective, (x, y), "ggn")
    lazy = [index for index in K._index.values() if callable(index)]
    assert lazy and sum(p.numel() for p in objective.params) == K.shape[0]
    next(objective.model.parameters()).requires_grad_(False)
    damped, whole = K.damped(0.1), kfac(PROBLEMS[problem]()[0], (x, y), "ggn")
    assert all(torch.equal(damped.index[name], index) and K.index[name] is damped.index[name] for name, index in whole.index.items())
    again = pickle.loads(pickle.dumps(kfac(PROBLEMS[problem]()[0], (x, y), "ggn")))
    v = normal(K.shape[0])
    assert torch.equal(again @ v, whole @ v) and torch.allclose(K @ v, whole @ v)
    assert torch.equal(torch.cat([index.flatten() for index in K.index.values()]).sort().values, torch.arange(K.shape[0]))


# What is exact: dense blocks and diagonals


@pytest.mark.parametrize("by", ["layer", "unit", "parameter"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_dense_blocks_are_those_of_the_ggn(problem, by):
    objective, x, y = PROBLEMS[problem]()
    G = GGN(objective, x, y).to_dense()
    B = block_diagonal(objective, (x, y), by=by)
    assert_blocks_of(B, G)
    assert torch.allclose(B.trace(), G.trace())                       # every parameter is in a block
    assert torch.allclose(diagonal(objective, (x, y)).diagonal(), G.diagonal(), atol=1e-14)


@pytest.mark.parametrize("curvature, samples", [("fisher-mc", 1), ("fisher-mc", 3), ("fisher-empirical", 1)])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_dense_blocks_are_those_of_the_fisher(problem, curvature, samples):
    objective, x, y = PROBLEMS[problem]()
    F = Fisher(objective, x, y, curvature, seed=3, samples=samples).to_dense()
    assert_blocks_of(block_diagonal(objective, (x, y), curvature, seed=3, samples=samples), F)
    assert torch.allclose(diagonal(objective, (x, y), curvature, seed=3, samples=samples).diagonal(), F.diagonal(), atol=1e-14)


def test_a_unit_is_an_output_a_token_or_a_feature():
    objective, x, y = zoo()
    B = block_diagonal(objective, (x, y), by="unit")
    shapes = {name: tuple(M.matrix.shape) for name, M in B.blocks.items()}
    assert shapes["head"] == (3, 4, 4) and shapes["embed"] == (7, 4, 4) and shapes["encoder.norm1"] == (4, 2, 2) and shapes["positions"] == (5, 4, 4)


class Tail(nn.Module):
    """A layer under test behind a linear one and before a head."""

    def __init__(self, layer, width, shape):
        super().__init__()
        self.first, self.layer, self.head, self.shape = nn.Linear(3, 12), layer, nn.Linear(width, 3), shape

    def forward(self, x):
        h = self.layer(self.first(x).view(len(x), *self.shape))
        return self.head(torch.tanh((h[0] if isinstance(h, tuple) else h).flatten(1)))


OTHERS = {
    "layer norm over two dimensions": (lambda: nn.LayerNorm((2, 6)), 12, (2, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), 12, (2, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), 12, (2, 6)),
    "instance norm": (lambda: nn.InstanceNorm1d(2, affine=True), 12, (2, 6)),
    "instance norm with statistics": (lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True).eval(), 12, (2, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), 12, (4, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(4).eval(), 12, (4, 3)),
    "deep bidirectional rnn": (lambda: nn.RNN(3, 2, 2, bidirectional=True, batch_first=True), 16, (4, 3)),
    "lstm with projection": (lambda: nn.LSTM(3, 3, 2, proj_size=2, bidirectional=True, batch_first=True), 16, (4, 3)),
    "gru without bias": (lambda: nn.GRU(3, 2, bias=False, batch_first=True), 8, (4, 3)),
    "attention without bias": (lambda: Self(nn.MultiheadAttention(3, 1, bias=False, batch_first=True)), 12, (4, 3)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 2, 2), 8, (4, 3)),
    "3d convolution": (lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"), 72, (1, 3, 2, 2)),
    "attention with three heads": (lambda: Self(nn.MultiheadAttention(3, 3, kdim=3, vdim=3, batch_first=True)), 12, (4, 3)),
}


class Self(nn.Module):
    """Self-attention as a layer of one input."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)


@pytest.mark.parametrize("kind", OTHERS)
def test_blocks_of_all_other_layers(kind):
    make, width, shape = OTHERS[kind]
    torch.manual_seed(0)
    model = Tail(make(), width, shape).to(double)
    with torch.no_grad():
        for p in model.parameters():      # scales that are not 1, shifts that are not 0
            p.copy_(torch.randn_like(p))
    objective, x, y = Objective(model, nn.CrossEntropyLoss()), normal(6, 3), torch.randint(0, 3, (6,))
    G = GGN(objective, x, y).to_dense()
    for by in ("layer", "unit"):
        B = block_diagonal(objective, (x, y), by=by)
        assert_blocks_of(B, G)
        assert torch.allclose(B.trace(), G.trace())
    for sharing in ("expand", "reduce"):
        assert all(r.errors["ekfac"][0] <= r.errors["kfac"][0] + 1e-10 for r in kronecker_error(objective, (x, y), sharing=sharing))


# What K-FAC gets exactly right


def check_exact(model, loss, x, y, sharing, names=None):
    objective = Objective(model.to(double), loss)
    G, K = GGN(objective, x, y).to_dense(), kfac(objective, (x, y), "ggn", sharing)
    for name in names or K.names:
        places = K.index[name].flatten()
        expected = G[places][:, places]
        mine = torch.block_diag(*K.blocks[name].to_dense())
        assert expected.norm() > 1e-6 and torch.allclose(mine, expected, rtol=1e-9, atol=1e-13 * float(G.norm())), name
    return objective


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_deep_linear_nets_are_exact(reduction, bias):
    torch.manual_seed(0)
    chain = lambda: nn.Sequential(nn.Linear(5, 4, bias), nn.Linear(4, 6, bias), nn.Linear(6, 3, bias))
    loss = nn.MSELoss(reduction=reduction)
    check_exact(chain(), loss, normal(9, 5), normal(9, 3), "expand")
    check_exact(chain(), loss, normal(9, 7, 5), normal(9, 7, 3), "expand")        # a loss at every position

    class Pooled(nn.Module):                                                       # a loss of the mean, or the sum, of positions
        def __init__(self, pool):
            super().__init__()
            self.layers, self.pool = chain(), pool

        def forward(self, x):
            return self.pool(self.layers(x))

    for pool in (lambda h: h.mean(1), lambda h: h.sum(1)):
        check_exact(Pooled(pool), loss, normal(9, 7, 5), normal(9, 3), "reduce")


def test_single_layers_are_exact():
    torch.manual_seed(0)
    loss = nn.MSELoss()
    tokens = torch.randint(0, 6, (9, 4))
    check_exact(nn.Embedding(6, 3), loss, tokens, normal(9, 4, 3), "expand")
    for conv in (nn.Conv2d(2, 3, 2, stride=2), nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv1d(2, 3, 3, dilation=2)):
        x = normal(6, conv.in_channels, *[8] * len(conv.kernel_size))
        check_exact(conv, loss, x, torch.randn_like(conv.to(double)(x)), "expand")

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 2, stride=2)

        def forward(self, x):
            return self.conv(x).mean((2, 3))

    check_exact(Pooled(), loss, normal(6, 2, 8, 8), normal(6, 3), "reduce")


class First(nn.Module):
    """The first output of a layer that returns several."""

    def __init__(self, layer, *fixed):
        super().__init__()
        self.layer, self.fixed = layer, fixed

    def forward(self, x):
        return self.layer(x, *self.fixed)[0] if isinstance(self.layer, nn.RNNBase) else self.layer(x, x, x)[0]


def test_one_recurrent_step_in_its_linear_range_is_exact():
    torch.manual_seed(0)
    rnn = nn.RNN(4, 3, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        rnn.bias_ih_l0.fill_(20.0)          # every pre-activation is positive
    check_exact(First(rnn), nn.MSELoss(), normal(8, 1, 4), normal(8, 1, 3), "expand")


def test_attention_over_one_token_is_linear_and_exact():
    torch.manual_seed(0)
    objective = check_exact(First(nn.MultiheadAttention(4, 2, batch_first=True)), nn.MSELoss(), normal(8, 1, 4), normal(8, 1, 4), "expand", ["layer.value", "layer.out_proj"])
    K = kfac(objective, (normal(8, 1, 4), normal(8, 1, 4)), "ggn")
    assert K.blocks["layer.query"].frobenius_norm() == 0 and K.blocks["layer.key"].frobenius_norm() == 0      # the softmax of one number is 1


@pytest.mark.parametrize("kwargs", [dict(kdim=3, vdim=5), dict(kdim=3, vdim=5, bias=False), dict(add_bias_kv=True, add_zero_attn=True), dict(batch_first=True)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_with_separate_weights(kwargs, masked):
    """Blocks of all projections, with sequences of different lengths for query and key."""
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, **kwargs)

        def forward(self, q, k, v):
            swap = (lambda t: t) if self.attention.batch_first else (lambda t: t.transpose(0, 1))
            mask = torch.zeros(3, 6, dtype=torch.bool).index_fill(1, torch.tensor([4]), masked)
            return swap(self.attention(swap(q), swap(k), value=swap(v), attn_mask=mask, need_weights=masked)[0]).mean(1)

    torch.manual_seed(0)
    objective = Objective(Cross().to(double), nn.MSELoss())
    inputs, y = (normal(5, 3, 4), normal(5, 6, kwargs.get("kdim", 4)), normal(5, 6, kwargs.get("vdim", 4))), normal(5, 4)
    G, B = GGN(objective, inputs, y).to_dense(), block_diagonal(objective, (inputs, y))
    assert {"attention.query", "attention.key", "attention.value", "attention.out_proj"} <= set(B.names)
    assert_blocks_of(B, G)
    assert torch.allclose(B.trace(), G.trace())


# Factors and estimates


def test_factors_are_those_of_the_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4), nn.Tanh(), nn.Linear(4, 3)).to(double)
    objective, x, y = Objective(model, nn.CrossEntropyLoss()), normal(8, 2, 5, 5), torch.randint(0, 3, (8,))
    for sharing in ("expand", "reduce"):
        optimizer = KFAC(model, lr=0.0, momentum=0.0, curvature="fisher-exact", approximation=sharing)
        optimizer.step(objective.at(x, y))
        K = kfac(objective, (x, y), "fisher-exact", sharing)
        for block in layer_blocks(model):
            state = optimizer.state[block.weight]
            assert torch.allclose(K.blocks[block.name].A, state["A"]) and torch.allclose(K.blocks[block.name].G, state["G"])


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("curvature", ["ggn", "fisher-mc", "fisher-empirical"])
def test_ekfac_is_never_worse_than_kfac(problem, sharing, curvature):
    objective, x, y = PROBLEMS[problem](12)
    report = kronecker_error(objective, (x, y), curvature, sharing)
    assert len(report) >= 3 and all(r.errors["ekfac"][0] <= r.errors["kfac"][0] + 1e-10 for r in report)
    assert any(r.errors["ekfac"][0] < 0.98 * r.errors["kfac"][0] for r in report)


def test_sampled_targets_converge_to_the_expectation():
    """Mean of the output factors over many draws, within its standard error."""
    objective, x, y = convnet(4)
    exact = kfac(objective, (x, y), "ggn")
    draws = [kfac(objective, (x, y), "fisher-mc", seed=k) for k in range(200)]
    for name in ("0", "3", "6"):
        G = torch.stack([d.blocks[name].G for d in draws])
        z = (G.mean(0) - exact.blocks[name].G) / (G.std(0) / len(G) ** 0.5)
        assert z.abs().max() < 5 and torch.equal(draws[0].blocks[name].A, exact.blocks[name].A)
        assert (G[0] - exact.blocks[name].G).norm() > 0.05 * exact.blocks[name].G.norm()
    many = kfac(objective, (x, y), "fisher-mc", samples=200)
    assert (many.blocks["6"].G - exact.blocks["6"].G).norm() < 0.2 * exact.blocks["6"].G.norm()


def test_probes_estimate_the_error_of_large_blocks():
    objective, x, y = convnet(10)
    formed, probed = kronecker_error(objective, (x, y)), kronecker_error(objective, (x, y), limit=0, probes=2000)
    for f, p in zip(formed, probed):
        for kind, (error, spread) in p.errors.items():
            assert spread > 0 and abs(error - f.errors[kind][0]) < 4 * spread < 0.3 * error + 1e-9


# Data and scale


@pytest.mark.parametrize("build", [lambda o, d, **k: kfac(o, d, "ggn", **k), lambda o, d, **k: kfac(o, d, "ggn", "reduce", **k), lambda o, d, **k: ekfac(o, d, "fisher-empirical", **k), lambda o, d, **k: block_diagonal(o, d, **k), lambda o, d, **k: diagonal(o, d, **k)])
@pytest.mark.parametrize("average", ["mean", "sum", "examples"])
def test_batches_chunks_and_generators_change_nothing(build, average):
    objective, x, y = zoo(9)
    objective = Objective(objective.model, nn.CrossEntropyLoss(reduction="mean" if average == "mean" else "sum"), average="examples" if average == "examples" else None)
    whole = build(objective, (x, y)).to_dense()
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    for data, options in ((parts, {}), ((b for b in parts), {}), ([x, y], {}), ((x, y), dict(chunk=4)), (torch.utils.data.DataLoader(list(zip(x, y)), batch_size=4), {})):
        assert torch.allclose(build(objective, data, **options).to_dense(), whole, rtol=1e-9, atol=1e-14)


def test_ignored_tokens_weigh_batches():
    """A mean over counted tokens over all data: batches weigh as many tokens as they count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(double)
    objective = Objective(model, nn.CrossEntropyLoss(), class_dim=-1)
    x, y = normal(6, 4, 4), torch.randint(0, 3, (6, 4))
    y[0, 1:], y[4, 2:] = -100, -100
    G = GGN(objective, x, y).to_dense()
    assert_blocks_of(block_diagonal(objective, [(x[:2], y[:2]), (x[2:], y[2:])]), G)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_lower_precision_is_close(dtype, tolerance):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    x, y = torch.randn(20, 4).to(dtype), torch.randint(0, 3, (20,))
    low = [f(Objective(model, nn.CrossEntropyLoss()), (x, y), "ggn") for f in (kfac, ekfac, diagonal, block_diagonal)]
    model.to(double)
    high = [f(Objective(model, nn.CrossEntropyLoss()), (x.to(double), y), "ggn") for f in (kfac, ekfac, diagonal, block_diagonal)]
    for a, b in zip(low, high):
        assert a.dtype == torch.float32 and (a.to_dense() - b.to_dense()).norm() < tolerance * b.to_dense().norm()
        v = torch.randn(len(a.diagonal()))
        assert torch.allclose(a.damped(0.1) @ a.damped(0.1).solve(v), v, atol=1e-4)


def test_sequence_first_is_the_same_model():
    objective, x, y = zoo(6)
    other, _, _ = zoo(6, batch_first=False)
    for sharing in ("expand", "reduce"):
        assert torch.allclose(kfac(objective, (x, y), "ggn", sharing).to_dense(), kfac(other, (x, y), "ggn", sharing).to_dense(), atol=1e-13)
    assert torch.allclose(diagonal(objective, (x, y)).diagonal(), diagonal(other, (x, y)).diagonal(), atol=1e-13)


def test_nothing_is_left_behind():
    objective, x, y = convnet()
    model = objective.model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kfac(objective, (x, y)), ekfac(objective, (x, y))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
    objective, x, y = zoo()
    with pytest.raises(IndexError):
        kfac(objective, (x + 7, y))
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in objective.model.modules())


# What has no Kronecker product


def test_unsupported_parameters_are_named_and_exact(caplog):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.scale = nn.Embedding(6, 4), nn.Parameter(torch.randn(4))
            self.body = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.decoder = nn.Linear(4, 6, bias=False)
            self.decoder.weight = self.table.weight

        def forward(self, tokens):
            return self.decoder(torch.tanh(self.body(self.table(tokens)) * self.scale)).mean(1)

    torch.manual_seed(0)
    objective = Objective(Odd().to(double), nn.CrossEntropyLoss())
    x, y = torch.randint(0, 6, (7, 3)), torch.randint(0, 6, (7,))
    G = GGN(objective, x, y).to_dense()
    names = {"scale", "table.weight", "body.bias", "body.parametrizations.weight.original0", "body.parametrizations.weight.original1"}
    blocks, rest = curvature_blocks(objective.model)
    assert blocks == [] and {n for n, _ in rest} == names
    assert_blocks_of(kfac(objective, (x, y), "ggn", unsupported="dense"), G)
    assert torch.allclose(kfac(objective, (x, y), "ggn").to_dense(), torch.diag(G.diagonal()), atol=1e-13)
    with pytest.raises(ValueError, match="scale.*unsupported='diagonal'"):
        kfac(objective, (x, y), unsupported="raise")


def test_no_gradients_of_examples_through_batch_norm_in_training_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.PReLU()).to(double)
    objective, data = Objective(model, nn.CrossEntropyLoss()), (normal(6, 4), torch.randint(0, 3, (6,)))
    with pytest.raises(ValueError, match="batch norm in training mode.*2.weight"):
        kfac(objective, data)
    model.eval()
    G = GGN(objective, *data).to_dense()
    assert_blocks_of(block_diagonal(objective, data), G)


def test_rows_that_belong_to_no_example():
    class Chosen(nn.Module):
        """A layer for some of the examples only; batch and tokens merged before another."""

        def __init__(self):
            super().__init__()
            self.merged, self.some, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = torch.tanh(self.merged(x.flatten(0, 1))).view(x.shape).mean(1)
            return self.head(torch.cat([self.some(h[:4]), h[4:]]))

    torch.manual_seed(0)
    objective, x, y = Objective(Chosen().to(double), nn.CrossEntropyLoss()), normal(7, 5, 4), torch.randint(0, 3, (7,))
    K, G = kfac(objective, (x, y), "ggn"), GGN(objective, x, y).to_dense()
    assert K.blocks["some"].frobenius_norm() > 0
    for build in (diagonal, block_diagonal, ekfac, lambda o, d: kfac(o, d, sharing="reduce")):
        with pytest.raises(ValueError, match="layer some sees 4 x 1 rows in a batch of 7"):
            build(objective, (x, y))
    for p in objective.model.some.parameters():
        p.requires_grad_(False)
    rest = torch.cat([torch.arange(20), torch.arange(40, 55)])
    assert_blocks_of(block_diagonal(objective, (x, y)), G[rest][:, rest])


def test_unreached_layers_are_zero():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    objective = Objective(Idle().to(double), nn.CrossEntropyLoss())
    x, y = normal(5, 4), torch.randint(0, 3, (5,))
    for A in (kfac(objective, (x, y)), ekfac(objective, (x, y)), diagonal(objective, (x, y))):
        assert A.layer("idle").frobenius_norm() == 0 and A.layer("used").frobenius_norm() > 0
        assert torch.allclose(A.damped(0.1).layer("idle").to_dense(), 0.1 * torch.eye(10, dtype=double))


def test_arguments_are_checked():
    objective, x, y = convnet()
    for call, message in ((lambda: kfac(objective, (x, y), "hessian"), "curvature='hessian'"), (lambda: kfac(objective, (x, y), sharing="both"), "sharing='both'"),
                          (lambda: kfac(objective, (x, y), samples=0), "samples=0"), (lambda: kfac(objective, (x, y), unsupported="drop"), "unsupported='drop'"),
                          (lambda: kfac(objective, (x, y), elementwise="no"), "elementwise='no'"), (lambda: block_diagonal(objective, (x, y), by="row"), "by='row'"),
                          (lambda: block_diagonal(objective, (x, y), limit=10), "'0'.*dense with 76 rows"), (lambda: kronecker_error(objective, (x, y), probes=1), "probes=1")):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="pass a batch"):
        kfac(objective, x)
    with pytest.raises(TypeError, match="likelihood"):
        kfac(Objective(objective.model, lambda f, y: f.sum()), (x, y))
    rnn = Objective(First(nn.RNN(4, 3)).to(double), nn.MSELoss())
    packed = nn.utils.rnn.pack_padded_sequence(normal(5, 2, 4), torch.tensor([5, 3]))
    with pytest.raises(TypeError, match="PackedSequence"):
        with curvature_blocks(rnn.model)[0][0].watch(lambda use: None):
            rnn.model(packed)


# Other libraries


def linear_and_conv(n):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Sigmoid(), nn.Conv2d(3, 4, 2, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3)).to(double)
    return model, normal(n, 2, 6, 6)


def theirs(cls, model, loss, data, **options):
    A = cls(model, loss, [p for p in model.parameters()], data, check_deterministic=False, separate_weight_and_bias=False, **options)
    return A @ torch.eye(sum(p.numel() for p in model.parameters()), dtype=double)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.MSELoss(), nn.MSELoss(reduction="sum")], ids=str)
def test_kfac_and_ekfac_equal_curvlinops(loss, sharing):
    other = pytest.importorskip("curvlinops")
    model, x = linear_and_conv(60)      # more examples than inputs of any layer: eigenvectors of a singular factor are nobody's in particular
    y = torch.randint(0, 3, (60,)) if isinstance(loss, nn.CrossEntropyLoss) else normal(60, 3)
    objective, data = Objective(model, loss), [(x[:25], y[:25]), (x[25:], y[25:])]
    for ours, kind in (("ggn", "type-2"), ("fisher-empirical", "empirical")):
        options = dict(fisher_type=kind, kfac_approx=sharing)
        assert torch.allclose(kfac(objective, data, ours, sharing).to_dense(), theirs(other.KFACLinearOperator, model, loss, data, **options), rtol=1e-8, atol=1e-12), kind
        assert torch.allclose(ekfac(objective, data, ours, sharing).to_dense(), theirs(other.EKFACLinearOperator, model, loss, data, **options), rtol=1e-7, atol=1e-10), kind


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_equals_curvlinops_on_sequences_and_sampled_targets(sharing):
    other = pytest.importorskip("curvlinops")
    torch.manual_seed(3)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.inner(x)).mean(1))

    model, loss = Tokens().to(double), nn.CrossEntropyLoss()
    x, y = normal(7, 6, 4), torch.randint(0, 3, (7,))
    objective = Objective(model, loss)
    exact = kfac(objective, (x, y), "ggn", sharing).to_dense()
    assert torch.allclose(exact, theirs(other.KFACLinearOperator, model, loss, [(x, y)], fisher_type="type-2", kfac_approx=sharing), rtol=1e-8, atol=1e-12)
    sampled = kfac(objective, (x, y), "fisher-mc", sharing, samples=1000).to_dense()
    drawn = theirs(other.KFACLinearOperator, model, loss, [(x, y)], fisher_type="mc", mc_samples=1000, kfac_approx=sharing)
    assert max((sampled - exact).norm(), (drawn - exact).norm(), (sampled - drawn).norm()) < 0.1 * exact.norm()


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=str)
def test_diagonals_equal_backpack(loss):
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import DiagGGNExact, SumGradSquared

    model, x = linear_and_conv(7)
    y = torch.randint(0, 3, (7,)) if isinstance(loss, nn.CrossEntropyLoss) else normal(7, 3)
    objective = Objective(model, loss)
    ours, empirical = diagonal(objective, (x, y)).diagonal(), diagonal(objective, (x, y), "fisher-empirical").diagonal()
    value = backpack.extend(loss)(backpack.extend(model)(x), y)
    with backpack.backpack(DiagGGNExact(), SumGradSquared()):
        value.backward()
    assert torch.allclose(ours, torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()]), rtol=1e-9, atol=1e-15)
    terms = 7 if isinstance(loss, nn.CrossEntropyLoss) else 21      # their gradients carry the weight of a term, the empirical Fisher divides by it once
    assert torch.allclose(empirical, terms * torch.cat([p.sum_grad_squared.flatten() for p in model.parameters()]), rtol=1e-9, atol=1e-15)
