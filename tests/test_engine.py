"""The engine: torch's own optimizers as reference, scaling, groups, refusals, masks, randomness, state."""
import copy
import inspect
import pickle

import nets
import pytest
import torch
from fake_device import fake_device, no_host_reads
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import METHODS, build, same, snapshot, tensors_of, train
from torch import nn

from curvlab import optim
from curvlab.optim import SGD, Adam, AdaGrad, AMSGrad, Armijo, FallbackWarning, KFAC, NonFiniteError, Polyak, QuadraticModel
from curvlab.optim.engine import CurvatureOptimizer, due

STEPS = 6


def plain_steps(optimizer, problem, steps=STEPS):
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(problem.model(problem.x), problem.y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in problem.model.parameters()])


# Torch as reference


@settings(max_examples=25)
@given(lr=st.floats(1e-3, 0.5), momentum=st.sampled_from([0.0, 0.5, 0.9]), nesterov=st.booleans(), decay=st.sampled_from([0.0, 0.1]), maximize=st.booleans())
def test_sgd_is_torch_sgd(lr, momentum, nesterov, decay, maximize):
    arguments = dict(lr=lr, momentum=momentum, weight_decay=decay, nesterov=nesterov and momentum > 0, maximize=maximize)
    ours, theirs = nets.mlp(torch.double), nets.mlp(torch.double)
    a = plain_steps(SGD(ours.model, **arguments), ours)
    b = plain_steps(torch.optim.SGD(theirs.model.parameters(), **arguments), theirs)
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-12) or (maximize and not b.isfinite().all())


@pytest.mark.parametrize("ours, theirs, same_arguments", [
    (Adam, torch.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}),
    (Adam, torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    (AMSGrad, lambda p, **a: torch.optim.Adam(p, amsgrad=True, **a), {"lr": 0.05, "betas": (0.5, 0.6)}),
    (AdaGrad, lambda p, **a: torch.optim.Adagrad(p, **a), {"lr": 0.05, "eps": 1e-10, "weight_decay": 0.1}),
])
def test_adaptive_methods_are_torchs(ours, theirs, same_arguments):
    mine, reference = nets.mlp(torch.double), nets.mlp(torch.double)
    a = plain_steps(ours(mine.model, **same_arguments), mine)
    b = plain_steps(theirs(reference.model.parameters(), **same_arguments), reference)
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_decoupled_decay_is_adamw():
    mine, reference = nets.mlp(torch.double), nets.mlp(torch.double)
    a = plain_steps(Adam(mine.model, lr=0.05, weight_decay=0.2, decoupled=True), mine)
    b = plain_steps(torch.optim.AdamW(reference.model.parameters(), lr=0.05, weight_decay=0.2), reference)
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_params_as_torch_takes_them():
    problem, reference = nets.mlp(torch.double), nets.mlp(torch.double)
    groups = lambda model: [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters(), "momentum": 0.9}]
    a = plain_steps(SGD(groups(problem.model), lr=0.1), problem)
    b = plain_steps(torch.optim.SGD(groups(reference.model), lr=0.1), reference)
    assert torch.allclose(a, b, rtol=1e-12)


# Scaling


@settings(max_examples=25)
@given(kl=st.floats(1e-6, 10), norm=st.floats(1e-4, 10), lr=st.floats(0.01, 2))
def test_bounds_hold_together(kl, norm, lr):
    """The step keeps both bounds, is never longer than without them, and reaches the tighter one when it binds."""
    problem = nets.mlp(torch.double)
    before = snapshot(problem.model)
    optimizer = SGD(problem.model, lr=lr, kl_clip=kl, max_norm=norm)
    optimizer.step(problem.closure())
    step = sum((before[n] - p.detach()).square().sum() for n, p in problem.model.named_parameters()).sqrt()
    gradient = torch.cat([p.grad.flatten() for p in problem.model.parameters()]).norm()
    # along the gradient d = g, so lr^2 d.g <= kl bounds the step's norm by sqrt(kl)
    expected = min(lr * gradient, kl**0.5, norm)
    assert step == pytest.approx(float(expected), rel=1e-9)


