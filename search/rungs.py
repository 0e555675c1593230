"""The ladder of a search file: its rungs, and who is promoted from one to the next."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from archspec.component import Count, Flag, Number, Positive, StrictModel, Text
from archspec.search.families import Metric


class Promote(StrictModel):
    """Who goes on to the next rung: ``count`` in all, ``random`` of them drawn whatever their scores.

    Instead of ``count``, ``fraction`` says which share of those who finish the rung goes on, and ``random`` which share
    of these is drawn. The random share is drawn first, from all. The others are those with the best rank aggregate:
    within each bin of equal size (non-embedding parameters within a factor ``bin_width``), each metric of ``by`` ranks
    the candidates; ranks are scaled to (0, 1) and averaged.

    A bare number is ``count``.
    """

    count: Count | None = None
    fraction: Annotated[Number, Field(gt=0, le=1)] | None = None
    by: tuple[Text, ...] = ()
    random: Annotated[Number, Field(ge=0)] | None = None
    bin_width: Annotated[Number, Field(ge=1)] = 1.25

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"count": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _random_is_a_share(self) -> Self:
        if (self.count is None) == (self.fraction is None):
            raise PydanticCustomError("promote", "required: either 'count' or 'fraction'.")
        if self.random is not None and self.random > (self.count or 1):
            raise PydanticCustomError(
                "promote",
                "random: {random} is more than {what}; 'random' is a share of those promoted.",
                {"random": f"{self.random:g}", "what": "1" if self.count is None else f"count: {self.count}"},
            )
        if self.count is not None and self.random is not None and self.random != int(self.random):
            raise PydanticCustomError(
                "promote",
                "random: found {random}; required beside 'count': a whole number.",
                {"random": f"{self.random:g}"},
            )
        return self

    def numbers(self, finished: int) -> tuple[int, int]:
        """Return how many of those who finished a rung together go on, and how many of these are drawn at random."""
        if self.count is not None:
            return self.count, max(1, self.count // 4) if self.random is None else int(self.random)
        count = math.ceil((self.fraction or 0.0) * finished)
        return count, round(count * (0.25 if self.random is None else self.random))

    def shares(self, expected: int) -> tuple[float, float]:
        """Return the same as shares: of those who finish goes on; of these is drawn, ``expected`` finishing in all."""
        if self.count is None:
            return self.fraction or 0.0, 0.25 if self.random is None else self.random
        count, lot = self.numbers(expected)
        return min(1.0, count / expected), lot / count


class Rung(StrictModel):
    """One step of the ladder.

    Args:
        rung: ``training_free`` measures metrics at initialisation; ``short_train`` trains on every task.
        candidates: how many distinct feasible draws a round of the ladder takes; first rung only.
        metrics: training-free metrics; default: the controls, hidden covariance, memory capacity, recall at init.
        init_seeds: number of initialisations a metric is averaged over; default 3.
        tokens: training tokens per seed: one number for every task, or one by task.
        seconds: instead of ``tokens``: training seconds per seed, turned into tokens by the speed of a few steps.
        continues: go on from where the rung below stood before its learning rate began to fall, instead of afresh;
            needs the recipe's ``constant`` schedule with ``warmup_tokens``.
        seeds: runs per task; default: the recipe's.
        promote: who goes on; not on the last rung.
    """

    rung: Literal["training_free", "short_train"]
    candidates: Count | None = None
    metrics: tuple[Metric, ...] | None = None
    init_seeds: Count | None = None
    tokens: Count | dict[Text, Count] | None = None
    seconds: Positive | None = None
    continues: Flag = False
    seeds: Count | None = None
    promote: Promote | None = None

    @model_validator(mode="after")
    def _fields_belong(self) -> Self:
        wrong = ("tokens", "seeds", "seconds") if self.rung == "training_free" else ("metrics", "init_seeds")
        for name in wrong:
            if getattr(self, name) is not None:
                raise PydanticCustomError(
                    "rung", "'{name}' does not belong to a {rung} rung.", {"name": name, "rung": self.rung}
                )
        if self.rung == "short_train" and self.tokens is None and self.seconds is None:
            raise PydanticCustomError("rung", "a short_train rung needs 'tokens': training tokens per task and seed.")
        if self.tokens is not None and self.seconds is not None:
            raise PydanticCustomError("rung", "'tokens' and 'seconds' are two ways to say the same; keep one.")
        return self
