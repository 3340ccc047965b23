"""Tiny models, each with one thing in it that an optimizer may trip over, as problems with a batch."""
import torch
from methods import Problem
from torch import nn
from torch.utils.checkpoint import checkpoint

CE = nn.CrossEntropyLoss


def classes(x, k=3, seed=1):
    """Learnable labels: the largest of `k` random linear functions of the first features."""
    flat = x.flatten(1).double()
    w = torch.randn(flat.shape[1], k, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return (flat @ w).argmax(1)


def inputs(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(dtype)


def seeded(make, dtype=torch.float32, seed=0):
    """`make()` with seeded initial parameters, and the global stream as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(dtype)


def mlp(dtype=torch.float32, n=24, activation=nn.Tanh, seed=0):
    x = inputs(n, 4, dtype=dtype)
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 3)), dtype, seed)
    return Problem(model, CE(), x, classes(x))


class Twice(nn.Module):
    """One inner layer applied twice, and one called by keyword; `tied` writes the same function with two modules that share their parameters."""

    def __init__(self, tied, share_bias=True):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.inner = nn.Linear(6, 6)
        self.again = self.inner
        if tied:
            self.again = nn.Linear(6, 6)
            self.again.weight = self.inner.weight
            if share_bias:
                self.again.bias = self.inner.bias

    def forward(self, x):
        return self.last(input=torch.tanh(self.again(torch.tanh(self.inner(torch.tanh(self.first(x)))))))


def twice(tied=False, share_bias=True, dtype=torch.double):
    x = inputs(24, 4, dtype=dtype)
    return Problem(seeded(lambda: Twice(tied, share_bias), dtype), CE(), x, classes(x))


def sequence(dtype=torch.float32):
    """Inputs (batch, sequence, feature), a class for every position, some positions ignored."""
    x = inputs(8, 5, 4, dtype=dtype)
    y = classes(x.reshape(40, 4)).view(8, 5)
    y[0, 3:] = -100
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), dtype)
    return Problem(model, CE(), x, y, class_dim=-1)


class Tied(nn.Module):
    """A tiny language model whose output layer has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.last = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, tokens):
        return self.last(torch.tanh(self.hidden(self.embedding(tokens))))


def language(dtype=torch.float32):
    tokens = torch.randint(0, 7, (16, 5), generator=torch.Generator().manual_seed(0))
    return Problem(seeded(Tied, dtype), CE(), tokens, (tokens + 1) % 7, class_dim=-1)


class Heads(nn.Module):
    """A trunk and two heads; `use` names the heads whose outputs count, `run` those that run at all."""

    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.use = self.run = "a"

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        out = {name: getattr(self, name)(h) for name in self.run}
        return sum(out[name] for name in self.use)


def heads(dtype=torch.float32):
    x = inputs(24, 4, dtype=dtype)
    return Problem(seeded(Heads, dtype), CE(), x, classes(x))


class Mixed(nn.Module):
    """Embedding, layer norm and bare parameters beside linear layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.scale, self.shift = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(()))
        self.hidden, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        h = self.norm(self.embedding(tokens)) * self.scale + self.shift
        return self.last(torch.tanh(self.hidden(h)).mean(1))


def mixed(dtype=torch.float32):
    tokens = torch.randint(0, 7, (24, 4), generator=torch.Generator().manual_seed(0))
    return Problem(seeded(Mixed, dtype), CE(), tokens, tokens.sum(1) % 3)


class Conv(nn.Module):
    """Convolution, batch norm, dropout, linear; the memory layout of the inputs passes through."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)  # batch norm takes a bias out again
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(dropout)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


def conv(dtype=torch.float32, dropout=0.0, seed=0):
    x = inputs(16, 2, 6, 6, seed=seed, dtype=dtype)
    return Problem(seeded(lambda: Conv(dropout), dtype, seed), CE(), x, classes(x))


class Block(nn.Module):
    """A self-attention layer and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 6, batch_first=True)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.last(self.recurrent(h)[0].mean(1))


def attention(dtype=torch.float32):
    x = inputs(12, 5, 4, dtype=dtype)
    return Problem(seeded(Block, dtype), CE(), x, classes(x))


class Checkpointed(nn.Module):
    """An MLP whose hidden block is recomputed in the backward pass when `on`."""

    def __init__(self, on):
        super().__init__()
        self.first, self.hidden, self.last, self.on = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), on

    def block(self, h):
        return torch.tanh(self.hidden(torch.tanh(h)))

    def forward(self, x):
        h = self.first(x)
        return self.last(checkpoint(self.block, h, use_reentrant=False) if self.on else self.block(h))


def checkpointed(on, dtype=torch.double):
    x = inputs(24, 4, dtype=dtype)
    return Problem(seeded(lambda: Checkpointed(on), dtype), CE(), x, classes(x))
