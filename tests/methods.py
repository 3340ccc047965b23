"""All optimizers of the package, how the tests build them, and small helpers to train with them."""
import inspect

import torch

from curvlab import Objective, optim

METHODS = tuple(optim.METHODS)

# Arguments without a default, and little noise for the methods that perturb, so that a loss can fall within a few steps.
ARGUMENTS: dict[str, dict] = {name: {"train_size": 1_000_000, "initial_precision": 1e4} for name in ("Vadam", "VOGN", "Vprop")}
ARGUMENTS["VadaGrad"] = {"temperature": 1e-4}

# Methods that need per-example gradients, which batch norm in training mode does not have.
PER_EXAMPLE = {"VOGN"}

# Methods whose loss is the one at perturbed weights, and how to switch that off.
UNPERTURBED = {name: {"temperature": 0.0} for name in ("Vadam", "VOGN", "Vprop", "VadaGrad")}

# Functions that may read from the device in a step, because the algorithm decides there. Hessian-free: conjugate gradients stop when the model
# stops falling, backtracking and line search compare losses, and the damping follows from one of them.
# Truncated natural gradients: the solver stops by the residual, the damping follows from the loss, and the plane search compares losses.
HOST_DECISIONS = {"HessianFree": {"cg", "loss_at", "solve"}} | {name: {"minres", "loss_at", "_adapt_damping"} for name in ("TruncatedNaturalGradient", "NaturalConjugateGradient")}
SHORT = {name: {"max_iter": 3} for name in HOST_DECISIONS}  # where such decisions are made up
# Multidimensional backtracking: each trial is judged by its loss, and a cut is made only where it separates.
HOST_DECISIONS["MultidimBacktracking"], SHORT["MultidimBacktracking"] = {"_judge", "_half_space"}, {"max_trials": 3}

# Line searches compare losses and slopes.
HOST_DECISIONS |= {name: {"_measured", "value_and_slope"} for name in ("LBFGS", "SR1", "Newton")}

# Methods that train some kinds of parameter by the engine's fallback and must say so.
LAYERWISE = {"KFAC", "Unitwise"}

# Methods that draw from the model's predictive distribution: the draws of another split of the batch are other draws, so where
# two ways to evaluate one batch are compared the curvature is computed without sampling.
WITHOUT_SAMPLING = {name: {"curvature": "fisher-exact"} for name in ("KFAC", "Unitwise")}


def needs_closure(method):
    """Whether a gradient is not enough for this method."""
    return getattr(optim, method).needs_closure


def usable(method, problem):
    """The problem, with batch norm in evaluation mode where the method cannot train it otherwise."""
    problem.model.train(method not in PER_EXAMPLE)
    return problem


GRADIENT_ONLY = tuple(m for m in METHODS if not needs_closure(m))


def build(method, model, exact=False, **arguments):
    """The optimizer with its default settings; `exact` switches sampling of targets off. Intervals are left out for a method that has no statistics."""
    arguments = {k: v for k, v in arguments.items() if k not in ("observe_every", "refresh_every") or accepts(method, k)}
    chosen = {**ARGUMENTS.get(method, {}), **(WITHOUT_SAMPLING.get(method, {}) if exact else {}), **arguments}
    return getattr(optim, method)(model, **chosen)


def accepts(method, argument):
    """Whether the constructor names this argument or passes it on to the shared ones."""
    parameters = inspect.signature(getattr(optim, method).__init__).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def train(optimizer, problem, steps, chunk=None):
    """Full-batch steps; returns the loss at the start, what each step returned, and the loss at the end."""
    objective = problem.objective()
    loss = lambda: float(objective.at(problem.x, problem.y, chunk)(backward=False))
    return [loss(), *(float(optimizer.step(objective.at(problem.x, problem.y, chunk))) for _ in range(steps)), loss()]


def snapshot(model):
    """Copies of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def tensors_of(value):
    """Every tensor inside nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for child in children for t in tensors_of(child)]


def same(a, b):
    """Whether two nested values (state dicts) are equal bit for bit, tensors included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


class Problem:
    """A model, a loss and one batch."""

    def __init__(self, model, loss, x, y, **options):
        self.model, self.loss, self.x, self.y, self.options = model, loss, x, y, options

    def objective(self, model=None):
        return Objective(self.model if model is None else model, self.loss, **self.options)

    def closure(self, **arguments):
        return self.objective().at(self.x, self.y, **arguments)
