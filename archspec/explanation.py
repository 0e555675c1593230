"""What a spec compiles to and why: the text and data behind ``archspec explain``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from archspec.canonical import architecture_hash
from archspec.complexity import Complexity, predict
from archspec.composition import Mixer, inside
from archspec.launches import H100_MULTIPROCESSORS, NO_GATE, ROW_GATE, TOKEN_GATE, Launch, launches
from archspec.loading import dotted, load
from archspec.lowering import Decision, Plan, plan
from archspec.pieces import fused_pieces
from archspec.rule import Rule
from archspec.schema import MemoryMixer, Spec


def explain(
    source: str | Path | Mapping[str, Any] | Spec,
    *,
    device: str = "cpu",
    vocab_size: int = 256,
    context: int = 2048,
    batch: int = 1,
    multiprocessors: int = H100_MULTIPROCESSORS,
) -> Explanation:
    """Return how a spec runs on a type of device, with its predicted sizes; printing it shows a summary.

    Args:
        source: a spec, a file, a shipped model's name or a mapping.
        device: ``cpu`` or ``cuda``.
        vocab_size: number of tokens; it comes from the task.
        context: tokens in the context, for attention's FLOPs and the state bytes shown, and for launches of kernels.
        batch: sequences at a time, for launches of kernels.
        multiprocessors: of a CUDA device; an H100 or H200 has 132.
    """
    spec = load(source)
    sizes = predict(spec, vocab_size, context)
    return Explanation(spec, plan(spec, device), sizes, device, context, batch, multiprocessors)


class Explanation:
    """A spec with its plan and sizes; ``str`` for people, ``data`` for programs."""

    def __init__(
        self, spec: Spec, plan: Plan, complexity: Complexity, device: str, context: int, batch: int = 1,
        multiprocessors: int = H100_MULTIPROCESSORS,
    ) -> None:  # fmt: skip
        self.spec, self.plan, self.complexity = spec, plan, complexity
        self.device, self.context = device, context
        self.batch, self.multiprocessors = batch, multiprocessors

    def mixers(self) -> dict[str, Mixer]:
        """Return the mixers with a recurrence of their own that the layout uses, by their path in the document."""
        return {path: mixer for path, mixer in self._used().items() if path in self.plan.decisions}

    def compositions(self) -> dict[str, str]:
        """Return the mixers made of mixers that the layout uses: their summaries, by their path in the document."""
        return {path: mixer.summary() for path, mixer in self._used().items() if mixer.children()}

    def _used(self) -> dict[str, Mixer]:
        names = set(self.spec.layout.names())
        return {
            dotted(path): mixer
            for name, block in self.spec.blocks.items()
            if name in names
            for path, mixer in inside(block.mixer, ("blocks", name, "mixer"))
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
            "expected_flops_per_token": self.complexity.expected_flops_per_token,
            "state_bytes": self.complexity.state_bytes(self.context),
            "layers": [list(paths) for paths in self.plan.layers],
            "compositions": self.compositions(),
            "mixers": {
                path: {
                    "coordinates": coordinates(mixers[path]),
                    "dims": _dims(mixers[path], self.spec.model_dim),
                    "family": decision.family,
                    "form": decision.form,
                    "kernel": decision.kernel,
                    "reason": decision.reason,
                    "fused": list(self._fused(mixers[path])),
                    "launches": [asdict(launch) for launch in self._launches(mixers[path], decision)],
                    "rejected": [vars(rejection) for rejection in decision.rejected],
                }
                for path, decision in self.plan.decisions.items()
            },
        }

    def _fused(self, mixer: Mixer) -> tuple[str, ...]:
        """Return the pieces around a memory that are one kernel on this type of device."""
        if self.device != "cuda" or not isinstance(mixer, MemoryMixer):
            return ()
        return fused_pieces(mixer, self.spec.model_dim)

    def _launches(self, mixer: Mixer, decision: Decision) -> tuple[Launch, ...]:
        """Return how the serial kernels of a mixer that runs on Triton are launched."""
        if decision.kernel != "triton" or not isinstance(mixer, MemoryMixer):
            return ()
        rule = Rule.of(mixer, self.spec.model_dim)
        gate = rule.retention.decay_gate
        kind = NO_GATE if gate is None else TOKEN_GATE if rule.granularity(gate) == "head" else ROW_GATE
        length = self.context * rule.update.steps_per_token
        dims = rule.dims
        return launches(
            decision.family, kind, self.batch, length, dims.num_heads, dims.key_dim, dims.value_dim,
            self.multiprocessors,
        )  # fmt: skip

    def _expected(self) -> list[str]:
        """Return a line of its own where tokens may halt before the last pass of a loop."""
        most, expected = self.complexity.flops_per_token, self.complexity.expected_flops_per_token
        return [f"    before training {expected:>15,}  (tokens halt after fewer passes)"] if expected != most else []

    def __str__(self) -> str:
        data, mixers = self.data(), self.mixers()
        lines = [
            f"{data['name']}  ({data['hash']})",
            f"  parameters        {data['parameters']:>15,}  ({data['non_embedding_parameters']:,} without embeddings)",
            f"  FLOPs per token   {data['flops_per_token']:>15,}  (forward, context {self.context:,})",
            *self._expected(),
            f"  state bytes       {data['state_bytes']:>15,}  (one sequence of {self.context:,} tokens, float32)",
        ]
        for path, summary in data["compositions"].items():
            lines += ["", path, f"  {summary}"]
        for path, mixer in data["mixers"].items():
            count = sum(path in layer for layer in self.plan.layers)
            heads = mixer["dims"]
            lines += [
                "",
                f"{path}  (in {count} layer{'s' if count != 1 else ''})",
                f"  {mixer['coordinates']}",
                *(
                    [f"  {heads['num_heads']} heads, key {heads['key_dim']}, value {heads['value_dim']}"]
                    if heads
                    else []
                ),
                f"  runs as {mixer['family']} / {mixer['form']} on {mixer['kernel']}: {mixer['reason']}",
            ]
            lines += [f"  fused: {piece}" for piece in mixer["fused"]]
            for launch in self._launches(mixers[path], self.plan.decisions[path]):
                lines += [f"  launch: {launch}", f"    since {launch.reason}"]
            lines += [f"    not {item['family']}: {item['reason']}" for item in mixer["rejected"]]
            if mixer["family"] == "recurrence":
                lines.append("  note: this is the slow form that defines the result; no faster one is known")
            if mixer["family"] == "sequential":
                lines.append("  note: one token after another, since each sees what the one before has changed")
        return "\n".join(lines)


def coordinates(mixer: Mixer) -> str:
    """Return the four choices of a mixer in one line, such as ``matrix x l2 x decay(ssd) x gradient_descent``.

    Of a mixer outside the four choices: its own summary.
    """
    if not isinstance(mixer, MemoryMixer):
        return mixer.summary()
    gate = mixer.retention.decay_gate
    retention = mixer.retention.kind if gate is None else f"{mixer.retention.kind}({gate.kind}/{gate.granularity})"
    anchor = mixer.update.anchor
    update = mixer.update.kind if anchor is None else f"{mixer.update.kind}@{anchor.every}"
    return " x ".join((mixer.memory.kind, mixer.bias.kind, retention, update))


def _dims(mixer: Mixer, model_dim: int) -> dict[str, int]:
    return vars(Rule.of(mixer, model_dim).dims) if isinstance(mixer, MemoryMixer) else {}
