"""HGRN2 (Qin et al. 2024), section 3, with the lower bounds of HGRN (Qin et al. 2023), equation 5."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, perturbed, rms, sigmoid, silu

LAYER = 2
ROW = "gates.retention/gate.inner.bound.row"


def bounds(rows: list[Tensor]) -> list[Tensor]:
    """Return cumsum(softmax(Gamma)) - softmax(Gamma)_0 for each layer, Gamma [L, H, K]."""
    powers = [torch.exp(row) for row in rows]
    shares = [power / sum(powers) for power in powers]  # type: ignore[operator]
    return [sum(shares[1 : layer + 1], torch.zeros_like(shares[0])) for layer in range(len(rows))]


def rows(backend: str) -> list[Tensor]:
    """Return Gamma of the model that ``hold`` makes, by layer."""
    layers: Any = perturbed("hgrn2", backend).layers
    return [layer.mixer.get_parameter(ROW).squeeze(-1) for layer in layers]


def hgrn2(x: Tensor, p: Parameters, others: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = Diag(a_t) S_{t-1} + (1 - a_t) v_t^T, a = b + (1 - b) sigmoid(x W_f); o = S^T silu(x W_q) / sqrt(K)."""
    gamma = [*others[:LAYER], p[ROW].squeeze(-1), *others[LAYER + 1 :]]
    bound = bounds(gamma)[LAYER]
    q = silu(heads(x @ p["projections.query.source.weight"], 2))
    v = heads(x @ p["projections.value.source.weight"], 2)
    a = bound + (1 - bound) * sigmoid(heads(x @ p["gates.retention/gate.source.weight"], 2))
    s = torch.zeros(x.shape[0], 2, q.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        s = a[:, t, :, :, None] * s + torch.einsum("bhk,bhv->bhkv", 1 - a[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) / q.shape[-1] ** 0.5)
    return rms(torch.stack(outputs, dim=1).flatten(2), p["norm.weight"]) @ p["output"], {"dual.w": s}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_hgrn2(backend: str) -> None:
    others = rows(backend)
    hold("hgrn2", lambda x, p: hgrn2(x, p, others), backend, length=70, layer=LAYER)


def test_every_layer_learns_from_every_bound() -> None:
    model = perturbed("hgrn2", "auto")
    layers: Any = model.layers
    gamma = [layer.mixer.get_parameter(ROW) for layer in layers]
    model(torch.arange(12).reshape(2, 6)).logits.sin().sum().backward()
    for row in gamma:
        assert row.grad.norm() > 0
    wanted = bounds([row.detach() for row in gamma])
    assert float(wanted[0].norm()) == 0
    assert all(bool((low < high).all()) for low, high in pairwise(wanted))
    assert bool((wanted[-1] < 1).all())
