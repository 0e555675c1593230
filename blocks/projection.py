"""Streams and projections as modules: source, activation, norm, then blend, position and feature map."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from archspec.blocks.activation import activate
from archspec.blocks.carry import Carry
from archspec.blocks.declared import Declared
from archspec.blocks.gating import GateModule
from archspec.blocks.source import SourceModule, Streams
from archspec.declarations import stream_width
from archspec.families import FeatureMap, Norm, Projection, Stream
from archspec.pieces import norm_kind
from archspec.shapes import HeadDims


class NormModule(Declared):
    """A norm with its learned scale, over the last axis; of ``num_heads`` heads when it stands where heads are."""

    def __init__(self, norm: Norm, dim: int, num_heads: int = 1) -> None:
        super().__init__()
        self.norm = norm
        self.declare(norm.parameters_of(num_heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., dim]."""
        kind = norm_kind(self.norm, x.shape[-1])
        pieces = self.pieces_for(x) if kind is not None else None
        if kind is None or pieces is None:
            return self.norm.apply(x, self.values())
        return pieces.norm(x, kind, self.values().get("weight"), None, "silu", self.norm.eps)

    def gated(self, x: Tensor, gate: Tensor, activation: str) -> Tensor:
        """Return norm(x) act(gate) in one piece, where the fused pieces serve x."""
        pieces = self.pieces_for(x)
        if pieces is None:
            raise AssertionError("a gate left for the fused norm needs fused pieces")
        return pieces.norm(x, "rms", self.values().get("weight"), gate, activation, self.norm.eps)


