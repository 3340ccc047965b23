"""What every optimizer must do, written once: each test runs over every registered method with its default settings."""
import copy
import io
import warnings

import nets
import pytest
import ranks
import torch
from fake_device import fake_device, no_host_reads
from methods import GRADIENT_ONLY, HOST_DECISIONS, LAYERWISE, METHODS, PER_EXAMPLE, SHORT, UNPERTURBED, accepts, build, needs_closure, same, snapshot, tensors_of, train, usable
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from curvlab import Objective
from curvlab.optim import Armijo, FallbackWarning, NonFiniteError

every = pytest.mark.parametrize("method", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore::curvlab.optim.FallbackWarning")
FEW = 6


def falls(losses, share=1.0):
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert losses[-1] < share * losses[0], losses


def close(a, b, tolerance=1e-8):
    for p, q in zip(a, b, strict=True):
        gap = float((p - q).detach().abs().max())
        assert gap <= tolerance * (1 + float(q.detach().abs().max())), gap


def saved_and_loaded(state):
    """Through a file, as torch loads it by default."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Models


@every
def test_plain_mlp(method):
    """Trains a plain MLP"""
    problem = nets.mlp()
    falls(train(build(method, problem.model), problem, 120), 0.95)


@every
def test_called_twice(method):
    """A module called twice in one forward pass"""
    problem = nets.twice()
    falls(train(build(method, problem.model), problem, FEW))


@every
def test_tied_parameters(method):
    """Two modules sharing parameters train as one module called twice"""
    reuse, tied = nets.twice(tied=False), nets.twice(tied=True)
    tied.model.load_state_dict(reuse.model.state_dict())
    for problem in (reuse, tied):
        train(build(method, problem.model), problem, FEW)
    close(tied.model.parameters(), reuse.model.parameters())
    half_tied = nets.twice(tied=True, share_bias=False)
    falls(train(build(method, half_tied.model), half_tied, FEW))


@every
def test_tied_embedding(method):
    """An output layer with the weight of the embedding"""
    problem = nets.language()
    before = snapshot(problem.model)
    falls(train(build(method, problem.model), problem, FEW))
    assert all(not torch.equal(t, before[n]) for n, t in snapshot(problem.model).items())


@every
def test_sequence_inputs(method):
    """Inputs (batch, sequence, feature) with ignored positions"""
    problem = nets.sequence()
    falls(train(build(method, problem.model), problem, FEW))


@every
def test_frozen_layer(method):
    """A frozen layer stays, also one that is frozen later"""
    problem = nets.mlp()
    first, last = problem.model[0], problem.model[2]
    first.requires_grad_(False)
    before = snapshot(first)
    optimizer = build(method, problem.model)
    falls(train(optimizer, problem, FEW))
    assert same(snapshot(first), before)
    last.bias.requires_grad_(False)
    before = snapshot(last)
    train(optimizer, problem, 2)
    assert torch.equal(last.bias, before["bias"]) and not torch.equal(last.weight, before["weight"])


@every
def test_layer_without_gradient(method):
    """A layer that does not run, or whose output is not used, is skipped in this step and trained in others"""
    problem = nets.heads()
    model = problem.model
    optimizer = build(method, model)
    objective = problem.objective()
    for use, run in (("a", "a"), ("b", "ba"), ("ab", "ab"), ("b", "b")):
        model.use, model.run, before = use, run, snapshot(model)
        for _ in range(2):
            optimizer.step(objective.at(problem.x, problem.y))
        after = snapshot(model)
        moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
        assert moved == {"trunk", *use}


@every
def test_norms_embeddings_bare_parameters(method):
    """Layer norm, embedding and bare parameters are trained; a fallback is named"""
    problem = nets.mixed()
    before = snapshot(problem.model)
    optimizer = build(method, problem.model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        falls(train(optimizer, problem, FEW))
    assert all(not torch.equal(t, before[n]) for n, t in snapshot(problem.model).items())
    messages = [str(w.message) for w in said if issubclass(w.category, FallbackWarning)]
    assert len(messages) == (method in LAYERWISE)
    for name in ("embedding.weight", "norm.weight", "norm.bias", "scale", "shift"):
        assert all(name in m for m in messages)


@every
def test_inplace_activation(method):
    """ReLU(inplace=True) gives the same steps as ReLU()"""
    inplace, plain = nets.mlp(torch.double, activation=lambda: nn.ReLU(inplace=True)), nets.mlp(torch.double, activation=nn.ReLU)
    for problem in (inplace, plain):
        train(build(method, problem.model), problem, FEW)
    close(inplace.model.parameters(), plain.model.parameters(), 0)


@every
def test_attention_and_recurrence(method):
    """Multi-head attention and a recurrent layer"""
    problem = nets.attention()
    before = snapshot(problem.model)
    falls(train(build(method, problem.model), problem, FEW))
    assert all(not torch.equal(t, before[n]) for n, t in snapshot(problem.model).items())


@every
def test_batch_norm(method, refuses):
    """Batch norm in training mode: its averages move once a step, or a clear error"""
    problem = nets.conv()
    optimizer = build(method, problem.model)
    if method in PER_EXAMPLE:
        before = snapshot(problem.model)
        with pytest.raises(ValueError, match="batch norm"):
            train(optimizer, problem, 1)
        assert same(snapshot(problem.model), before)
        refuses()
        return
    ends = []
    for seed in range(5):  # a few steps with noisy batch statistics may rise by the luck of a draw; most must fall
        problem = nets.conv(seed=seed)
        optimizer = build(method, problem.model, **({"seed": seed} if accepts(method, "seed") else {}))
        losses = train(optimizer, problem, FEW)
        assert all(map(torch.isfinite, map(torch.tensor, losses)))
        assert problem.model.norm.num_batches_tracked == FEW
        ends.append(losses[-1] / losses[0])
    assert sum(end < 1 for end in ends) >= 4 and (method == "AdaHessian" or ends[0] < 1), ends  # only one vector of random signs a step is so noisy that the draw is to blame


@every
def test_channels_last(method):
    """Channels-last memory format gives the same steps"""
    plain, last = (usable(method, nets.conv(torch.double)) for _ in range(2))
    last.model.to(memory_format=torch.channels_last)
    last.x = last.x.to(memory_format=torch.channels_last)
    for problem in (plain, last):
        train(build(method, problem.model), problem, FEW)
    close(last.model.parameters(), plain.model.parameters())


@every
def test_activation_checkpointing(method):
    """Activation checkpointing gives the same steps"""
    plain, recomputed = nets.checkpointed(False), nets.checkpointed(True)
    for problem in (plain, recomputed):
        train(build(method, problem.model), problem, FEW)
    close(recomputed.model.parameters(), plain.model.parameters(), 1e-12)


@every
def test_compiled_model(method):
    """A torch.compile'd model gives the same steps"""
    plain, compiled = nets.mlp(torch.double), nets.mlp(torch.double)
    train(build(method, plain.model), plain, 3)
    model = torch.compile(compiled.model, backend="aot_eager")
    optimizer = build(method, model)
    objective = compiled.objective(model)
    for _ in range(3):
        optimizer.step(objective.at(compiled.x, compiled.y))
    close(compiled.model.parameters(), plain.model.parameters())


# Precision


@every
def test_float64(method):
    """float64 throughout"""
    problem = nets.mlp(torch.double)
    optimizer = build(method, problem.model)
    falls(train(optimizer, problem, FEW))
    assert all(t.dtype == torch.double for t in tensors_of(list(optimizer.state.values())) if t.is_floating_point())


@every
def test_autocast(method):
    """bfloat16 autocast; parameters and statistics stay float32"""
    problem = nets.mlp()
    optimizer = build(method, problem.model)
    objective = problem.objective()
    losses = []
    for i in range(2 * FEW):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            closure = objective.at(problem.x, problem.y)
            if i % 2:
                losses.append(float(optimizer.step(closure)))
        if i % 2 == 0:
            losses.append(float(optimizer.step(closure)))
    falls(losses)
    tensors = [*problem.model.parameters(), *tensors_of(list(optimizer.state.values()))]
    assert all(t.dtype == torch.float32 for t in tensors if t.is_floating_point())


@every
def test_bfloat16_parameters(method):
    """bfloat16 parameters, float32 statistics"""
    problem = nets.mlp(torch.bfloat16)
    optimizer = build(method, problem.model)
    falls(train(optimizer, problem, 10 * FEW))
    assert all(p.dtype == torch.bfloat16 for p in problem.model.parameters())
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors_of(list(optimizer.state.values())) if t.is_floating_point())


