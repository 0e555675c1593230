"""A multi-layer perceptron per head: deep associative memory, trained as it reads."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from archspec.component import Count, Flag, Off, Positive
from archspec.families import Activation, Dim, FeatureMap, Linear, Memory, Per
from archspec.initial import FAN_IN, ONES, ZEROS, Initial, Parameter, Parameters
from archspec.shapes import HeadDims

if TYPE_CHECKING:
    from torch import Tensor


class Mlp(Memory, kind="mlp"):
    """M(W, x) = [x +] [LN] W_L^T s(... s(W_1^T phi(x))): L layers, inner width expansion * K.

    Args:
        depth: L, number of weight matrices (the gating matrix not counted).
        expansion: inner width over K.
        activation: s, between layers.
        gated: each inner layer is s(W_i^T x) * (U_i^T x) (Atlas++).
        residual: add x; requires key_dim = value_dim.
        norm: LayerNorm with learned scale and shift, on the input (``pre``) or on the output before the residual
            (``post``). The outer loop learns them; updates do not touch them.
        offsets: each layer adds a vector, which updates move like a weight.
        feature: phi, what the first layer sees of x; the residual adds x itself (Atlas).
        init: law of the learned start weights.

    Source: TTT (arXiv:2407.04620), section 2.6; Titans (arXiv:2501.00663), section 3.1; Miras (arXiv:2504.13173),
    section 5 (residual and post-norm, expansion 4).
    """

    depth: Annotated[Count, Field(le=8)] = 2
    expansion: Positive = 4.0
    activation: Activation = "gelu"
    gated: Flag = False
    residual: Flag = False
    norm: Literal["none", "pre", "post"] = "none"
    offsets: Flag = False
    feature: Annotated[FeatureMap | None, Off] = None
    init: Initial = FAN_IN

    def _layers(self, dims: HeadDims) -> list[tuple[int, int]]:
        inner = Dim(ratio=self.expansion, of="key_dim").resolve({"key_dim": dims.key_dim})
        entry = dims.key_dim if self.feature is None else self.feature.output_dim(dims.key_dim)
        sizes = [entry, *[inner] * (self.depth - 1), dims.value_dim]
        return list(pairwise(sizes))

    def weights(self, dims: HeadDims) -> Mapping[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for index, (d_in, d_out) in enumerate(self._layers(dims), start=1):
            found[f"w{index}"] = (d_in, d_out)
            if self.gated and index < self.depth:
                found[f"u{index}"] = (d_in, d_out)
            if self.offsets:
                found[f"b{index}"] = (1, d_out)
        return found

    def initial(self, dims: HeadDims) -> Parameters:
        return {
            name: Parameter(
                (dims.num_heads, *shape), ZEROS if name.startswith("b") else self.init, decayed=not name.startswith("b")
            )
            for name, shape in self.weights(dims).items()
        }

    def parameters(self, dims: HeadDims) -> Parameters:
        found: dict[str, Parameter] = {}
        if self.feature is not None:
            learned = self.feature.parameters(dims.num_heads, dims.key_dim)
            found.update({f"feature_{name}": parameter for name, parameter in learned.items()})
        if self.norm != "none":
            width = dims.key_dim if self.norm == "pre" else dims.value_dim
            shape = (dims.num_heads, 1, width)
            found.update({"norm_scale": Parameter(shape, ONES), "norm_shift": Parameter(shape, ZEROS)})
        return found

    def network(self, linear: Linear, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        from archspec.blocks.activation import activate
        from archspec.blocks.normalization import layer_norm

        skip = x
        if self.norm == "pre":
            x = layer_norm(x, parameters["norm_scale"], parameters["norm_shift"])
        if self.feature is not None:
            x = self._featured(x, parameters)
        for index in range(1, self.depth + 1):
            last = index == self.depth
            inner = x
            x = linear(f"w{index}", inner)
            if self.offsets:
                x = x + linear(f"b{index}", inner.new_ones(1).expand(*inner.shape[:-1], 1))
            if not last:
                x = activate(self.activation, x)
                if self.gated:
                    x = x * linear(f"u{index}", inner)
        if self.norm == "post":
            x = layer_norm(x, parameters["norm_scale"], parameters["norm_shift"])
        return x + skip if self.residual else x

    def _featured(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return phi(x) for x [B, H, C, K]; feature maps are written for [B, T, H, K]."""
        learned = {
            name.removeprefix("feature_"): tensor for name, tensor in parameters.items() if name.startswith("feature_")
        }
        return self.feature.apply(x.transpose(1, 2), learned).transpose(1, 2) if self.feature is not None else x

    def axis(self, weight: str, per: Per) -> Literal["none", "input", "output", "both", "illegal"]:
        """``per: key`` is the model-sized axis of each matrix: the input of the first layer, the output of the last."""
        if per == "head":
            return "none"
        if per != "key" or self.depth > 2 or self.feature is not None:
            return "illegal"
        if weight == f"w{self.depth}" and self.depth > 1:
            return "output"
        return "illegal" if weight.startswith("b") else "input"
