"""Work of the spawned processes of the data-parallel tests."""
import traceback
from datetime import timedelta

import nets
import torch
import torch.distributed as dist
from methods import METHODS, PER_EXAMPLE, UNPERTURBED, Problem, build
from torch.nn.parallel import DistributedDataParallel

STEPS = 4


def joint_problem():
    return nets.mlp(torch.double)


def steps_on(method, problem, model):
    """Parameters after a few steps, with intervals so that averages and factorisations of several ages meet."""
    optimizer = build(method, model, exact=True)
    objective = problem.objective(model)
    losses = [float(optimizer.step(objective.at(problem.x, problem.y))) for _ in range(STEPS)]
    return [p.detach().clone() for p in model.parameters()], losses


def own_share(problem, rank, world):
    return Problem(problem.model, problem.loss, problem.x.tensor_split(world)[rank], problem.y.tensor_split(world)[rank])


def sharded_error(method):
    """The error of building the method over FSDP2 parameters."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # before torch 2.6
        from torch.distributed._composable.fsdp import fully_shard

    model = joint_problem().model
    fully_shard(model)
    try:
        build(method, model)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def buffers(method, rank, world):
    """Batch-norm averages after steps of length zero."""
    problem = own_share(nets.conv(torch.double), rank, world)
    model = DistributedDataParallel(problem.model)
    optimizer, objective = build(method, problem.model, lr=0.0, **UNPERTURBED.get(method, {})), problem.objective(model)
    for _ in range(STEPS):
        optimizer.step(objective.at(problem.x, problem.y))
    return list(problem.model.buffers())


def main(rank, world, folder):
    """Train every method on this rank's share; write what happened to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    results = {}
    for method in METHODS:
        try:
            problem = own_share(joint_problem(), rank, world)
            # compiled, so that the wrapper is not the outermost module
            params, losses = steps_on(method, problem, torch.compile(DistributedDataParallel(problem.model), backend="eager"))
            results[method] = {"params": params, "losses": losses, "sharded": sharded_error(method)}
            if method not in PER_EXAMPLE:
                results[method]["buffers"] = buffers(method, rank, world)
        except Exception:
            results[method] = {"error": traceback.format_exc()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def quantities(problem, model=None):
    """Loss, gradient and curvature products of a problem, each as one vector."""
    closure = problem.objective(model).at(problem.x, problem.y)
    probe = [torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p) for p in closure.params]
    flat = lambda tensors: torch.cat([t.detach().flatten() for t in tensors])
    loss = closure().reshape(1)
    gradient = flat(p.grad for p in closure.params)
    value = closure(backward=False).reshape(1)
    return {"loss": loss, "value": value, "gradient": gradient, "hvp": flat(closure.hvp(probe)), "ggnvp": flat(closure.ggnvp(probe)), "batched": flat(closure.ggnvp([torch.stack([v, -v]) for v in probe], batched=True))}


def objective_main(rank, world, folder):
    """What `quantities` are on this rank's share."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    problem = own_share(joint_problem(), rank, world)
    torch.save(quantities(problem, DistributedDataParallel(problem.model)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
