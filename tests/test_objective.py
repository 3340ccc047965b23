"""Likelihoods and objective against dense references: values, curvature, sampling, replay, chunks, data parallelism."""
import copy
import itertools

import nets
import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import Problem, snapshot
from torch import nn

from curvlab import Objective
from curvlab.likelihood import Bernoulli, Categorical, Gaussian, cotangents, likelihood_of

D = torch.double
quick = settings(max_examples=40)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def generator(seed):
    return torch.Generator().manual_seed(seed)


# Cases: a loss, outputs and targets of any shape the loss takes


@st.composite
def cases(draw):
    """`(loss, average, outputs, targets)` for all three losses, reductions, sequences, ignored terms, soft labels and smoothing."""
    g = generator(draw(st.integers(0, 2**31)))
    n, c, inner = draw(st.integers(1, 4)), draw(st.integers(2, 4)), draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    kind, reduction = draw(st.sampled_from(["index", "soft", "bce", "mse"])), draw(st.sampled_from(["mean", "sum", "examples"]))
    own = "sum" if reduction == "examples" else reduction
    outputs = 2 * torch.randn(n, c, *inner, generator=g, dtype=D)
    if kind == "index":
        y = torch.randint(0, c, (n, *inner), generator=g)
        if draw(st.booleans()):
            y.flatten()[torch.rand(y.numel(), generator=g).argsort()[: y.numel() // 2]] = -7
        loss = nn.CrossEntropyLoss(reduction=own, ignore_index=-7, label_smoothing=draw(st.sampled_from([0.0, 0.2])))
    elif kind == "soft":
        y = torch.rand(n, c, *inner, generator=g, dtype=D).softmax(1)
        loss = nn.CrossEntropyLoss(reduction=own, label_smoothing=draw(st.sampled_from([0.0, 0.2])))
    else:
        y = torch.rand(outputs.shape, generator=g, dtype=D)
        loss = (nn.BCEWithLogitsLoss if kind == "bce" else nn.MSELoss)(reduction=own)
    return loss, "examples" if reduction == "examples" else None, outputs, y


def value(loss, average, outputs, y):
    return loss(outputs, y) / (len(y) if average else 1)


def dense_hessian(loss, average, outputs, y):
    n = outputs.numel()
    return torch.func.hessian(lambda f: value(loss, average, f, y))(outputs).reshape(n, n)


# Likelihoods


@quick
@given(cases())
def test_score_is_the_gradient(case):
    loss, average, outputs, y = case
    expected = torch.func.grad(lambda f: value(loss, average, f, y))(outputs)
    assert torch.allclose(likelihood_of(loss, average).score(outputs, y), expected, rtol=1e-10, atol=1e-13)


@quick
@given(cases())
def test_hessian_product_and_root(case):
    """Both forms of the loss's Hessian agree with autograd's; the columns of the root carry the weight `w`, not its root."""
    loss, average, outputs, y = case
    likelihood = likelihood_of(loss, average)
    H = dense_hessian(loss, average, outputs, y)
    v = torch.randn(outputs.shape, generator=generator(0), dtype=D)
    assert torch.allclose(likelihood.hessian_product(outputs, y, v).flatten(), H @ v.flatten(), rtol=1e-9, atol=1e-12)
    w = torch.as_tensor(likelihood.weight(outputs, y), dtype=D)
    examples = len(outputs)
    root = torch.zeros_like(H).reshape(examples, -1, examples, outputs[0].numel())
    for column in cotangents(likelihood, "fisher-exact", outputs, y):
        rows = column.reshape(examples, -1)
        for b in range(examples):
            root[b, :, b, :] += torch.outer(rows[b], rows[b]) / w
    assert torch.allclose(root.reshape(H.shape), H, rtol=1e-9, atol=1e-12)


@settings(max_examples=12)
@given(cases())
def test_sampled_scores_have_the_fisher_as_covariance(case):
    """Mean zero and covariance `w * Lambda` within five standard errors of a large sample, term by term; ignored terms have no score."""
    loss, average, outputs, y = case
    likelihood, draws = likelihood_of(loss, average), 4000
    f, t = outputs[:1] / 4, y[:1]  # no class so rare that it is never drawn
    repeat = lambda a: a.expand(draws, *a.shape[1:]).contiguous()
    many, targets = repeat(f), repeat(t)
    scores, = cotangents(likelihood, "fisher-mc", many, targets, generator(3))
    w = torch.as_tensor(likelihood.weight(many, targets), dtype=D)
    if not torch.isfinite(w):  # everything is ignored
        return
    scores = (scores / w).flatten(1)
    expected = dense_hessian(nn.CrossEntropyLoss(reduction="sum", ignore_index=-7) if isinstance(likelihood, Categorical) else type(loss)(reduction="sum"), None, f, t)
    for i, j in itertools.product(range(scores.shape[1]), repeat=2):
        products = scores[:, i] * scores[:, j]
        assert abs(products.mean() - expected[i, j]) <= 5 * products.std() / draws**0.5 + 1e-12
    assert (scores.mean(0).abs() <= 5 * scores.std(0) / draws**0.5 + 1e-12).all()


def test_samples_are_private_and_seeded():
    """Draws depend on the generator alone, and follow the predictive distribution: for MSE a variance of one half."""
    state = torch.get_rng_state()
    for likelihood, f, y in ((Categorical(), torch.randn(50, 3), torch.zeros(50, dtype=torch.long)), (Bernoulli(), torch.randn(50, 3), torch.zeros(50, 3)), (Gaussian(), torch.randn(50, 3), torch.zeros(50, 3))):
        a, b, c = (likelihood.sample(f, y, generator(s)) for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)
    torch.set_rng_state(state)
    noise = Gaussian().sample(torch.zeros(200, 100), torch.zeros(200, 100), generator(0))
    assert float(noise.var()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(weight=torch.ones(3)), nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), nn.L1Loss(), lambda f, y: f.sum()])
