"""What a spec compiles to and why: the text and data behind ``archspec explain``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from archspec.canonical import architecture_hash
from archspec.complexity import Complexity, memory_mixers, predict
from archspec.loading import load
from archspec.lowering import Plan, plan
from archspec.rule import Rule
from archspec.schema import MemoryMixer, Spec


def explain(
    source: str | Path | Mapping[str, Any] | Spec,
    *,
    device: str = "cpu",
    vocab_size: int = 256,
    context: int = 2048,
) -> Explanation:
    """Return how a spec runs on a type of device, with its predicted sizes; printing it shows a summary.

    Args:
        source: a spec, a file, a shipped model's name or a mapping.
        device: ``cpu`` or ``cuda``.
        vocab_size: number of tokens; it comes from the task.
        context: tokens in the context, for attention's FLOPs and the state bytes shown.
    """
    spec = load(source)
    return Explanation(spec, plan(spec, device), predict(spec, vocab_size, context), device, context)


class Explanation:
    """A spec with its plan and sizes; ``str`` for people, ``data`` for programs."""

    def __init__(self, spec: Spec, plan: Plan, complexity: Complexity, device: str, context: int) -> None:
        self.spec, self.plan, self.complexity = spec, plan, complexity
        self.device, self.context = device, context

    def mixers(self) -> dict[str, MemoryMixer]:
        """Return the memory mixers that the layout uses, by their path in the document."""
        return {
            f"blocks.{name}.mixer{path}": mixer
            for name, block in self.spec.blocks.items()
            for path, mixer in memory_mixers(block.mixer)
            if f"blocks.{name}.mixer{path}" in self.plan.decisions
        }

    def data(self) -> dict[str, Any]:
        """Return everything as plain data."""
        mixers = self.mixers()
        return {
            "name": self.spec.name,
            "hash": architecture_hash(self.spec),
            "device": self.device,
            "context": self.context,
            "parameters": self.complexity.parameters,
            "non_embedding_parameters": self.complexity.non_embedding_parameters,
            "flops_per_token": self.complexity.flops_per_token,
            "state_bytes": self.complexity.state_bytes(self.context),
            "layers": [list(paths) for paths in self.plan.layers],
            "mixers": {
                path: {
                    "coordinates": coordinates(mixers[path]),
                    "dims": vars(Rule.of(mixers[path], self.spec.model_dim).dims),
                    "family": decision.family,
                    "form": decision.form,
                    "kernel": decision.kernel,
                    "reason": decision.reason,
                    "rejected": [vars(rejection) for rejection in decision.rejected],
                }
                for path, decision in self.plan.decisions.items()
            },
        }

    def __str__(self) -> str:
        data = self.data()
        lines = [
            f"{data['name']}  ({data['hash']})",
            f"  parameters        {data['parameters']:>15,}  ({data['non_embedding_parameters']:,} without embeddings)",
            f"  FLOPs per token   {data['flops_per_token']:>15,}  (forward, context {self.context:,})",
            f"  state bytes       {data['state_bytes']:>15,}  (one sequence of {self.context:,} tokens, float32)",
        ]
        for path, mixer in data["mixers"].items():
            count = sum(path in layer for layer in self.plan.layers)
            heads = mixer["dims"]
            lines += [
                "",
                f"{path}  (in {count} layer{'s' if count != 1 else ''})",
                f"  {mixer['coordinates']}",
                f"  {heads['num_heads']} heads, key {heads['key_dim']}, value {heads['value_dim']}",
                f"  runs as {mixer['family']} / {mixer['form']} on {mixer['kernel']}: {mixer['reason']}",
            ]
            lines += [f"    not {item['family']}: {item['reason']}" for item in mixer["rejected"]]
            if mixer["family"] == "recurrence":
                lines.append("  note: this is the slow form that defines the result; no faster one is known")
        return "\n".join(lines)


def coordinates(mixer: MemoryMixer) -> str:
    """Return the four choices of a mixer in one line, such as ``matrix x l2 x decay(ssd) x gradient_descent``."""
    gate = mixer.retention.decay_gate
    retention = mixer.retention.kind if gate is None else f"{mixer.retention.kind}({gate.kind}/{gate.granularity})"
    anchor = mixer.update.anchor
    update = mixer.update.kind if anchor is None else f"{mixer.update.kind}@{anchor.every}"
    return " x ".join((mixer.memory.kind, mixer.bias.kind, retention, update))
