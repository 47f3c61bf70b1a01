"""Where images are: storage, formats, splits, and the listing of a dataset.

Input: `--data`, a name, a path or a URI. Output: a `Listing`; and for its rows, bytes. Invariant: what is listed is
later read, or named with the reason why not.
"""