class FeatureModule(Declared):
    """A feature map with its learned parameters."""

    def __init__(self, feature: FeatureMap, num_heads: int, dim: int) -> None:
        super().__init__()
        self.feature = feature
        self.declare(feature.parameters(num_heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return phi(x) for x [B, T, H, K]."""
        return self.feature.apply(x, self.values())


class VectorModule(Declared):
    """A projection that reads no token: one vector a head, the same everywhere."""

    def __init__(self, projection: Projection, groups: int, dim: int) -> None:
        super().__init__()
        self.projection, self.groups, self.dim = projection, groups, dim
        self.declare(projection.own_parameters(groups, dim))

    def forward(self, streams: Streams, carry: Carry) -> Tensor:
        """Return [B, T, G d] for the tokens of ``streams``."""
        like = streams["input"]
        vector = self.projection.vector(self.groups, self.dim, self.values(), like)
        return vector.flatten().expand(*like.shape[:2], -1)


class DerivedModule(nn.Module):
    """A projection that is made of a gate: [B, T, G d], a gate per head alike in all channels."""

    def __init__(self, projection: Projection, groups: int, dim: int) -> None:
        super().__init__()
        self.projection, self.groups, self.dim = projection, groups, dim

    def forward(self, streams: Streams, carry: Carry) -> Tensor:
        """Return the projection for the tokens of ``streams``, which hold the gate [B or 1, T or 1, H, 1 or K, 1]."""
        gate, like = streams[self.projection.derived or ""], streams["input"]
        found = self.projection.derive(gate.squeeze(-1)).to(like.dtype)
        return found.expand(*like.shape[:2], self.groups, self.dim).flatten(2)


class StreamModule(nn.Module):
    """A named signal: source, activation, norm; [B, T, width]."""

    def __init__(self, stream: Stream, path: str, widths: Mapping[str, int], dims: HeadDims) -> None:
        super().__init__()
        d_in = sum(widths[name] for name in stream.from_)
        self.stream = stream
        self.width = stream_width(stream, d_in, dims)
        self.source = SourceModule(stream, path, d_in, self.width, vars(dims), has_weights=stream.has_weights)
        self.norm = NormModule(stream.norm, self.width) if stream.norm is not None else None

    def forward(self, streams: Streams, carry: Carry) -> Tensor:
        """Return the stream for the tokens of ``streams``."""
        x, activation = self.source.before(streams, carry, self.stream.activation)
        x = activate(activation, x)
        return x if self.norm is None else self.norm(x)


class ProjectionModule(nn.Module):
    """Query, key or value: [B, T, G, d] with G groups of heads that share it.

    Args:
        projection: the effective choice (qkv, qk and its own key already laid on each other).
        name: ``query``, ``key`` or ``value``.
        path: where its state is kept.
        widths: widths of the streams it may read.
        dims: sizes of the heads before feature maps.
        dim: channels of one head.
        copies: how many of them a token has, for rules that take several steps a token.
    """

    def __init__(
        self,
        projection: Projection,
        name: str,
        path: str,
        widths: Mapping[str, int],
        dims: HeadDims,
        dim: int,
        copies: int = 1,
    ) -> None:
        super().__init__()
        self.projection, self.name, self.path, self.dim = projection, name, path, dim
        self.place = path.removeprefix("layers.").lstrip("0123456789.")  # the same in every layer
        self.groups = (projection.heads or dims.num_heads) * copies
        parts = projection.parts
        sizes = [part.dim.resolve(vars(dims)) if part.dim is not None else dim for part in parts]
        self.parts = nn.ModuleList(
            ProjectionModule(part, name, f"{path}.parts.{index}", widths, dims, size, copies)
            for index, (part, size) in enumerate(zip(parts, sizes, strict=True))
        )
        d_in, d_out = sum(widths[source] for source in projection.from_), self.groups * dim
        self.source: SourceModule | VectorModule | DerivedModule | None = None
        if projection.derived is not None:
            self.source = DerivedModule(projection, self.groups, dim)
        elif not projection.has_source:
            self.source = VectorModule(projection, self.groups, dim)
        elif not parts:
            self.source = SourceModule(projection, path, d_in, d_out, vars(dims), has_weights=projection.has_weights)
        self.norm = NormModule(projection.norm, dim, self.groups) if projection.norm is not None else None
        self.feature = FeatureModule(projection.feature, self.groups, dim) if projection.feature is not None else None
        blend = projection.blend
        self.blend = GateModule(blend.gate, f"{path}.blend", widths, dims, (0, 1)) if blend is not None else None

    def forward(self, streams: Streams, carry: Carry) -> Tensor:
        """Return [B, T, G, d] for the tokens of ``streams``."""
        if self.source is None:
            x = torch.cat([self._widened(part(streams, carry)) for part in self.parts], dim=-1)
        else:
            activation: str = self.projection.activation
            if isinstance(self.source, SourceModule):
                x, activation = self.source.before(streams, carry, activation)
            else:
                x = self.source(streams, carry)
            x = x.reshape(*x.shape[:2], self.groups, self.dim)
            x = activate(activation, x)
        if self.norm is not None:
            x = self.norm(x)
        if self.blend is not None:
            x = self._blend(x, streams, carry)
        if self.projection.position is not None:
            positions = torch.arange(carry.position, carry.position + x.shape[1], device=x.device)
            x = self.projection.position.apply(x, positions, is_query=self.name == "query")
        return x if self.feature is None else self.feature(x)

    def _widened(self, x: Tensor) -> Tensor:
        """Repeat a part's groups so that every head of the projection has one."""
        return x if x.shape[2] == self.groups else x.repeat_interleave(self.groups // x.shape[2], dim=2)

    def _blend(self, x: Tensor, streams: Streams, carry: Carry) -> Tensor:
        """x + gate (x_first - x): the first layer that blends at this place, as wide, is what later ones read."""
        first = carry.shared.setdefault(f"first.{self.place}.{self.groups}.{self.dim}", x)
        if self.blend is None:
            return x
        # The first layer evaluates its gate too, so that what a layer keeps does not depend on its place.
        gate: Tensor = self.blend(streams, carry, {}).flatten(-2).to(x.dtype)
        return x if first is x else x + gate * (first - x)
