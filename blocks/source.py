"""Sources: the token shift, linear map and causal convolution in front of every stream, projection and gate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from archspec.blocks.activation import activate
from archspec.blocks.carry import Carry
from archspec.blocks.declared import Declared
from archspec.declarations import source_parameters
from archspec.families import Source
from archspec.initial import Parameters
from archspec.pieces import CONV_ACTIVATIONS, convolves

Streams = Mapping[str, Tensor]


class SourceModule(Declared):
    """The stages shift, linear and conv of one source.

    Args:
        source: the spec's choice.
        path: where its state is kept.
        d_in, d_out: channels of the concatenated inputs and of the output.
        sizes: sizes by name, for relative ranks.
        has_weights: whether there is a linear map.
    """

    def __init__(
        self, source: Source, path: str, d_in: int, d_out: int, sizes: Mapping[str, int], *, has_weights: bool
    ) -> None:
        super().__init__()
        self.source = source
        self.path = path
        self.declare(source_parameters(source, d_in, d_out, sizes, has_weights=has_weights))

    def forward(self, streams: Streams, carry: Carry) -> Tensor:
        """Return [B, T, d_out] from the streams [B, T, ..] that the source names."""
        return self.before(streams, carry, "none")[0]

    def before(self, streams: Streams, carry: Carry, activation: str) -> tuple[Tensor, str]:
        """Return the source's [B, T, d_out] and the activation that is still to be applied to it.

        A fused convolution applies ``activation`` itself: ``none`` is then left.
        """
        inputs = [streams[name] for name in self.source.from_]
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=-1)
        values = self.values()
        if "shift_mix" in values:
            x = self._shift(x, values["shift_mix"], carry)
        x = self._mapped(x, values, streams.get(self.product))
        pieces = self.pieces_for(x) if "conv" in values and convolves(self.source) else None
        if pieces is not None and activation in CONV_ACTIVATIONS:
            kept, name = carry.take(f"{self.path}.conv"), CONV_ACTIVATIONS[activation]
            x, last = pieces.convolution(x, values["conv"], values.get("conv_offset"), name, kept)
            carry.put(f"{self.path}.conv", last)
            return x, "none"
        if "conv" in values:
            x = self._convolve(x, values["conv"], carry)
        if "conv_offset" in values:
            x = x + values["conv_offset"]
        return x, activation

    @property
    def product(self) -> str:
        """The name among the streams of what `first_map` gives, where the mixer has computed it already."""
        return f"input @ {self.path}"

    def first_map(self) -> tuple[Tensor, Tensor | None] | None:
        """Return the weight that the mixer's input itself meets first here, and the offset of their product or None.

        There is none where other streams, a shift or a map of blocks come first.
        """
        values = self.values()
        meets_input = self.source.from_ == ("input",) and "shift_mix" not in values
        return self._first_factors(values) if meets_input else None

    def _first_factors(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None] | None:
        """Return the first matrix and the offset that its product takes with it, which the last one does."""
        if "down" in values:
            return values["down"], None
        if "weight" not in values or self.source.block_size is not None:
            return None
        return values["weight"], None if "adapt_down" in values else values.get("offset")

    def _mapped(self, x: Tensor, values: Mapping[str, Tensor], product: Tensor | None) -> Tensor:
        """Return the linear map of x, its adapter and its offset; ``product`` is `first_map`'s, or None."""
        given, offset, adapted = x, values.get("offset"), "adapt_down" in values
        first = self._first_factors(values)
        if first is not None:
            x = _affine(x, *first) if product is None else product
        elif "weight" in values:
            x = _block_diagonal(x, values["weight"])
        if "down" in values:
            x = _affine(activate(self.source.hidden, x), values["up"], None if adapted else offset)
        if adapted:
            x = x + (given @ values["adapt_down"]) @ values["adapt_up"]
        taken = first is not None and not adapted
        return x if offset is None or taken else x + offset

    def adapt(self, adapter: Parameters) -> None:
        """Add a learned x A B to the linear map; ``adapter`` declares A (``adapt_down``) and B (``adapt_up``)."""
        self.declare(adapter)

    def _shift(self, x: Tensor, mix: Tensor, carry: Carry) -> Tensor:
        """x_t + mix (x_{t-1} - x_t); before the first token stands zero."""
        last = carry.take(f"{self.path}.shift")
        last = torch.zeros_like(x[:, :1]) if last is None else last
        carry.put(f"{self.path}.shift", x[:, -1:])
        before = torch.cat([last.to(x.dtype), x[:, :-1]], dim=1)
        return x + mix * (before - x)

    def _convolve(self, x: Tensor, weight: Tensor, carry: Carry) -> Tensor:
        """Causal depthwise convolution over time: y_t = sum_i weight_i x_{t - width + 1 + i}."""
        width = weight.shape[-1]
        kept = carry.take(f"{self.path}.conv")
        if kept is None:
            kept = x.new_zeros(x.shape[0], width - 1, x.shape[-1])
        padded = torch.cat([kept.to(x.dtype), x], dim=1)
        carry.put(f"{self.path}.conv", padded[:, padded.shape[1] - (width - 1) :])
        return functional.conv1d(padded.transpose(1, 2), weight[:, None], groups=x.shape[-1]).transpose(1, 2)


def _affine(x: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    return x @ weight if offset is None else functional.linear(x, weight.t(), offset)


def _block_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    blocks, size, _ = weight.shape
    return torch.einsum("btns,nsr->btnr", x.reshape(*x.shape[:-1], blocks, size), weight).flatten(-2)
