"""How uncorrelated the hidden channels are at initialisation.

The hidden states of one random batch are stacked over sequences and time, projected to a fixed number d of channels,
and scored by the eigenvalues lambda_1 .. lambda_d of their correlation matrix C:

    KL(C) = -sum_n [log(lambda_n + k) + 1 / (lambda_n + k)],  k = 1e-5.

It is largest, -d, when the channels are uncorrelated (all eigenvalues 1) and falls as they become dependent: each
eigenvalue near 0 costs about 1/k. Source: Mellor et al., "Neural Architecture Search without Training",
arXiv:2006.04647 (the score), applied to hidden states as in training-free search for recurrent networks and
transformers (Serianni and Kalita, arXiv:2306.00288).

The score depends on d and on the number of samples, so both are the same for every model: states are projected by
one fixed random rotation per width. That is where this departs from the source, which takes all channels.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from archspec.component import Count
from archspec.errors import ArchspecError
from archspec.search.families import Direction, MetricContext, SeededMetric, SequenceModel

K = 1e-5
PROJECTION_SEED = 2306


class HiddenCovariance(SeededMetric, kind="hidden_covariance"):
    """KL(C) of the projected hidden states, averaged over blocks.

    Args:
        num_dims: d; models narrower than this are refused.
        num_sequences, sequence_length: B and T; C is estimated from B * T states.
    """

    source: ClassVar[str] = "arXiv:2006.04647"
    direction: ClassVar[Direction] = "maximize"

    num_dims: Count = 32
    num_sequences: Count = 32
    sequence_length: Count = 64

    def of_model(self, model: SequenceModel, context: MetricContext) -> float:
        """Return the mean over blocks of KL(C).

        Raises:
            ArchspecError: when a block is narrower than ``num_dims``.
        """
        tokens = random_tokens(self.num_sequences, self.sequence_length, context)
        blocks = [states.flatten(0, 1) for states in model.features(tokens)]  # each [B * T, D]
        for states in blocks:
            if states.shape[1] < self.num_dims:
                raise ArchspecError(
                    f"metric {self.kind}: model_dim={states.shape[1]} is under num_dims={self.num_dims}; "
                    "lower num_dims for every model compared, or use wider models"
                )
        return sum(correlation_score(projected(states, self.num_dims)) for states in blocks) / len(blocks)


def random_tokens(num_sequences: int, sequence_length: int, context: MetricContext) -> Tensor:
    """Return the uniform random tokens [B, T] that every model with this vocabulary reads."""
    generator = torch.Generator().manual_seed(PROJECTION_SEED)
    tokens = torch.randint(context.vocab_size, (num_sequences, sequence_length), generator=generator)
    return tokens.to(context.device)


def projected(states: Float[Tensor, "samples D"], num_dims: int) -> Float[Tensor, "samples d"]:
    """Project states to ``num_dims`` channels by the fixed random rotation of their width, in float64.

    The columns are orthonormal (Gaussian columns would correlate channels that were not). Narrower states keep
    their width and are filled up with constant channels.
    """
    width = states.shape[1]
    generator = torch.Generator().manual_seed(PROJECTION_SEED)
    rotation, _ = torch.linalg.qr(torch.randn(width, min(num_dims, width), generator=generator, dtype=torch.float64))
    return pad(states.double().cpu() @ rotation, (0, max(0, num_dims - width)))


def correlation_score(states: Float[Tensor, "samples d"]) -> float:
    """Return KL(C) of the correlation matrix C of float64 states; a constant channel counts as eigenvalue 0."""
    centred = states - states.mean(0)
    deviation = centred.square().mean(0).sqrt()
    scale = states.abs().amax(0)
    varies = deviation > 1e-6 * scale  # the rounding of float32 states is not variation
    normalised = torch.where(varies, centred / deviation.where(varies, 1.0), 0.0)
    correlation = normalised.T @ normalised / len(states)  # [d, d]
    eigenvalues = torch.linalg.eigvalsh(correlation).clamp_min(0) + K
    return -float((eigenvalues.log() + 1 / eigenvalues).sum())