@every
def test_grad_scaler(method, refuses):
    """GradScaler: the same steps as without it, or a clear error"""
    plain, scaled = nets.mlp(), nets.mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = [build(method, p.model) for p in (plain, scaled)]
    for _ in range(3):
        for problem, optimizer in zip((plain, scaled), optimizers):
            optimizer.zero_grad()
            loss = problem.loss(problem.model(problem.x), problem.y)
            if needs_closure(method):
                scaler.scale(loss).backward()
                with pytest.raises(TypeError, match="objective.at"):
                    scaler.step(optimizer)
                refuses()
                return
            if problem is plain:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    close(scaled.model.parameters(), plain.model.parameters(), 0)


# Batches


@every
def test_accumulation(method):
    """Gradient accumulation equals the joint batch"""
    joint = nets.mlp(torch.double)
    expected = train(build(method, joint.model, exact=True), joint, 4)
    chunked = nets.mlp(torch.double)
    losses = train(build(method, chunked.model, exact=True), chunked, 4, chunk=7)
    close(chunked.model.parameters(), joint.model.parameters())
    assert losses == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", GRADIENT_ONLY)
def test_plain_accumulation(method):
    """Accumulated loss.backward() equals the joint batch"""
    joint, parts = nets.mlp(torch.double), nets.mlp(torch.double)
    train(build(method, joint.model), joint, 4)
    optimizer = build(method, parts.model)
    for _ in range(4):
        optimizer.zero_grad()
        for x, y in zip(parts.x.split(8), parts.y.split(8)):
            (parts.loss(parts.model(x), y) / 3).backward()
        optimizer.step()
    close(parts.model.parameters(), joint.model.parameters())


