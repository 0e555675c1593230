"""The long-term memory of Titans (Behrouz et al. 2025), equations 9 to 14, gradients at the start of chunks of 16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, rms, short_convolution, silu, unit

CHUNK = 16


def gradients(w1: Tensor, w2: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of 1/2 ||W_2^T silu(W_1^T k) - v||^2 in W_1 and W_2, by the chain rule."""
    before = torch.einsum("bhij,bhi->bhj", w1, k)
    sigmoid = 1 / (1 + torch.exp(-before))
    hidden = before * sigmoid
    surprise = torch.einsum("bhji,bhj->bhi", w2, hidden) - v
    slope = sigmoid * (1 + before * (1 - sigmoid))
    back = torch.einsum("bhji,bhi->bhj", w2, surprise) * slope
    return torch.einsum("bhi,bhj->bhij", k, back), torch.einsum("bhj,bhi->bhji", hidden, surprise)


def long_term_memory(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = mu_t S_{t-1} - theta_t grad(W*);  W_t = a_t W_{t-1} + S_t;  o_t = M(W_t, q_t)."""
    state, projected = {}, {}
    for name in ("query", "key", "value"):
        mapped = x @ p[f"projections.{name}.source.weight"]
        convolved, state[f"{name}.conv"] = short_convolution(mapped, p[f"projections.{name}.source.conv"])
        projected[name] = heads(silu(convolved), 4)
    q, k, v = unit(projected["query"]), unit(projected["key"]), projected["value"]

    def gate(name: str) -> Tensor:
        z = x @ p[f"gates.{name}.source.weight"] + p.get(f"gates.{name}.source.offset", torch.zeros(()))
        return 1 / (1 + torch.exp(-z))[..., None, None]

    a, mu, theta = gate("retention/gate"), gate("update/momentum"), gate("update/step_size")
    w = {name: p[f"memory.{name}"].expand(x.shape[0], -1, -1, -1) for name in ("w1", "w2")}
    s = {name: torch.zeros_like(weight) for name, weight in w.items()}
    anchor, outputs = w, []
    for t in range(x.shape[1]):
        if t % CHUNK == 0:
            anchor = dict(w)
        slopes = dict(zip(("w1", "w2"), gradients(anchor["w1"], anchor["w2"], k[:, t], v[:, t]), strict=True))
        s = {name: mu[:, t] * s[name] - theta[:, t] * slopes[name] for name in w}
        w = {name: a[:, t] * w[name] + s[name] for name in w}
        hidden = silu(torch.einsum("bhij,bhi->bhj", w["w1"], q[:, t]))
        outputs.append(torch.einsum("bhji,bhj->bhi", w["w2"], hidden))
    o = rms(torch.stack(outputs, dim=1), p["norm.weight"]).flatten(2)
    kept = {"dual": w, "anchor": anchor, "momentum": s}
    state.update({f"{kind}.{name}": tensor for kind, pair in kept.items() for name, tensor in pair.items()})
    return (silu(x @ p["gates.readout/gate.source.weight"]) * o) @ p["output"], state


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_titans_lmm(backend: str) -> None:
    hold("titans_lmm", long_term_memory, backend)
