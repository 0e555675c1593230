"""Forward and backward passes over batches: launched from the host or, on a card, replayed as one CUDA graph."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

from archspec.errors import UnsupportedError
from archspec.search.families import Batch, Task
from archspec.search.recipe import Recipe
from archspec.training_graph import TrainingGraph


class Passes:
    """Passes of one model, each of which leaves its gradients in the parameters.

    The kernels of a small model take less time than the host takes to launch them, so that on a card one graph of
    them all is several times as fast. A model that CUDA cannot capture, or whose graph has no room, is trained from
    the host; the numbers are the same.

    Args:
        model: in the mode that it is trained in.
        task: whose loss is taken, with the model's auxiliary loss.
        recipe: gives the precision.
        batch: like those to come; only its shapes and dtypes matter.
    """

    def __init__(self, model: nn.Module, task: Task, recipe: Recipe, batch: Batch) -> None:
        self.model, self.task, self.recipe = model, task, recipe
        self.device = next(model.parameters()).device
        self.graph: TrainingGraph | None = None
        self._value = torch.zeros(())  # until the first pass
        if self.device.type != "cuda":
            return
        try:
            self.graph = TrainingGraph(model, lambda *tensors: self._loss(Batch(*tensors)), *batch)
        except (UnsupportedError, torch.OutOfMemoryError):
            gc.collect()
            torch.cuda.empty_cache()

    def __call__(self, batch: Batch) -> Tensor:
        """Return the task's loss of a batch, without a gradient."""
        if self.graph is None:
            self.model.zero_grad(set_to_none=True)
            self._loss(batch.to(self.device)).backward()  # type: ignore[no-untyped-call]
        else:
            self.graph(*batch)
        return self._value if self.graph is None else self._value.clone()  # which the next replay writes over

    def _loss(self, batch: Batch) -> Tensor:
        """Return what is differentiated, and leave the task's own part of it."""
        with self.recipe.autocast(self.device):
            output = self.model(batch.tokens)
        loss = self.task.loss(output.logits, batch)
        self._value = loss.detach()
        return loss if output.auxiliary_loss is None else loss + output.auxiliary_loss
