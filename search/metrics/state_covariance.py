"""How uncorrelated the entries of the memory are at initialisation: ``hidden_covariance`` of the final state.

The flattened final memory state of each of B random sequences is one sample, projected to a fixed number of channels.
A memory whose state hardly depends on what it read, or moves along few directions, scores low.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from archspec.component import Count
from archspec.search.families import Direction, MetricContext, SeededMetric, SequenceModel
from archspec.search.metrics.hidden_covariance import correlation_score, projected, random_tokens


class StateCovariance(SeededMetric, kind="state_covariance"):
    """KL(C) of the projected memory states, averaged over mixers; a model without memory scores as one collapsed.

    Args:
        num_dims: d, after projection.
        num_sequences, sequence_length: B, the number of samples, and T, after which the state is read.
    """

    source: ClassVar[str] = "arXiv:2006.04647"
    direction: ClassVar[Direction] = "maximize"

    num_dims: Count = 16
    num_sequences: Count = 64
    sequence_length: Count = 32

    def of_model(self, model: SequenceModel, context: MetricContext) -> float:
        """Return the mean over mixers of KL(C) of their final states."""
        tokens = random_tokens(self.num_sequences, self.sequence_length, context)
        states = [state for state in model.memory_states(tokens) if state.shape[1] > 0]  # each [B, n]
        if not states:
            return correlation_score(torch.zeros(self.num_sequences, self.num_dims, dtype=torch.float64))
        return sum(correlation_score(projected(state, self.num_dims)) for state in states) / len(states)