def test_losses_without_likelihood_train_but_refuse_curvature(loss):
    problem = nets.mlp(D)
    y = problem.y if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(24, 3, dtype=D)
    if getattr(loss, "weight", None) is not None:
        loss = nn.CrossEntropyLoss(weight=torch.ones(3, dtype=D))
    closure = Objective(problem.model, loss).at(problem.x, y)
    assert closure().isfinite()
    with pytest.raises(TypeError, match="likelihood"):
        closure.ggnvp([torch.zeros_like(p) for p in closure.params])
    assert flat(closure.hvp([torch.ones_like(p) for p in closure.params])).isfinite().all()


@pytest.mark.parametrize("arguments, message", [
    ({"loss": nn.MSELoss(reduction="none")}, "none"), ({"loss": nn.MSELoss(), "average": "examples"}, "sum"), ({"loss": nn.MSELoss(reduction="sum"), "average": "tokens"}, "tokens"),
])
def test_bad_scales_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(nn.Linear(2, 1), **arguments)


# Objective: curvature of small nets against dense matrices


class Net(nn.Module):
    """Maps `(n, *inner, 3)` to logits `(n, c, *inner)`."""

    def __init__(self, c):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, c)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x))).movedim(-1, 1)


@st.composite
def problems(draw):
    """A net on a batch of a random case, and a chunk size that may or may not divide the batch."""
    loss, average, outputs, y = draw(cases())
    model = nets.seeded(lambda: Net(outputs.shape[1]), D, seed=draw(st.integers(0, 99)))
    x = torch.randn(len(y), *outputs.shape[2:], 3, generator=generator(1), dtype=D)
    return Problem(model, loss, x, y, average=average), draw(st.sampled_from([None, 1, 2, 3]))


def loss_of_flat(problem):
    shapes = [p.shape for p in problem.model.parameters()]
    names = [n for n, _ in problem.model.named_parameters()]

    def run(theta):
        parts = [t.view(s) for t, s in zip(theta.split([s.numel() for s in shapes]), shapes)]
        return torch.func.functional_call(problem.model, dict(zip(names, parts)), (problem.x,))

    total = lambda theta: problem.loss(run(theta), problem.y) / (len(problem.y) if problem.options["average"] else 1)
    return run, total, flat(problem.model.parameters())


def matrix(product, closure):
    n = sum(p.numel() for p in closure.params)
    eye = torch.eye(n, dtype=D).split([p.numel() for p in closure.params], 1)
    rows = product([e.reshape(n, *p.shape) for e, p in zip(eye, closure.params)], batched=True)
    return torch.cat([r.reshape(n, -1) for r in rows], 1)


