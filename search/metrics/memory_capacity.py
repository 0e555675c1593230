"""How much of the past can be read linearly from the output at initialisation.

Random symbols go in; at each position a ridge regression decodes, from the last hidden state y_t, the one-hot symbol
that went in k steps before, x_{t-k}:

    W_k = (Y^T Y + lambda n I)^{-1} Y^T X_k   on half of the sequences (Y standardised, X_k centred, n rows),
    accuracy_k = share of positions of the other half where argmax(Y W_k + mean X_k) = x_{t-k},
    memory_capacity = sum_k (accuracy_k - 1/S) / (1 - 1/S)   over the lags, for S symbols.

A delay line that holds the last L symbols has as capacity the number of lags up to L; a model without memory has 0
in expectation. The same positions serve every lag, so that one factorisation solves them all. Source: Jaeger,
"Short term memory in echo state networks", GMD report 152, 2001 (the sum over delays of what a linear read-out
recovers); here with symbols and accuracy in place of a scalar signal and the squared correlation. Four symbols, since
untrained models of width 64 keep their differences there: with 16 nearly all of them decode at chance.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from archspec.component import Count, Positive
from archspec.search.families import Direction, MetricContext, SeededMetric, SequenceModel

INPUT_SEED = 152


class MemoryCapacity(SeededMetric, kind="memory_capacity"):
    """Chance-corrected accuracy of decoding past symbols, summed over lags.

    Args:
        lags: steps back, in tokens.
        num_symbols: S, drawn from the vocabulary (all of it when it is smaller).
        num_sequences: B, half to fit and half to score.
        positions: positions per sequence that are decoded; sequences have max(lags) more tokens.
        ridge: lambda, relative to the unit variance of the standardised states.
    """

    source: ClassVar[str] = "GMD report 152 (2001)"
    direction: ClassVar[Direction] = "maximize"

    lags: tuple[Count, ...] = Field(default=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32), min_length=1)
    num_symbols: Count = 4
    num_sequences: Count = 96
    positions: Count = 32
    ridge: Positive = 1e-2

    def of_model(self, model: SequenceModel, context: MetricContext) -> float:
        """Return the capacity in lags, from 0 (in expectation) to the number of lags."""
        generator = torch.Generator().manual_seed(INPUT_SEED)
        num_symbols = min(self.num_symbols, context.vocab_size)
        alphabet = torch.randperm(context.vocab_size, generator=generator)[:num_symbols]
        length = max(self.lags) + self.positions
        symbols = torch.randint(num_symbols, (self.num_sequences, length), generator=generator)  # [B, T]
        states = model.features(alphabet[symbols].to(context.device))[-1]  # [B, T, D]
        return self._capacity(states[:, max(self.lags) :].double().cpu(), symbols, num_symbols)

    def _capacity(self, states: Float[Tensor, "B P D"], symbols: Int[Tensor, "B T"], num_symbols: int) -> float:
        fit = len(states) // 2
        mean = states[:fit].mean((0, 1))
        deviation = states[:fit].std((0, 1))
        varies = deviation > 1e-6 * states[:fit].abs().amax((0, 1))  # float32 rounding is not memory
        standard = torch.where(varies, (states - mean) / deviation.where(varies, 1.0), 0.0)
        first = max(self.lags)
        past = torch.stack([symbols[:, first - lag : symbols.shape[1] - lag] for lag in self.lags], -1)  # [B, P, L]
        wanted = one_hot(past, num_symbols).double()  # [B, P, L, S]
        known, targets = standard[:fit].flatten(0, 1), wanted[:fit].flatten(0, 1).flatten(1)  # [n, D], [n, L * S]
        frequency = targets.mean(0)
        gram = known.T @ known + self.ridge * len(known) * torch.eye(known.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(gram, known.T @ (targets - frequency))  # [D, L * S]
        guess = (standard[fit:] @ weights + frequency).view(*wanted[fit:].shape).argmax(-1)
        accuracy = (guess == past[fit:]).double().mean((0, 1))  # [L]
        return float(((accuracy - 1 / num_symbols) / (1 - 1 / num_symbols)).sum())