def test_equal_bounds_are_two_bounds():
    """One number given for both is squared for the norm only."""
    bound = 0.01
    problem = nets.mlp(torch.double)
    before = snapshot(problem.model)
    SGD(problem.model, lr=100.0, kl_clip=bound, max_norm=bound).step(problem.closure())
    step = sum((before[n] - p.detach()).square().sum() for n, p in problem.model.named_parameters()).sqrt()
    assert float(step) == pytest.approx(0.01, rel=1e-9)


# Schedules, groups, fallback


@given(every=st.integers(1, 9), step=st.integers(0, 100))
def test_due(every, step):
    assert due(every, step) == (step % every == 0) == due(lambda k: k % every == 0, step)


def test_bounds_of_several_groups_are_joint():
    problem = nets.mlp(torch.double)
    before = snapshot(problem.model)
    optimizer = SGD(problem.model, lr=10.0, max_norm=0.1, groups=[{"params": problem.model[2].parameters()}])
    optimizer.step(problem.closure())
    step = sum((before[n] - p.detach()).square().sum() for n, p in problem.model.named_parameters()).sqrt()
    assert float(step) == pytest.approx(0.1, rel=1e-9)


@pytest.mark.parametrize("fallback, scale", [("adam", 0.01), ("sgd", 0.5)])
def test_fallback_is_the_named_method(fallback, scale):
    ours, theirs = nets.mlp(torch.double), nets.mlp(torch.double)
    a = plain_steps(build("Shampoo", ours.model, lr=0.3, momentum=0.0, fallback=fallback, fallback_scale=scale, groups=[{"params": ours.model.parameters(), "precondition": False}]), ours)
    reference = torch.optim.Adam if fallback == "adam" else torch.optim.SGD
    b = plain_steps(reference(theirs.model.parameters(), lr=0.3 * scale), theirs)
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_fallback_says_so_once():
    problem = nets.mixed()
    optimizer = KFAC(problem.model)
    with pytest.warns(FallbackWarning, match="embedding.weight") as said:
        train(optimizer, problem, 3)
    assert len(said) == 1


def test_sparse_gradient_is_refused_by_name():
    model = nn.Embedding(5, 3, sparse=True)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        SGD(model).step()


def test_layer_without_gradient_does_not_age():
    """Adam's bias correction counts a layer's own steps."""
    problem = nets.heads(torch.double)
    optimizer = Adam(problem.model)
    for use in ("a", "a", "b"):
        problem.model.use = problem.model.run = use
        optimizer.step(problem.closure())
    counts = {n: optimizer.state[p].get("step", 0) for n, p in problem.model.named_parameters()}
    assert counts["trunk.weight"] == 3 and counts["a.weight"] == 2 and counts["b.weight"] == 1


# Step rules


