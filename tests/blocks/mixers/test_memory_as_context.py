"""Attention over segments with context from a memory: laws, what a token may see, and what is illegal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import archspec
from archspec.blocks.carry import Carry
from archspec.errors import SpecError

from .laws import ATTENTION, MATRIX, ONLINE, close, document, first_mixer, hold


def contextual(layers: int = 2, **fields: Any) -> dict[str, Any]:
    mixer = {"kind": "memory_as_context", "segment": 6, "memory": ONLINE, "attention": ATTENTION, **fields}
    return document(mixer, layers)


@pytest.mark.parametrize("persistent", [0, 3])
def test_laws_hold_at_every_place_in_a_segment(persistent: int) -> None:
    hold(contextual(persistent=persistent), length=20, cuts=(1, 5, 6, 7, 12, 13))


def test_laws_hold_with_streams_convolutions_and_shared_gates() -> None:
    memory = {
        **MATRIX,
        "streams": {"near": {"kind": "identity", "conv": 2}},
        "gates": {"open": {"kind": "sigmoid", "from": "near"}},
        "readout": {"norm": "rms", "gate": "open"},
    }
    hold(contextual(memory=memory, attention={**ATTENTION, "qkv": {"conv": 2}}, persistent=2), length=14)


def test_it_can_stand_inside_other_compositions() -> None:
    inner = contextual()["blocks"]["main"]["mixer"]
    hold(document({"kind": "serial", "of": [inner, MATRIX], "prefix": 2}, layers=1), length=15)


def test_attention_forgets_at_the_end_of_a_segment_and_memory_does_not() -> None:
    """With a memory that never moves, a segment is a function of its own tokens; with one that does, it is not."""
    x = torch.randn(1, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    other = torch.cat([torch.flip(x[:, :6], dims=(1,)), x[:, 6:]], dim=1)
    still = {**MATRIX, "qkv": "none", "retention": "none", "update": {"kind": "gradient_descent", "step_size": 0}}
    still = {**still, "memory": {"kind": "matrix", "initial": "learned"}}
    del still["qkv"]
    for memory, same in ((still, True), (ONLINE, False)):
        mixer = first_mixer(contextual(memory=memory))
        ours, theirs = (mixer(tokens, Carry(None, 0))[:, 6:] for tokens in (x, other))
        assert close(ours, theirs) is same


def test_what_is_illegal_is_said_with_its_place() -> None:
    cases: dict[str, dict[str, Any]] = {
        r"mixer\.memory: the look-up reads weights": {"memory": ATTENTION},
        r"mixer\.attention: attention stores tokens": {"attention": MATRIX},
        r"mixer\.attention\.prefix: the learned tokens of a segment are 'persistent'": {
            "attention": {**ATTENTION, "prefix": 2}
        },
        r"mixer\.memory\.prefix: the memory reads what attention returns": {"memory": {**MATRIX, "prefix": 2}},
        r"mixer\.memory\.readout\.gate: a look-up has no key": {
            "memory": {**MATRIX, "readout": {"gate": {"kind": "sigmoid", "from": "key"}}}
        },
        r"mixer\.memory\.readout\.skip\.of: a look-up has no key": {"memory": {**MATRIX, "readout": {"skip": {}}}},
        r"mixer\.memory\.readout\.correction: a look-up has no key": {
            "memory": {**MATRIX, "readout": {"correction": 1}}
        },
        r"mixer\.memory\.value\.blend: the first layer's projections belong to other tokens": {
            "memory": {**MATRIX, "value": {"blend": {"with": "first_layer", "gate": 0.5}}}
        },
        r"mixer\.memory\.update: memory kv stores tokens": {"memory": {**MATRIX, "memory": "kv"}},
        r"mixer\.segment: ": {"segment": 0},
        r"mixer\.persistant: unknown key 'persistant'.*Did you mean 'persistent'": {"persistant": 4},
    }
    for message, fields in cases.items():
        with pytest.raises(SpecError, match=message):
            archspec.load(contextual(**fields))


def test_flops_count_the_look_up_and_two_tokens_of_attention() -> None:
    """At the first token of a segment attention sees P + 2 tokens; the look-up is a query, a read and an output."""
    D, P = 16, 3
    found = archspec.predict(archspec.load(contextual(1, persistent=P, memory=MATRIX)), vocab_size=11, context=7)
    maps, read = 4 * D * D, 2 * 8 * 8
    convolutions, gates = 3 * 3 * D, 2 * 2 * D
    attention = 2 * (2 * maps + 2 * 2 * (P + 2) * (8 + 8))
    memory = 2 * (maps + convolutions + gates) + 3 * 2 * read
    look_up = 2 * (2 * D * D + 3 * D) + 2 * read
    feed_forward, logits = 2 * 3 * D * D, 2 * 11 * D
    assert found.flops_per_token == attention + memory + look_up + feed_forward + logits
