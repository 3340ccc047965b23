"""Convolutions in the layout `channels_last` give the same numbers, to everybody who looks on, and leave no trace in the gradients."""

import pytest
import torch
from torch import nn

from curvlab import quick_layers
from curvlab.curvature import kfac
from curvlab.objective import Objective
from curvlab.quick_layers import QuickLayers, channels_last

CLOSE = dict(rtol=2e-4, atol=2e-5)  # float32, sums of a few hundred products in another order


@pytest.fixture(autouse=True)
def every_convolution(monkeypatch):
    monkeypatch.setattr(quick_layers, "WORTH_LAYOUT", 0)


class Flattens(nn.Module):
    "What people write: `view` in several forms, an in-place activation, a residual sum, a concatenation; it notes the layout that its images have in the end."

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm, self.strided, self.head = nn.BatchNorm2d(8), nn.Conv2d(16, 6, 2, stride=2), nn.Linear(6 * 3 * 2, 3)
        self.seen = []

    def forward(self, x):
        h = self.first(x).relu_()
        h = torch.cat([h, h + torch.tanh(self.norm(self.second(h)))], 1)
        h = nn.functional.max_pool2d(torch.nn.functional.avg_pool2d(self.strided(h), 1), 2)
        self.seen.append(channels_last(h))
        assert h.view(torch.int32).dtype == torch.int32 and torch.equal(h.view((len(x), -1)), h.view(len(x), 6 * 3 * 2))
        return self.head(h.view(h.size(0), -1))


class Paints(nn.Module):
    "A net whose output are images."

    def __init__(self, channels):
        super().__init__()
        self.down, self.up, self.out = nn.Conv2d(channels, 6, 3, stride=2, padding=1), nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x):
        return self.out(torch.tanh(self.up(torch.tanh(self.down(x)))))


def case(name, channels):
    torch.manual_seed(0)
    x = torch.randn(5, channels, 12, 8)
    net = {"flattens": Flattens, "paints": Paints}[name](channels)
    return net, x, torch.randint(3, (5,) if name == "flattens" else (5, 12, 8))


def gradients(net, x, y):
    loss = nn.functional.cross_entropy(net(x), y)
    return loss.detach(), torch.autograd.grad(loss, list(net.parameters()), create_graph=True)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", ["flattens", "paints"])
def test_gradients_and_products_are_those_of_the_usual_layout(name, channels):
    net, x, y = case(name, channels)
    params = list(net.parameters())
    vs = [torch.randn_like(p) for p in params]
    loss, grads = gradients(net, x, y)
    products = torch.autograd.grad(grads, params, vs)
    objective = Objective(net, nn.CrossEntropyLoss())
    for second_order in (False, True):
        closure = objective.at(x, y)
        torch.testing.assert_close(closure.evaluate(second_order=second_order), loss, **CLOSE)
        for (n, p), g, found, expected in zip(net.named_parameters(), grads, closure.hvp(vs), products, strict=True):
            torch.testing.assert_close(p.grad, g.detach(), **CLOSE)
            torch.testing.assert_close(found, expected, **CLOSE)
            if n != "up.weight":  # for a transposed convolution PyTorch's own rules hold
                assert p.grad.stride() == found.stride() == p.stride()
    together = objective.at(x, y).hvp([torch.stack([v, -2 * v]) for v in vs], batched=True)
    for found, expected in zip(together, products):
        torch.testing.assert_close(found[1], -2 * expected, **CLOSE)
    if name == "flattens":
        assert net.seen[0] is False and all(net.seen[1:2])  # by itself, and in the closure


@pytest.mark.parametrize("curvature", ["fisher-exact", "fisher-empirical"])
def test_factors_are_those_of_the_usual_layout(curvature, monkeypatch):
    net, x, y = case("flattens", 3)
    factors = lambda: kfac(Objective(net, nn.CrossEntropyLoss()), [(x, y)], curvature)
    quick = factors().to_dense()
    monkeypatch.setattr(quick_layers, "WORTH_LAYOUT", 2**60)
    usual = factors().to_dense()
    torch.testing.assert_close(quick, usual, **CLOSE)


def test_a_net_in_that_layout_keeps_it():
    "Gradients come in the layout of their parameters, which the optimizer's states share."
    net, x, y = case("paints", 3)
    expected = gradients(net, x, y)[1]
    net = net.to(memory_format=torch.channels_last)
    Objective(net, nn.CrossEntropyLoss()).at(x, y)()
    for p, g in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g.detach(), **CLOSE)
    assert net.down.weight.grad.stride() == net.down.weight.stride() != torch.empty(net.down.weight.shape).stride()


def test_where_the_layout_stays(monkeypatch):
    net, x, y = case("flattens", 3)
    wanted = lambda x, W: quick_layers.laid_out(x, W) is not x
    W = net.first.weight
    assert wanted(x, W) and not wanted(x.double(), W.double()) and not wanted(x[0], W)
    with torch.autocast("cpu"):
        assert not wanted(x, W)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not wanted(x, W)
    torch.func.vmap(lambda x: x.sum() if not wanted(x.unsqueeze(0), W) else pytest.fail("changed inside vmap"))(x)
    monkeypatch.setattr(quick_layers, "WORTH_LAYOUT", x.numel() // 3 * W.numel())
    assert wanted(x, W) and not wanted(x[:-1], W)
    with pytest.raises(RuntimeError, match="view"), QuickLayers():
        x.transpose(0, 1).view(-1)  # no image in that layout: PyTorch's own error
