"""Three Gated DeltaNet layers to one of softmax attention, twice, in Llama's blocks: the whole model by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import TOLERANCE, error, hold, perturbed, rms, silu
from .test_gated_deltanet import gated_delta_net
from .test_transformer import attention


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_layers_of_both_kinds(backend: str) -> None:
    hold("hybrid_3_1", gated_delta_net, backend, layer=2)
    hold("hybrid_3_1", attention, backend, layer=3)


def test_whole_model_is_its_layers_with_residuals_swiglu_and_tied_logits() -> None:
    model = perturbed("hybrid_3_1", "auto")
    p = dict(model.named_parameters())
    tokens = torch.randint(0, 32, (2, 40), generator=torch.Generator().manual_seed(3))
    x = p["embedding.weight"][tokens]
    for layer, mixer in enumerate(2 * [*3 * [gated_delta_net], attention]):
        own = {
            name.removeprefix(f"layers.{layer}."): tensor for name, tensor in p.items() if f"layers.{layer}." in name
        }
        inner = {name.removeprefix("mixer."): tensor for name, tensor in own.items()}
        x = x + mixer(rms(x, own["mixer_norm.weight"]), inner)[0]
        y = rms(x, own["channel_norm.weight"])
        x = x + swiglu(y, own["feed_forward.gate"], own["feed_forward.up"], own["feed_forward.down"])
    logits = rms(x, p["norm.weight"]) @ p["embedding.weight"].t()
    assert len(model.layers) == 8
    assert error(model(tokens).logits, logits) < TOLERANCE


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return (silu(x W_gate) * (x W_up)) W_down (Shazeer 2020)."""
    return (silu(x @ gate) * (x @ up)) @ down
