"""Checkpoints of training: where a run stood before its learning rate began to fall, for a longer run to go on from.

With the ``constant`` schedule and a warm-up in tokens, runs of every length are the same run until their decay begins.
A checkpoint taken there holds weights, optimizer state and the state of torch's generator; batches are a function of
(seed, step) and need nothing. So a continued run takes exactly the steps that an uninterrupted one would have taken.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archspec.errors import RunError
from archspec.search.files import write_atomically


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after ``step`` steps at a peak rate of ``learning_rate``."""

    step: int
    learning_rate: float
    state: dict[str, Any]

    @classmethod
    def take(cls, step: int, learning_rate: float, model: nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint:
        """Copy the state of a run."""
        copied = io.BytesIO()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": torch.get_rng_state()}
        torch.save(state, copied)
        copied.seek(0)
        return cls(step, learning_rate, torch.load(copied, weights_only=True))

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put a run where this one stood."""
        model.load_state_dict(self.state["model"])
        optimizer.load_state_dict(self.state["optimizer"])
        torch.set_rng_state(self.state["generator"].cpu())


def checkpoint_path(results: Path, key: str, seed: int) -> Path:
    """Return the file of a checkpoint of an evaluation's run."""
    return results / f"{key}.{seed}.checkpoint"


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint, renamed into place."""
    data = {"step": checkpoint.step, "learning_rate": checkpoint.learning_rate, "state": checkpoint.state}
    write_atomically(path, lambda file: torch.save(data, file))


def load_checkpoint(path: Path, device: torch.device | str) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        RunError: when it is not there or cannot be read.
    """
    try:
        data = torch.load(path, map_location=device, weights_only=True)
        return Checkpoint(data["step"], data["learning_rate"], data["state"])
    except (OSError, RuntimeError, KeyError, EOFError) as error:
        raise RunError(
            f"{path}: the checkpoint of the rung below cannot be read ({error}); remove 'continue'"
        ) from error
