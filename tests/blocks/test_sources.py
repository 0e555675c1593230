"""Sources: what is added after a convolution."""

from __future__ import annotations

import torch

import archspec
from archspec.blocks.carry import Carry
from archspec.canonical import architecture_hash
from archspec.complexity import predict
from archspec.schema import Spec


def spec(value: str) -> Spec:
    return archspec.loads(
        f"""
name: convolved
model_dim: 8
blocks:
  main:
    mixer: {{value: {value}, memory: matrix, bias: dot, update: gradient_descent}}
layout: main
"""
    )


def test_a_convolution_may_add_a_vector_and_the_prediction_counts_it() -> None:
    plain, added = spec("{conv: 3}"), spec("{conv: 3, conv_offset: 1}")
    first, second = (archspec.compile(found, vocab_size=4) for found in (plain, added))
    assert predict(added, 4).parameters == sum(p.numel() for p in second.parameters())
    assert predict(added, 4).parameters == predict(plain, 4).parameters + 8
    streams = {"input": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))}
    outputs = [model.memory_mixers()[0].projections["value"](streams, Carry(None, 0)) for model in (first, second)]
    torch.testing.assert_close(outputs[1], outputs[0] + 1)


def test_without_a_convolution_there_is_nothing_to_add_to() -> None:
    assert architecture_hash(spec("{conv_offset: 1}")) == architecture_hash(spec("linear"))
