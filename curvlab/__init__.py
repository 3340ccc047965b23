"""curvlab: a laboratory for curvature in learning."""
__version__ = "0.1.0"


def __getattr__(name):
    # torch takes seconds to import, so `import curvlab` and the command line load it only when it is needed
    import importlib

    if name in ("Objective", "Closure"):
        return getattr(importlib.import_module("curvlab.objective"), name)
    if name in ("curvature", "lab", "ledger", "objective", "likelihood", "products", "replay", "optim"):
        return importlib.import_module(f"curvlab.{name}")
    raise AttributeError(f"module 'curvlab' has no attribute {name!r}")
