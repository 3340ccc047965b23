"""Shampoo against a slow reference that writes the Kronecker product out, and against itself on parts; wrong variants must be seen."""
import pytest
import torch
from torch import nn

from curvlab.curvature.shaping import blocks, merge_dims, mode_gram, mode_product
from curvlab.objective import Objective
from curvlab.optim.shampoo import Shampoo

EXACT = dict(momentum=0.0, eps=1e-3, refresh_every=1)


def gradients(shape, steps=12, seed=0, dtype=torch.float64):
    """Generic gradients: no symmetry, scales over a decade."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=dtype) * 10 ** torch.rand((), generator=g, dtype=dtype) for _ in range(steps)]


def follow(gs, **options):
    """Parameter after Shampoo has seen the gradients, starting from zero, in the gradients' dtype."""
    p = nn.Parameter(torch.zeros_like(gs[0]))
    optimizer = Shampoo([p], lr=0.1, **{**EXACT, **options})
    for g in gs:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def dense(gs, lr=0.1, eps=1e-3, power=None, diagonal=(), decay=None):
    """The whole method with one matrix for all coordinates. `power`: of every side (default -1/(2k)); `diagonal`: modes that keep diagonals."""
    shape = gs[0].shape
    k, w = len(shape), torch.zeros(gs[0].numel(), dtype=torch.float64)
    for t in range(1, len(gs) + 1):
        product = torch.ones(1, 1, dtype=torch.float64)
        for mode, n in enumerate(shape):
            H = torch.zeros(n, n, dtype=torch.float64)
            for s, g in enumerate(gs[:t], 1):
                rows = g.movedim(mode, 0).reshape(n, -1)
                weight = 1.0 if decay is None else (1 - decay) * decay ** (t - s) / (1 - decay**t)
                H += weight * rows @ rows.T
            H = torch.diag(H.diagonal()) if mode in diagonal else H
            values, vectors = torch.linalg.eigh(H + eps * torch.eye(n, dtype=torch.float64))
            product = torch.kron(product, (vectors * values ** (power or -1 / (2 * k))) @ vectors.T)
        w -= lr * product @ gs[t - 1].flatten()
    return w.reshape(shape)


def gap(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("root", ["eigh", "newton"])
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2), (4, 3, 2, 3), (6,)], ids=["matrix", "three modes", "kernel", "vector"])
def test_equals_the_dense_reference(shape, root):
    gs = gradients(shape)
    assert gap(follow(gs, root=root), dense(gs)) < 1e-9


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2)])
def test_wrong_exponent_would_be_seen(shape):
    gs = gradients(shape)
    assert gap(follow(gs), dense(gs, power=-1 / 2)) > 1e-2
    assert gap(follow(gs), dense(gs, power=-1 / 4 if len(shape) == 3 else -1 / 6)) > 1e-2


def test_vector_is_full_matrix_adagrad():
    gs = gradients((6,), steps=50)
    w, H = torch.zeros(6, dtype=torch.float64), 1e-3 * torch.eye(6, dtype=torch.float64)
    for g in gs:
        H = H + torch.outer(g, g)
        values, vectors = torch.linalg.eigh(H)
        w = w - 0.1 * vectors @ ((vectors.T @ g) / values.sqrt())
    assert gap(follow(gs), w) < 1e-10
    assert gap(follow(gs, max_dim=5), w) > 1e-2  # diagonal AdaGrad is another method


def test_running_average_is_bias_corrected():
    gs = gradients((5, 4))
    assert gap(follow(gs, decay=0.9), dense(gs, decay=0.9)) < 1e-12
    assert gap(follow(gs, decay=0.9), follow(gs)) > 1e-2
    # one gradient: no trace of the zero that the average starts from
    assert gap(follow(gs[:1], decay=0.9), follow(gs[:1])) < 1e-12


@pytest.mark.parametrize("shape,max_dim,diagonal", [((5, 4), 4, (0,)), ((3, 4, 2), 2, (0, 1)), ((6,), 3, (0,)), ((5, 4), 1, (0, 1))])
def test_long_sides_keep_a_diagonal_with_the_same_exponent(shape, max_dim, diagonal):
    gs = gradients(shape)
    assert gap(follow(gs, max_dim=max_dim), dense(gs, diagonal=diagonal)) < 1e-12


