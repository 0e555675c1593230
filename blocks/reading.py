"""Reading a memory without writing to it."""

from __future__ import annotations

from torch import Tensor

from archspec.blocks.attending import regress
from archspec.blocks.rule import MemoryState, Quantities
from archspec.rule import Rule


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """Return x [B, T, G, d] with each of its G groups repeated for the heads that share it."""
    return x if x.shape[2] == num_heads else x.repeat_interleave(num_heads // x.shape[2], dim=2)


def read_only(rule: Rule, quantities: Quantities, state: MemoryState, queries: Tensor) -> Tensor:
    """Return what ``queries`` [B, M, H, K] read from a state, [B, M, H, V], without writing."""
    dtype = quantities.state_dtype
    x = queries.transpose(1, 2).to(dtype)
    if "statistics.value" in state:
        read = state["statistics.value"] / state["statistics.weight"][..., None]
        return read[:, None].expand(-1, queries.shape[1], -1, -1).to(queries.dtype)
    if rule.memory.grows:
        keys, values = (expand_heads(state[name].to(dtype), rule.dims.num_heads) for name in ("keys", "values"))
        bias = state["log_decay"].transpose(1, 2)[:, :, None] if "log_decay" in state else None
        # Queries that are no tokens have the first token's ridge.
        ridge = quantities.gates["update.fit.ridge"][:, 0].to(dtype) if "update.fit.ridge" in quantities.gates else None
        read = regress(rule, x, keys, values, bias, ridge)
    else:
        weights = {name: rule.retention.link(state[f"dual.{name}"]) for name in rule.memory.weights(rule.dims)}
        parameters = {name: tensor.to(dtype) for name, tensor in quantities.parameters.items()}
        if rule.update.solves:
            covariance = state["covariance.w"]
            ridge = quantities.gates["update.ridge"][:, 0].to(dtype).transpose(-1, -2)
            x = rule.update.solve(lambda y: y @ covariance + ridge * y, x, ridge)  # type: ignore[attr-defined]
        read = rule.memory.network(lambda name, y: y @ weights[name], x, parameters)
        read = rule.memory.finish(read, rule.dims)
    return read.transpose(1, 2).to(queries.dtype)
