"""The Kronecker factors of every kind of layer against their definition: loops over examples, positions and cotangents, through forward passes written out by hand."""
import pytest
import torch
from torch import nn

from curvlab import Objective
from curvlab.curvature import ekfac, kfac, kronecker_error

N, CLASSES = 5, 3


class Tape:
    """`apply` multiplies one vector by a weight and remembers input and output."""

    def __init__(self):
        self.calls = []

    def apply(self, name, W, b, a):
        s = W @ a + (0 if b is None else b)
        s = s + torch.zeros_like(s, requires_grad=True)
        self.calls.append((name, a if b is None else torch.cat([a, a.new_ones(1)]), s))
        return s


def head(model, tape, h):
    return tape.apply("head", model.head.weight, model.head.bias, h)


class Net(nn.Module):
    """A layer under test and a head."""

    def __init__(self, layer, width, run):
        super().__init__()
        self.layer, self.head, self.run = layer, nn.Linear(width, CLASSES), run

    def forward(self, x):
        return self.head(self.run(self.layer, x))


def linear_on_tokens(model, tape, x):
    rows = [tape.apply("layer", model.layer.weight, model.layer.bias, t) for t in x]
    return head(model, tape, torch.tanh(torch.stack(rows)).mean(0))


def used_twice(model, tape, x):
    L = model.layer
    return head(model, tape, torch.tanh(tape.apply("layer", L.weight, L.bias, torch.tanh(tape.apply("layer", L.weight, L.bias, x)))))


def convolution(model, tape, x):
    L = model.layer  # stride (2, 1), padding (1, 0), two groups
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
    per, out = x.shape[0] // 2, []
    for group in range(2):
        W, b, image = L.weight[3 * group : 3 * group + 3].flatten(1), L.bias[3 * group : 3 * group + 3], padded[per * group : per * group + per]
        sites = [(i, j) for i in range(0, image.shape[1] - 2, 2) for j in range(image.shape[2] - 1)]
        out.append(torch.stack([tape.apply(f"layer|{group}", W, b, image[:, i : i + 3, j : j + 2].flatten()) for i, j in sites], 1))
    return head(model, tape, torch.tanh(torch.cat(out)).mean(1))


def embedding(model, tape, x):
    L = model.layer
    rows = [tape.apply("layer", L.weight.T, None, nn.functional.one_hot(t, len(L.weight)).double()) for t in x if t != L.padding_idx]
    return head(model, tape, torch.tanh(torch.stack(rows)).sum(0))


def recurrent(model, tape, x):
    L, H = model.layer, model.layer.hidden_size
    h, c, hs = x.new_zeros(H), x.new_zeros(H), []
    for step in x:
        s = tape.apply("layer.weight_ih_l0", L.weight_ih_l0, L.bias_ih_l0, step)
        r = tape.apply("layer.weight_hh_l0", L.weight_hh_l0, L.bias_hh_l0, h)
        if L.mode == "GRU":
            (sr, sz, sn), (rr, rz, rn) = s.split(H), r.split(H)
            z = torch.sigmoid(sz + rz)
            h = (1 - z) * torch.tanh(sn + torch.sigmoid(sr + rr) * rn) + z * h
        elif L.mode == "LSTM":
            i, f, g, o = (s + r).split(H)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            h = torch.tanh(s + r)
        hs.append(h)
    return head(model, tape, torch.stack(hs).mean(0))


def attention(model, tape, x):
    L, E = model.layer, model.layer.embed_dim
    Ws, bs = L.in_proj_weight.split(E), L.in_proj_bias.split(E)
    q, k, v = (torch.stack([tape.apply(f"layer.{n}", W, b, t) for t in x]) for n, W, b in zip(("query", "key", "value"), Ws, bs))
    mixed = []
    for part in torch.arange(E).split(E // L.num_heads):
        weights = (q[:, part] @ k[:, part].T / len(part) ** 0.5).softmax(-1)
        mixed.append(weights @ v[:, part])
    rows = [tape.apply("layer.out_proj", L.out_proj.weight, L.out_proj.bias, t) for t in torch.cat(mixed, 1)]
    return head(model, tape, torch.tanh(torch.stack(rows)).mean(0))


def tokens():
    return torch.randint(0, 6, (N, 4))


SEQUENCE = lambda: torch.randn(N, 4, 4).double()
KINDS = {
    "linear on tokens": (lambda: nn.Linear(4, 5), 5, SEQUENCE, lambda L, x: torch.tanh(L(x)).mean(1), linear_on_tokens),
    "used twice": (lambda: nn.Linear(4, 4), 4, lambda: torch.randn(N, 4).double(), lambda L, x: torch.tanh(L(torch.tanh(L(x)))), used_twice),
    "convolution": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), 6, lambda: torch.randn(N, 4, 5, 4).double(), lambda L, x: torch.tanh(L(x)).mean((2, 3)), convolution),
    "embedding": (lambda: nn.Embedding(6, 4), 4, tokens, lambda L, x: torch.tanh(L(x)).sum(1), embedding),
    "embedding with padding": (lambda: nn.Embedding(6, 4, padding_idx=2), 4, tokens, lambda L, x: torch.where((x != 2).unsqueeze(-1), torch.tanh(L(x)), 0.0).sum(1), embedding),
    "rnn": (lambda: nn.RNN(4, 3, batch_first=True), 3, SEQUENCE, lambda L, x: L(x)[0].mean(1), recurrent),
    "gru": (lambda: nn.GRU(4, 3, batch_first=True), 3, SEQUENCE, lambda L, x: L(x)[0].mean(1), recurrent),
    "lstm": (lambda: nn.LSTM(4, 3, batch_first=True), 3, SEQUENCE, lambda L, x: L(x)[0].mean(1), recurrent),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), 4, SEQUENCE, lambda L, x: torch.tanh(L(x, x, x)[0]).mean(1), attention),
    "attention, sequence first": (lambda: nn.MultiheadAttention(4, 2), 4, SEQUENCE, lambda L, x: torch.tanh(L(*[x.transpose(0, 1)] * 3)[0]).mean(0), attention),
}


