"""The columns of a manifest as arrays: of 300,000 rows, too."""

import numpy as np
import pyarrow as pa


def codes(column: pa.ChunkedArray) -> np.ndarray:
    """A number for each different value."""
    return column.combine_chunks().dictionary_encode().indices.to_numpy()


def matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """A list of `width` numbers a row, as `[rows, width]`."""
    return column.combine_chunks().flatten().to_numpy().reshape(-1, width)
