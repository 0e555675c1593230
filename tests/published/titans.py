"""Titans' parts, one token at a time, from raw parameters: the long-term memory and a layer of softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .plain import Parameters, rms, silu, unit

CHUNK = 16
HEADS = 4


class LongTermMemory:
    """S_t = mu_t S_{t-1} - theta_t grad 1/2 ||M(W*, k_t) - v_t||^2;  W_t = a_t W_{t-1} + S_t, W* of the chunk's start.

    M(W, x) = W_2^T silu(W_1^T x); queries, keys and values pass short convolutions; q and k have length one.
    """

    def __init__(self, parameters: Parameters, below: str, batch: int) -> None:
        self.p = {name.removeprefix(below): p for name, p in parameters.items() if name.startswith(below)}
        self.w = {name: self.p[f"memory.{name}"].expand(batch, -1, -1, -1) for name in ("w1", "w2")}
        self.s = {name: torch.zeros_like(weight) for name, weight in self.w.items()}
        self.anchor = self.w
        self.count = 0
        self.seen: dict[str, list[Tensor]] = {}

    def project(self, name: str, x: Tensor, seen: dict[str, list[Tensor]]) -> Tensor:
        """Return one projection [B, H, d] of a token [B, D]; ``seen`` holds the convolution's last three inputs."""
        z = x @ self.p[f"projections.{name}.source.weight"]
        taps = self.p[f"projections.{name}.source.conv"]  # [H d, 4]
        row = [*seen.get(name, [torch.zeros_like(z)] * 3), z]
        seen[name] = row[1:]
        summed = sum((taps[:, i] * row[i] for i in range(4)), torch.zeros_like(z))
        mixed = silu(summed).reshape(x.shape[0], HEADS, -1)
        return mixed if name == "value" else unit(mixed)

    def gate(self, name: str, x: Tensor) -> Tensor:
        """Return a gate [B, H, 1, 1] of a token."""
        z = x @ self.p[f"gates.{name}.source.weight"] + self.p.get(f"gates.{name}.source.offset", torch.zeros(()))
        return 1 / (1 + torch.exp(-z))[..., None, None]

    def read(self, w: dict[str, Tensor], q: Tensor, x: Tensor) -> Tensor:
        """Return the read-out [B, D]: M(W, q), a norm per head, a gate by the token x, the output projection."""
        hidden = silu(torch.einsum("bhij,bhi->bhj", w["w1"], q))
        o = rms(torch.einsum("bhji,bhj->bhi", w["w2"], hidden), self.p["norm.weight"]).flatten(1)
        return (silu(x @ self.p["gates.readout/gate.source.weight"]) * o) @ self.p["output"]

    def token(self, x: Tensor) -> Tensor:
        """Write a token [B, D] and return what it then reads."""
        q, k, v = (self.project(name, x, self.seen) for name in ("query", "key", "value"))
        if self.count % CHUNK == 0:
            self.anchor = dict(self.w)
        self.count += 1
        before = torch.einsum("bhij,bhi->bhj", self.anchor["w1"], k)
        sigmoid = 1 / (1 + torch.exp(-before))
        hidden = before * sigmoid
        surprise = torch.einsum("bhji,bhj->bhi", self.anchor["w2"], hidden) - v
        back = torch.einsum("bhji,bhi->bhj", self.anchor["w2"], surprise) * sigmoid * (1 + before * (1 - sigmoid))
        slopes = {
            "w1": torch.einsum("bhi,bhj->bhij", k, back),
            "w2": torch.einsum("bhj,bhi->bhji", hidden, surprise),
        }
        keep, mu, theta = (self.gate(name, x) for name in ("retention/gate", "update/momentum", "update/step_size"))
        self.s = {name: mu * self.s[name] - theta * slopes[name] for name in slopes}
        self.w = {name: keep * self.w[name] + self.s[name] for name in slopes}
        return self.read(self.w, q, x)

    def state(self) -> dict[str, Tensor]:
        """Return what is kept; at the end of a chunk the anchor already stands where the next one begins."""
        found = {f"{name}.conv": torch.stack(row, dim=1) for name, row in self.seen.items()}
        anchor = self.w if self.count % CHUNK == 0 else self.anchor
        for kind, weights in (("dual", self.w), ("anchor", anchor), ("momentum", self.s)):
            found.update({f"{kind}.{name}": weight for name, weight in weights.items()})
        return found


class Attention:
    """o_t = sum_j softmax_j(q_t . k_j / sqrt(K)) v_j over the last ``window`` tokens, with RoPE."""

    def __init__(self, parameters: Parameters, below: str, window: int | None = None) -> None:
        self.p = {name.removeprefix(below): p for name, p in parameters.items() if name.startswith(below)}
        self.window = window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.count = 0

    def token(self, x: Tensor) -> Tensor:
        """Store a token [B, D] and return what it reads."""
        q, k, v = (
            (x @ self.p[f"projections.{name}.source.weight"]).reshape(x.shape[0], HEADS, -1)
            for name in ("query", "key", "value")
        )
        self.keys.append(turned(k, self.count))
        self.values.append(v)
        q = turned(q, self.count)
        self.count += 1
        first = 0 if self.window is None else max(0, len(self.keys) - self.window)
        keys, values = torch.stack(self.keys[first:]), torch.stack(self.values[first:])
        scores = torch.exp(torch.einsum("bhk,sbhk->sbh", q, keys) / q.shape[-1] ** 0.5)
        o = torch.einsum("sbh,sbhv->bhv", scores / scores.sum(0), values)
        return o.flatten(1) @ self.p["output"]

    def state(self) -> dict[str, Tensor]:
        """Return the stored tokens that a later one may read."""
        first = 0 if self.window is None else max(0, len(self.keys) - self.window + 1)
        return {"keys": torch.stack(self.keys[first:], dim=1), "values": torch.stack(self.values[first:], dim=1)}


def turned(x: Tensor, position: int) -> Tensor:
    """Return RoPE of x [B, H, K] at a position: (x_i, x_{i + K/2}) turned by position * 10000^(-2i/K)."""
    half = x.shape[-1] // 2
    angle = position * torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)
