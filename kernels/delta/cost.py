"""Launch configurations of the delta family's Triton kernels: a rule from sizes to tiles."""

from __future__ import annotations

from archspec.kernels.linear.cost import SweepConfig, padded_dim


def padded_rows(dim: int) -> int:
    """Return the tile width for a head dim, at least 32: Triton 3.6 compiles 16 x 16 states to wrong outputs."""
    return max(32, padded_dim(dim))


def serial_config(rows: int, cols: int, itemsize: int) -> SweepConfig:
    """Return the tile of the kernels that walk a sequence chunk by chunk with a state of rows x cols.

    Args:
        rows: the state dim held whole.
        cols: the state dim cut into blocks.
        itemsize: bytes of one input element.
    """
    rows, cols = padded_rows(rows), padded_rows(cols)
    if itemsize == 4:
        return SweepConfig(32, 4, 1)
    if rows > 128:
        # On Triton 3.6, (32, 4, 1) gives wrong outputs for T = 1 and (32, 8, 1) reads out of bounds.
        return SweepConfig(min(cols, 64), 8, 1)
    return SweepConfig(min(cols, 64), 4, 2)
