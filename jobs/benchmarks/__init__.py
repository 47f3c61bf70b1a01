"""The modules of `jobs/benchmark.py`, which runs each peer and each part as a process of its own.

Input: requests as JSON. Output: an `Answer` each, and the table of all. Invariant: nothing in `pipeline/` imports this.
"""
