"""What a run leaves behind: figures, tables, `run.json`, and what a terminal shows.

Input: counts, parameters and scored parts. Output: files that are complete or not there. Invariant: the same counts
give the same bytes, in whatever order they came.
"""
