"""No kind of step reads from the device or copies to it: every method, step rule and option, on a device without data (see `fake_device`)."""
import math
from collections import Counter

import pytest
import torch
from fake_device import DEVICE, fake_device, no_host_reads
from methods import HOST_DECISIONS, METHODS, PER_EXAMPLE, SHORT, build
from torch import nn

from curvlab import Objective, curvature, optim
from curvlab.curvature.jacobian import Jacobian
from curvlab.lab.recorder import Recorder, alignment, decrease, factor_conditions, sharpness, spectrum
from curvlab.optim import SGD, Armijo, KFAC, Polyak, QuadraticModel, Shampoo, Unitwise, Wolfe

pytestmark = [pytest.mark.filterwarnings("ignore::curvlab.optim.FallbackWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


class Vision(nn.Module):
    """A convolution cuts images into tokens; one attention block; a linear head."""

    def __init__(self, width=6, heads=2, classes=3):
        super().__init__()
        self.heads = heads
        self.patches, self.position = nn.Conv2d(1, width, 3, stride=3), nn.Parameter(torch.zeros(4, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out, self.up, self.down, self.head = (nn.Linear(*n) for n in ((width, 3 * width), (width, width), (width, 2 * width), (2 * width, width), (width, classes)))

    def forward(self, images):
        h = self.patches(images).flatten(2).mT + self.position
        q, k, v = self.qkv(self.norm1(h)).view(*h.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        h = h + self.out(a.transpose(1, 2).reshape(h.shape))
        return self.head((h + self.down(nn.functional.gelu(self.up(self.norm2(h))))).mean(1))


def vision():
    return Vision(), torch.zeros(5, 1, 6, 6), torch.zeros(5, dtype=torch.long)


def chain():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.zeros(5, 4), torch.zeros(5, dtype=torch.long)


def counts(make, steps, net=chain, readers=()):
    """What every step of `make(model)` reads and waits for, `[(reads, waits), ...]`; fails at anything that is not allowed."""
    seen = []
    with fake_device():
        model, x, y = net()
        optimizer, objective = make(model), Objective(model, nn.CrossEntropyLoss())
        for _ in range(steps):
            with no_host_reads(readers) as watch:
                optimizer.step(objective.at(x, y))
            assert not watch.copies
            seen.append((watch.reads, watch.waits))
    return seen


# Statistics at steps 0, 2, 4, factorisations at steps 0, 3: the four kinds of step are both, neither, the first, the second.
KINDS = {"observing and refreshing": 0, "plain": 1, "observing": 2, "refreshing": 3}
ITERATIONS = 2
SEARCHING = ("LBFGS", "SR1", "Newton")
# What a step of the methods that decide on the host reads when every number it reads is a one. Conjugate gradients and MINRES: once before the first iteration, once in each; then
# losses: the last two iterates, the start, and where the line search starts (it gives up at once: the slope is not negative); the loss before and after; the trials in the plane.
READS = {
    "HessianFree": {"cg": 1 + ITERATIONS, "loss_at": 4, "solve": 1},
    "TruncatedNaturalGradient": {"minres": 1 + ITERATIONS, "loss_at": 2, "_adapt_damping": 1},
    "NaturalConjugateGradient": {"minres": 1 + ITERATIONS, "loss_at": 9, "_adapt_damping": 1},
    "MultidimBacktracking": {"_judge": ITERATIONS, "_half_space": ITERATIONS},  # every trial is judged, and every rejected one cuts the set
}


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_step(method):
    """Default settings. Shampoo's eigendecomposition waits for its error code, once for each shape of a side, and only when roots are made."""
    short = dict.fromkeys(SHORT[method], ITERATIONS) if method in SHORT else {"step_rule": None} if method in SEARCHING else {}  # a search of its own is counted below
    make = lambda model: build(method, model.train(method not in PER_EXAMPLE), observe_every=2, refresh_every=3, **short)
    # without kernels, vmap over the columns of a dense Fisher matrix is a loop, too long for this network
    seen = counts(make, len(KINDS), chain if method in ("NaturalGradient", "Newton") else vision, HOST_DECISIONS.get(method, ()))
    assert [reads for reads, _ in seen] == [READS.get(method, {})] * len(KINDS)
    waits = {kind: seen[step][1] for kind, step in KINDS.items()}
    if method == "Shampoo":
        # sides of the orders 1 to 4 (biases to kernels), each with its own exponent, so that no two orders share a call
        made = {"_linalg_eigh": SIDES}
        assert waits.pop("observing and refreshing") == made
        # the second gradient doubles the statistics, so that roots grow old at once; the refresh after it finds nothing new and makes none
        assert waits.pop("observing") == made and waits.pop("refreshing") == {}
    if method == "Newton":  # a decomposition of the whole Hessian is the method
        assert all(waits.pop(kind) == {"_linalg_eigh": 1} for kind in KINDS)
    assert not any(waits.values()), waits


def sides(model):
    """Pairs of order and length of the sides of a model's parameters, those of length one aside: one eigendecomposition each."""
    return len({(p.squeeze().ndim, n) for p in model.parameters() for n in p.squeeze().shape})


SIDES = sides(Vision())


@pytest.mark.parametrize("method, solver", [("HessianFree", "cg"), ("TruncatedNaturalGradient", "minres")])
def test_one_read_an_iteration(method, solver):
    """The solvers read one (list of) number an iteration, and nothing else in a step grows with their number."""
    few, many = (counts(lambda model: getattr(optim, method)(model, max_iter=n), 1, readers=HOST_DECISIONS[method])[0][0] for n in (1, 4))
    assert many[solver] - few[solver] == 3 and few[solver] == 2
    assert {k: v for k, v in many.items() if k not in (solver, "loss_at")} == {k: v for k, v in few.items() if k not in (solver, "loss_at")}


OPTIONS = {
    **{f"Shampoo graft={graft}": lambda model, graft=graft: Shampoo(model, graft=graft, decay=0.9, root="newton", ridge="max", eps=0.1, refresh_every=2) for graft in (None, "sgd", "adagrad", "rmsprop", "adam")},
    "Shampoo in blocks": lambda model: Shampoo(model, root="newton", ridge="mean", eps=0.1, merge_dims=8, block_size=2, max_dim=3),
    **{f"KFAC {c}": lambda model, c=c: KFAC(model, curvature=c) for c in ("fisher-exact", "ggn", "fisher-empirical")},
    "KFAC reduce": lambda model: KFAC(model, approximation="reduce", weight_decay=0.1, decoupled=True),
    **{f"Unitwise {s}": lambda model, s=s: Unitwise(model, structure=s, damping=0.1) for s in ("unitwise", "diagonal")},
    **{f"Unitwise {c}": lambda model, c=c: Unitwise(model, curvature=c) for c in ("fisher-exact", "fisher-empirical", "backpropagated")},
    "SGD with everything": lambda model: SGD(model, momentum=0.9, nesterov=True, weight_decay=0.1, kl_clip=0.1, max_norm=1.0, maximize=True),
    "SGD in groups": lambda model: SGD(model, groups=[{"params": model[0].parameters(), "precondition": False}]),
    "AdaHessian in blocks": lambda model: optim.AdaHessian(model, block_length=3, absolute=True, hessian_power=0.5),
    "AMSGrad, decoupled": lambda model: optim.AMSGrad(model, weight_decay=0.1, decoupled=True),
    **{f"steepest descent {norm}": lambda model, norm=norm: optim.NormalizedSteepestDescent(model, norm=norm, average=0.9) for norm in ("max", "fro", "spectral", 3.0)},
    "conservative acceleration": lambda model: optim.StochasticNesterov(model, mu=0.1, rho=4.0, mode="conservative"),
    "Vadam, samples": lambda model: optim.Vadam(model, train_size=10, samples=2),
    "VOGN, samples": lambda model: optim.VOGN(model, train_size=10, samples=2),
    "VadaGrad": lambda model: optim.VadaGrad(model, growth=0.5, momentum=0.5),
    "NaturalGradient in blocks": lambda model: optim.NaturalGradient(model, block=7, weight_decay=0.1),
    "Polyak": lambda model: SGD(model, step_rule=Polyak(growth=2.0, init=1.0, heavy_ball=0.5)),
    "Polyak on K-FAC": lambda model: KFAC(model, step_rule=Polyak(max_step=1.0)),
    "quadratic model": lambda model: KFAC(model, momentum=0.0, step_rule=QuadraticModel(adapt_every=1)),
}


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_options(make):
    assert counts(make, 2) == [(Counter(), Counter())] * 2


DECOMPOSED = {
    "Shampoo, grafted": (lambda model: Shampoo(model, graft="adam", refresh_every=2, refresh_growth=math.inf), sides(chain()[0])),
    "KFAC eigenbasis": (lambda model: KFAC(model, damping_in="eigenbasis", refresh_every=2), 4),  # 2 layers, no two factors of one size
    "KFAC tridiagonal": (lambda model: KFAC(model, structure="tridiagonal", refresh_every=2), 4),  # 4 decompositions a pair of neighbours
}


@pytest.mark.parametrize("make, waits", DECOMPOSED.values(), ids=DECOMPOSED)
def test_eigendecompositions_wait_at_refreshes_only(make, waits):
    assert [w for _, w in counts(make, 3)] == [{"_linalg_eigh": waits}, {}, {"_linalg_eigh": waits}]


def test_line_search_reads_two_numbers_and_one_a_trial():
    trials = 3
    found = counts(lambda model: SGD(model, step_rule=Armijo(max_trials=trials)), 2, readers={"__call__"})
    assert [reads for reads, _ in found] == [{"__call__": 2 + trials}] * 2


@pytest.mark.parametrize("method", SEARCHING)
def test_wolfe_search_reads_loss_slope_length_and_two_numbers_a_trial(method):
    """Loss 1 and slope 1 at every place are no Wolfe point of a search that follows the direction backward: all trials are made."""
    trials = 3
    found = counts(lambda model: build(method, model, step_rule=Wolfe(max_trials=trials)), 2, readers=HOST_DECISIONS[method])
    assert [reads for reads, _ in found] == [{"_measured": 3, "value_and_slope": 2 * trials}] * 2


def test_posterior_is_read_nowhere():
    with fake_device():
        model, x, y = chain()
        optimizer, objective = optim.Vadam(model, train_size=10), Objective(model, nn.CrossEntropyLoss())
        with no_host_reads():
            optimizer.step(objective.at(x, y))
            optimizer.posterior(), optimizer.posterior_std(), optimizer.kl()
            with optimizer.sampled(3):
                model(x)


# Measuring: products read nothing; what is measured becomes numbers on the host, so many at a time.

OPERATORS = {name: getattr(curvature, name) for name in ("Hessian", "GGN", "Residual", "Covariance")}
OPERATORS |= {kind: lambda o, x, y, kind=kind: curvature.Fisher(o, x, y, kind) for kind in ("fisher-exact", "fisher-mc", "fisher-empirical")}
OPERATORS |= {"Jacobian": lambda o, x, y: Jacobian(o, x), "NTK": lambda o, x, y: curvature.NTK(o, x)}


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("columns", [(), (3,)], ids=["vector", "block"])
def test_products_read_nothing(make, columns):
    with fake_device():
        model, x, y = chain()
        A = make(Objective(model, nn.CrossEntropyLoss()), x, y)
        with no_host_reads({"forward_works"}):  # the first product tries whether forward mode works, and reads the answer
            A @ torch.zeros(A.shape[1], *columns, device=DEVICE)
        with no_host_reads():
            A @ torch.zeros(A.shape[1], *columns, device=DEVICE)
            A.T @ torch.zeros(A.shape[0], *columns, device=DEVICE)


def recorded(*measures, every=1, looks=2):
    """Counts of a recorder's looks at a run with K-FAC."""
    with fake_device():
        model, x, y = chain()
        optimizer, objective = KFAC(model), Objective(model, nn.CrossEntropyLoss())
        recorder = Recorder(*measures, every=every, objective=objective, x=x, y=y, optimizer=optimizer)
        with no_host_reads():
            optimizer.step(objective.at(x, y))
        with no_host_reads({"_look", "measure", "later", "eigenpairs", "shrink", "_measured", "density", "condition"}) as watch:
            for step in range(1, looks + 1):
                recorder(step)
    return watch


def test_a_recorder_that_is_not_due_does_nothing():
    watch = recorded(sharpness(), decrease(), every=lambda step: False)
    assert not watch.reads + watch.waits + watch.copies


def test_what_a_look_reads():
    """A look reads the loss, and a few numbers a measure; only the eigensolver, which stops by what it sees, reads in every iteration."""
    assert recorded(decrease(), looks=2).reads == {"_look": 2, "later": 3}  # the second look finishes the first
    found = recorded(factor_conditions(), looks=1)
    assert found.reads == {"_look": 1, "condition": 4} and found.waits == {"_linalg_eigh": 4}  # two factors a layer
    assert recorded(spectrum(probes=2, steps=4), looks=1).reads == {"_look": 1, "density": 1, "measure": 2}
    found = recorded(alignment(k=2, max_products=12), looks=1)
    assert found.reads.pop("eigenpairs") <= 12 and found.reads == {"_look": 1, "measure": 2, "_measured": 1}


# The watch itself


class Faulty(SGD):
    """SGD that waits in one of several ways."""

    def __init__(self, model, how):
        super().__init__(model)
        self.how = how

    def direction(self, group, params, grads):
        square = grads[0] @ grads[0].mT
        {"inverse": torch.linalg.inv, "eigh": torch.linalg.eigh, "norm": lambda M: torch.linalg.matrix_norm(M, 2), "draw": lambda M: torch.multinomial(M.softmax(-1), 1)}[self.how](square)
        return grads


@pytest.mark.parametrize("how", ["inverse", "eigh", "norm", "draw"])
def test_waits_inside_operations_are_counted(how):
    [(_, waits)] = counts(lambda model: Faulty(model, how), 1)
    assert sum(waits.values()) == 1


def test_lists_count_once():
    class Lists(SGD):
        def direction(self, group, params, grads):
            torch.stack([g.sum() for g in grads]).tolist(), float(grads[0].sum())
            return grads

    assert counts(Lists, 1, readers={"direction"})[0][0] == {"direction": 2}