@every
def test_returns_loss(method):
    """step(closure) returns the loss before the step"""
    problem = nets.mlp(torch.double)
    optimizer = build(method, problem.model, **UNPERTURBED.get(method, {}))
    expected = float(problem.closure()(backward=False))
    loss = optimizer.step(problem.closure())
    assert loss.shape == () and not loss.requires_grad and float(loss) == pytest.approx(expected, rel=1e-12)


@every
def test_drop_in(method, refuses):
    """loss.backward(); step() as any torch optimizer, or a TypeError that says what to pass"""
    plain, closure = nets.mlp(torch.double), nets.mlp(torch.double)
    optimizer = build(method, plain.model)

    def backward():
        optimizer.zero_grad()
        loss = plain.loss(plain.model(plain.x), plain.y)
        loss.backward()
        return loss

    backward()
    before = snapshot(plain.model)
    if needs_closure(method):
        for argument in (None, backward):
            with pytest.raises(TypeError, match=rf"{method}.*objective\.at"):
                optimizer.step(argument)
        assert same(snapshot(plain.model), before) and not optimizer.state
        refuses()
        return
    assert optimizer.step() is None
    assert optimizer.step(backward).detach() > 0
    train(build(method, closure.model), closure, 2)
    close(plain.model.parameters(), closure.model.parameters(), 1e-12)


# Groups


def two_groups(problem, **settings):
    """The last layer of the MLP with its own settings."""
    return [{"params": problem.model[2].parameters(), **settings}]


@every
def test_groups_differ(method):
    """Parameter groups with their own lr, weight decay and precondition=False"""
    still = nets.mlp()
    before = snapshot(still.model)
    train(build(method, still.model, groups=two_groups(still, lr=0.0)), still, 3)
    after = snapshot(still.model)
    assert {n[0] for n in after if not torch.equal(after[n], before[n])} == {"0"}

    plain, decayed = nets.mlp(), nets.mlp()
    for problem, decay in ((plain, 0.0), (decayed, 0.5)):
        train(build(method, problem.model, groups=two_groups(problem, weight_decay=decay, decoupled=True)), problem, 1)
    a, b = snapshot(plain.model), snapshot(decayed.model)
    assert torch.equal(a["0.weight"], b["0.weight"]) and b["2.weight"].norm() < a["2.weight"].norm()

    free = nets.mlp()
    optimizer = build(method, free.model, groups=two_groups(free, precondition=False))
    falls(train(optimizer, free, FEW))
    assert len(optimizer.param_groups) == 2
    assert set(optimizer.state[free.model[2].weight]) <= {"m", "v", "step", "momentum"}


