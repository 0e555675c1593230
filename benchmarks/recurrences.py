"""The recurrences that `benchmarks.kernels` times: their inputs, our call and a peer's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from archspec.kernels import delta_rule, linear_attention

Shape = tuple[int, int, int, int]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """One recurrence: how to make its inputs, ours and the peer's call."""

    inputs: Callable[[Shape], Inputs]
    ours: Callable[..., Tensor]
    fla: Callable[..., Tensor]


def _base(shape: Shape, unit: bool) -> Inputs:
    B, T, H, D = shape
    q, k, v = (torch.randn(B, T, H, D, device="cuda") for _ in range(3))
    if unit:
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    return {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16()}


def _inputs(gate: str = "none", delta: bool = False) -> Callable[[Shape], Inputs]:
    def make(shape: Shape) -> Inputs:
        torch.manual_seed(0)
        B, T, H, D = shape
        made = _base(shape, delta)
        if delta:
            made["beta"] = torch.rand(B, T, H, device="cuda")
        if gate == "token":
            made["g"] = logsigmoid(torch.randn(B, T, H, device="cuda") + 3)
        if gate == "key":
            made["g"] = logsigmoid(torch.randn(B, T, H, D, device="cuda") + 3) / 4
        return made

    return make


def _linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, backend: str = "triton") -> Tensor:
    o: Tensor = linear_attention(q, k, v, g, backend=backend)[0]
    return o


def _delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, backend: str = "triton") -> Tensor:
    o: Tensor = delta_rule(q, k, v, beta, g, backend=backend)[0]
    return o


def _fla(module: str, name: str, **options: bool) -> Callable[..., Tensor]:
    def call(**inputs: Tensor) -> Tensor:
        o: Tensor = getattr(importlib.import_module(f"fla.ops.{module}"), name)(**inputs, **options)[0]
        return o

    return call


OPS: dict[str, Op] = {
    "linear": Op(_inputs(), _linear, _fla("linear_attn", "chunk_linear_attn", normalize=False)),
    "scalar_gated": Op(_inputs("token"), _linear, _fla("simple_gla", "chunk_simple_gla")),
    "gla": Op(_inputs("key"), _linear, _fla("gla", "chunk_gla")),
    "delta": Op(_inputs(delta=True), _delta, _fla("delta_rule", "chunk_delta_rule")),
    "gated_delta": Op(_inputs("token", True), _delta, _fla("gated_delta_rule", "chunk_gated_delta_rule")),
    "kda": Op(_inputs("key", True), _delta, _fla("kda", "chunk_kda")),
}
