"""The ledger: papers, claims, measured results and verdicts."""
from curvlab.ledger.results import Run

__all__ = ["Run"]
