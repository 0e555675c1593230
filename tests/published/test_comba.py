"""Comba (Hu et al. 2025): the error is read with p = sigmoid(c) k, the query corrected by D p."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import SMALL_HEADS, Parameters, convolved, hold, rms, sigmoid, softplus, unit


def comba(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = a_t S_{t-1} + b_t k (v - (a_t S_{t-1})^T p)^T; o = S_t^T (q - D p) / sqrt(K); sigmoid(W_g x) * norm(o)."""
    (q, q_kept), (k, k_kept), (v, v_kept) = (convolved(x, p, name, 3) for name in ("query", "key", "value"))
    q, k = unit(q), unit(k)
    gate = "gates.retention/gate"
    z = x @ p[f"{gate}.source.weight"] + p[f"{gate}.source.offset"]
    a = torch.exp(-torch.exp(p[f"{gate}.log_rate"].flatten()) * softplus(z))[..., None, None]
    b = sigmoid(x @ p["gates.update/step_size.source.weight"])[..., None, None]
    read_key = sigmoid(p["gates.bias/read_key/scale.raw"].reshape(3, 1)) * k
    q = q - p["gates.readout/correction.raw"].reshape(3, 1) * read_key
    s = torch.zeros(x.shape[0], 3, q.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        s = a[:, t] * s
        surprise = v[:, t] - torch.einsum("bhk,bhkv->bhv", read_key[:, t], s)
        s = s + b[:, t] * torch.einsum("bhk,bhv->bhkv", k[:, t], surprise)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) / q.shape[-1] ** 0.5)
    o = rms(torch.stack(outputs, dim=1), p["norm.weight"]).flatten(2)
    gated = sigmoid(x @ p["gates.readout/gate.source.weight"]) * o
    return gated @ p["output"], {"dual.w": s, "query.conv": q_kept, "key.conv": k_kept, "value.conv": v_kept}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_comba(backend: str) -> None:
    hold("comba", comba, backend, length=70, narrow=SMALL_HEADS)