def test_rule_sees_where_a_group_goes():
    """With two learning rates the line search moves along the direction that is then taken."""
    problem = nets.mlp(torch.double)
    optimizer = SGD(problem.model, lr=1.0, step_rule=Armijo(c=1e-4), groups=[{"params": problem.model[2].parameters(), "lr": 0.25}, {"params": problem.model[0].parameters(), "lr": 1.0}])
    # the first group sets the unit, so the other has four times its step
    before = snapshot(problem.model)
    optimizer.step(problem.closure())
    eta = optimizer.param_groups[0]["step_rule"]["step"]
    for name, p in problem.model.named_parameters():
        ratio = 1.0 if name.startswith("2") else 4.0
        assert torch.allclose(before[name] - p.detach(), eta * ratio * p.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("rule", [Armijo, Polyak])
def test_rule_refuses_ascent(rule):
    with pytest.raises(ValueError, match="maximize"):
        SGD(nets.mlp().model, step_rule=rule(), maximize=True)


@pytest.mark.parametrize("rule", [Armijo, Polyak])
def test_rule_needs_a_curvlab_closure(rule):
    problem = nets.mlp()
    with pytest.raises(TypeError, match=rf"{rule.__name__}.*objective\.at"):
        SGD(problem.model, step_rule=rule()).step(lambda: torch.zeros(()))


@pytest.mark.parametrize("make", [
    lambda m: SGD(m, step_rule=Armijo()), lambda m: Adam(m, step_rule=Polyak()), lambda m: KFAC(m, momentum=0.0, kl_clip=None, step_rule=QuadraticModel(adapt_every=2), refresh_every=3),
])
def test_rules_resume_exactly(make):
    straight, resumed = nets.mlp(torch.double), nets.mlp(torch.double)
    optimizer = make(straight.model)
    train(optimizer, straight, 5)
    state = copy.deepcopy(optimizer.state_dict())
    resumed.model.load_state_dict(straight.model.state_dict())
    other = make(resumed.model)
    other.load_state_dict(state)
    assert train(other, resumed, 5) == train(optimizer, straight, 5)
    assert same(snapshot(resumed.model), snapshot(straight.model))


# Refusals


def test_large_float64_gradient_is_finite():
    p = nn.Parameter(torch.ones(3, dtype=torch.double))
    optimizer = SGD([p], lr=1e-300)
    p.grad = torch.full_like(p, 1e200)
    optimizer.step()
    p.grad = torch.full_like(p, float("inf"))
    with pytest.raises(NonFiniteError, match="gradient"):
        optimizer.step()


def test_finite_gradient_whose_sum_overflows_is_finite():
    p = nn.Parameter(torch.ones(4))
    optimizer = SGD([p], lr=0.0)
    p.grad = torch.full_like(p, 3e38)
    optimizer.step()
    for bad in (torch.tensor([0.0, float("inf"), -float("inf"), 0.0]), torch.tensor([0.0, float("nan"), 1.0, 2.0])):
        p.grad = bad
        with pytest.raises(NonFiniteError, match="gradient"):
            optimizer.step()


def test_adam_takes_gradients_in_any_layout():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.ones(3, 5).double()), nn.Parameter(torch.ones(3, 5).double())
    a, b = Adam([ours], lr=0.1), torch.optim.Adam([theirs], lr=0.1)
    for _ in range(4):
        g = torch.randn(5, 3).double()
        ours.grad, theirs.grad = g.mT, g.mT.contiguous()
        a.step()
        b.step()
    assert torch.allclose(ours, theirs, rtol=1e-12)


class Masked(Adam):
    """Adam which believes that its tensors are on an accelerator, where a refusal is a mask."""

    def _refuse_nonfinite(self, loss, grads):
        self.finite = torch.stack([g.isfinite().all() for g in grads]).all()
        self.refused = (~self.finite).int() + getattr(self, "refused", 0)
        for g in grads:
            g.copy_(torch.where(self.finite, g, 0.0))


def test_masked_step_moves_nothing():
    """On an accelerator a bad batch is masked: parameters, buffers and averages as they were, and the refusal is counted."""
    problem = nets.conv(torch.double)
    optimizer = Masked(problem.model, lr=0.1, momentum=0.5)
    train(optimizer, problem, 3)
    before = copy.deepcopy((snapshot(problem.model), [t for t in tensors_of(list(optimizer.state.values()))]))
    bad = problem.x.clone()
    bad[0] = float("nan")
    optimizer.step(problem.objective().at(bad, problem.y))
    assert same(snapshot(problem.model), before[0])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(tensors_of(list(optimizer.state.values())), before[1]))
    assert optimizer.refused == 1


# Randomness and state


