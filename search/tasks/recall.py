"""Multi-query associative recall: key-value pairs first, then the keys again, each to be answered by its value.

Definition: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv:2312.04927,
section 3.2 and appendix (MQAR). A sequence of length T holds

    k_1 v_1 ... k_n v_n | slots of two tokens, n of which start with one of the keys

Keys are drawn without replacement from the lower half of the vocabulary (token 0 is the filler), values without
replacement from the upper half. The slots that hold queries are drawn without replacement with probability
proportional to power_a * i^(power_a - 1) for slot i = 1, 2, ...: a small power_a asks soon after the pairs. Only
the query positions count, in the loss and in the accuracy; the answer itself never appears in the input. Positions
that hold no query are random tokens of the whole vocabulary, or the filler.

The accuracy is pooled over all queries of the split, not averaged over batches.
"""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from archspec.component import Count, Flag, Number
from archspec.search.families import SPLITS, Batch, Direction, Split, Tally, Task


class Recall(Task, kind="recall"):
    """Multi-query associative recall.

    Args:
        vocab_size: tokens in all; keys are 1 .. vocab_size/2 - 1, values vocab_size/2 .. vocab_size - 1.
        sequence_length: T, even, at least 4 tokens per pair.
        num_kv_pairs: pairs in a sequence, each asked once.
        power_a: exponent of the law by which queries follow the pairs.
        random_non_queries: fill the rest with random tokens instead of token 0.
    """

    source: ClassVar[str] = "arXiv:2312.04927"
    scores: ClassVar[dict[str, Direction]] = {"recall/accuracy": "maximize", "recall/loss_nats": "minimize"}
    primary: ClassVar[str] = "recall/accuracy"

    vocab_size: Count = 8192
    sequence_length: Count = 64
    num_kv_pairs: Count = 4
    power_a: Number = Field(default=0.01, gt=0)
    random_non_queries: Flag = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.sequence_length % 2:
            raise ValueError(
                f"sequence_length={self.sequence_length} is odd; pairs and query slots are two tokens each, "
                "use an even length"
            )
        if self.sequence_length < 4 * self.num_kv_pairs:
            raise ValueError(
                f"sequence_length={self.sequence_length} is too short for num_kv_pairs={self.num_kv_pairs}; "
                f"each pair needs two tokens and a query slot of two: use at least {4 * self.num_kv_pairs}"
            )
        if self.vocab_size // 2 - 1 < self.num_kv_pairs:
            raise ValueError(
                f"vocab_size={self.vocab_size} has {max(0, self.vocab_size // 2 - 1)} keys for "
                f"num_kv_pairs={self.num_kv_pairs} distinct ones; use at least {2 * self.num_kv_pairs + 2}"
            )
        return self

    def batch(self, split: Split, seed: int, index: int, batch_size: int) -> Batch:
        """Return ``batch_size`` fresh sequences; the split, seed and index select an independent random stream."""
        random = np.random.Generator(np.random.PCG64([SPLITS.index(split), seed, index]))
        B, T, n = batch_size, self.sequence_length, self.num_kv_pairs
        half = self.vocab_size // 2
        keys = 1 + _distinct(random, B, half - 1, n)  # [B, n]
        values = half + _distinct(random, B, self.vocab_size - half, n)  # [B, n]
        asked_at = 2 * n + 2 * self._slots(random, B)  # [B, n]: where each key is asked

        tokens = np.zeros((B, T), dtype=np.int64)
        if self.random_non_queries:
            tokens[:, 2 * n :] = random.integers(0, self.vocab_size, (B, T - 2 * n))
        tokens[:, 0 : 2 * n : 2] = keys
        tokens[:, 1 : 2 * n : 2] = values
        np.put_along_axis(tokens, asked_at, keys, axis=1)
        targets = np.zeros((B, T), dtype=np.int64)
        np.put_along_axis(targets, asked_at, values, axis=1)
        weights = np.zeros((B, T), dtype=np.float32)
        np.put_along_axis(weights, asked_at, np.float32(1), axis=1)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(weights))

    def score(self, tally: Tally) -> dict[str, float]:
        """Return the accuracy and the mean loss over all queries seen."""
        return {
            "recall/accuracy": tally.correct / tally.weight,
            "recall/loss_nats": tally.loss_nats / tally.weight,
        }

    def _slots(self, random: np.random.Generator, batch_size: int) -> np.ndarray:
        """Draw distinct query slots by the power law: the n largest of log p + Gumbel noise."""
        num_slots = (self.sequence_length - 2 * self.num_kv_pairs) // 2
        log_p = (self.power_a - 1) * np.log(np.arange(1, num_slots + 1))
        noise = -np.log(random.exponential(size=(batch_size, num_slots)))
        return np.argsort(-(log_p + noise), axis=1, kind="stable")[:, : self.num_kv_pairs]


def _distinct(random: np.random.Generator, rows: int, population: int, count: int) -> np.ndarray:
    """Draw ``count`` distinct integers below ``population`` in each row, in random order."""
    return np.argsort(random.random((rows, population)), axis=1, kind="stable")[:, :count]