@every
def test_scheduler(method):
    """A learning-rate schedule is obeyed"""
    problem = nets.mlp()
    optimizer = build(method, problem.model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
    objective = problem.objective()
    for moves in (True, True, False):
        before = snapshot(problem.model)
        optimizer.step(objective.at(problem.x, problem.y))
        scheduler.step()
        assert same(snapshot(problem.model), before) is not moves


@every
def test_add_param_group(method):
    """A layer thawed later joins by add_param_group"""
    problem = nets.mlp()
    last = problem.model[2].requires_grad_(False)
    optimizer = build(method, problem.model)
    train(optimizer, problem, 2)
    last.requires_grad_(True)
    optimizer.add_param_group({"params": list(last.parameters())})
    before = snapshot(last)
    falls(train(optimizer, problem, FEW))
    assert not any(torch.equal(t, before[n]) for n, t in snapshot(last).items())


@every
def test_maximize(method, refuses):
    """maximize=True ascends"""
    problem = nets.mlp()
    try:
        optimizer = build(method, problem.model, maximize=True)
    except ValueError as error:
        assert "maximize" in str(error)
        refuses()
        return
    losses = train(optimizer, problem, FEW)
    assert losses[-1] > losses[0]


@every
def test_hooks(method):
    """Step hooks run once a step"""
    problem = nets.mlp()
    optimizer = build(method, problem.model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(optimizer, problem, 2)
    assert calls == ["pre", "post"] * 2


@every
def test_step_rule(method, refuses):
    """A line search along the method's direction"""
    problem = nets.mlp(torch.double)
    try:
        optimizer = build(method, problem.model, step_rule=Armijo())
    except (TypeError, ValueError) as error:
        assert "step_rule" in str(error)
        refuses()
        return
    losses = train(optimizer, problem, FEW)
    falls(losses)
    assert optimizer.param_groups[0]["step_rule"]["evaluations"] >= FEW


# State


def resumable(method, problem):
    settings = {"observe_every": 3, "refresh_every": 5, "momentum": 0.5}
    return build(method, problem.model, **{k: v for k, v in settings.items() if accepts(method, k)})


@every
@pytest.mark.parametrize("steps", [7])
def test_exact_resume(method, steps):
    """Resumes bit for bit from torch.load(weights_only=True), between two refreshes"""
    straight, resumed = nets.conv(dropout=0.3), nets.conv(dropout=0.3)
    straight.model.eval(), resumed.model.eval()
    optimizer = resumable(method, straight)
    train(optimizer, straight, steps)
    state, weights = saved_and_loaded(optimizer.state_dict()), saved_and_loaded(straight.model.state_dict())
    expected = train(optimizer, straight, 5)

    resumed.model.load_state_dict(weights)
    other = resumable(method, resumed)
    other.load_state_dict(state)
    assert same(other.state_dict(), state)
    assert train(other, resumed, 5) == expected
    assert same(snapshot(resumed.model), snapshot(straight.model))
    assert same(other.state_dict(), optimizer.state_dict())
    third = nets.conv()
    third.model.load_state_dict(weights), third.model.eval()
    again = resumable(method, third)
    again.load_state_dict(state)
    assert train(again, third, 5) == expected, "training changed the dictionary that was loaded"


@every
def test_foreign_state(method):
    """A state_dict of another method or another model is refused and changes nothing"""
    problem, wider = nets.mlp(), nets.heads()
    optimizer, other = build(method, problem.model), build(method, wider.model)
    train(optimizer, problem, 2), train(other, wider, 2)
    before = copy.deepcopy(optimizer.state_dict())
    foreign = {**before, "curvlab": {**before["curvlab"], "method": "Another"}}
    torch_state = torch.optim.SGD(problem.model.parameters(), lr=0.1).state_dict()
    for bad in (other.state_dict(), foreign, torch_state):
        with pytest.raises(ValueError, match="state_dict"):
            optimizer.load_state_dict(bad)
        assert same(optimizer.state_dict(), before)


@every
def test_deep_copy(method):
    """copy.deepcopy of model and optimizer trains on its own, exactly alike"""
    problem = nets.mlp()
    optimizer = build(method, problem.model)
    train(optimizer, problem, 3)
    twin = copy.copy(problem)
    twin.model, other = copy.deepcopy((problem.model, optimizer))
    before = snapshot(problem.model)
    losses = train(other, twin, 3)
    assert same(snapshot(problem.model), before)
    assert train(optimizer, problem, 3) == losses and same(snapshot(twin.model), snapshot(problem.model))


# Bad input


@every
def test_bad_arguments(method):
    """Numbers out of range and unknown names are refused by name"""
    problem = nets.mlp()
    defaults = build(method, problem.model).defaults
    numbers = {k for k, v in defaults.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and k != "steps"}
    assert {"lr", "weight_decay"} <= numbers
    for name in sorted(numbers | {"observe_every", "fallback_scale", "kl_clip", "max_norm"}):
        if accepts(method, name):
            with pytest.raises(ValueError, match=rf"{name}=-1"):
                build(method, problem.model, **{name: -1})
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="lr="):
            build(method, problem.model, groups=two_groups(problem, lr=bad))
    with pytest.raises(TypeError, match="dampign"):
        build(method, problem.model, dampign=1.0)
    optimizer = build(method, problem.model)
    train(optimizer, problem, 1)
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


@every
@pytest.mark.parametrize("fault", ["nan", "inf", "raises"])
def test_bad_batch(method, fault):
    """A batch with a non-finite loss or a failing model leaves parameters, buffers and state as they were"""
    problem = usable(method, nets.conv())
    optimizer = build(method, problem.model)
    train(optimizer, problem, 3)
    before = copy.deepcopy((optimizer.state_dict(), snapshot(problem.model)))
    objective, x = problem.objective(), problem.x.clone()
    x[0, 0, 0, 0] = float("nan" if fault == "nan" else "inf")
    if fault == "raises":
        handle = problem.model.last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ArithmeticError if fault == "raises" else NonFiniteError):
        optimizer.step(objective.at(x, problem.y))
    if fault == "raises":
        handle.remove()
    assert same((optimizer.state_dict(), snapshot(problem.model)), before)
    twin = usable(method, nets.conv())
    twin_optimizer = build(method, twin.model)
    train(twin_optimizer, twin, 3)
    twin_optimizer.step(twin.closure()), optimizer.step(problem.closure())
    assert same(snapshot(twin.model), snapshot(problem.model)), "a refused step changed the next one"


