"""AdaHessian against a slow, dense, literal reading of the algorithm, in float64."""
import pytest
import torch
from torch import nn

from curvlab import Objective
from curvlab.curvature.estimators import random_signs
from curvlab.curvature.operators import Hessian
from curvlab.optim import AdaHessian


def conv_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(steps, seed=7):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 1, 5, 5, generator=g).double(), torch.randint(0, 3, (6,), generator=g)) for _ in range(steps)]


def dense_hessian(net, loss, x, y):
    names, params = zip(*net.named_parameters())
    def value(*tensors):
        return loss(torch.func.functional_call(net, dict(zip(names, tensors)), (x,)), y)
    rows = torch.autograd.functional.hessian(value, tuple(p.detach() for p in params))
    return torch.cat([torch.cat([b.reshape(p.numel(), q.numel()) for b, q in zip(row, params)], 1) for row, p in zip(rows, params)])


def averaged_by_loops(D, block_length):
    out = D.clone()
    if D.ndim == 4:
        for o in range(D.shape[0]):
            for i in range(D.shape[1]):
                out[o, i] = sum(D[o, i].flatten().tolist()) / D[o, i].numel()
    elif D.ndim == 2 and block_length:
        flat = out.view(-1)
        for start in range(0, len(flat), block_length):
            flat[start : start + block_length] = D.reshape(-1)[start : start + block_length].mean()
    return out


def reference(net, data, draw, lr, b1, b2, eps, k, decay, block_length, absolute, every):
    """Literal reading: dense Hessian, explicit sums of all past estimates, no running averages."""
    loss = nn.CrossEntropyLoss()
    params = list(net.parameters())
    past_g, past_D = [], []
    for t, (x, y) in enumerate(data):
        grads = torch.autograd.grad(loss(net(x), y), params)
        past_g.append(grads)
        if t % every == 0:
            z = draw(t, params)
            Hz = dense_hessian(net, loss, x, y) @ torch.cat([s.flatten() for s in z])
            parts = [h.view_as(p) for h, p in zip(Hz.split([p.numel() for p in params]), params)]
            D = [s * h for s, h in zip(z, parts)]
            past_D.append([averaged_by_loops(d.abs() if absolute else d, block_length) for d in D])
        with torch.no_grad():
            for i, p in enumerate(params):
                m = sum((1 - b1) * b1 ** (t - s) * g[i] for s, g in enumerate(past_g)) / (1 - b1 ** (t + 1))
                n = len(past_D)
                v = sum((1 - b2) * b2 ** (n - 1 - s) * D[i] ** 2 for s, D in enumerate(past_D)) / (1 - b2**n)
                p.sub_(lr * (m / (v.sqrt() ** k + eps) + decay * p))


SETTINGS = [
    dict(),
    dict(k=0.5),
    dict(absolute=True, block_length=4),
    dict(block_length=7, decay=0.1, b1=0.5),
    dict(every=3),
    dict(k=0.0, every=2),
]


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_equals_dense_reference(setting, chunk):
    s = {"lr": 0.05, "b1": 0.9, "b2": 0.99, "eps": 1e-4, "k": 1.0, "decay": 0.0, "block_length": None, "absolute": False, "every": 1, **setting}
    ours, theirs, data = conv_net(), conv_net(), batches(5)
    optimizer = AdaHessian(ours, lr=s["lr"], betas=(s["b1"], s["b2"]), eps=s["eps"], hessian_power=s["k"], block_length=s["block_length"], absolute=s["absolute"],
                           observe_every=s["every"], weight_decay=s["decay"], seed=3)
    streams = {t: torch.Generator() for t in range(5)}
    objective = Objective(ours, nn.CrossEntropyLoss())
    for t, (x, y) in enumerate(data):
        streams[t].set_state(optimizer.generator().get_state())
        optimizer.step(objective.at(x, y, chunk))
    draw = lambda t, params: [random_signs(p.shape, streams[t], p.dtype) for p in params]
    start = [p.clone() for p in theirs.parameters()]
    reference(theirs, data, draw, **s)
    for p, q, p0 in zip(ours.parameters(), theirs.parameters(), start):
        assert (p - q).abs().max() < 1e-10 * (q - p0).abs().max()


