"""Arrow columns, as every room reads them.

Input: columns of a table. Output: arrays. Invariant: nothing is copied that need not be.
"""

from __future__ import annotations

import pyarrow as pa


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array; copied, as `combine_chunks` does in any case, only where it is more than one."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
