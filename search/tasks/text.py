"""Byte-level language modelling on real text.

Every byte is predicted from those before it in its window of T bytes; the score is bits per byte,

    bits_per_byte = sum over positions of -log2 p(byte | window so far) / number of positions,

which charges the first bytes of each window their lack of context. Windows of the validation and test splits are
disjoint, cover the split, and are taken in one fixed random order, so that every model reads the same ones.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from archspec.component import Count, Text
from archspec.search.corpus import STANDARD_LIBRARY, freeze, open_corpus
from archspec.search.families import SPLITS, Batch, Direction, Split, Tally, Task


class TextModelling(Task, kind="text"):
    """Byte-level language modelling.

    Args:
        corpus: ``stdlib``, a file, a glob, a list of these, or a frozen corpus file (see ``archspec.search.corpus``).
        sequence_length: T, bytes per window.
        vocab_size: 256, one symbol per byte value.
    """

    scores: ClassVar[dict[str, Direction]] = {"text/bits_per_byte": "minimize"}
    primary: ClassVar[str] = "text/bits_per_byte"

    vocab_size: Literal[256] = 256
    sequence_length: Count = 256
    corpus: Text | tuple[Text, ...] = STANDARD_LIBRARY

    def batch(self, split: Split, seed: int, index: int, batch_size: int) -> Batch:
        """Return windows: random ones of the train split, the next ones in the fixed order of the others."""
        text = self._bytes(split)
        if split == "train":
            random = np.random.Generator(np.random.PCG64([SPLITS.index(split), seed, index]))
            starts = random.integers(0, len(text) - self.sequence_length, batch_size)
        else:
            order = np.random.Generator(np.random.PCG64(SPLITS.index(split))).permutation(self._num_windows(text))
            starts = self.sequence_length * order[index * batch_size : (index + 1) * batch_size]
        places = torch.from_numpy(starts)[:, None] + torch.arange(self.sequence_length + 1)  # [B, T + 1]
        window = text[places].long()
        return Batch(window[:, :-1], window[:, 1:], torch.ones(window[:, 1:].shape))

    def num_sequences(self, split: Split) -> int | None:
        """Return the number of windows of an evaluation split."""
        return None if split == "train" else self._num_windows(self._bytes(split))

    def score(self, tally: Tally) -> dict[str, float]:
        """Return bits per byte over all positions seen."""
        return {"text/bits_per_byte": tally.loss_nats / tally.weight / math.log(2)}

    def prepare(self, folder: Path) -> Self:
        """Freeze the corpus into ``folder`` once; the task returned memory-maps that file."""
        corpus = open_corpus(self.corpus)
        path = folder / f"corpus-{corpus.hash[:16]}.safetensors"
        if not path.exists():
            freeze(corpus, path)
        return self.model_copy(update={"corpus": str(path)})

    def identity(self) -> dict[str, Any]:
        """Return the fields with the corpus named by its hash: the same bytes are the same task."""
        return {**self.dump(), "corpus": open_corpus(self.corpus).hash}

    def _bytes(self, split: Split) -> Tensor:
        corpus = open_corpus(self.corpus)
        text: Tensor = getattr(corpus, split)
        if self._num_windows(text) < 1:
            raise ValueError(
                f"text: sequence_length={self.sequence_length} does not fit the {split} split's {len(text)} bytes; "
                "use a shorter sequence_length or more text"
            )
        return text

    def _num_windows(self, text: Tensor) -> int:
        return (len(text) - 1) // self.sequence_length