def make(kind):
    torch.manual_seed(0)
    layer, width, data, run, explicit = KINDS[kind]
    model = Net(layer(), width, run).double()
    return model, data(), torch.randint(0, CLASSES, (N,)), explicit


def rows_of(model, x, explicit):
    """`{name: [per example: (a (T, in), g (cotangents, T, out))]}`, the loss's `1/N` undone."""
    rows = {}
    for example in x:
        tape = Tape()
        f = explicit(model, tape, example)
        p = f.softmax(0).detach()
        root = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        outputs = [s for _, _, s in tape.calls]
        grads = [torch.autograd.grad(f, outputs, root[:, c], retain_graph=True, allow_unused=True) for c in range(CLASSES)]
        for name in dict.fromkeys(n for n, _, _ in tape.calls):
            mine = [k for k, (n, _, _) in enumerate(tape.calls) if n == name]
            a = torch.stack([tape.calls[k][1] for k in mine]).detach()
            g = torch.stack([torch.stack([grads[c][k] for k in mine]) for c in range(CLASSES)])
            rows.setdefault(name, []).append((a, g))
    return rows


def factors(examples, sharing):
    """`(mean a a') (x) (sum g g')`, in two loops."""
    A, G, count = 0, 0, 0
    for a, g in examples:
        if sharing == "reduce":
            a, g = a.mean(0, keepdim=True), g.sum(1, keepdim=True)
        for t in range(len(a)):
            A, count = A + torch.outer(a[t], a[t]), count + 1
            for c in range(CLASSES):
                G = G + torch.outer(g[c, t], g[c, t]) / N
    return torch.kron(G, A / count)


def dense_parts(operator, name):
    """Dense blocks of an operator under the oracle's names, a group each."""
    D = operator.blocks[name].to_dense()
    return {name if len(D) == 1 else f"{name}|{k}": block for k, block in enumerate(D)}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_what_the_definition_says(kind, sharing):
    model, x, y, explicit = make(kind)
    K, rows = kfac(Objective(model, nn.CrossEntropyLoss()), (x, y), "ggn", sharing), rows_of(model, x, explicit)
    mine = {n: D for name in K.names for n, D in dense_parts(K, name).items()}
    assert mine.keys() == rows.keys()
    for name, examples in rows.items():
        expected = factors(examples, sharing)
        assert expected.norm() > 0 and torch.allclose(mine[name], expected, rtol=1e-9, atol=1e-14), name


@pytest.mark.parametrize("kind", KINDS)
def test_eigenvalues_are_second_moments_in_the_eigenbasis(kind):
    model, x, y, explicit = make(kind)
    objective = Objective(model, nn.CrossEntropyLoss())
    E, K, rows = ekfac(objective, (x, y), "ggn"), kfac(objective, (x, y), "ggn"), rows_of(model, x, explicit)
    for name in K.names:
        Q = K.blocks[name].eigen()
        for k in range(len(Q.s)):
            own = rows.get(name, rows.get(f"{name}|{k}"))
            s = 0
            for a, g in own:
                for c in range(CLASSES):
                    gradient = sum(torch.outer(g[c, t], a[t]) for t in range(len(a)))
                    rotated = Q.QG[k].T @ gradient if Q.QA is None else Q.QG[k].T @ gradient @ Q.QA[k]
                    s = s + rotated**2 / N
            assert torch.allclose(E.blocks[name].s[k], s, rtol=1e-8, atol=1e-14), name


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_against_the_exact_block(kind, sharing):
    """The report's numbers by hand, and EKFAC never above K-FAC (its eigenvalues are optimal in K-FAC's basis)."""
    model, x, y, explicit = make(kind)
    report, rows = kronecker_error(Objective(model, nn.CrossEntropyLoss()), (x, y), sharing=sharing), rows_of(model, x, explicit)
    for block in report:
        assert block.errors["ekfac"][0] <= block.errors["kfac"][0] + 1e-10
        if block.name not in rows:  # groups: the oracle has them one by one
            continue
        exact = 0
        for a, g in rows[block.name]:
            for c in range(CLASSES):
                p = sum(torch.outer(g[c, t], a[t]) for t in range(len(a))).flatten()
                exact = exact + torch.outer(p, p) / N
        expected = (factors(rows[block.name], sharing) - exact).norm() / exact.norm()
        assert torch.allclose(block.errors["kfac"][0], expected, rtol=1e-7) and block.entries == len(exact)
        diagonal = (exact - torch.diag(exact.diagonal())).norm() / exact.norm()
        assert torch.allclose(block.errors["diagonal"][0], diagonal, rtol=1e-7)
