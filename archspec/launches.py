"""How the Triton kernels of linear attention and the delta rule are cut up and launched: a rule, with its reasons.

No autotuning: a run compiles each kernel once, and `archspec explain` shows what a rule chooses. The numbers were
measured on one H200 and one H100. Nothing here needs tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

H100_MULTIPROCESSORS = 132  # of an H200 too

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


WALKS = 1024
"""Programs below which those that do several pieces of work in turn do fewer each: eight a multiprocessor."""


def next_power_of_two(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def walk_length(pieces: int, most: int) -> int:
    """Return how many of so many pieces of work one program does in turn: at most ``most``, and leaving `WALKS`.

    A power of two: a kernel is compiled for each. The longer the walk, the fewer partial sums it leaves.
    """
    return min(most, next_power_of_two(pieces // WALKS + 1) // 2 or 1)


@lru_cache
def padded_dim(dim: int) -> int:
    """Return the tile width for a head dim: a power of two of at least 16, which a matrix product needs."""
    return max(16, next_power_of_two(dim))


def chunk_length(key_dim: int, value_dim: int, itemsize: int) -> int:
    """Return C: 64, or 32 where two fp32 tiles of 256 columns would not fit shared memory."""
    return 32 if itemsize == 4 and max(padded_dim(key_dim), padded_dim(value_dim)) > 128 else 64


@lru_cache
def sweep_config(
    rows: int, cols: int, itemsize: int, programs_per_multiprocessor: float = 1.0, *, gated: bool = False
) -> SweepConfig:
    """Return the tile of the head-serial kernel for a state of rows x cols.

    Args:
        rows: the state dim held whole.
        cols: the state dim cut into blocks.
        itemsize: bytes of one input element.
        programs_per_multiprocessor: how many there are to run; one alone may prefetch deeper.
        gated: whether the state decays, or gate gradients are summed.
    """
    rows, cols = padded_dim(rows), padded_dim(cols)
    block = min(cols, 64)
    if itemsize == 4:
        block = min(block, 32 if rows > 128 else 64)
        return SweepConfig(block, 4, 1 if rows > 64 else 2)
    if rows > 128:
        # With gates, 64 columns of so many rows leave registers for nothing else: they spill 1.2 KB a thread.
        return SweepConfig(min(block, 32), 4, 2) if gated else SweepConfig(block, 4, 1)
    return SweepConfig(block, 4, 3 if programs_per_multiprocessor <= 1.0 else 2)


def channels_config(key_dim: int) -> SweepConfig:
    """Return the tile, of key channels, of the kernels for one chunk under a decay per key channel.

    Two stages: with one, at four warps, Triton 3.6.0 compiles wrong products of bf16 for sm_90.
    """
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
    block = sweep_config(key_dim, value_dim, itemsize, gated=gated).block
    programs = num_sequences * num_heads * -(-padded_dim(value_dim) // block)
    # Sweeps that also sum gate gradients wait for more loads: two programs hide each other's.
    wanted = 2 if gated else 1
    segments = max(1, min(wanted * num_multiprocessors // programs, length // SHORTEST_SEGMENT))
    load = programs * segments / num_multiprocessors
    reason = (
        f"{programs} programs without segments, {wanted} wanted on each of {num_multiprocessors} multiprocessors: "
        f"{segments} of {-(-length // segments)} rows"
    )
    return Plan(chunk, segments, load, reason)


WIDE_PRODUCTS_UP_TO = 32
"""Key channels up to which the delta rule serves bf16 inputs as fp32, with products in tf32.

