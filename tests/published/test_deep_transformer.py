"""DeepTransformer (Behrouz et al. 2025, "ATLAS"): deep linear attention with the exponential kernel's first terms."""

from __future__ import annotations

import math

import pytest
import torch

from .miras import exponential
from .plain import hold
from .test_dla import deep_linear_attention
from .test_omeganet import NARROW


def test_the_features_are_the_first_terms_of_the_exponential() -> None:
    q, k = torch.randn(2, 5, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = (q * k).sum(-1)
    terms = sum(product**n / math.factorial(n) for n in range(4))
    assert torch.allclose((exponential(q) * exponential(k)).sum(-1), terms, rtol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_deep_transformer(backend: str) -> None:
    hold("deep_transformer", deep_linear_attention, backend, narrow=NARROW)
