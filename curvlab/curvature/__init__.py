"""The mathematics of curvature, by name: `curvlab.curvature.GGN(objective, x, y) @ v` and so on."""
import importlib

HOMES = {
    "roots": ["power", "inverse_root", "newton_inverse_root", "root_residual", "eigendecomposition", "grouped"],
    "estimators": ["Estimate", "random_signs", "random_probes", "hutchinson_diagonal", "hutchinson_trace", "hutchpp_trace", "frobenius_norm"],
    "spectrum": ["eigenpairs", "Eigenpairs", "exact_spectrum", "density", "Density", "spectral_norm", "condition_number", "Bounded", "concentration"],
    "solvers": ["cg", "CGResult", "minres", "MinresResult", "lanczos", "LanczosResult"],
    "algebra": ["Operator", "Identity", "DiagonalOperator", "MatrixOperator", "as_operator", "Sum", "Scaled", "Product", "Transposed", "SubBlock", "flat", "unflat"],
    "operators": ["NetworkOperator", "Batches", "Hessian", "GGN", "Residual", "Fisher", "Covariance"],
    "jacobian": ["Jacobian", "NTK"],
    "function_space": ["NTKLinear", "ntk_mlp", "FactoredJacobian", "factored_jacobian", "dense_fisher", "natural_steps", "optimal_rates", "apply_steps"],
    "preconditioners": ["Preconditioner", "Preconditioned", "preconditioner_of"],
    "closed_form": ["PerceptronFisher", "CommitteeFisher", "UnitFisher"],
    "structured": ["Dense", "Diagonal", "Kronecker", "KroneckerDiagonal", "KroneckerEigen", "LowRankDiagonal", "BlockDiagonal", "KroneckerDifference", "BlockTridiagonal"],
    "capture": ["LayerCapture", "layer_blocks"],
    "conv_factors": ["conv_gram"],
    "capture_layers": ["curvature_blocks"],
    "structured_operator": ["StructuredOperator", "low_rank"],
    "approximations": ["diagonal", "block_diagonal", "kfac", "ekfac", "kronecker_error"],
    "random_matrices": ["semicircle", "spiked_wigner", "effective_batch", "noise_level"],
    "pruning": ["Surgeon", "kronecker_saliencies"],
    "products": ["product", "add_gram_", "gram", "spd_inverse"],
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
