"""The form of a memory of tokens that keeps running statistics in their place."""

from __future__ import annotations

from torch import Tensor

from archspec.blocks.rule import MemoryState, Quantities, initial_state
from archspec.kernels.softmax.running import Statistics, running_attention
from archspec.rule import Rule


def average(rule: Rule, quantities: Quantities, state: MemoryState | None, backend: str) -> tuple[Tensor, MemoryState]:
    """o_t = sum_j softmax_j(s_j) v_j where every reader gives the tokens the same scores s_j: a running average."""
    start = initial_state(rule, quantities) if state is None else state
    heads = rule.dims.num_heads
    key, value = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (quantities.key, quantities.value))
    dtype = quantities.state_dtype
    temperature = rule.memory.temperature(rule.dims)  # type: ignore[attr-defined]
    scores = (quantities.query.to(dtype) * key.to(dtype)).sum(-1) * temperature
    before = Statistics(*(start[f"statistics.{name}"] for name in Statistics._fields))
    read, after = running_attention(scores, value, before, backend)
    return read, {f"statistics.{name}": tensor for name, tensor in after._asdict().items()}