# Devices and processes


@every
@pytest.mark.parametrize("net", ["conv", "mixed"])
def test_no_host_read(method, net, record_property):
    """A step reads nothing from the device, or only where the algorithm decides"""
    problem = getattr(nets, net)()
    shapes = [(tuple(t.shape), t.dtype) for t in (problem.x, problem.y)]
    with fake_device():
        model = {"conv": nets.Conv, "mixed": nets.Mixed}[net]().train(method not in PER_EXAMPLE)
        x, y = (torch.zeros(s, dtype=d) for s, d in shapes)
        optimizer = build(method, model, **SHORT.get(method, {}))
        objective = Objective(model, nn.CrossEntropyLoss())
        for _ in range(3):
            with no_host_reads(HOST_DECISIONS.get(method, ())):
                optimizer.step(objective.at(x, y))
    if method in HOST_DECISIONS:
        record_property("acceptance", "reads in " + ", ".join(sorted(HOST_DECISIONS[method])))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two gloo processes computed, by rank and method."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks.main, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@every
def test_data_parallel(method, two_ranks):
    """Two data-parallel processes take the steps of one process on the joint batch"""
    problem = ranks.joint_problem()
    params, losses = ranks.steps_on(method, problem, problem.model)
    for result in (r[method] for r in two_ranks):
        assert "error" not in result, result["error"]
        close(result["params"], params)
        assert result["losses"] == pytest.approx(losses, rel=1e-9)
    assert same(two_ranks[0][method]["params"], two_ranks[1][method]["params"]), "the ranks drift apart"
    # SGD runs in torch's own wrapper, which shares the buffers of the first rank
    assert method in PER_EXAMPLE or all(same(r[method]["buffers"], r["SGD"]["buffers"]) for r in two_ranks)


@every
def test_sharded_parameters(method, two_ranks, refuses):
    """FSDP2 parameters are refused with a clear error"""
    kind, message = two_ranks[0][method]["sharded"]
    assert kind == "TypeError" and "DistributedDataParallel" in message
    refuses()
