"""What a mixer keeps between the tokens of one sequence, counted in scalars without building it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stored:
    """Scalars kept of each token, of the last ``most`` tokens.

    Args:
        each: scalars of one stored token.
        most: most tokens that are stored; None is every one.
        before: learned tokens that come before the first (of every period).
        in_memory: whether they are kept in fp32 whatever the model's dtype.
        per_token: how many are stored for each token of the sequence.
        period: the store starts anew with the token after every ``period``; None is never.
        ahead: learned tokens that come before the sequence and count in its periods.
        sinks, stride: which tokens older than the last ``most`` are stored too: see ``num_older``.
    """

    each: int
    most: int | None = None
    before: int = 0
    in_memory: bool = False
    per_token: int = 1
    period: int | None = None
    ahead: int = 0
    sinks: int = 0
    stride: int | None = None

    def scalars(self, length: int) -> int:
        """Return the scalars kept after ``length`` tokens."""
        seen = length + self.ahead
        if self.period is not None and seen:
            seen = (seen - 1) % self.period + 1
        count = self.before + self.per_token * seen
        if self.most is None:
            return self.each * count
        older = max(0, count - self.most)
        return self.each * (count - older + num_older(older, self.sinks, self.stride))


def num_older(older: int, sinks: int, stride: int | None) -> int:
    """Return how many of the first ``older`` tokens stay: the first ``sinks`` and every ``stride``-th."""
    first = min(sinks, older)
    return first if stride is None else first + older // stride - first // stride


@dataclass(frozen=True)
class Kept:
    """Scalars kept between tokens.

    Args:
        memory: scalars of memories, always kept in fp32.
        buffer: scalars in the model's dtype, whatever the length.
        stored: what grows with the tokens.
    """

    memory: int = 0
    buffer: int = 0
    stored: tuple[Stored, ...] = ()

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.memory + other.memory, self.buffer + other.buffer, self.stored + other.stored)

    def after(self, prefix: int) -> Kept:
        """Return what is kept when ``prefix`` learned tokens come before the first."""
        stored = tuple(replace(item, ahead=item.ahead + prefix) for item in self.stored)
        return Kept(self.memory, self.buffer, stored)

    def renewed_every(self, period: int, per_token: int) -> Kept:
        """Return what is kept when ``per_token`` tokens go in for each one and all starts anew every ``period``."""
        stored = tuple(replace(item, per_token=per_token * item.per_token, period=period) for item in self.stored)
        return Kept(self.memory, self.buffer, stored)