A chunk overwrites a memory of few key channels several times over, and strengths up to 2 do not damp what rounding left
there: in bf16, outputs of 32 channels are off by 0.0052 and of 16, under a decay, by 0.0069.
"""


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


def _serial_ways(key_dim: int, itemsize: int, gate: int, *, reverse: bool) -> tuple[Serial, ...]:
    """Return what `serial_config` chooses from; where only one way is known, without its time."""
    if itemsize == 4:
        return (_serial(32, 4, 1, 1, 0.0, 0.0),)
    if padded_rows(key_dim) > 128:
        # Three key tiles of two stages do not fit. On Triton 3.6, 16-bit programs of 32 columns without pipelining read
        # out of bounds, also for fewer rows.
        one = (64, 8, 1) if gate == ROW_GATE else (64, 8, 2) if reverse else (32, 4, 2)
        return (_serial(*one, 1, 0.0, 0.0),)
    return (_BACKWARD if reverse else _FORWARD)[gate]


@lru_cache
def serial_config(
    key_dim: int, value_dim: int, itemsize: int, gate: int, heads: int, multiprocessors: int, *, reverse: bool
) -> SweepConfig:
    """Return the tile of the kernels that walk a sequence chunk by chunk with a state of key_dim x value_dim.

    A program holds all key channels and a block of value channels. Two on one multiprocessor hide each other's waits;
    where there are too few to fill the card, narrow ones that prefetch deeper are faster.

    Args:
        itemsize: bytes of one input element.
        gate: the decay's kind, as numbered above.
        heads: of all sequences.
        multiprocessors: of the device.
    """
    ways = _serial_ways(key_dim, itemsize, gate, reverse=reverse)
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


def delta_gradients_config(key_dim: int, itemsize: int) -> SweepConfig:
    """Return the tile, of key and of value channels, of the kernel for the gradients inside one chunk."""
    return SweepConfig(64, 4, 2) if itemsize == 2 else SweepConfig(32, 4, 1)


@dataclass(frozen=True)
class Launch:
    """How the main kernel of a pass is launched, and why so.

    Args:
        kernel: what it does.
        programs: of all sequences, heads and blocks.
        tile: columns, warps and stages of one.
    """

    kernel: str
    programs: int
    tile: SweepConfig
    reason: str

    def __str__(self) -> str:
        tile = self.tile
        return (
            f"{self.kernel}: {self.programs} programs of {tile.block} value channels, {tile.num_warps} warps, "
            f"{tile.num_stages} stage{'s' if tile.num_stages > 1 else ''}"
        )


def launches(
    family: str, gate: int, sequences: int, length: int, num_heads: int, key_dim: int, value_dim: int,
    multiprocessors: int,
) -> tuple[Launch, ...]:  # fmt: skip
    """Return how a family's serial kernels are launched for bf16 inputs; none for a family without Triton kernels.

    Args:
        family: ``linear`` or ``delta``.
        gate: the decay's kind, as numbered above.
        length: rows of a sequence: its tokens, times the steps of each.
    """
    heads = sequences * num_heads
    if family == "linear":
        cut = plan(sequences, length, num_heads, key_dim, value_dim, 2, gate != NO_GATE, multiprocessors)
        tile = sweep_config(key_dim, value_dim, 2, cut.load, gated=gate != NO_GATE)
        programs = heads * -(-value_dim // tile.block) * cut.num_segments
        return (Launch(f"sweeps over chunks of {cut.chunk} rows", programs, tile, cut.reason),)
    if family != "delta":
        return ()
    itemsize = 4 if key_dim <= WIDE_PRODUCTS_UP_TO else 2
    chunk = chunk_length(key_dim, value_dim, itemsize)
    found = []
    for reverse in (False, True):
        tile = serial_config(key_dim, value_dim, itemsize, gate, heads, multiprocessors, reverse=reverse)
        ways = _serial_ways(key_dim, itemsize, gate, reverse=reverse)
        times = {way.config: way.time_us(heads, value_dim, multiprocessors) for way in ways}
        others = ", ".join(
            f"{other.block}x{other.num_warps}x{other.num_stages} {us:.1f}"
            for other, us in times.items()
            if other != tile
        )
        reason = f"a chunk of every head takes {times[tile]:.1f} us (channels x warps x stages: {others})"
        reason = reason if others else "no other fits these dims"
        name = f"walk {'back' if reverse else 'forward'} over chunks of {chunk} rows"
        found.append(Launch(name, heads * -(-value_dim // tile.block), tile, reason))
    return tuple(found)
