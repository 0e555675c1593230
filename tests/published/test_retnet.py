"""RetNet (Sun et al. 2023), equations 5 to 8: rotations and a decay a head, then a group norm and a gate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, rotated, silu


def retention(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = gamma_h S_{t-1} + k v^T, gamma_h = 1 - 2^(-5 - h); o = S^T q / sqrt(K); silu(W_g x) * GN_h(o), W_o."""
    q, k, v = (heads(x @ p[f"projections.{name}.source.weight"], 4) for name in ("query", "key", "value"))
    q, k = rotated(q), rotated(k)
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(4)], dtype=x.dtype)[:, None, None]
    s = torch.zeros(x.shape[0], 4, q.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        s = gamma * s + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) / q.shape[-1] ** 0.5)
    o = torch.stack(outputs, dim=1)
    centred = o - o.mean(-1, keepdim=True)
    o = p["norm.weight"] * centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6) + p["norm.shift"]
    o = o.flatten(2)
    return (silu(x @ p["gates.readout/gate.source.weight"]) * o) @ p["output"], {"dual.w": s}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_retnet(backend: str) -> None:
    hold("retnet", retention, backend, length=70)


def test_rotations_and_a_decay_are_xpos_of_one_scale() -> None:
    """Equation 3: q_n (gamma e^(i theta))^n . conj(k_m (gamma e^(i theta))^-m), the scores of the parallel form."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 9, 1, 8, generator=generator, dtype=torch.float64)
    gamma, theta = 0.9, torch.tensor([10000.0 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    turned = torch.exp(torch.arange(9)[:, None] * torch.complex(torch.full_like(theta, gamma).log(), theta))
    complexes = [torch.complex(x[0, :, 0, :4], x[0, :, 0, 4:]) for x in (q, k)]
    scores = ((complexes[0] * turned) @ (complexes[1].conj() / turned).T).real
    places = torch.arange(9, dtype=torch.float64)
    wanted = (rotated(q)[0, :, 0] @ rotated(k)[0, :, 0].T) * gamma ** (places[:, None] - places)
    torch.testing.assert_close(scores, wanted, rtol=1e-9, atol=1e-9)
