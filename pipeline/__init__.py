"""Simple, honest baselines for labelled image datasets, computed in parallel on Ray."""

__version__ = "0.2.0"
