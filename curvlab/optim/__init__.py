"""The optimizers, by name: `curvlab.optim.KFAC` and so on. A new method joins (and joins the acceptance tests) with its line here."""
import importlib

METHODS = {
    "SGD": "first_order", "Adam": "first_order", "AMSGrad": "first_order", "AdaMax": "first_order", "NAdamW": "first_order", "AdaGrad": "first_order",
    "SignDescent": "first_order", "NormalizedGD": "first_order", "RescaledSign": "first_order",
    "NormalizedSteepestDescent": "normalized_descent", "StochasticNesterov": "accelerated",
    "KFAC": "kfac",
    "Unitwise": "unitwise",
    "Shampoo": "shampoo",
    "AdaHessian": "adahessian",
    "HessianFree": "hessian_free",
    "MultidimBacktracking": "multidim_backtracking",
    "NaturalGradient": "natural_gradient", "TruncatedNaturalGradient": "natural_gradient", "NaturalConjugateGradient": "natural_gradient",
    "Vadam": "bayes", "VOGN": "bayes", "Vprop": "bayes", "VadaGrad": "bayes",
    "LBFGS": "quasi_newton", "SR1": "quasi_newton", "Newton": "quasi_newton",
}
RULES = {"Armijo": "step_rules", "Polyak": "step_rules", "EstimatedPolyak": "step_rules", "QuadraticModel": "step_rules", "NonMonotone": "line_searches", "Wolfe": "line_searches", "PlaneSearch": "subspace"}
OTHERS = {"CurvatureOptimizer": "engine", "FallbackWarning": "engine", "NonFiniteError": "engine"}

__all__ = [*METHODS, *RULES, *OTHERS]


def __getattr__(name):
    home = {**METHODS, **RULES, **OTHERS}.get(name)
    if home is None:
        raise AttributeError(f"curvlab.optim has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"curvlab.optim.{home}"), name)


def __dir__():
    return __all__
