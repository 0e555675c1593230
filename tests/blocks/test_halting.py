"""Loops in which every token decides after how many passes it halts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import archspec
from archspec.errors import SpecError

from .mixers.laws import ATTENTION, MATRIX, compiled, hold


def looped(layout: Any) -> dict[str, Any]:
    blocks = {"main": {"mixer": ATTENTION, "feed_forward": {"kind": "mlp", "expansion": 1}}, "delta": {"mixer": MATRIX}}
    return {"name": "looped", "model_dim": 16, "blocks": blocks, "layout": layout}


@pytest.mark.parametrize(
    "layout",
    [
        {"loop": 4, "of": ["main", "delta"], "inject": True, "embed": "coordinates", "halt": {"offset": -0.5}},
        ["main", {"loop": 2, "of": {"loop": 3, "of": "delta", "halt": {"offset": 0, "epsilon": 0.1}}, "halt": "act"}],
        {"repeat": 2, "of": {"loop": 3, "of": "delta", "embed": "sinusoidal", "halt": "act"}},
    ],
)
def test_halting_loops_hold_the_laws(layout: Any) -> None:
    hold(looped(layout), length=14)


def test_tokens_that_halt_leave_the_rest_of_the_passes_without_effect() -> None:
    """With b so large that every token halts after its first pass, the loop is its block, once."""
    model = compiled(looped({"loop": 3, "of": "main", "halt": {"offset": 40}}), "auto")
    once = compiled(looped("main"), "auto")
    once.load_state_dict({name: p for name, p in model.state_dict().items() if not name.startswith("halting")})
    tokens = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(4))
    output = model(tokens)
    # sigmoid(40 + w . s) is 1 to the last digit: all of the result is the first pass's, and N + R = 1 + 1.
    assert torch.allclose(output.logits, once(tokens).logits, rtol=0, atol=1e-12)
    assert output.auxiliary_loss is not None
    assert output.auxiliary_loss.item() == pytest.approx(0.01 * 2)


def test_expected_flops_count_the_passes_before_training() -> None:
    """At b = 1 a token's first two passes add up to 2 x 0.73 > 0.99; at b = -0.5 (0.38) it takes three of four."""
    for offset, passes in ((1, 2), (-0.5, 3), (-9, 4), (9, 1)):
        halting = {"loop": 4, "of": "main", "halt": {"offset": offset}}
        found = archspec.predict(archspec.load(looped(halting)), vocab_size=11)
        plain = archspec.predict(archspec.load(looped("main")), vocab_size=11)
        logits = 2 * 11 * 16
        block = plain.flops_per_token - logits + 2 * 16
        assert found.flops_per_token == logits + 4 * block
        assert found.expected_flops_per_token == logits + passes * block
        assert plain.expected_flops_per_token == plain.flops_per_token


def test_halting_changes_the_hash_and_shows_in_a_comparison() -> None:
    from archspec.comparison import differences

    specs = [
        archspec.load(looped({"loop": 3, "of": "main", **fields}))
        for fields in (
            {},
            {"halt": "act"},
            {"halt": {"ponder": 0.1}},
            {"embed": "sinusoidal"},
            {"embed": "coordinates"},
        )
    ]
    assert len({archspec.architecture_hash(spec) for spec in specs}) == len(specs)
    for spec in specs[1:]:
        assert differences(specs[0], spec)


def test_loops_that_cannot_halt_are_refused() -> None:
    with pytest.raises(SpecError, match="layout: a loop of 1 pass has nothing to halt"):
        archspec.load(looped({"loop": 1, "of": "main", "halt": "act"}))
    with pytest.raises(SpecError, match="layout: a cycle may cut a loop before its last pass"):
        archspec.load(looped({"cycle": 3, "of": [{"loop": 2, "of": "main", "halt": "act"}]}))
    with pytest.raises(SpecError, match=r"layout\.halt\.kind: found 'akt'.*Did you mean 'act'"):
        archspec.load(looped({"loop": 2, "of": "main", "halt": "akt"}))
