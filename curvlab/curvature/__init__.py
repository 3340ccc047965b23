"""The mathematics of curvature, by name: `curvlab.curvature.GGN(objective, x, y) @ v` and so on."""
import importlib

HOMES = {
    "roots": ["power", "inverse_root", "newton_inverse_root", "root_residual", "eigendecomposition", "grouped"],
    "solvers": ["cg", "CGResult", "lanczos", "LanczosResult"],
    "operators": ["Operator", "Hessian", "GGN", "Fisher", "Identity", "hutchinson_diagonal", "hutchinson_trace"],
    "structured": ["Dense", "Diagonal", "Kronecker", "KroneckerEigen", "KroneckerDifference", "BlockTridiagonal"],
    "capture": ["LayerCapture", "layer_blocks"],
    "pruning": ["Surgeon", "kronecker_saliencies"],
    "shaping": ["blocks", "merge_dims", "unfold", "fold"],
}

__all__ = [name for names in HOMES.values() for name in names]


def __getattr__(name):
    for home, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"curvlab.curvature.{home}"), name)
        if name == home:
            return importlib.import_module(f"curvlab.curvature.{home}")
    raise AttributeError(f"curvlab.curvature has no {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return __all__
