"""Gates inside gates: their rows under several steps a token, their logarithms, and where projections blend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import archspec
from archspec.blocks.carry import Carry
from archspec.families import Gate

SIZES = {"num_heads": 2, "key_dim": 4, "value_dim": 4, "qk": {"norm": "l2"}}
MLP = {**SIZES, "memory": "mlp", "update": {"kind": "gradient_descent", "step_size": 0.1}}


def compiled(mixer: dict[str, Any]) -> Any:
    written = {
        "name": "gates",
        "model_dim": 8,
        "blocks": {"main": {"mixer": mixer}},
        "layout": {"repeat": 2, "of": "main"},
    }
    return archspec.compile(archspec.load(written), vocab_size=5, dtype=torch.float64)


def gates(mixer: Any, x: Tensor) -> Any:
    carry = Carry(None, 0)
    streams = {"input": x}
    known = {name: torch.zeros(*x.shape[:2], 2, 4, dtype=x.dtype) for name in ("query", "key", "value")}
    return mixer._gates(streams, known, carry)


@pytest.mark.parametrize("step_size", ["normalizing", "shared"])
def test_a_bound_that_is_derived_from_the_token_is_that_of_each_of_its_steps(step_size: str) -> None:
    """b + (1 - b) sigmoid(z), b one number a token and z one a step."""
    mixer = compiled(
        {
            **SIZES,
            "memory": "mlp",
            "gates": {"shared": "sigmoid"},
            "retention": {"kind": "decay", "gate": "sigmoid"},
            "update": {"kind": "multi_step", "steps": 3, "step_size": {"kind": "lower_bounded", "bound": step_size}},
        }
    )
    mixer = mixer.layers[0].mixer
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = gates(mixer, x)
    bound = found["gates.shared"] if step_size == "shared" else (-torch.expm1(2 * found["retention.gate"])).sqrt()
    bound = bound.repeat_interleave(3, dim=1)
    # One column a step and head, the heads of a step side by side.
    z = mixer.gates["update/step_size"].source({"input": x}, Carry(None, 0)).reshape(2, 15, 2, 1, 1)
    torch.testing.assert_close(found["update.step_size"], bound + (1 - bound) * z.sigmoid())


def test_a_product_of_decays_that_underflows_has_a_logarithm_and_gradients() -> None:
    mixer = compiled(
        {**MLP, "retention": {"kind": "decay", "gate": {"kind": "product", "first": "ssd", "second": "sigmoid"}}}
    )
    mixer = mixer.float().layers[0].mixer
    module = mixer.gates["retention/gate"]
    x = 500 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    found = module({"input": x}, Carry(None, 0), {}, aspect="log_value")
    assert float(found.detach().min()) < -200  # exp of it is 0 in fp32
    log_factors = [inner({"input": x}, Carry(None, 0), {}, aspect="log_value") for inner in module.inner.values()]
    torch.testing.assert_close(found, log_factors[0] + log_factors[1])
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_the_logarithm_of_a_gate_without_one_of_its_own_is_finite_where_the_gate_underflows() -> None:
    gate = Gate.parse({"kind": "lower_bounded", "bound": 0.0})
    z = torch.tensor([-200.0, 0.0], requires_grad=True)
    found = gate.log_value(z, {"bound": torch.tensor(0.0)})
    torch.testing.assert_close(found[1], torch.tensor(0.5).log())
    assert float(found[0].detach()) < -87
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())


def test_each_place_of_a_layer_blends_with_itself_in_the_first() -> None:
    """Two mixers of different sizes in a row blend apart from each other."""
    blend = {"blend": {"with": "first_layer", "gate": 0.5}}
    wide = {**MLP, "num_heads": 1, "key_dim": 8, "value_dim": 8, "key": blend}
    model = compiled({"kind": "serial", "of": [wide, {**MLP, "key": blend}]})
    generator = torch.Generator().manual_seed(0)
    inputs = [{"input": torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)} for _ in range(2)]
    carry = Carry(None, 0)
    for index in (0, 1):
        keys = [layer.mixer.of[index].projections["key"] for layer in model.layers]
        alone = [key(x, Carry(None, 0)) for key, x in zip(keys, inputs, strict=True)]
        blended = [key(x, carry) for key, x in zip(keys, inputs, strict=True)]
        torch.testing.assert_close(blended[0], alone[0])
        torch.testing.assert_close(blended[1], (alone[0] + alone[1]) / 2)
    tokens = torch.randint(0, 5, (2, 6), generator=generator)
    assert bool(model(tokens).logits.isfinite().all())