def test_sides_of_length_one_do_not_count():
    gs = gradients((5, 4))
    assert gap(follow([g.reshape(5, 1, 4, 1) for g in gs]).reshape(5, 4), dense(gs)) < 1e-12
    scalar = gradients(())
    total = torch.tensor(1e-3, dtype=torch.float64)
    w = 0.0
    for g in scalar:
        total = total + g**2
        w = w - 0.1 * g / total.sqrt()
    assert gap(follow(scalar), w) < 1e-12


def test_merged_sides():
    gs = gradients((6, 5, 3, 3))
    assert merge_dims((6, 5, 3, 3), 45) == (6, 45)
    assert gap(follow(gs, merge_dims=45).reshape(6, 45), dense([g.reshape(6, 45) for g in gs])) < 1e-10
    assert gap(follow(gs, merge_dims=45), follow(gs)) > 1e-2


@pytest.mark.parametrize("shape,size", [((7, 5), 3), ((6, 4), 2), ((5, 3, 4), 2), ((7,), 3)])
def test_blocks_are_separate_problems(shape, size):
    gs = gradients(shape)
    parts = follow(gs, block_size=size)
    for corner in torch.cartesian_prod(*[torch.arange(0, n, size) for n in shape]).reshape(-1, len(shape)).tolist():
        place = tuple(slice(a, a + size) for a in corner)
        assert gap(parts[place], dense([g[place] for g in gs])) < 1e-12
    assert gap(parts, follow(gs)) > 1e-2


@pytest.mark.parametrize("shape", [(7, 5), (6, 4, 3), (9,), (4, 3, 3, 3)])
@pytest.mark.parametrize("merge,size", [(None, None), (None, 2), (12, 4), (1000, 5)])
def test_split_and_join_are_inverse(shape, merge, size):
    W = torch.randn(shape)
    cut = blocks(shape, merge, size)
    stacks = cut.split(W)
    assert torch.equal(cut.join(stacks), W)
    assert sum(s.numel() for s in stacks) == W.numel()
    assert all(max(s.shape[1:]) <= (size or max(cut.merged)) for s in stacks)


def test_mode_operations_commute_and_match_matrices():
    G = torch.randn(2, 4, 5, dtype=torch.float64)
    L, R = torch.randn(2, 4, 4, dtype=torch.float64), torch.randn(2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(mode_product(mode_product(G, L, 0), R, 1), L @ G @ R.mT)
    torch.testing.assert_close(mode_product(mode_product(G, R, 1), L, 0), L @ G @ R.mT)
    torch.testing.assert_close(mode_gram(G, 1), G.mT @ G)


@pytest.mark.parametrize("graft", ["sgd", "adagrad", "rmsprop", "adam"])
def test_grafting_takes_the_norm_and_keeps_the_direction(graft):
    gs = gradients((5, 4), steps=6)
    before, after, plain_before, plain_after = follow(gs[:-1], graft=graft), follow(gs, graft=graft), follow(gs[:-1]), follow(gs)
    p = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    theirs = {"sgd": lambda: torch.optim.SGD([p], lr=0.1), "adagrad": lambda: torch.optim.Adagrad([p], lr=0.1, eps=1e-8),
              "rmsprop": lambda: torch.optim.Adam([p], lr=0.1, betas=(0.0, 0.999)), "adam": lambda: torch.optim.Adam([p], lr=0.1)}[graft]()
    for g in gs:
        start = p.detach().clone()
        p.grad = g.clone()
        theirs.step()
    step, plain = after - before, plain_after - plain_before
    assert abs(step.norm() / (p.detach() - start).norm() - 1) < 1e-10
    assert torch.nn.functional.cosine_similarity(step.flatten(), plain.flatten(), 0) > 1 - 1e-12
    assert abs(plain.norm() / step.norm() - 1) > 1e-2


def test_roots_are_kept_between_refreshes():
    gs = gradients((5, 4), steps=5)
    p = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    optimizer = Shampoo([p], refresh_every=3, refresh_growth=float("inf"))
    kept = []
    for g in gs:
        p.grad = g.clone()
        optimizer.step()
        kept.append(optimizer.state[p]["root.0.0"].clone())
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[1], kept[2]) and not torch.equal(kept[2], kept[3]) and torch.equal(kept[3], kept[4])


