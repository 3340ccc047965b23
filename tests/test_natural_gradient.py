"""The natural-gradient optimizer against its definition: labels enumerated, gradients one by one, a dense solve."""
import nets
import pytest
import torch
from torch import nn

from curvlab import Objective
from curvlab.optim import NaturalGradient


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def enumerated_fisher(problem):
    """Fisher matrix of the mean cross-entropy over all outputs of `problem`, from the definition: one gradient for each example, position and label."""
    model, params = problem.model, list(problem.model.parameters())
    outputs = model(problem.x).reshape(-1, 7) if problem.x.dtype == torch.long else model(problem.x)
    log_p, total = outputs.log_softmax(-1), 0
    for row in log_p:
        for value in row:
            g = flat(torch.autograd.grad(value, params, retain_graph=True))
            total = total + value.exp().detach() * torch.outer(g, g)
    return total / len(log_p)


@pytest.mark.parametrize("net", ["mlp", "language", "twice"])
def test_step_is_the_definition(net):
    problem = {"mlp": nets.mlp, "language": nets.language, "twice": lambda dtype: nets.twice(tied=True)}[net](torch.double)
    params = list(problem.model.parameters())
    F, before = enumerated_fisher(problem), flat(params)
    NaturalGradient(problem.model, lr=0.3, damping=0.02, block=13).step(problem.closure())
    gradient = flat([p.grad for p in params])
    expected = before - 0.3 * torch.linalg.solve(F + 0.02 * torch.eye(len(F), dtype=torch.double), gradient)
    torch.testing.assert_close(flat(params), expected, rtol=1e-9, atol=1e-11)


def test_metric_from_other_inputs_needs_no_true_labels():
    problem, more = nets.mlp(torch.double), nets.inputs(100, 4, seed=5, dtype=torch.double)
    objective, params = problem.objective(), list(problem.model.parameters())
    before = flat(params)
    labels = torch.randint(0, 3, (100,), generator=torch.Generator().manual_seed(3))
    ends = []
    for y in (labels, 2 - labels):
        with torch.no_grad():
            for p, value in zip(params, before.split([p.numel() for p in params])):
                p.copy_(value.view_as(p))
        NaturalGradient(problem.model).step(problem.closure(), objective.at(more, y))
        ends.append(flat(params))
    torch.testing.assert_close(ends[0], ends[1])
    NaturalGradient(problem.model).step(problem.closure())
    assert (flat(params) - ends[0]).norm() > 1e-3


def test_groups_have_their_own_damping_and_fallback():
    problem = nets.mlp(torch.double)
    last = problem.model[2]
    F, before = enumerated_fisher(problem), flat(problem.model.parameters())
    groups = [{"params": last.parameters(), "damping": 5.0}]
    NaturalGradient(problem.model, lr=0.3, damping=0.02, groups=groups).step(problem.closure())
    gradient = flat([p.grad for p in problem.model.parameters()])
    damping = torch.cat([torch.full((n,), value, dtype=torch.double) for n, value in ((40, 0.02), (27, 5.0))])
    torch.testing.assert_close(flat(problem.model.parameters()), before - 0.3 * torch.linalg.solve(F + damping.diag(), gradient))

    problem = nets.mlp(torch.double)
    first, last = problem.model[0], problem.model[2]
    groups = [{"params": last.parameters(), "precondition": False}]
    before = flat(first.parameters())
    NaturalGradient(problem.model, lr=0.3, damping=0.02, groups=groups).step(problem.closure())
    gradient = flat([p.grad for p in first.parameters()])
    torch.testing.assert_close(flat(first.parameters()), before - 0.3 * torch.linalg.solve(F[:40, :40] + 0.02 * torch.eye(40, dtype=torch.double), gradient))


def test_linear_coordinates_do_not_matter():
    """Undamped steps on inputs B x give the outputs of steps on x; with damping they do not."""
    x, y = nets.inputs(40, 4, dtype=torch.double), nets.inputs(40, 1, seed=2, dtype=torch.double)
    B = nets.inputs(4, 4, seed=3, dtype=torch.double) + torch.eye(4, dtype=torch.double)
    start = nets.inputs(1, 4, seed=4, dtype=torch.double)

    def outputs(x, weight, damping):
        model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Tanh()).double()
        with torch.no_grad():
            model[0].weight.copy_(weight)
        optimizer, objective = NaturalGradient(model, lr=0.1, damping=damping), Objective(model, nn.MSELoss())
        for _ in range(10):
            optimizer.step(objective.at(x, y))
        return model(x).detach()

    twin = start @ torch.linalg.inv(B)
    torch.testing.assert_close(outputs(x, start, 0.0), outputs(x @ B.T, twin, 0.0), rtol=1e-9, atol=1e-9)
    assert (outputs(x, start, 0.1) - outputs(x @ B.T, twin, 0.1)).abs().max() > 1e-3


def test_a_singular_matrix_refuses_the_step():
    problem = nets.mlp(torch.double, n=2)
    before = flat(problem.model.parameters())
    optimizer = NaturalGradient(problem.model, damping=0.0, momentum=0.5)
    with pytest.raises(ArithmeticError, match="raise damping"):
        optimizer.step(problem.closure())
    assert torch.equal(flat(problem.model.parameters()), before) and not optimizer.state


def test_bad_arguments():
    model = nets.mlp().model
    with pytest.raises(ValueError, match="block=0"):
        NaturalGradient(model, block=0)
    with pytest.raises(ValueError, match="damping=-1"):
        NaturalGradient(model, damping=-1)
    with pytest.raises(TypeError, match="curvature_closure is a"):
        NaturalGradient(model).step(nets.mlp().closure(), lambda: 0)
