"""The quantities a rule consumes and the state it keeps: what every form of it agrees on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from archspec.declarations import STEPPED_GATES
from archspec.families import Per
from archspec.rule import Rule


@dataclass
class Quantities:
    """Everything a rule reads of a stretch of T tokens.

    Args:
        query, key: [B, T, H, K], after feature maps.
        value: [B, T, H, V].
        gates: by path (``update.step_size``, ``bias.threshold``, ...), each [B or 1, T or 1, H, 1 or K, 1 or V];
            ``retention.gate`` holds log(alpha).
        start: learned start weights of the dual by weight name, [H, d_in, d_out]; zero when absent.
        parameters: learned parameters of the memory's network, [H, ...].
        read_key: p, the key the error is read with, when it is not the key; [B, T, H, K].
        steps: S, steps a token takes; key, value and the gates of ``stepped_gates`` then have S T rows, the S of a
            token one after another.
        routed: whether some tokens are not taken, so that even constant gates vary.
        inplace: whether a form may write the new state into the tensors of the old one.
    """

    stepped_gates: ClassVar[tuple[str, ...]] = STEPPED_GATES

    query: Tensor
    key: Tensor
    value: Tensor
    gates: Mapping[str, Tensor]
    start: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    read_key: Tensor | None = None
    steps: int = 1
    routed: bool = False
    inplace: bool = False

    def step(self, index: int) -> Quantities:
        """Return one of the steps of a single token whose layout is [B, H, S, d]."""
        gates = {
            path: gate[:, index] if path in self.stepped_gates and gate.ndim == 5 else gate
            for path, gate in self.gates.items()
        }
        rows = slice(index, index + 1)
        return replace(self, key=self.key[:, :, rows], value=self.value[:, :, rows], gates=gates, steps=1)

    def replaced(self, key: Tensor, value: Tensor, read_key: Tensor | None, gates: Mapping[str, Tensor]) -> Quantities:
        """Return the same token with other keys, values and gates."""
        return replace(self, key=key, value=value, read_key=read_key, gates=gates)

    @property
    def state_dtype(self) -> torch.dtype:
        """fp64 for fp64 inputs, else fp32: states and decays are never kept in less."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


MemoryState = dict[str, Tensor]
"""State of one memory by name: ``dual.<weight>`` [B, H, d_in, d_out], ``momentum.<weight>``, ``anchor.<weight>``,
``linear.<weight>`` (what is read inside a chunk when the link applies at anchors), ``steps.<weight>`` (their sum since
the anchor, where its share is learned), ``covariance.w``, ``window.<name>``;
for a memory of tokens ``keys`` [B, S, H, K], ``values`` [B, S, H, V] and, with a decay, ``log_decay`` [B, S, H], or
``statistics.maximum`` and ``.weight`` [B, H] and ``.value`` [B, H, V]."""


def gate_on_weight(gate: Tensor, axis: str) -> Tensor:
    """Return a gate [..., 1 or K, 1 or V] so that it broadcasts against a weight [..., d_in, d_out].

    ``axis`` is what ``Memory.axis`` says: a per-key gate varies along the input of a first layer but along the
    output of a last one, so its axes may have to change places.
    """
    return gate.transpose(-1, -2) if axis == "output" and gate.shape[-2] > 1 else gate


def weight_axis(rule: Rule, name: str, gate: Tensor) -> str:
    """Return where on the weight a gate varies, from the axes the gate itself has."""
    varies = (gate.shape[-2] > 1, gate.shape[-1] > 1)
    grains: dict[tuple[bool, bool], Per] = {
        (False, False): "head",
        (True, False): "key",
        (False, True): "value",
        (True, True): "state",
    }
    return rule.memory.axis(name, grains[varies])


def initial_state(rule: Rule, quantities: Quantities) -> MemoryState:
    """Return the state before the first token, for the batch that ``quantities`` has."""
    batch, device, dtype = quantities.query.shape[0], quantities.query.device, quantities.state_dtype
    dims = rule.dims
    if getattr(rule.memory, "cache", "tokens") == "statistics":
        weight = torch.zeros(batch, dims.num_heads, device=device, dtype=dtype)
        return {
            "statistics.maximum": torch.full_like(weight, -torch.inf),
            "statistics.weight": weight,
            "statistics.value": torch.zeros(batch, dims.num_heads, dims.value_dim, device=device, dtype=dtype),
        }
    if rule.memory.grows:
        state = {
            "keys": quantities.key[:, :0],
            "values": quantities.value[:, :0],
        }
        if rule.retention.decay_gate is not None:
            state["log_decay"] = torch.zeros(batch, 0, dims.num_heads, device=device, dtype=dtype)
        return state
    state = {}
    for name, shape in rule.memory.weights(dims).items():
        full = (batch, dims.num_heads, *shape)
        if name in quantities.start:
            dual = quantities.start[name].to(dtype).expand(full)
        else:
            dual = torch.zeros(full, device=device, dtype=dtype)
        state[f"dual.{name}"] = dual
        for buffer in rule.update.buffers:
            state[f"{buffer}.{name}"] = torch.zeros(full, device=device, dtype=dtype)
        if rule.update.anchor is not None:
            state[f"anchor.{name}"] = rule.retention.link(dual)
            if rule.update.anchor.reduce == "learned":
                state[f"steps.{name}"] = torch.zeros(full, device=device, dtype=dtype)
        if rule.links_at_anchors:
            state[f"linear.{name}"] = rule.retention.link(dual)
        if rule.update.solves:
            covariance = (batch, dims.num_heads, dims.key_dim, dims.key_dim)
            state[f"covariance.{name}"] = torch.zeros(covariance, device=device, dtype=dtype)
    return state
