"""Launch configurations of the delta family's Triton kernels: a rule from sizes to tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from archspec.kernels.linear.cost import NO_GATE, ROW_GATE, SweepConfig, padded_dim


def needs_wide_products(key_dim: int, dtype: torch.dtype) -> bool:
    """Return whether bf16 inputs are served as fp32, with products in tf32.

    A chunk overwrites a memory of few key channels several times over, and strengths up to 2 do not damp what rounding
    left there: in bf16, outputs of 32 channels are off by 0.0052 and of 16, under a decay, by 0.0069.
    """
    return dtype == torch.bfloat16 and key_dim <= 32


def padded_rows(dim: int) -> int:
    """Return the tile width for a head dim, at least 32: Triton 3.6 compiles 16 x 16 states to wrong outputs."""
    return max(32, padded_dim(dim))


@dataclass(frozen=True)
class Serial:
    """A way to launch a kernel that walks a sequence chunk by chunk, and how long it takes.

    Args:
        config: its tile and launch shape.
        resident: programs that fit one multiprocessor.
        chunk_us: time a chunk with as many on each, on an H100 at 128 key channels.
        alone_us: with one on each.
    """

    config: SweepConfig
    resident: int
    chunk_us: float
    alone_us: float

    def time_us(self, heads: int, value_dim: int, multiprocessors: int) -> float:
        """Return the time of one chunk of every head: full rounds of programs, and what is left."""
        programs = heads * -(-value_dim // self.config.block)
        rounds, rest = divmod(programs, multiprocessors * self.resident)
        last = 0.0 if rest == 0 else self.alone_us if rest <= multiprocessors else self.chunk_us
        return rounds * self.chunk_us + last


def _serial(block: int, num_warps: int, num_stages: int, resident: int, chunk_us: float, alone_us: float) -> Serial:
    return Serial(SweepConfig(block, num_warps, num_stages), resident, chunk_us, alone_us)


# By the decay's kind (none, a token, a key channel), forward and backward in time.
_FORWARD = (
    (_serial(32, 4, 2, 2, 4.09, 3.16), _serial(32, 4, 3, 1, 2.40, 2.37), _serial(16, 4, 3, 1, 1.96, 1.94)),
    (_serial(32, 4, 2, 2, 4.23, 3.42), _serial(32, 4, 3, 1, 2.72, 2.71), _serial(16, 4, 3, 1, 2.28, 2.26)),
    (_serial(64, 4, 2, 1, 4.90, 4.02), _serial(32, 4, 3, 1, 2.80, 2.74), _serial(16, 4, 3, 1, 2.31, 2.35)),
)
_BACKWARD = (
    (_serial(32, 4, 2, 2, 4.24, 3.05), _serial(32, 4, 3, 1, 3.25, 3.05), _serial(16, 4, 3, 1, 2.04, 2.12)),
    (_serial(32, 4, 2, 2, 5.62, 4.53), _serial(16, 4, 4, 1, 2.92, 2.83)),
    (_serial(64, 8, 2, 1, 5.46, 4.86), _serial(32, 8, 3, 1, 3.22, 3.11), _serial(16, 4, 3, 1, 2.32, 2.28)),
)


@lru_cache
def serial_config(
    key_dim: int, value_dim: int, itemsize: int, gate: int, heads: int, multiprocessors: int, *, reverse: bool
) -> SweepConfig:
    """Return the tile of the kernels that walk a sequence chunk by chunk with a state of key_dim x value_dim.

    A program holds all key channels and a block of value channels. Two on one multiprocessor hide each other's waits;
    where there are too few to fill the card, narrow ones that prefetch deeper are faster.

    Args:
        itemsize: bytes of one input element.
        gate: the decay's kind, as `archspec.kernels.linear.call` numbers them.
        heads: of all sequences.
        multiprocessors: of the device.
    """
    if itemsize == 4:
        return SweepConfig(32, 4, 1)
    if padded_rows(key_dim) > 128:
        # Three key tiles of two stages do not fit. On Triton 3.6, 16-bit programs of 32 columns without pipelining read
        # out of bounds, also for fewer rows.
        if gate == ROW_GATE:
            return SweepConfig(64, 8, 1)
        return SweepConfig(64, 8, 2) if reverse else SweepConfig(32, 4, 2)
    ways = (_BACKWARD if reverse else _FORWARD)[gate]
    return min(ways, key=lambda way: way.time_us(heads, value_dim, multiprocessors)).config


@lru_cache
def states_config(
    key_dim: int, value_dim: int, itemsize: int, gate: int, heads: int, multiprocessors: int
) -> SweepConfig:
    """Return the tile, of key and of value channels, of the kernel that leaves the state of every chunk.

    Args: as of `serial_config`.
    """
    if itemsize == 4:
        return SweepConfig(64, 4, 1)
    alone = heads * -(-key_dim // 64) * -(-value_dim // 64) <= multiprocessors
    return SweepConfig(64, 4, 4 if alone and gate == NO_GATE else 3)


def gradients_config(key_dim: int, itemsize: int) -> SweepConfig:
    """Return the tile, of key and of value channels, of the kernel for the gradients inside one chunk."""
    return SweepConfig(64, 4, 2) if itemsize == 2 else SweepConfig(32, 4, 1)