@settings(max_examples=25)
@given(problems())
def test_everything_against_dense_references(case):
    """Value, gradient, Hessian, Gauss-Newton matrix and per-example gradients, at every reduction, shape and chunk size."""
    problem, chunk = case
    if problem.y.dtype == torch.long and (problem.y == -7).all():
        return
    run, total, theta = loss_of_flat(problem)
    closure = problem.objective().at(problem.x, problem.y, chunk)
    assert float(closure()) == pytest.approx(float(total(theta)), rel=1e-9)
    assert float(closure(backward=False)) == pytest.approx(float(total(theta)), rel=1e-9)
    assert torch.allclose(flat(p.grad for p in closure.params), torch.func.grad(total)(theta), rtol=1e-8, atol=1e-11)
    H = torch.func.hessian(total)(theta)
    assert torch.allclose(matrix(closure.hvp, closure), H, rtol=1e-7, atol=1e-10)
    outputs = run(theta)
    J = torch.func.jacrev(run)(theta).reshape(outputs.numel(), -1)
    L = dense_hessian(problem.loss, problem.options["average"], outputs.detach(), problem.y)
    assert torch.allclose(matrix(closure.ggnvp, closure), J.T @ L @ J, rtol=1e-7, atol=1e-10)
    v = [torch.randn(p.shape, generator=generator(5), dtype=D) for p in closure.params]
    assert torch.allclose(flat(closure.ggnvp(v)), J.T @ L @ J @ flat(v), rtol=1e-7, atol=1e-10)
    per_example = closure.per_example_grads()
    assert all(g.shape == (len(problem.y), *p.shape) for g, p in zip(per_example, closure.params))
    assert torch.allclose(flat(g.mean(0) for g in per_example), flat(p.grad for p in closure.params), rtol=1e-8, atol=1e-11)


def test_chunk_in_which_everything_is_ignored():
    problem = nets.sequence(D)
    problem.y[:4] = -100
    joint, parts = problem.closure(), problem.closure(chunk=2)
    assert float(parts()) == pytest.approx(float(joint(backward=False)), rel=1e-12)
    gradients = flat(p.grad for p in parts.params)
    joint()
    assert torch.allclose(gradients, flat(p.grad for p in joint.params), rtol=1e-10, atol=1e-14)
    v = [torch.ones_like(p) for p in joint.params]
    for product in ("hvp", "ggnvp"):
        assert torch.allclose(flat(getattr(parts, product)(v)), flat(getattr(joint, product)(v)), rtol=1e-8, atol=1e-12)
    assert torch.allclose(flat(g.mean(0) for g in parts.per_example_grads()), gradients, rtol=1e-9, atol=1e-13)


def test_class_weights_in_chunks():
    """A mean weighted by class is a mean over weights, not over examples."""
    problem = nets.mlp(D)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 7.0], dtype=D), ignore_index=-3)
    problem.y[5] = -3
    objective = Objective(problem.model, weighted)
    expected = weighted(problem.model(problem.x), problem.y).item()
    assert float(objective.at(problem.x, problem.y, chunk=5)()) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="weights"):
        objective.at(problem.x, problem.y).per_example_grads()


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left, right):
        return torch.tanh(self.a(left)) + self.b(right)


@pytest.mark.parametrize("form", ["tuple", "dict"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_tuple_and_dict_inputs(form, chunk):
    model = nets.seeded(Keyword, D)
    left, right = nets.inputs(12, 4, dtype=D), nets.inputs(12, 2, seed=1, dtype=D)
    y = nets.classes(left)
    x = (left, right) if form == "tuple" else {"right": right, "left": left}
    closure = Objective(model, nn.CrossEntropyLoss()).at(x, y, chunk)
    assert float(closure()) == pytest.approx(nn.functional.cross_entropy(model(left, right), y).item(), rel=1e-12)
    assert torch.allclose(flat(g.mean(0) for g in closure.per_example_grads()), flat(p.grad for p in closure.params))


@pytest.mark.parametrize("arguments, error", [(({}, torch.zeros(1)), "positive"), (((torch.zeros(3, 4), torch.zeros(2, 4)), torch.zeros(3)), "same"), ((torch.zeros(3, 4), torch.zeros(2)), "3 examples"), ((torch.zeros(0, 4), torch.zeros(0)), "positive"), ((torch.zeros(3, 4), torch.zeros(3), 0), "chunk=0")])
def test_bad_batches_are_refused(arguments, error):
    objective = Objective(nn.Linear(4, 1), nn.MSELoss())
    with pytest.raises(ValueError, match=error):
        objective.at(*arguments)


# Replay


def dropout_net():
    return nets.seeded(lambda: nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)), D)