def test_young_roots_are_renewed_as_statistics_grow():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Shampoo([p], refresh_every=1000, refresh_growth=2.0)
    rooted = []
    for g in gradients((3,), steps=20):
        p.grad = g
        optimizer.step()
        rooted.append(optimizer.state[p]["rooted"])
    assert sorted(set(rooted)) == [1, 2, 4, 8, 16]


def test_a_late_parameter_gets_its_own_first_root():
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))
    optimizer = Shampoo([a, b], refresh_every=7, observe_every=5)
    for t in range(6):
        a.grad, b.grad = torch.randn(3), torch.randn(4) if t >= 3 else None
        optimizer.step()
    assert optimizer.state[b]["observed"] == 2 and b.abs().sum() > 0


def test_batched_factorisation_changes_nothing():
    """Equal shapes share one call; each parameter must still get its own root."""
    shapes = [(5, 4), (4, 5), (5, 4), (4,), (5,), (4, 4)]
    params = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    together = Shampoo(params, lr=0.1, **EXACT)
    lists = [gradients(s, seed=i) for i, s in enumerate(shapes)]
    for gs in zip(*lists):
        for p, g in zip(params, gs):
            p.grad = g.clone()
        together.step()
    for p, gs in zip(params, lists):
        assert gap(p.detach(), dense(gs)) < 1e-12


def test_half_precision_parameters_have_float32_statistics():
    gs = [g.to(torch.bfloat16) for g in gradients((5, 4))]
    p = nn.Parameter(torch.zeros(5, 4, dtype=torch.bfloat16))
    optimizer = Shampoo([p], **EXACT)
    for g in gs:
        p.grad = g.clone()
        optimizer.step()
    assert optimizer.state[p]["gram.0.0"].dtype == optimizer.state[p]["root.0.1"].dtype == torch.float32
    wide = [g.double() for g in gs]
    expected = sum(g @ g.T for g in wide)
    assert gap(optimizer.state[p]["gram.0.0"].double(), expected) < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("ridge", ["absolute", "mean", "max"])
@pytest.mark.parametrize("max_dim", [None, 1])
def test_zero_gradients_leave_no_nan(ridge, max_dim):
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = Shampoo([p], ridge=ridge, max_dim=max_dim, graft="sgd", decay=0.9)
    for g in (torch.zeros(3, 4), torch.zeros(3, 4), torch.randn(3, 4)):
        p.grad = g
        optimizer.step()
    assert p.isfinite().all() and not torch.equal(p.detach(), torch.ones(3, 4))


def test_relative_ridge_makes_the_first_step_independent_of_scale():
    gs = gradients((5, 4))[:1]
    tiny = [g * 1e-6 for g in gs]
    relative = dict(ridge="max", eps=1e-6)
    assert gap(follow(gs, **relative), follow(tiny, **relative)) < 1e-6
    assert gap(follow(gs), follow(tiny)) > 1e-2


def test_group_can_opt_out_and_options_can_differ():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    groups = [{"params": [model[0].bias], "precondition": False}, {"params": [model[2].weight], "block_size": 2}]
    optimizer = Shampoo(model, groups=groups)
    objective = Objective(model, nn.CrossEntropyLoss())
    before = model[0].bias.detach().clone()
    optimizer.step(objective.at(torch.randn(8, 4).double(), torch.randint(2, (8,))))
    assert "gram.0.0" not in optimizer.state[model[0].bias] and (model[0].bias != before).all()
    assert optimizer.state[model[2].weight]["gram.0.1"].shape == (1, 2, 2) and optimizer.state[model[2].weight]["gram.1.1"].shape == (1, 1, 1)


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"decay": 1.0}, {"root": "svd"}, {"root_dtype": torch.float16}, {"root_dtype": "float64"}, {"ridge": "trace"}, {"graft": "lamb"}, {"block_size": 0}, {"max_dim": 0}, {"merge_dims": 0}, {"refresh_growth": 1.0}, {"graft_decay": 1.0}, {"graft_eps": -1.0}])
def test_bad_arguments_are_named(options):
    (name, _), = options.items()
    with pytest.raises(ValueError, match=name):
        Shampoo([nn.Parameter(torch.zeros(2, 2))], **options)


def test_works_after_a_plain_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    optimizer = Shampoo(model, lr=0.05, merge_dims=64)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
