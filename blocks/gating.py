"""Gates as modules: a source's linear map and the gate's own law; [B, T, H, 1 or K, 1 or V]."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from archspec.blocks.carry import Carry
from archspec.blocks.declared import Declared
from archspec.blocks.source import SourceModule, Streams
from archspec.families import Gate, gate_size, gates_of, seen_dims
from archspec.pieces import decays
from archspec.shapes import HeadDims

Aspect = Literal["value", "log_value", "token_step"]


class GateModule(Declared):
    """One gate of a mixer.

    Args:
        gate: the spec's choice.
        path: where its state is kept.
        widths: widths of the streams it may read.
        dims: sizes of the memory's heads.
        depth: (layer, number of layers), for schedules and laws over depth.
        copies: how many values a token has, for rules that take several steps a token; gates without a source
            have one.
        head: sizes of the memory's heads, where ``dims`` are those of pairs.
        rows: how many copies stand side by side on the head axis of ``dims``, for a gate inside one with copies.
    """

    def __init__(
        self,
        gate: Gate,
        path: str,
        widths: Mapping[str, int],
        dims: HeadDims,
        depth: tuple[int, int],
        copies: int = 1,
        head: HeadDims | None = None,
        rows: int | None = None,
    ) -> None:
        super().__init__(depth)
        self.gate = gate
        self.path = path
        self.peers: tuple[GateModule, ...] = (self,)  # a tuple: modules in it stay where they are registered
        self.copies = copies if gate.has_source else 1
        self.rows = self.copies if rows is None else rows
        head = head or dims
        dims = replace(seen_dims(gate, dims, head), num_heads=dims.num_heads * self.copies)
        self.sizes = (dims.num_heads, *gate_size(gate.per, dims))
        self.declare(gate.parameters(dims))
        self.constants = gate.constants(dims.num_heads, *depth)
        self._laid_out: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
        self.source = None
        if gate.has_source:
            d_in = sum(widths[name] for name in gate.from_)
            d_out = self.sizes[0] * self.sizes[1] * self.sizes[2]
            self.source = SourceModule(gate, path, d_in, d_out, vars(dims), has_weights=True)
            self.source.depth = depth
        self.inner = torch.nn.ModuleDict(
            {
                name.replace(".", "_"): GateModule(inner, f"{path}.{name}", widths, dims, depth, 1, head, self.rows)
                for name, inner in gates_of(gate)
            }
        )

    def forward(
        self, streams: Streams, carry: Carry, known: Mapping[str, Tensor], *, aspect: Aspect = "value"
    ) -> Tensor:
        """Return the value, its logarithm, or the token's step of a decay, for the tokens of ``streams``.

        Args:
            known: quantities of the mixer that derived gates need, by path.
        """
        if self.source is None:
            reference = streams["input"]
            z = torch.zeros(1, 1, self.sizes[0], 1, 1, dtype=_wide(reference), device=reference.device)
        else:
            # In at least fp32: a decay rounded to bf16 forgets at the wrong rate within a few hundred tokens.
            found = self.source(streams, carry)
            decay = aspect == "log_value" and self.copies == 1 and decays(self.gate)
            pieces = self.pieces_for(found) if decay else None
            if pieces is not None:
                rate = self.values()["log_rate"].squeeze(-1)  # [H, 1 or K]
                return pieces.log_decay(found.reshape(*found.shape[:2], *self.sizes[:2]), rate).unsqueeze(-1)
            z = found.to(_wide(found)).reshape(*found.shape[:2], *self.sizes)
        given = {
            **{name: tensor.to(z.dtype) for name, tensor in self.values().items()},
            **self._rows(z),
            **self._accumulated(z, carry),
            **self._constants(z),
            **{name: self._in_rows(known[name], streams["input"].shape[1]) for name in self.gate.needs()},
        }
        factors = dict(gates_of(self.gate)) if aspect == "log_value" else {}
        for name, module in self.inner.items():
            if name in self.gate.starting:
                continue
            if name in self.gate.factors and name in factors and _has_log(factors[name]):
                given[f"log.{name}"] = module(streams, carry, known, aspect="log_value")
                given[name] = given[f"log.{name}"].exp()
            else:
                given[name] = module(streams, carry, known)
        value = self._evaluate(z, given, aspect)
        # One row a step: [B, T, S H, ..] becomes [B, S T, H, ..].
        return value if self.copies == 1 else value.reshape(z.shape[0], z.shape[1] * self.copies, -1, *value.shape[3:])

    def _in_rows(self, needed: Tensor, length: int) -> Tensor:
        """Lay a quantity of the mixer out as the copies are: side by side on the head axis [B, T, S H, ..]."""
        if self.rows == 1:
            return needed
        if needed.shape[1] == length * self.rows:  # it has one row a step already
            return needed.reshape(needed.shape[0], length, -1, *needed.shape[3:])
        return needed.repeat(1, 1, self.rows, 1, 1)

    def start(self, streams: Streams, carry: Carry, known: Mapping[str, Tensor]) -> None:
        """Take the value of the gate that this one starts as, where there is one; so do the gates inside."""
        for name, module in self.inner.items():
            if name in self.gate.starting:
                value = module(streams, carry, known)[0, 0].expand(self.sizes)
                self.raw.copy_(self.gate.parameter_of(value))  # type: ignore[operator, attr-defined]
            else:
                module.start(streams, carry, known)  # type: ignore[operator]

    def before_law(self, streams: Streams, carry: Carry) -> Tensor:
        """Return what the gate's own law would take, [B, T, H, 1 or K, 1 or V] in its source's dtype."""
        if self.source is None:
            raise AssertionError("a gate without a source has nothing before its law")
        found: Tensor = self.source(streams, carry)
        return found.reshape(*found.shape[:2], *self.sizes)

    def _rows(self, z: Tensor) -> dict[str, Tensor]:
        """Return the rows that the same gate learns in all layers, for gates that are learned across them."""
        if not self.gate.across_layers:
            return {}
        rows = [peer.values()["row"].to(z.dtype) for peer in self.peers]
        return {"rows": torch.stack(rows), "layer": torch.tensor(self.peers.index(self))}

    def _accumulated(self, z: Tensor, carry: Carry) -> dict[str, Tensor]:
        """Return what a gate needs of all tokens so far, and keep what the next stretch needs."""
        if self.gate.keeps is None:
            return {}
        place = f"{self.path}.{self.gate.keeps}"
        found, kept = self.gate.accumulated(z, carry.take(place))
        carry.put(place, kept)
        return found

    def _evaluate(self, z: Tensor, given: Mapping[str, Tensor], aspect: Aspect) -> Tensor:
        scale = self.gate.scale
        if aspect == "log_value":
            value = self.gate.log_value(z, given)
            return value if scale == 1 else value + math.log(scale)
        if aspect == "token_step":
            return self.gate.token_step(z, given)  # type: ignore[attr-defined, no-any-return]
        value = self.gate.value(z, given)
        return value if scale == 1 else value * scale

    def _constants(self, z: Tensor) -> dict[str, Tensor]:
        key = (z.dtype, z.device)
        if key not in self._laid_out:
            self._laid_out[key] = {
                name: torch.tensor(numbers, dtype=z.dtype, device=z.device)[:, None, None]
                for name, numbers in self.constants.items()
            }
        return self._laid_out[key]


def _has_log(gate: Gate) -> bool:
    """Whether a gate never changes its sign to minus, nor is zero by law, so that its logarithm exists."""
    return gate.value_range[0] >= 0 and gate.value_range[1] > 0 and not gate.starts_at_zero and gate.scale > 0


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def join_layers(layers: torch.nn.ModuleList) -> None:
    """Let every gate that is learned across layers know its peers: those at the same place in the other layers."""
    found: dict[tuple[str, tuple[int, ...]], list[GateModule]] = defaultdict(list)
    for layer in layers:
        for place, module in layer.named_modules():
            if isinstance(module, GateModule) and module.gate.across_layers:
                found[place, module.sizes].append(module)
    for peers in found.values():
        for module in peers:
            module.peers = tuple(peers)
