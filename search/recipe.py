"""The training recipe: AdamW, linear warm-up and cosine decay, as it stands in a search file.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101 (AdamW), and "SGDR: Stochastic
Gradient Descent with Warm Restarts", arXiv:1608.03983 (the cosine, here without restarts). Warm-up, constant, decay at
the end: Hu et al., "MiniCPM", arXiv:2404.06395; Haegele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed
Training Durations", arXiv:2405.18392.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from archspec.blocks.declared import Declared
from archspec.component import Count, Number, Positive, StrictModel

UNDECAYED_NAMES = frozenset({"norm", "norms", "gate", "gates"})


class Recipe(StrictModel):
    """How a model is trained: AdamW, linear warm-up, cosine to a floor.

    Args:
        learning_rates: peak rates to choose from; one rate means no sweep.
        sweep_fraction: share of the budget that each rate gets in the sweep.
        seeds: number of full runs; they use the seeds seed, seed + 1, ...
        batch_size: B, sequences per step.
        betas, eps, weight_decay: AdamW's; see ``decays`` for what is not decayed.
        warmup: share of the steps over which the rate rises linearly.
        schedule: ``cosine`` falls from the end of the warm-up on; ``constant`` keeps the peak and falls linearly over
            the last ``decay`` of the steps. Only the second lets a rung continue from the rung below: until the
            decay begins, runs of every length are the same run.
        decay: share of the steps over which ``constant`` falls.
        warmup_tokens: tokens of warm-up instead of a share, so that runs of different lengths begin alike.
        floor: the last step's rate as a share of the peak.
        clip_norm: largest gradient norm over all parameters.
        eval_every_tokens: tokens between evaluations on validation; None is a tenth of the run.
        eval_tokens: tokens read by an evaluation on validation.
        test_tokens: tokens read on test, once per run; None is four times eval_tokens.
        precision: fp32, or bf16 autocast with fp32 parameters; auto is bf16 on CUDA and fp32 elsewhere.
        divergence_multiple: a loss above this multiple of the larger of log(vocab_size) and the first loss, or
            one that is not finite, ends the run.
    """

    learning_rates: tuple[Positive, ...] = Field(default=(2e-3,), min_length=1)
    sweep_fraction: Number = Field(default=0.1, gt=0, le=1)
    seeds: Count = 1
    batch_size: Count = 16
    betas: tuple[Number, Number] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Number = Field(default=0.1, ge=0)
    warmup: Number = Field(default=0.1, ge=0, lt=1)
    warmup_tokens: Count | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    decay: Number = Field(default=0.2, gt=0, lt=1)
    floor: Number = Field(default=0.1, ge=0, le=1)
    clip_norm: Positive = 1.0
    eval_every_tokens: Count | None = None
    eval_tokens: Count = 16_384
    test_tokens: Count | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    divergence_multiple: Number = Field(default=4.0, gt=1)

    @model_validator(mode="after")
    def _betas_below_one(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}; both must be at least 0 and below 1")
        return self

    def num_steps(self, budget_tokens: int, sequence_length: int) -> int:
        """Return the steps of a run: the budget in whole steps, rounded up."""
        return max(1, math.ceil(budget_tokens / (self.batch_size * sequence_length)))

    def warmup_steps(self, num_steps: int, tokens_per_step: int) -> int:
        """Return the steps over which the rate rises."""
        if self.warmup_tokens is not None:
            return min(num_steps, math.ceil(self.warmup_tokens / tokens_per_step))
        return math.ceil(self.warmup * num_steps)

    def decay_start(self, num_steps: int) -> int:
        """Return the first step, from 0, at which the rate of a ``constant`` schedule is below its peak."""
        return num_steps - math.ceil(self.decay * num_steps)

    def learning_rate_at(self, step: int, num_steps: int, peak: float, tokens_per_step: int = 1) -> float:
        """Return the rate of a step, from 0: linear up to the peak, then by the schedule to ``floor * peak``."""
        warmup_steps = self.warmup_steps(num_steps, tokens_per_step)
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        if self.schedule == "constant":
            start = self.decay_start(num_steps)
            fallen = max(0, step + 1 - start) / (num_steps - start)
            return peak * (1 - (1 - self.floor) * fallen)
        progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
        return peak * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW over the model's parameters, decayed as they are declared, or as ``decays`` says."""
        declared = {
            id(module.get_parameter(name)): law.decayed
            for module in model.modules()
            if isinstance(module, Declared)
            for name, law in module.laws.items()
        }
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[declared.get(id(parameter), decays(name, parameter))].append(parameter)
        parameters: list[dict[str, Any]] = [
            {"params": members, "weight_decay": self.weight_decay if decayed else 0.0}
            for decayed, members in groups.items()
            if members
        ]
        return torch.optim.AdamW(parameters, self.learning_rates[0], self.betas, self.eps, fused=True)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context that computes in the recipe's precision on a device."""
        wanted = self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")
        return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Say whether weight decay applies to a parameter of a module that does not declare it.

    Parameters of compiled models follow their components' declarations (``archspec.initial.Parameter.decayed``):
    matrices are decayed, but gates, norms, offsets and embeddings are not, since their origin is a meaningful value
    rather than "no effect". Elsewhere: everything with two or more axes that is not below a part named norm or gate.
    """
    return parameter.ndim >= 2 and UNDECAYED_NAMES.isdisjoint(name.split("."))
