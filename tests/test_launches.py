"""How many kernels a step launches as a function of the number of layers: factorisations are batched, lists of tensors are handled as lists, and nothing grows faster than the layers."""
import math

import pytest
import torch
from fake_device import fake_device, no_host_reads
from methods import HOST_DECISIONS, METHODS, build
from torch import nn

from curvlab import Objective, optim
from curvlab.lab.counting import factorisations, launches
from curvlab.optim import KFAC, Shampoo, Unitwise

pytestmark = [pytest.mark.filterwarnings("ignore::curvlab.optim.FallbackWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
KINDS = {"plain": 1, "refreshing": 3, "observing": 4}  # steps, with statistics every 2 and factorisations every 3 steps
EVERY = {"observe_every": 2, "refresh_every": 3}


def equal_layers(layers, width=6):
    """A chain of equal linear layers and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())][:-1])
    return model, torch.randn(9, width), torch.randint(0, width, (9,))


def counted(make, layers):
    """Launches of each kind of step, beyond those of loss and gradient alone."""
    model, x, y = equal_layers(layers)
    optimizer, objective = make(model), Objective(model, nn.CrossEntropyLoss())
    steps = [launches(lambda: optimizer.step(objective.at(x, y))) for _ in range(1 + max(KINDS.values()))]
    gradient = launches(lambda: objective.at(x, y)())
    assert gradient.total() > 0
    return {kind: (steps[step].total() - gradient.total(), factorisations(steps[step])) for kind, step in KINDS.items()}


DIRECT = [m for m in METHODS if m not in HOST_DECISIONS and m != "NaturalGradient"]  # the others repeat products until they are satisfied, or once for every weight
MAKERS = {method: lambda model, method=method: build(method, model, **EVERY, **({"refresh_growth": math.inf} if method == "Shampoo" else {})) for method in DIRECT}
MAKERS |= {f"Shampoo graft={graft}": lambda model, graft=graft: Shampoo(model, graft=graft, decay=0.9, refresh_growth=math.inf, **EVERY) for graft in ("sgd", "adagrad", "rmsprop", "adam")}
MAKERS |= {
    "Shampoo newton": lambda model: Shampoo(model, root="newton", eps=1.0, refresh_growth=math.inf, **EVERY),
    "KFAC eigenbasis": lambda model: KFAC(model, damping_in="eigenbasis", **EVERY),
    "KFAC reduce": lambda model: KFAC(model, approximation="reduce", **EVERY),
    "Unitwise full": lambda model: Unitwise(model, structure="unitwise", damping=0.1, **EVERY),
}
REFRESHING = {"KFAC": 6, "KFAC reduce": 6, "KFAC eigenbasis": 2, "Shampoo": 2, "Unitwise full": 3}  # at most: one call a shape, three for a Cholesky inverse with its second try


@pytest.mark.parametrize("name", MAKERS)
def test_launches_grow_with_the_layers_at_most(name):
    """Twice the layers, twice the difference: exactly linear, for every kind of step."""
    few, some, many = (counted(MAKERS[name], layers) for layers in (3, 6, 12))
    for kind in KINDS:
        assert many[kind][0] - some[kind][0] == 2 * (some[kind][0] - few[kind][0]) >= 0, kind


@pytest.mark.parametrize("name", MAKERS)
def test_factorisations_do_not_grow(name):
    """Matrices of one shape are factorised in one call, and in refreshing steps only."""
    few, many = (counted(MAKERS[name], layers) for layers in (2, 9))
    assert {kind: n for kind, (_, n) in few.items()} == {kind: n for kind, (_, n) in many.items()}
    assert few["plain"][1] == few["observing"][1] == 0
    assert name not in REFRESHING or 1 <= few["refreshing"][1] <= REFRESHING[name]


def test_other_shapes_are_other_calls():
    """Layers 4-4-4-3: two sizes of input factors, two of gradient factors, and 4 outputs are no 5 inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = KFAC(model, damping_in="eigenbasis")
    counts = launches(lambda: optimizer.step(Objective(model, nn.CrossEntropyLoss()).at(torch.randn(9, 4), torch.randint(0, 3, (9,)))))
    assert factorisations(counts) == len({5, 4, 3})


@pytest.mark.parametrize("name", ["SGD", "Adam", "AMSGrad", "AdaGrad", "SignDescent"])
def test_updates_of_lists_do_not_grow(name):
    """What an elementwise method adds to the gradient is the same number of launches for 2 and for 16 layers."""
    few, many = (counted(MAKERS[name], layers) for layers in (2, 16))
    assert few == many and few["plain"][0] < 25


def test_momentum_clip_and_decay_do_not_grow():
    def make(model):
        return optim.SGD(model, momentum=0.9, nesterov=True, weight_decay=0.1, decoupled=True)

    assert counted(make, 2) == counted(make, 16)


@pytest.mark.parametrize("name", ["AdaHessian", "Shampoo"])
def test_plain_steps_of_second_order_methods(name):
    """Between estimates AdaHessian is Adam; Shampoo applies its roots tensor by tensor: at most two products a weight, one a bias."""
    few, many = (counted(MAKERS[name], layers)["plain"][0] for layers in (2, 16))
    assert many - few <= {"AdaHessian": 0, "Shampoo": 14 * 3}[name]


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_masks_on_an_accelerator(name):
    """Where a value cannot be read, a refused step is masked tensor by tensor: gradients, averages and moves, at most seven launches a tensor (a batched mask may lower this)."""
    def own(layers):
        with fake_device():
            model = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(6, 6), nn.Tanh())][:-1])
            x, y = torch.zeros(9, 6), torch.zeros(9, dtype=torch.long)
            optimizer, objective = MAKERS[name](model), Objective(model, nn.CrossEntropyLoss())
            with no_host_reads():
                optimizer.step(objective.at(x, y))
                step = launches(lambda: optimizer.step(objective.at(x, y)))
                return step.total() - launches(lambda: objective.at(x, y)()).total()

    few, many = own(2), own(6)
    assert (many - few) / (2 * 4) <= 7


def test_a_loop_over_layers_is_seen():
    class Looped(optim.SGD):
        def direction(self, group, params, grads):
            for p in params:
                torch.linalg.eigh(p @ p.T if p.ndim == 2 else torch.eye(2))
            return grads

    few, many = (counted(Looped, layers)["plain"] for layers in (2, 4))
    assert many[1] == 2 * few[1] == 8 and many[0] > few[0]
