"""How well a memory holds pairs that its own update rule writes, before any training.

For each memory mixer, N random pairs (k_i, v_i) are written straight into a fresh memory, gates at their initial
values, and each key is read back: the score is the cosine of the read-out with the value wanted, averaged over

    plain         N pairs are written, all are asked;
    overwritten   the same N keys are first written with other values, which must give way;
    distracted    N other pairs are written after them, which must not disturb;

over N, heads, mixers and sets of pairs. A dictionary scores 1, a memory that returns the same whatever it is asked 0
in expectation. Random keys have unit norm (as after an L2 norm) or norm sqrt(K) (unit variance per channel, what a
softmax over q . k / sqrt(K) needs to tell keys apart); training is free to choose the scale, so each mixer is given
the better of the two. A key-value cache read by softmax is scored in the same way.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from archspec.component import Count
from archspec.search.families import Direction, MemoryMixer, MetricContext, SeededMetric, SequenceModel

PAIR_SEED = 64


class RecallAtInit(SeededMetric, kind="recall_at_init"):
    """Retrieval cosine of pairs written straight into the memory; a model without memories scores 0.

    Args:
        num_pairs: the values of N, averaged over.
        num_sets: B, independent sets of pairs for each N.
    """

    direction: ClassVar[Direction] = "maximize"

    num_pairs: tuple[Count, ...] = Field(default=(4, 16, 64), min_length=1)
    num_sets: Count = 8

    def of_model(self, model: SequenceModel, context: MetricContext) -> float:
        """Return the mean over mixers of the retrieval cosine, from -1 to 1."""
        mixers = list(model.memory_mixers())
        if not mixers:
            return 0.0
        return sum(self._of_mixer(mixer, context.device) for mixer in mixers) / len(mixers)

    def _of_mixer(self, mixer: MemoryMixer, device: torch.device) -> float:
        scores = torch.stack([self._cosines(mixer, N, device) for N in self.num_pairs]).mean(0)  # [scale]
        return float(scores.max())

    def _cosines(self, mixer: MemoryMixer, N: int, device: torch.device) -> Float[Tensor, " scale"]:
        """Return the cosine for N pairs at each key scale; scales and conditions share a batch."""
        dims, B = mixer.dims, self.num_sets
        generator = torch.Generator().manual_seed(PAIR_SEED)
        keys = normalize(torch.randn(B, 2 * N, dims.num_heads, dims.key_dim, generator=generator), dim=-1)
        values = torch.randn(B, 2 * N, dims.num_heads, dims.value_dim, generator=generator)
        scales = torch.tensor([1.0, math.sqrt(dims.key_dim)]).view(2, 1, 1, 1, 1)
        asked, other = keys[:, :N], keys[:, N:]
        wanted, old = values[:, :N], values[:, N:]
        # [scale, condition * B, ...] -> one batch; the two conditions of 2N writes run side by side.
        writes = torch.cat([torch.cat([asked, asked], 1), torch.cat([asked, other], 1)])
        written = torch.cat([torch.cat([old, wanted], 1), torch.cat([wanted, old], 1)])
        plain = _ask(mixer, scales * asked, wanted, scales * asked, wanted, device)
        both = torch.cat([asked, asked])
        harder = _ask(mixer, scales * writes, written, scales * both, torch.cat([wanted, wanted]), device)
        return (plain + 2 * harder) / 3


def _ask(
    mixer: MemoryMixer,
    keys: Float[Tensor, "scale B N H K"],
    values: Float[Tensor, "B N H V"],
    queries: Float[Tensor, "scale B M H K"],
    wanted: Float[Tensor, "B M H V"],
    device: torch.device,
) -> Float[Tensor, " scale"]:
    """Return the mean cosine of the read-outs with the wanted values, at each key scale."""
    num_scales = len(keys)
    read = mixer.associate(
        keys.flatten(0, 1).to(device),
        values.repeat(num_scales, 1, 1, 1).to(device),
        queries.flatten(0, 1).to(device),
    )  # [scale * B, M, H, V]
    # A rule that blows up at one scale recalls nothing there.
    finite = torch.where(read.isfinite().all(-1, keepdim=True), read, 0.0).double().cpu()
    cosine = cosine_similarity(finite, wanted.double().repeat(num_scales, 1, 1, 1), dim=-1)
    return cosine.view(num_scales, -1).mean(1)
