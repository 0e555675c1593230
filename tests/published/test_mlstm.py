"""The mLSTM block of xLSTM (Beck et al. 2024), equations 19 to 27, with the running maximum of its appendix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, short_convolution, silu, softplus

HEADS = 4


def blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """Return x times a block-diagonal matrix, its blocks [N, 4, 4]."""
    return torch.cat([x[..., 4 * n : 4 * n + 4] @ block for n, block in enumerate(blocks)], dim=-1)


def mlstm(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """C = f' C + i' k v^T; n = f' n + i' k; h = C^T q / max(|n . q|, e^-m), f' and i' relative to the maximum m."""
    inner = x @ p["streams.inner.source.weight"]
    convolved, kept = short_convolution(inner, p["streams.conv.source.conv"])
    convolved = silu(convolved + p["streams.conv.source.conv_offset"])
    q, k, v = (
        blockwise(source, p[f"projections.{name}.source.weight"])
        for name, source in (("query", convolved), ("key", convolved), ("value", inner))
    )
    together = torch.cat([q, k, v], dim=-1)

    def gate(name: str) -> Tensor:
        return together @ p[f"gates.{name}.source.weight"] + p[f"gates.{name}.source.offset"]

    log_f, log_i = -softplus(-gate("retention/gate")), gate("update/step_size")  # [B, T, H]
    q, k, v = heads(q, HEADS), heads(k, HEADS) / (q.shape[-1] // HEADS) ** 0.5, heads(v, HEADS)
    c = torch.zeros(x.shape[0], HEADS, k.shape[-1], v.shape[-1], dtype=x.dtype)
    n = torch.zeros(x.shape[0], HEADS, k.shape[-1], dtype=x.dtype)
    m = torch.zeros(x.shape[0], HEADS, dtype=x.dtype)
    outputs, floored = [], []
    for t in range(x.shape[1]):
        highest = torch.maximum(log_f[:, t] + m, log_i[:, t])
        f, i = torch.exp(log_f[:, t] + m - highest)[..., None], torch.exp(log_i[:, t] - highest)[..., None]
        m = highest
        c = f[..., None] * c + torch.einsum("bhk,bhv->bhkv", i * k[:, t], v[:, t])
        n = f * n + i * k[:, t]
        total = torch.maximum((n * q[:, t]).sum(-1).abs(), torch.exp(-m))
        floored.append((total == torch.exp(-m)).double().mean().item())
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], c) / total[..., None])
    assert 0.05 < sum(floored) / len(floored) < 0.95, "totals must lie on both sides of the floor"
    h = torch.stack(outputs, dim=1)
    centred = h - h.mean(-1, keepdim=True)
    h = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6)
    h = (h * p["norm.weight"] + p["norm.shift"]).flatten(2)
    h = (h + p["gates.readout/skip/gate.raw"].flatten() * convolved) * silu(x @ p["gates.readout/gate.source.weight"])
    # The state that is kept has neither the maximum taken out nor the keys' scale put in.
    kept_state = torch.cat([c, n[..., None]], dim=-1) * torch.exp(m)[..., None, None] * k.shape[-1] ** 0.5
    return h @ p["output"], {"dual.w": kept_state, "streams.conv.conv": kept}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_mlstm(backend: str) -> None:
    hold("mlstm", mlstm, backend, length=70)
