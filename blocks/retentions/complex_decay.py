"""Complex diagonal decay: pairs of states shrink and turn, as in state-space models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from archspec.families import Gate, Retention

if TYPE_CHECKING:
    from torch import Tensor

    from archspec.shapes import HeadDims


class ComplexDecay(Retention, kind="complex_decay"):
    """Each pair of states is one complex number h, h_t = lambda h_{t-1} + b u_t, with a = log(gate) + i phase:

    - ``exact``: lambda = e^a, b = 1 (LRU: gate its magnitude, phase its angle).
    - ``zoh``: lambda = e^a, b = (e^a - 1) / a: u held between tokens, of a system integrated over one token.
    - ``bilinear``: lambda = (1 + a/2) / (1 - a/2), b = 1 / (1 - a/2).

    For a continuous system A with step Delta, a = Delta A, and Delta itself is the update's step size.

    Args:
        gate: e^(Re a) in [0, 1], per head or per pair.
        phase: Im a, radians a token.
        pairs: the axis that is halved: channel i and channel i + half are the real and imaginary part of pair i.
        discretization: see above.
        gain: a factor on b, per head or per pair; absent is 1.

    The query [Re c, -Im c] reads Re(c h). Gates per channel of the halved axis have one value a pair.

    Sources: LRU (arXiv:2303.06349), equation 5; S4D (arXiv:2206.11893), section 3; S5 (arXiv:2208.04933), section 3.
    """

    gate: Gate
    phase: Gate
    pairs: Literal["key", "value"] = "key"
    discretization: Literal["exact", "zoh", "bilinear"] = "exact"
    gain: Gate | None = None

    turns: ClassVar[bool] = True

    @property
    def decay_gate(self) -> Gate | None:
        return self.gate

    @property
    def axis(self) -> int:
        """The axis of a weight [..., K, V] that is halved."""
        return -2 if self.pairs == "key" else -1

    def gate_dims(self, dims: HeadDims) -> HeadDims:
        if self.pairs == "key":
            return replace(dims, key_dim=max(1, dims.key_dim // 2))
        return replace(dims, value_dim=max(1, dims.value_dim // 2))

    def laid_out(self, gate: Tensor) -> Tensor:
        """Both channels of a pair share its gates."""
        import torch

        return torch.cat([gate, gate], dim=self.axis) if gate.shape[self.axis] > 1 else gate

    def keep(self, weight: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        factor, _ = self.factors(gates)
        return self.to_real(factor * self.to_complex(weight))

    def receive(self, increment: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        _, written = self.factors(gates)
        return increment if written is None else self.to_real(written * self.to_complex(increment))

    def to_complex(self, x: Tensor) -> Tensor:
        """Return a weight [..., K, V] as complex numbers, half as many along the paired axis."""
        import torch

        real, imaginary = x.chunk(2, dim=self.axis)
        return torch.complex(real.contiguous(), imaginary.contiguous())

    def to_real(self, z: Tensor) -> Tensor:
        """Return what ``to_complex`` took."""
        import torch

        return torch.cat([z.real, z.imag], dim=self.axis)

    def factors(self, gates: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return lambda and b of every pair from the retention's gates, as laid out; b is None where it is 1."""
        import torch

        a = torch.complex(*self.exponents(gates["gate"], gates["phase"]))
        gain = gates["gain"].chunk(2, dim=self.axis)[0] if "gain" in gates else None
        factor, written = a.exp(), None
        if self.discretization == "bilinear":
            written = 1 / (1 - a / 2)
            factor = (1 + a / 2) * written
        elif self.discretization == "zoh":
            written = _held(a)
        if gain is None:
            return factor, written
        return factor, gain * torch.ones_like(a) if written is None else gain * written

    def polar(self, gates: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return log |lambda| and the angle of lambda of every pair, and b as ``factors`` does."""
        factor, written = self.factors(gates)
        if self.discretization == "bilinear":
            return factor.abs().log(), factor.angle(), written
        # Given as logarithms: a decay so strong that it underflows has none to take back.
        return *self.exponents(gates["gate"], gates["phase"]), written

    def exponents(self, log_decay: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
        """Return the real and imaginary part of a for every pair, of one shape."""
        import torch

        log_decay, phase = (x.chunk(2, dim=self.axis)[0] for x in (log_decay, phase))
        # Below this a decay is zero to the last bit, and minus infinity would divide by itself.
        log_decay = log_decay.clamp(min=-800.0 if log_decay.dtype == torch.float64 else -110.0)
        zero = torch.zeros_like(log_decay) * phase
        return log_decay + zero, phase + zero


def _held(a: Tensor) -> Tensor:
    """Return (e^a - 1) / a without cancellation near zero: e^a - 1 = expm1(r) cos t - 2 sin^2(t/2) + i e^r sin t."""
    import torch

    r, t = a.real, a.imag
    numerator = torch.complex(torch.expm1(r) * t.cos() - 2 * (t / 2).sin().square(), r.exp() * t.sin())
    still = a == 0
    return torch.where(still, torch.ones_like(a), numerator / torch.where(still, torch.ones_like(a), a))
