"""Launch configurations of the linear family's Triton kernels: a rule from sizes to tiles, with its reason.

No autotuning: a run compiles each kernel once. The numbers were measured on one H200 and one H100.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

# How the state decays: not, by a factor a token, or by a factor a chunk along its rows or columns.
NO_GATE, TOKEN_GATE, ROW_GATE, COLUMN_GATE = 0, 1, 2, 3


@dataclass(frozen=True)
class SweepConfig:
    """One kernel's tile and launch shape.

    Args:
        block: columns that one program holds: of the state (whose rows are all resident), or key channels.
        num_warps, num_stages: warps a program and pipelined chunks of loads.
    """

    block: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """How one call is cut up.

    Args:
        chunk: C, tokens a chunk.
        num_segments: segments a sequence, run side by side after a pass that finds their start states.
        load: programs a multiprocessor.
        reason: why this number of segments, for ``explain`` and benchmarks.
    """

    chunk: int
    num_segments: int
    load: float
    reason: str


SHORTEST_SEGMENT = 1024
"""Tokens below which the extra pass over k and v costs more than the parallelism gains."""


def next_power_of_two(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@lru_cache
def padded_dim(dim: int) -> int:
    """Return the tile width for a head dim: a power of two of at least 16, which a matrix product needs."""
    return max(16, next_power_of_two(dim))


def chunk_length(key_dim: int, value_dim: int, itemsize: int) -> int:
    """Return C: 64, or 32 where two fp32 tiles of 256 columns would not fit shared memory."""
    return 32 if itemsize == 4 and max(padded_dim(key_dim), padded_dim(value_dim)) > 128 else 64


@lru_cache
def sweep_config(rows: int, cols: int, itemsize: int, programs_per_multiprocessor: float = 1.0) -> SweepConfig:
    """Return the tile of the head-serial kernel for a state of rows x cols.

    Args:
        rows: the state dim held whole.
        cols: the state dim cut into blocks.
        itemsize: bytes of one input element.
        programs_per_multiprocessor: how many there are to run; one alone may prefetch deeper.
    """
    rows, cols = padded_dim(rows), padded_dim(cols)
    block = min(cols, 64)
    if itemsize == 4:
        block = min(block, 32 if rows > 128 else 64)
        return SweepConfig(block, 4, 1 if rows > 64 else 2)
    if rows > 128:
        return SweepConfig(block, 4, 1)
    return SweepConfig(block, 4, 3 if programs_per_multiprocessor <= 1.0 else 2)


def prepare_config(key_dim: int) -> SweepConfig:
    """Return the tile of the kernel that prepares one chunk under a decay per key channel."""
    return SweepConfig(min(32, padded_dim(key_dim)), 4, 2)


def gradients_config(key_dim: int) -> SweepConfig:
    """Return the tile of the kernel for the gradients inside one chunk of a decay per key channel.

    Two stages: with one, at four warps, Triton 3.6.0 compiles wrong products of bf16 for sm_90.
    """
    return SweepConfig(min(32, padded_dim(key_dim)), 4, 2)


def scaled_config(key_dim: int) -> SweepConfig:
    """Return the tile of the kernel that scales gradients inside one chunk and sums those of decays per key channel."""
    return SweepConfig(min(32, padded_dim(key_dim)), 4, 2)


@lru_cache
def plan(
    num_sequences: int, length: int, num_heads: int, key_dim: int, value_dim: int,
    itemsize: int, gated: bool, num_multiprocessors: int,
) -> Plan:  # fmt: skip
    """Return chunk length and number of segments.

    Args:
        num_sequences: N.
        length: tokens a sequence, the average of packed ones.
        num_heads: HV.
        gated: whether decays vary by token, so that their gradient is wanted.
        num_multiprocessors: of the device.
    """
    chunk = chunk_length(key_dim, value_dim, itemsize)
    block = sweep_config(key_dim, value_dim, itemsize).block
    programs = num_sequences * num_heads * -(-padded_dim(value_dim) // block)
    # Sweeps that also sum gate gradients wait for more loads: two programs hide each other's.
    wanted = 2 if gated else 1
    segments = max(1, min(wanted * num_multiprocessors // programs, length // SHORTEST_SEGMENT))
    load = programs * segments / num_multiprocessors
    reason = (
        f"{programs} programs, wanted {wanted} on each of {num_multiprocessors} multiprocessors: {segments} segments "
        f"of {-(-length // segments)} tokens"
    )
    return Plan(chunk, segments, load, reason)