def test_reference_can_fail():
    """Other signs, or the diagonal instead of one sample, lead elsewhere: the comparison sees the curvature."""
    runs = []
    for seed in (3, 4):
        net = conv_net()
        optimizer = AdaHessian(net, lr=0.05, seed=seed)
        for x, y in batches(2):
            optimizer.step(Objective(net, nn.CrossEntropyLoss()).at(x, y))
        runs.append(torch.cat([p.flatten() for p in net.parameters()]))
    assert (runs[0] - runs[1]).abs().max() > 1e-3


def test_one_sample_is_unbiased_and_its_mean_square_is_the_row_norm():
    net, (x, y) = conv_net(), batches(1)[0]
    objective = Objective(net, nn.CrossEntropyLoss())
    optimizer = AdaHessian(net, lr=0.0)
    H = Hessian(objective, x, y).to_dense()
    optimizer.closure = objective.at(x, y)
    draws = []
    for step in range(3000):
        optimizer.param_groups[0]["steps"] = step
        draws.append(torch.cat([d.flatten() for d in optimizer.sample(list(net.parameters()))]))
    D = torch.stack(draws)
    spread = H.pow(2).sum(1) - H.diagonal() ** 2
    assert ((D.mean(0) - H.diagonal()).abs() < 5 * (spread / len(D)).sqrt() + 1e-12).all()
    assert torch.allclose(D.pow(2).mean(0).sqrt(), H.norm(dim=1), rtol=0.1)


def test_memory_of_the_graph_is_released():
    import gc
    import weakref

    net, (x, y) = conv_net(), batches(1)[0]
    optimizer, objective = AdaHessian(net), Objective(net, nn.CrossEntropyLoss())
    closure = objective.at(x, y)
    optimizer.step(closure)
    watched = weakref.ref(closure)
    assert closure._graph is None and optimizer.closure is None
    assert all(p.grad.grad_fn is None and not p.grad.requires_grad for p in net.parameters())
    gc.disable()  # plain reference counting must free it: no cycle through the graph
    try:
        del closure
        assert watched() is None
    finally:
        gc.enable()


def test_late_parameters_get_an_estimate_at_once():
    """A head that joins between two Hessian updates is not divided by nothing."""
    torch.manual_seed(0)
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b, self.use = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3), "a"
        def forward(self, x):
            return getattr(self, self.use)(torch.tanh(self.body(x)))
    net = TwoHeads().double()
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    objective, optimizer = Objective(net, nn.CrossEntropyLoss()), AdaHessian(net, lr=0.05, observe_every=4)
    optimizer.step(objective.at(x, y))
    assert net.b.weight not in optimizer.state
    net.use = "b"
    optimizer.step(objective.at(x, y))
    assert optimizer.state[net.b.weight]["observations"] == 1 and optimizer.state[net.body.weight]["observations"] == 1
    assert all(p.isfinite().all() for p in net.parameters())


def test_infinite_curvature_refuses_the_step():
    class Kink(nn.Module):
        """sqrt(|x - 1|) has an infinite second derivative and a masked gradient at x = 1."""
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
        def forward(self, x):
            return Steep.apply(self.w) * x
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return w.clone()
        @staticmethod
        def backward(ctx, grad):
            (w,) = ctx.saved_tensors
            return grad * (1 + (w - 1).abs().sqrt())
    net = Kink()
    optimizer = AdaHessian(net)
    from curvlab.optim import NonFiniteError
    with pytest.raises(NonFiniteError, match="Hessian estimate"):
        optimizer.step(Objective(net, nn.MSELoss()).at(torch.ones(2, 1), torch.zeros(2, 1)))
    assert net.w.item() == 1 and not optimizer.state.get(net.w)
