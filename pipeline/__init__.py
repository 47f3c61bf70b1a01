"""Simple, honest baselines for labelled image datasets, computed in parallel on Ray.

From Python, `evaluate(Config(...))` does what `jobs/evaluate.py` does, and `progress()` shows how far it is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.driver.job import evaluate
    from pipeline.results.notebook import progress

__version__ = "0.4.1"
__all__ = ["Config", "__version__", "evaluate", "progress"]
_HOMES = {"Config": "config", "evaluate": "driver.job", "progress": "results.notebook"}


def __getattr__(name: str) -> object:
    """Import what a caller asks for, and no sooner: every process of a job imports this package, and few need Ray."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
