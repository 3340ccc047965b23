"""Curvature products against three independent libraries, on one small network, in float64."""
import pytest
import torch
from torch import nn

from curvlab import Objective
from curvlab.curvature import GGN, Fisher, Hessian, lanczos

LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss, lambda n: torch.randint(0, 3, (n,))),
    "bce": (nn.BCEWithLogitsLoss, lambda n: torch.rand(n, 3).double()),
    "mse": (nn.MSELoss, lambda n: torch.randn(n, 3).double()),
}
KINDS = [(name, reduction) for name in LOSSES for reduction in ("mean", "sum")]


def problem(name, reduction, n=11):
    torch.manual_seed(0)
    loss, targets = LOSSES[name]
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(n, 5).double(), targets(n)
    return net, loss(reduction=reduction), x, y


def relative(a, b):
    return (torch.linalg.norm(a - b) / torch.linalg.norm(b)).item()


@pytest.mark.parametrize("name, reduction", KINDS)
def test_dense_matrices_equal_curvlinops(name, reduction):
    other = pytest.importorskip("curvlinops")
    net, loss, x, y = problem(name, reduction)
    params = list(net.parameters())
    objective = Objective(net, loss)
    eye = torch.eye(sum(p.numel() for p in net.parameters())).double()
    pairs = ((Hessian(objective, x, y), other.HessianLinearOperator), (GGN(objective, x, y), other.GGNLinearOperator), (Fisher(objective, x, y), other.GGNLinearOperator))
    for ours, theirs in pairs:
        assert relative(ours.to_dense(), theirs(net, loss, params, [(x, y)], check_deterministic=False) @ eye) < 1e-12


def test_empirical_fisher_equals_curvlinops():
    other = pytest.importorskip("curvlinops")
    for reduction in ("mean", "sum"):
        net, loss, x, y = problem("cross-entropy", reduction)
        eye = torch.eye(sum(p.numel() for p in net.parameters())).double()
        theirs = other.EFLinearOperator(net, loss, list(net.parameters()), [(x, y)], check_deterministic=False) @ eye
        assert relative(Fisher(Objective(net, loss), x, y, "fisher-empirical").to_dense(), theirs) < 1e-12


# BackPACK's binary cross-entropy takes binary targets of one output only
@pytest.mark.parametrize("name, reduction", [k for k in KINDS if k[0] != "bce"])
def test_diagonals_equal_backpack(name, reduction):
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchGrad, DiagGGNExact, DiagHessian

    net, loss, x, y = problem(name, reduction)
    objective = Objective(net, loss)
    ours = GGN(objective, x, y).to_dense().diagonal(), Hessian(objective, x, y).to_dense().diagonal()
    per_example = objective.at(x, y).per_example_grads()
    extended = backpack.extend(net)
    value = backpack.extend(loss)(extended(x), y)
    with backpack.backpack(DiagGGNExact(), DiagHessian(), BatchGrad()):
        value.backward()
    theirs = [torch.cat([getattr(p, field).flatten() for p in net.parameters()]) for field in ("diag_ggn_exact", "diag_h")]
    assert relative(ours[0], theirs[0]) < 1e-12 and relative(ours[1], theirs[1]) < 1e-12
    # BackPACK's per-example gradients sum to the gradient, ours average to it
    for g, p in zip(per_example, net.parameters()):
        assert relative(g, p.grad_batch * len(x)) < 1e-12


@pytest.mark.parametrize("name, reduction", [("cross-entropy", "mean"), ("mse", "mean")])
def test_products_and_spectrum_equal_hessian_eigenthings(name, reduction):
    other = pytest.importorskip("hessian_eigenthings")
    net, loss, x, y = problem(name, reduction)
    batches = [(x, y)]
    objective = Objective(net, loss)
    hessian, ggn = Hessian(objective, x, y), GGN(objective, x, y)
    theirs_h = other.HessianOperator(net, batches, other.supervised_loss(loss))
    theirs_g = other.GGNOperator(net, batches, other.supervised_forward, other.supervised_loss_of_output(loss))
    v = torch.randn(hessian.shape[0]).double()
    assert relative(hessian @ v, theirs_h @ v) < 1e-12 and relative(ggn @ v, theirs_g @ v) < 1e-12
    start = torch.randn(hessian.shape[0]).double()
    ours = lanczos(lambda u: hessian @ u, start, 39)
    top = other.lanczos(theirs_h, k=1, max_iter=39, which="LA").eigenvalues
    assert abs(ours.values[-1] - float(top[0])) < 1e-6 * abs(ours.values[-1])
    assert abs(ours.values[-1] - torch.linalg.eigvalsh(hessian.to_dense())[-1]) < 1e-10


def test_spectrum_of_a_network_equals_scipy():
    from scipy.sparse.linalg import eigsh

    net, loss, x, y = problem("cross-entropy", "mean", n=40)
    ggn = GGN(Objective(net, loss), x, y)
    ours = lanczos(lambda u: ggn @ u, torch.randn(ggn.shape[0]).double(), 25)
    theirs = eigsh(ggn.to_scipy(), k=3, return_eigenvectors=False)
    assert torch.allclose(ours.values[-3:], torch.as_tensor(theirs).sort().values, rtol=1e-8)
    assert torch.allclose(torch.linalg.norm(ggn @ ours.vectors - ours.vectors * ours.values, dim=0), ours.residuals, atol=1e-10)