@pytest.mark.parametrize("chunk", [None, 6])
def test_replay(chunk):
    """One batch, one draw of the masks, one move of the averages, however often and at whatever parameters it is evaluated."""
    model, x = dropout_net(), nets.inputs(24, 4, dtype=D)
    objective = Objective(model, nn.CrossEntropyLoss())
    closure = objective.at(x, nets.classes(x), chunk)
    first = closure()
    moved = snapshot(model)
    later = torch.rand(3)
    assert closure(backward=False) == first == closure()
    assert all(torch.equal(t, moved[n]) for n, t in snapshot(model).items())
    assert objective.at(x, nets.classes(x), chunk)() != first
    with torch.no_grad():
        model[0].weight.add_(0.1)
    changed = closure(backward=False)
    with torch.no_grad():
        model[0].weight.sub_(0.1)
    assert changed != first and float(closure(backward=False)) == pytest.approx(float(first), rel=1e-12)
    assert not torch.equal(later, torch.rand(3))


def test_replay_leaves_the_global_stream_alone():
    """After the first evaluation nothing more is drawn from the global stream."""
    model, x = dropout_net(), nets.inputs(24, 4, dtype=D)
    closure = Objective(model, nn.CrossEntropyLoss()).at(x, nets.classes(x))
    closure()
    state = torch.get_rng_state()
    closure(), closure(backward=False), closure.hvp([torch.ones_like(p) for p in closure.params])
    assert torch.equal(torch.get_rng_state(), state)


def test_products_at_replayed_masks():
    """A Hessian product is the derivative of the gradient under the same masks, so a finite difference finds it."""
    model, x = dropout_net(), nets.inputs(24, 4, dtype=D)
    closure = Objective(model, nn.CrossEntropyLoss()).at(x, nets.classes(x))
    closure()
    v = [torch.randn(p.shape, generator=generator(2), dtype=D) for p in closure.params]
    product = flat(closure.hvp(v))

    def gradient(t):
        with torch.no_grad():
            torch._foreach_add_(closure.params, v, alpha=t)
        closure()
        out = flat(p.grad for p in closure.params)
        with torch.no_grad():
            torch._foreach_add_(closure.params, v, alpha=-t)
        return out

    h = 1e-5
    assert torch.allclose(product, (gradient(h) - gradient(-h)) / (2 * h), rtol=1e-5, atol=1e-7)


def test_undone_buffers():
    """A useless batch can be taken back, as a whole or by a mask; then the next evaluation counts again."""
    problem = nets.conv(D)
    before = snapshot(problem.model)
    closure = problem.closure()
    closure()
    after = snapshot(problem.model)
    closure.undo_buffers(unless=torch.tensor(True))
    assert all(torch.equal(t, after[n]) for n, t in snapshot(problem.model).items())
    closure.undo_buffers(unless=torch.tensor(False))
    assert all(torch.equal(t, before[n]) for n, t in snapshot(problem.model).items())
    second = problem.closure()
    second(), second.undo_buffers(), second()
    assert all(torch.equal(t, after[n]) for n, t in snapshot(problem.model).items())


def test_only_the_last_step_is_undone():
    """A batch used for two steps moved its buffers in the first; a refusal of the second does not take that back."""
    problem = nets.conv(D)
    closure = problem.closure()
    closure()
    after = snapshot(problem.model)
    closure.release(), closure(), closure.undo_buffers()
    assert all(torch.equal(t, after[n]) for n, t in snapshot(problem.model).items())


def test_failing_model_leaves_buffers():
    problem = nets.conv(D)
    before = snapshot(problem.model)
    problem.model.last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        problem.closure()()
    assert all(torch.equal(t, before[n]) for n, t in snapshot(problem.model).items())


# Kernels without second derivatives, compiled parts, precision


