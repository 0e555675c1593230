"""Clipping is torch's, bit by bit; a run lost by a gradient that was not finite names where it began."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from archspec.search.gradients import Gradients
from archspec.search.recipe import Recipe
from archspec.search.tasks.recall import Recall
from archspec.search.tasks.text import TextModelling
from archspec.search.training import TrialDiverged, train, train_model

TASK = Recall(vocab_size=16, sequence_length=8, num_kv_pairs=2, random_non_queries=False)
QUICK = Recipe(learning_rates=(1e-2,), batch_size=8, eval_tokens=256, test_tokens=512)
TOKENS = 8 * 8


@dataclass
class Output:
    logits: Tensor
    auxiliary_loss: Tensor | None = None
    state: None = None


class Scaled(nn.Module):
    """x * |g|, whose gradient in g is 0/0 where the vector g is zero, when the norm has no epsilon."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.map = nn.Linear(dim, dim)
        self.g = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.map(x)
        return mapped * self.g.square().sum().sqrt()


class Stack(nn.Module):
    """Residual layers; the norm of the second is taken at zero from the start."""

    def __init__(self, vocab_size: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 16)
        self.layers = nn.ModuleList([Scaled(16, 1.0), Scaled(16, 0.0), Scaled(16, 1.0)])

    def forward(self, tokens: Tensor, state: None = None) -> Output:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return Output(x @ self.embedding.weight.T)


WHERE = r"at step 0 the gradient was no longer finite, first of layers\.1\.g;"


def test_clipping_is_that_of_torch() -> None:
    model = Stack()
    for limit in (0.1, 1e3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        model.layers[0].map.bias.grad = None  # type: ignore[union-attr]
        own = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        wanted = [parameter.grad for parameter in model.parameters()]
        for parameter, gradient in zip(model.parameters(), own, strict=True):
            parameter.grad = gradient
        Gradients(model, 1).clip(0, limit)
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            assert (gradient is None and parameter.grad is None) or torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]


def test_the_error_names_the_parameter_whose_gradient_was_lost_first() -> None:
    with pytest.raises(TrialDiverged, match=rf"at step 1 .* loss nan nats, .* {WHERE} bound what") as caught:
        train_model(Stack(), TASK, QUICK, 1e-2, TOKENS * 30, 0)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_so_does_one_at_the_last_step_of_a_run_and_a_sweep_all_of_whose_rates_diverge() -> None:
    text = TextModelling(sequence_length=8)  # its score is a loss
    with pytest.raises(TrialDiverged, match=rf"at step 0 .*{WHERE}"):
        train_model(Stack(text.vocab_size), text, QUICK, 1e-2, TOKENS, 0)
    with pytest.raises(TrialDiverged, match=WHERE):
        train(lambda seed: Stack(), TASK, QUICK.model_copy(update={"learning_rates": (1e-3, 1e-2)}), TOKENS * 30, 0)


def test_of_many_layers_the_one_nearest_to_the_output_is_named() -> None:
    model = Stack()
    gradients = Gradients(model, remembered=2)
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.zeros_like(parameter)
            if step == 1 and name.startswith(("embedding", "layers.0", "layers.1.map")):
                parameter.grad[0] = float("inf")
        gradients.clip(step, 1.0)
    named = "layers.1.map.weight and 1 more of layers.1, then of 4 parameters nearer to the input"
    assert gradients.overflow(1) == named
    assert gradients.overflow(2) == ""  # all were finite
    assert gradients.overflow(0) == ""  # no longer known
