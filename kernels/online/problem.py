"""One call of online_memory after its checks: what the reference, the chunked form and the step all work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Linear = Callable[[str, Tensor], Tensor]
"""``linear(name, x)``: the product of x [B, H, C, d_in] with the weight of that name."""

Network = Callable[[Linear, Tensor], Tensor]
"""``network(linear, x)``: M(W, x) for x [B, H, C, K]; it calls ``linear`` once for every weight."""

Error = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""``error(prediction, value, inputs)``: dl/dprediction token by token, all [B, H, C, ...]."""

Weights = dict[str, Tensor]

Order = Literal["decay_first", "together", "step_first"]
"""Whether a token's step is decayed with the rest (``step_first``) or not; the first two coincide here, because
gradients are taken at the undecayed anchor."""

Reduce = Literal["sum", "mean"]
"""Whether the steps of a chunk add up or are averaged."""

Read = Literal["after", "before"]
"""Whether a token reads the memory with its own step or without."""


class OnlineState(NamedTuple):
    """Where an online memory stands between two tokens.

    Args:
        weights: the current weights by name, each [B, H, d_in, d_out].
        anchor: the weights at the last multiple of the chunk size, where gradients are taken.
        momentum: the momentum buffers by name, or the sums of the steps since the anchor where their ``shares`` are
            given; None without either.
        phase: tokens since the anchor, in [0, chunk_size).
    """

    weights: Weights
    anchor: Weights
    momentum: Weights | None
    phase: int


@dataclass(frozen=True)
class Problem:
    """Checked tensors, heads before time, in the dtype of the computation (fp32, or fp64 for fp64 inputs).

    Args:
        query, key, value: [B, H, T, d].
        read_key: what the prediction is made at, where it is not the key [B, H, T, K].
        error_inputs: what else the error needs, by name [B, H, T, ...].
        step_size, log_decay, momentum: gates by weight [B or 1, H or 1, T, d_in or 1, d_out or 1]. Weights that share
            a gate share the tensor.
        shares: c [chunk_size], the factor on the sum of the steps since the anchor; None for 1/i.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    read_key: Tensor | None
    error_inputs: Mapping[str, Tensor]
    step_size: Weights
    log_decay: Weights | None
    momentum: Weights | None
    network: Network
    error: Error
    chunk_size: int
    order: Order
    reduce: Reduce
    read: Read
    shares: Tensor | None = None

    def delta(self, prediction: Tensor) -> Tensor:
        """Return the error at all tokens [B, H, T, V]."""
        return self.error(prediction, self.value, self.error_inputs)

    def split(self, lengths: Sequence[int]) -> list[Problem]:
        """Cut the problem along time. (One split has one gradient; slices would each fill a tensor of all tokens.)"""
        parts: dict[int, Sequence[Tensor]] = {}

        def cut(x: Tensor) -> Sequence[Tensor]:
            if id(x) not in parts:
                parts[id(x)] = torch.split(x, list(lengths), dim=2)
            return parts[id(x)]

        def cut_all(named: Mapping[str, Tensor] | None, n: int) -> Weights | None:
            return None if named is None else {name: cut(x)[n] for name, x in named.items()}

        return [
            replace(
                self,
                query=cut(self.query)[n],
                key=cut(self.key)[n],
                value=cut(self.value)[n],
                read_key=None if self.read_key is None else cut(self.read_key)[n],
                error_inputs=cut_all(self.error_inputs, n) or {},
                step_size=cut_all(self.step_size, n) or {},
                log_decay=cut_all(self.log_decay, n),
                momentum=cut_all(self.momentum, n),
            )
            for n in range(len(lengths))
        ]


def product(weights: Mapping[str, Tensor]) -> Linear:
    """Return the ``linear`` of given weights."""
    return lambda name, x: x @ weights[name]