@pytest.mark.parametrize("layer", ["attention", "sdpa", "recurrent"])
def test_second_derivatives_through_fused_kernels(layer):
    """Hessian products through attention and recurrent layers agree with finite differences of the gradient."""
    class Sdpa(nn.Module):
        def forward(self, q, k, v, **_):
            return (nn.functional.scaled_dot_product_attention(q, k, v),)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.mix = nn.LSTM(8, 8, batch_first=True) if layer == "recurrent" else Sdpa() if layer == "sdpa" else nn.MultiheadAttention(8, 2, batch_first=True)
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            h = self.mix(h)[0] if layer == "recurrent" else self.mix(h, h, h, need_weights=False)[0]
            return self.last(h.mean(1))

    model, x = nets.seeded(Net), nets.inputs(6, 5, 4)
    closure = Objective(model, nn.CrossEntropyLoss()).at(x, nets.classes(x))
    v = [torch.randn(p.shape, generator=generator(2)) for p in closure.params]
    product, ggn = flat(closure.hvp(v)), flat(closure.ggnvp(v))
    double = copy.deepcopy(model).double()
    reference = Objective(double, nn.CrossEntropyLoss()).at(x.double(), nets.classes(x))
    wide = [t.double() for t in v]
    assert torch.allclose(product.double(), flat(reference.hvp(wide)), rtol=1e-3, atol=1e-4)
    assert torch.allclose(ggn.double(), flat(reference.ggnvp(wide)), rtol=1e-3, atol=1e-4)
    gradients = []
    for t in (1e-5, -1e-5):
        with torch.no_grad():
            torch._foreach_add_(reference.params, wide, alpha=t)
        reference()
        gradients.append(flat(p.grad for p in reference.params))
        with torch.no_grad():
            torch._foreach_add_(reference.params, wide, alpha=-t)
    assert torch.allclose(flat(reference.hvp(wide)), (gradients[0] - gradients[1]) / 2e-5, rtol=1e-4, atol=1e-6)
    assert torch.allclose(flat(g.mean(0) for g in reference.per_example_grads()), flat(_gradient(reference)), rtol=1e-8, atol=1e-11)


def _gradient(closure):
    closure()
    return [p.grad for p in closure.params]


def test_compiled_part_of_a_model():
    """Second derivatives exist when only an inner module is compiled."""
    model = nets.mlp(D).model
    plain = copy.deepcopy(model)
    model[0] = torch.compile(model[0], backend="aot_eager")
    problem = nets.mlp(D)
    closures = [Objective(m, nn.CrossEntropyLoss()).at(problem.x, problem.y) for m in (model, plain)]
    v = [torch.ones_like(p) for p in plain.parameters()]
    a, b = (flat(c.hvp(v)) for c in closures)
    assert torch.allclose(a, b, rtol=1e-10)


def test_autocast_sees_parameters_that_moved():
    """Inside autocast, whose cache of casts would outlive a change of the parameters."""
    problem = nets.mlp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        closure = problem.closure()
        first = closure(backward=False)
        with torch.no_grad():
            for p in problem.model.parameters():
                p.zero_()
        assert closure(backward=False) != first
        assert float(closure()) == pytest.approx(torch.log(torch.tensor(3.0)).item(), rel=1e-2)


def test_frozen_layer_keeps_no_gradient():
    problem = nets.mlp()
    closure = problem.closure()
    closure()
    problem.model[0].requires_grad_(False)
    problem.closure()()
    assert problem.model[0].weight.grad is None and problem.model[2].weight.grad is not None


@pytest.mark.parametrize("tied", [False, True])
def test_per_example_gradients_leave_shared_modules_whole(tied):
    problem = nets.twice(tied=tied)
    before = [id(p) for p in problem.model.parameters()]
    closure = problem.closure()
    per_example = closure.per_example_grads()
    assert [id(p) for p in problem.model.parameters()] == before
    assert torch.allclose(flat(g.mean(0) for g in per_example), flat(_gradient(closure)), rtol=1e-9, atol=1e-13)


# Data parallelism


def test_two_processes_average(tmp_path):
    """Loss, gradient, products and per-example means of two processes are those of the joint batch."""
    torch.multiprocessing.spawn(ranks.objective_main, (2, str(tmp_path)), nprocs=2)
    expected = ranks.quantities(ranks.joint_problem())
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got.keys() == expected.keys()
        for name in expected:
            assert torch.allclose(got[name], expected[name], rtol=1e-9, atol=1e-12), name
