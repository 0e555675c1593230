"""A memory mixer as a module: streams, projections, gates, the rule in some form, and the read-out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from archspec.blocks.carry import Carry
from archspec.blocks.declared import Declared, Named
from archspec.blocks.form import Form, Routing
from archspec.blocks.gating import Aspect, GateModule
from archspec.blocks.learned import MemoryWeights, OutputModule
from archspec.blocks.projection import NormModule, ProjectionModule, StreamModule
from archspec.blocks.reading import expand_heads, read_only
from archspec.blocks.recurrence import recurrence
from archspec.blocks.rule import MemoryState, Quantities, initial_state
from archspec.blocks.source import SourceModule
from archspec.declarations import stream_widths
from archspec.families import starting_needs
from archspec.initial import FAN_IN, Initial, Parameter
from archspec.pieces import readout_gate
from archspec.rule import Rule
from archspec.schema import MemoryMixer
from archspec.shapes import HeadDims

UNLAID = " of pairs"
"""Ends the names under which a retention's gates are known as they are, before they are laid on all channels."""


class MemoryMixerModule(Declared):
    """x [B, T, D] to [B, T, D] through one memory per head.

    Args:
        config: the checked choices.
        path: where its state is kept.
        model_dim: D.
        depth: (layer, number of layers).
        form: how the rule is run.
    """

    output: Tensor
    prefix: Tensor

    def __init__(
        self, config: MemoryMixer, path: str, model_dim: int, depth: tuple[int, int], form: Form = recurrence
    ) -> None:
        super().__init__(depth)
        self.config, self.path, self.form = config, path, form
        self.dims = config.dims(model_dim)
        self.rule = Rule.of(config, model_dim)
        self._add_inputs(config.projected_dims(model_dim), depth)
        self.memory = MemoryWeights(self.rule)
        self._add_readout(model_dim)
        if config.prefix:
            self.declare({"prefix": Parameter((config.prefix, model_dim), Initial(normal=0.02))})

    def _add_inputs(self, projected: HeadDims, depth: tuple[int, int]) -> None:
        """Add what the memory's inputs are made by: streams, projections and gates."""
        config, path, dims = self.config, self.path, self.dims
        widths = stream_widths(config, projected)
        steps = config.update.steps_per_token
        self.streams = Named(
            {
                name: StreamModule(stream, f"{path}.streams.{name}", widths, projected)
                for name, stream in config.streams.items()
            }
        )
        self.projections = nn.ModuleDict(
            {
                name: ProjectionModule(
                    config.projection(name),  # type: ignore[arg-type]
                    name,
                    f"{path}.{name}",
                    widths,
                    projected,
                    projected.value_dim if name == "value" else projected.key_dim,
                    1 if name == "query" else steps,
                )
                for name in ("query", "key", "value")
            }
        )
        own = config.retention.gate_dims(dims)
        self.gates = nn.ModuleDict(
            {
                name.replace(".", "/"): GateModule(
                    gate,
                    f"{path}.{name}",
                    widths,
                    own if name.startswith("retention.") else dims,
                    depth,
                    steps if name in Quantities.stepped_gates else 1,
                    dims,
                )
                for name, gate in config.named_gates()
            }
        )
        position = config.projection("query").position
        self.score_decay = (
            GateModule(position.score_decay(), f"{path}.score_decay", widths, dims, depth)
            if position is not None and position.on_scores
            else None
        )

    def _add_readout(self, model_dim: int) -> None:
        """Add what comes after the memory: norms, the gate, and what leads back to the model's width."""
        config, dims = self.config, self.dims
        read_key = config.bias.read_key
        self.read_key_norm = (
            NormModule(read_key.norm, dims.key_dim, dims.num_heads)
            if read_key is not None and read_key.norm is not None
            else None
        )
        norm = config.readout.norm
        inner = dims.num_heads * dims.value_dim
        width = dims.value_dim if norm is None or norm.over == "head" else inner
        self.norm = NormModule(norm, width, dims.num_heads) if norm is not None else None
        self.gate_activation = readout_gate(config.readout, width)
        if not config.stages:
            self.declare({"output": Parameter((inner, model_dim), FAN_IN, decayed=True)})
        self.output_stages = nn.ModuleList()
        for stage in config.stages:
            self.output_stages.append(OutputModule(stage, inner, model_dim))
            inner = stage.width(inner, model_dim)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Return the mixer's output [B, T, D] for x [B, T, D]; the state passes through ``carry``."""
        if not self.config.prefix:
            return self._mix(x, carry)
        shifted = replace(carry, position=carry.position + self.config.prefix)
        if carry.incoming is not None:
            return self._mix(x, shifted)
        # The learned tokens are read before the first of a sequence; they are not predicted.
        learned = self.prefix.to(x.dtype).expand(x.shape[0], -1, -1)
        shifted.position = carry.position
        return self._mix(torch.cat([learned, x], dim=1), shifted)[:, self.config.prefix :]

    def look_up(self, x: Tensor, carry: Carry, state: MemoryState) -> Tensor:
        """Return what x [B, T, D] reads from a state that it does not change, [B, T, D].

        Only streams, query and read-out run; ``carry`` passes on their convolutions and shifts.
        """
        streams = self._streams(x, carry)
        query = expand_heads(self.projections["query"](streams, carry), self.dims.num_heads)
        streams["query"] = query.flatten(2)
        gates = self._gates(streams, {"query": query}, carry, below="readout.")
        read = read_only(self.rule, self._untouched(query), state, query)
        return self.project(self._readout(read, streams, gates), x)

    def initial_state(self, x: Tensor) -> MemoryState:
        """Return the state before the first token, for the batch, dtype and device of x [B, T, D]."""
        empty = x.new_zeros(x.shape[0], 0, self.dims.num_heads, self.dims.key_dim)
        return initial_state(self.rule, self._untouched(empty))

    def _untouched(self, query: Tensor) -> Quantities:
        """Return the quantities of a memory that is only read: nothing to write, no gate."""
        return Quantities(query, query[:, :0], query[:, :0], {}, self.memory.start(), self.memory.network())

    def _streams(self, x: Tensor, carry: Carry, products: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        streams = {"input": x, **(products or {})}
        for name, stream in self.streams.items():
            streams[name] = stream(streams, carry)
        return streams

    @cached_property
    def _sources(self) -> tuple[SourceModule, ...]:
        owners = [*(module for _, module in self.streams.items()), *self.projections.values(), *self.gates.values()]
        owners += [part for owner in owners for part in getattr(owner, "parts", ())]
        return tuple(owner.source for owner in owners if isinstance(owner.source, SourceModule))

    def _products(self, x: Tensor) -> dict[str, Tensor]:
        """Return the first products of all sources that read x, by their names, where x is to have a gradient.

        Made together, they add its parts up themselves.
        """
        pieces = self.pieces_for(x)
        if pieces is None or not (torch.is_grad_enabled() and x.requires_grad):
            return {}
        maps = {source.product: source.first_map() for source in self._sources}
        found = {name: factors for name, factors in maps.items() if factors is not None}
        return dict(zip(found, pieces.maps(x, list(found.values())), strict=True)) if len(found) > 1 else {}

    def _mix(self, x: Tensor, carry: Carry) -> Tensor:
        return self.project(self.read_out(x, carry), x)

    def project(self, read: Tensor, x: Tensor) -> Tensor:
        """Return the mixer's output [B, T, D] from its read-out [B, T, H V] and x [B, T, D], what it was given."""
        if not self.config.stages:
            return read @ self.output
        for stage in self.output_stages:
            read = stage(read, x)
        return read

    def without_output(self) -> None:
        """Drop the output projection, for compositions that project once after combining what ``read_out`` returns."""
        del self._parameters["output"], self.laws["output"]

    def read_out(
        self, x: Tensor, carry: Carry, routing: Routing | None = None, given: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Write x [B, T, D] and return the read-out [B, T, H V] before the output projection.

        Args:
            routing: which tokens the memory takes, and how strongly it writes them; None is all.
            given: projections [B, T, G, d] that another mixer has computed already, by name.
        """
        streams = self._streams(x, carry, {} if given else self._products(x))
        known: dict[str, Tensor] = {}
        made_of = {module.projection.derived for module in self.projections.values()} - {None}  # type: ignore[union-attr]
        for path in made_of:
            self._evaluated(path, streams, carry, known)  # type: ignore[arg-type]
        own = {name: module({**streams, **known}, carry) for name, module in self.projections.items()}
        projected = self._expanded({**own, **(given or {})})
        every = {name: expand_heads(tensor, self.dims.num_heads) for name, tensor in projected.items()}
        streams.update({name: tensor.flatten(2) for name, tensor in every.items()})
        gates = self._gates(streams, every, carry, known=known)
        if routing is not None:
            gates = routing.applied(gates, self.config.update.steps_per_token)
        quantities = self.quantities(projected, gates, routed=routing is not None, inplace=carry.inplace)
        read, state = self.form(self.rule, quantities, carry.take_all(self.path), carry.position)
        for name, tensor in state.items():
            carry.put(f"{self.path}.{name}", tensor)
        return self._readout(read, streams, gates)

    def _expanded(self, projected: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give every head its own copy of shared projections, except where a memory of tokens stores the groups.

        With several steps a token, the keys and values of its steps come one after another.
        """
        steps = self.config.update.steps_per_token
        if steps > 1:
            projected = {
                name: tensor
                if name == "query"
                else tensor.reshape(tensor.shape[0], tensor.shape[1] * steps, -1, tensor.shape[-1])
                for name, tensor in projected.items()
            }
        groups = {name: tensor.shape[2] for name, tensor in projected.items()}
        shared = self.rule.memory.grows and groups["key"] == groups["value"]
        return {
            name: tensor if shared and name != "query" else expand_heads(tensor, self.dims.num_heads)
            for name, tensor in projected.items()
        }

    def quantities(
        self,
        projected: Mapping[str, Tensor],
        gates: Mapping[str, Tensor],
        *,
        routed: bool = False,
        inplace: bool = False,
    ) -> Quantities:
        """Return what the rule consumes, from the projections [B, T, H, d] and the mixer's gates by path."""
        key = projected["key"]
        read_key = None
        if self.config.bias.read_key is not None:
            scale = gates.get("bias.read_key.scale")
            read_key = key if scale is None else key * scale.squeeze(-1).to(key.dtype)
            read_key = read_key if self.read_key_norm is None else self.read_key_norm(read_key)
        query = projected["query"]
        if "readout.correction" in gates:
            base = expand_heads(key if read_key is None else read_key, self.dims.num_heads)
            query = query - gates["readout.correction"].squeeze(-1).to(query.dtype) * base
        return Quantities(
            query=query,
            key=key,
            value=projected["value"],
            gates={name: gate for name, gate in gates.items() if name.startswith(("bias.", "retention.", "update."))},
            start=self.memory.start(),
            parameters=self.memory.network(),
            read_key=read_key,
            steps=self.config.update.steps_per_token,
            routed=routed,
            inplace=inplace,
        )

    def _gates(
        self,
        streams: Mapping[str, Tensor],
        projected: Mapping[str, Tensor],
        carry: Carry,
        below: str = "",
        known: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Evaluate every gate (of a path that starts with ``below``) once; ``known`` are those that have been."""
        known = {name: x.unsqueeze(-2 if name == "value" else -1) for name, x in projected.items()} | dict(known or {})
        paths = [path for path, _ in self.config.named_gates() if path.startswith(below)]
        fused = self.gate_activation is not None and self.pieces_for(streams["input"]) is not None
        raw = "readout.gate" if fused and "readout.gate" in paths else None
        found = {
            path: self._stepped(path, self._evaluated(path, streams, carry, known)) for path in paths if path != raw
        }
        if raw is not None:
            module: GateModule = self.gates["readout/gate"]  # type: ignore[assignment]
            found["readout.gate.raw"] = module.before_law(streams, carry)
        if self.score_decay is not None:
            faded = self.score_decay(streams, carry, known, aspect="log_value")
            found["retention.gate"] = found["retention.gate"] + faded if "retention.gate" in found else faded
        return found

    def _evaluated(self, path: str, streams: Mapping[str, Tensor], carry: Carry, known: dict[str, Tensor]) -> Tensor:
        """Return a quantity by its path, from ``known``, to which are added it and what it is derived from."""
        if path in known:
            return known[path]
        owner = path.removesuffix(".token_step")
        aspect: Aspect = "token_step" if owner != path else "log_value" if path == "retention.gate" else "value"
        module: GateModule = self.gates[owner.replace(".", "/")]  # type: ignore[assignment]
        for needed in module.gate.all_needs():
            self._evaluated(needed, streams, carry, known)
        found = module(streams, carry, self._seen_from(path, known), aspect=aspect)
        known[path] = self._laid_out(found)
        if path.startswith("retention."):
            known[path + UNLAID] = found
        return known[path]

    def _seen_from(self, path: str, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the gate at ``path`` knows: the retention's see each other with one value for each pair."""
        if not path.startswith("retention."):
            return dict(known)
        return {**known, **{name.removesuffix(UNLAID): x for name, x in known.items() if name.endswith(UNLAID)}}

    @torch.no_grad()
    def settle(self) -> None:
        """Let gates that start as others do take the values that those have for a zero input."""
        widths = stream_widths(self.config, self.config.projected_dims(self.dims.model_dim))
        streams = {name: torch.zeros(1, 1, width) for name, width in widths.items()}
        for path, gate in self.config.named_gates():
            known: dict[str, Tensor] = {}
            for needed in starting_needs(gate):
                self._evaluated(needed, streams, Carry(None, 0), known)
            module: GateModule = self.gates[path.replace(".", "/")]  # type: ignore[assignment]
            module.start(streams, Carry(None, 0), self._seen_from(path, known))

    def _laid_out(self, gate: Tensor) -> Tensor:
        """Return a gate on the axes of the head, where it has one value for each pair of their channels."""
        whole = gate.shape[-2] in (1, self.dims.key_dim) and gate.shape[-1] in (1, self.dims.value_dim)
        return gate if whole else self.rule.retention.laid_out(gate)

    def _stepped(self, path: str, gate: Tensor) -> Tensor:
        """Give all steps of a token the same value of a gate that has one a token (a named or derived one)."""
        steps = self.config.update.steps_per_token
        module: GateModule = self.gates[path.replace(".", "/")]  # type: ignore[assignment]
        if path not in Quantities.stepped_gates or steps == 1 or module.copies > 1 or gate.shape[1] == 1:
            return gate
        return gate.repeat_interleave(steps, dim=1)

    def _readout(self, read: Tensor, streams: Mapping[str, Tensor], gates: Mapping[str, Tensor]) -> Tensor:
        """Apply norm, skip and gate in the spec's order to o [B, T, H, V]; return [B, T, H V]."""
        readout = self.config.readout
        for stage in readout.order:
            if stage == "norm" and self.norm is not None:
                over_model = readout.norm is not None and readout.norm.over == "model"
                shape, raw = read.shape, gates.get("readout.gate.raw")
                read = read.flatten(2) if over_model else read
                if raw is None:
                    read = self.norm(read)
                else:
                    read = self.norm.gated(read, raw.reshape(read.shape), self.gate_activation or "none")
                read = read.reshape(shape)
            elif stage == "skip" and readout.skip is not None:
                skipped = streams[readout.skip.of].reshape(read.shape)
                read = read + gates["readout.skip.gate"].squeeze(-2).to(read.dtype) * skipped
            elif stage == "gate" and "readout.gate" in gates:
                read = read * gates["readout.gate"].squeeze(-2).to(read.dtype)
        return read.flatten(2)

    def memory_marks(self) -> list[str]:
        """Return what the paths of the memory's own tensors contain, among all that the mixer keeps."""
        return [f"{self.path}.{kind}" for kind in ("dual.", "keys", "values", "statistics.")]

    def associate(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Write pairs straight into a fresh memory and read it: keys [B, N, H, K], values [B, N, H, V].

        Each pair is one token of the mixer's own rule, with its gates at the values they have for a zero input.

        Returns:
            What each of ``queries`` [B, M, H, K] reads from the final memory, without being written: [B, M, H, V].
        """
        # A rule of several steps a token takes them all with the same pair.
        steps = self.config.update.steps_per_token
        written = (keys.repeat_interleave(steps, dim=1), values.repeat_interleave(steps, dim=1))
        projected = {"query": keys, "key": written[0], "value": written[1]}
        # The zero of the stream, not of the model: gates see nothing of the pairs.
        streams = {
            name: keys.new_zeros(*keys.shape[:2], width)
            for name, width in stream_widths(self.config, self.config.projected_dims(self.dims.model_dim)).items()
        }
        carry = Carry(None, 0)
        quantities = self.quantities(projected, self._gates(streams, projected, carry))
        _, state = self.form(self.rule, quantities, None, 0)
        return read_only(self.rule, quantities, state, queries)