def test_generator_depends_on_seed_step_and_stream_only():
    draw = lambda o, stream=0: torch.rand(4, generator=o.generator(stream=stream))
    problem = nets.mlp()
    a, b, other = SGD(problem.model, seed=1), SGD(problem.model, seed=1), SGD(problem.model, seed=2)
    assert torch.equal(draw(a), draw(b)) and torch.equal(draw(a), draw(a))
    assert not torch.equal(draw(a), draw(other)) and not torch.equal(draw(a), draw(a, 1))
    first = draw(a)
    state = torch.get_rng_state()
    train(a, problem, 1)
    assert torch.equal(torch.get_rng_state(), state), "a step drew from the global stream"
    assert not torch.equal(draw(a), first)


def test_pickle_and_copy_drop_hooks_and_schedulers():
    problem = nets.mlp()
    optimizer = Adam(problem.model)
    optimizer.register_step_pre_hook(print)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(optimizer, problem, 2)
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert same(twin.state_dict(), optimizer.state_dict())
        assert not twin._optimizer_step_pre_hooks and "step" not in vars(twin)


def test_loaded_groups_are_the_same_objects():
    """What a method or a scheduler holds on to stays connected."""
    problem = nets.mlp()
    optimizer = KFAC(problem.model)
    group = optimizer.param_groups[0]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0] is group
    assert all(optimizer.group_of[b.name] is group for b in optimizer.blocks)


@pytest.mark.parametrize("method", METHODS)
def test_closure_may_be_used_again(method):
    """Several steps on one closure are steps on fresh closures of the same batch, also where gradients are switched off around them."""
    kept, fresh = nets.mlp(torch.double), nets.mlp(torch.double)
    a, b, closure = build(method, kept.model), build(method, fresh.model), kept.closure()
    for _ in range(4):
        a.step(closure)
        with torch.no_grad():
            b.step(fresh.closure())
    assert same(snapshot(kept.model), snapshot(fresh.model))


@pytest.mark.parametrize("method", METHODS)
def test_closure_of_another_model_is_refused(method):
    problem, other = nets.mlp(), nets.mlp()
    optimizer = build(method, problem.model)
    with pytest.raises(ValueError, match="another model"):
        optimizer.step(other.closure())


def test_state_names_the_mismatch():
    small, large = SGD(nets.mlp().model), SGD(nets.heads().model)
    with pytest.raises(ValueError, match="shapes"):
        small.load_state_dict(large.state_dict())


# The catalogue and the fake device


def test_catalogue():
    assert set(METHODS) <= set(optim.__all__)
    with pytest.raises(AttributeError, match="KFACC.*KFAC"):
        optim.KFACC
    for name in METHODS:
        assert issubclass(getattr(optim, name), CurvatureOptimizer) and inspect.getdoc(getattr(optim, name))


class Reads(CurvatureOptimizer):
    """Four ways to make a GPU wait, and one not to."""

    def __init__(self, model, how):
        super().__init__(model, {}, lr=0.1)
        self.how = how

    def direction(self, group, params, grads):
        if self.how == "item":
            return [g / g.norm().item() for g in grads]
        if self.how == "branch":
            return [g if g.sum() > 0 else -g for g in grads]
        if self.how == "copy":
            return [g * torch.tensor(2.0).to(g.device) for g in grads]
        if self.how == "generator":
            return [g * torch.rand((), device=g.device, generator=torch.Generator()) for g in grads]
        return [g / g.norm() for g in grads]


@pytest.mark.parametrize("how", ["item", "branch", "copy", "generator", "clean"])
def test_fake_device_catches(how):
    def run():
        with fake_device():
            model, x, y = nn.Linear(4, 3), torch.zeros(5, 4), torch.zeros(5, dtype=torch.long)
            optimizer = Reads(model, how)
            nn.functional.cross_entropy(model(x), y).backward()
            with no_host_reads():
                optimizer.step()

    if how == "clean":
        run()
    else:
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            run()
        assert how in ("item", "branch") or "test_engine.py" in str(caught.value)
