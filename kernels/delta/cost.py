"""Launch configurations of the delta family's Triton kernels: a rule from sizes to tiles."""

from __future__ import annotations

from archspec.kernels.linear.cost import SweepConfig, padded_dim


def serial_config(rows: int, cols: int, itemsize: int) -> SweepConfig:
    """Return the tile of the kernels that walk a sequence chunk by chunk with a state of rows x cols.

    Args:
        rows: the state dim held whole.
        cols: the state dim cut into blocks.
        itemsize: bytes of one input element.
    """
    rows, cols = padded_dim(rows), padded_dim(cols)
    if itemsize == 4 or rows > 128:
        return SweepConfig(min(cols, 32), 4, 1)
    return SweepConfig(min(cols, 64), 4, 2)
