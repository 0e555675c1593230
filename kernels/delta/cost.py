"""Launch configurations of the delta family's Triton kernels: a rule from sizes to tiles."""

from __future__ import annotations

import torch

from archspec.kernels.linear.cost import SweepConfig, padded_dim


def needs_wide_products(key_dim: int, dtype: torch.dtype) -> bool:
    """Return whether bf16 inputs are served as fp32, with products in tf32.

    A chunk overwrites a memory of few key channels several times over, and strengths up to 2 do not damp what rounding
    left there: in bf16, outputs of 32 channels are off by 0.0052 and of 16, under a decay, by 0.0069.
    """
    return dtype == torch.bfloat16 and key_dim <= 32


def padded_rows(dim: int) -> int:
    """Return the tile width for a head dim, at least 32: Triton 3.6 compiles 16 x 16 states to wrong outputs."""
    return max(32, padded_dim(dim))


def serial_config(rows: int, cols: int, itemsize: int) -> SweepConfig:
    """Return the tile of the kernels that walk a sequence chunk by chunk with a state of rows x cols.

    Two programs of 32 columns on one multiprocessor beat one of 64 (forward 0.52 ms against 0.58 at 4x8192x16x128,
    backward 0.54 against 0.84): each works while the other waits. Under a decay per key channel the tiles of two do not
    fit from 128 channels on; 64 columns would then be faster, but were timed without their results being checked.

    Args:
        rows: the state dim held whole.
        cols: the state dim cut into blocks.
        itemsize: bytes of one input element.
    """
    if itemsize == 4:
        return SweepConfig(32, 4, 1)
    if padded_rows(rows) > 128:
        # On Triton 3.6, 16-bit programs of 32 columns without pipelining read out of bounds, also for fewer rows.
        return SweepConfig(64, 8, 1)
    return SweepConfig(32, 4, 2)


def states_config(key_dim: int, value_dim: int, itemsize: int) -> SweepConfig:
    """Return the tile, of key and of value channels, of the kernel that leaves the state of every chunk."""
    return SweepConfig(64, 4, 3 if itemsize == 2 else 1)


def gradients_config(key_dim: int, itemsize: int) -> SweepConfig:
    """Return the tile, of key and of value channels, of the kernel for the gradients inside one chunk."""
    return SweepConfig(64, 4, 2) if itemsize == 2 else SweepConfig(32, 4, 1)
