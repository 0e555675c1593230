"""How one call of the linear family's Triton form is cut up, and how its products round."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from archspec.launches import Plan, plan


@dataclass(frozen=True)
class Call:
    """Sizes of one call and how it is cut up."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int
    packed: bool
    multiprocessors: int
    plan: Plan

    @property
    def chunk(self) -> int:
        return self.plan.chunk

    @property
    def rows(self) -> int:
        """Tokens of all sequences."""
        return self.B * self.T

    @property
    def slots(self) -> int:
        """Entries in arrays with one a chunk; packed sequences may leave one each unused."""
        return self.T // self.chunk + self.N if self.packed else self.B * -(-self.T // self.chunk)

    def sizes(self) -> dict[str, object]:
        return {"HV": self.HV, "C": self.chunk, "PACKED": self.packed}


@lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 elsewhere, where only the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def make_call(q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> Call:
    B, T, H, K = q.shape
    HV, V = v.shape[-2:]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    length = T if cu_seqlens is None else T // N
    multiprocessors = _num_multiprocessors(q.device)
    cut = plan(N, length, HV, K, V, q.element_size(), g is not None, multiprocessors)
    return Call(B, T, H, HV, K, V, N, cu_seqlens is not None, multiprocessors, cut)


def precision(x: Tensor) -> str:
    # tf32 keeps 10 bits of each factor: as many as fp16 inputs have. It is what fp32 users of the hardware get.
    return "tf32" if x.dtype == torch.float32 else "ieee"


def wide_precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.bfloat16 else "tf32"
