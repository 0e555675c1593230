"""Norms whose scale and shift every head has for itself."""

from __future__ import annotations

import pytest
import torch

import archspec
from archspec.complexity import predict
from archspec.errors import SpecError

SPEC = """
name: normed
model_dim: 16
{top}
blocks:
  main:
    mixer:
      num_heads: 2
      qk: {{norm: {{kind: rms, per_head: true}}}}
      memory: matrix
      update: gradient_descent
      readout: {{norm: {norm}}}
layout: main
"""


def test_every_head_has_its_own_scale_and_the_prediction_counts_it() -> None:
    spec = archspec.loads(SPEC.format(top="", norm="{kind: layer, per_head: true}"))
    model = archspec.compile(spec, vocab_size=8)
    mixer = model.memory_mixers()[0]
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters() if ".norm." in name or "norm." in name}
    assert shapes == {
        "projections.query.norm.weight": (2, 8),
        "projections.key.norm.weight": (2, 8),
        "norm.weight": (2, 8),
        "norm.shift": (2, 8),
    }
    assert predict(spec, 8).parameters == sum(p.numel() for p in model.parameters())
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("top", "norm", "message"),
    [
        ("norm: {kind: rms, per_head: true}", "rms", "norm.per_head: there are no heads here"),
        ("", "{kind: rms, per_head: true, over: model}", "over model has a scale for every channel of every head"),
    ],
)
def test_where_there_are_no_heads_it_is_an_error(top: str, norm: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        archspec.loads(SPEC.format(top=top, norm=norm))
