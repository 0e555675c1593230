"""Attention over segments whose context is read from a long-term memory (Titans, arXiv:2501.00663, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from archspec.component import Count, Integer
from archspec.composition import Finding, Mixer, Path
from archspec.declarations import looked_up_parameters, num_buffered
from archspec.families import nested_gates
from archspec.kept import Kept
from archspec.rule import Rule
from archspec.schema import MemoryMixer

if TYPE_CHECKING:
    from torch.nn import Module


class MemoryAsContext(Mixer, kind="memory_as_context"):
    """Titans' memory as context (MAC), in segments of C tokens.

        h_t = M*_s(x_t)                       read with x's query from the memory as it stood at the segment's start
        y_t = Attn([P || h_1 x_1 ... h_t x_t])  within the segment, read at x_t
        o_t = y_t (x) M_t*(y_t)               M_t the memory after y_t was written, (x) the product of channels

    Where the paper is silent or would look ahead, this is chosen: a token sees the h of the segment's tokens up to
    itself (all of [P || h || X] would show it what later tokens read); h_t stands just before x_t, so positions count
    both; the attention starts anew with every segment; the short convolutions of the look-up follow x, those of the
    memory follow y; the product is plain, without the paper's unnamed nonlinearity.

    Args:
        persistent: P, learned tokens at the start of every segment.
        segment: C, tokens of a segment.
        memory: the long-term memory: a mixer whose memory has weights.
        attention: the attention: a mixer whose memory is the tokens.
    """

    persistent: Annotated[Integer, Field(ge=0)] = 0
    segment: Count = 128
    memory: Mixer
    attention: Mixer

    def children(self) -> Mapping[Path, Mixer]:
        return {("memory",): self.memory, ("attention",): self.attention}

    def instances(self) -> Mapping[Path, Mixer]:
        """The persistent tokens are the attention's prefix: it is read whenever a segment starts."""
        attention = self.attention.model_copy(update={"prefix": self.persistent})
        return {("memory",): self.memory, ("attention",): attention}

    def flops(self, model_dim: int, context: int, of: Callable[[Mixer, int], int]) -> int:
        memory, attention = self.instances().values()
        seen = self.persistent + 2 * ((context - 1) % self.segment + 1)
        return of(memory, context) + self._look_up_flops(model_dim) + 2 * of(attention, seen)

    def _look_up_flops(self, model_dim: int) -> int:
        if not isinstance(self.memory, MemoryMixer):
            return 0
        maps = sum(p.size for p in looked_up_parameters(self.memory, model_dim).values() if p.decayed)
        rule = Rule.of(self.memory, model_dim)
        return 2 * (maps + rule.dims.num_heads * _num_weights(rule))

    def kept(self, model_dim: int, of: Callable[[Mixer], Kept]) -> Kept:
        memory, attention = self.instances().values()
        found = of(memory) + of(attention).renewed_every(self.segment, per_token=2)
        if not isinstance(memory, MemoryMixer):
            return found
        # The weights at the segment's start, and what the look-up's convolutions and shifts keep.
        rule = Rule.of(memory, model_dim)
        buffered = num_buffered(looked_up_parameters(memory, model_dim))
        return found + Kept(memory=rule.dims.num_heads * _num_weights(rule), buffer=buffered)

    def findings(self, model_dim: int) -> Iterator[Finding]:
        memory, attention = self.memory, self.attention
        for (name, *_), mixer in self.children().items():
            for part in _blended(mixer):
                yield (name, part, "blend"), "the first layer's projections belong to other tokens; remove 'blend'."
        if not isinstance(memory, MemoryMixer) or memory.memory.grows or memory.update.solves:
            yield ("memory",), "the look-up reads weights; use a mixer whose memory has them (matrix, mlp), unsolved."
        else:
            yield from _memory_findings(memory)
        if not isinstance(attention, MemoryMixer) or not attention.memory.grows:
            yield ("attention",), "attention stores tokens; use a mixer with memory 'kv'."
        elif attention.prefix:
            yield ("attention", "prefix"), "the learned tokens of a segment are 'persistent', beside 'attention'."

    def summary(self) -> str:
        return f"memory as context: segments of {self.segment} behind {self.persistent} learned tokens"

    def build(self, instances: Mapping[Path, Module], path: str, model_dim: int, depth: tuple[int, int]) -> Module:
        from archspec.blocks.contextual import MemoryAsContextModule

        memory, attention = instances.values()
        return MemoryAsContextModule(memory, attention, path, self.segment)


def _blended(mixer: Mixer) -> list[str]:
    names: tuple[Literal["query", "key", "value"], ...] = ("query", "key", "value")
    return [name for name in names if isinstance(mixer, MemoryMixer) and mixer.projection(name).blend is not None]


def _num_weights(rule: Rule) -> int:
    return sum(rows * columns for rows, columns in rule.memory.weights(rule.dims).values())


def _memory_findings(memory: MemoryMixer) -> Iterator[Finding]:
    """The look-up computes streams, query and read-out: the read-out may need nothing else."""
    if memory.prefix:
        yield ("memory", "prefix"), "the memory reads what attention returns; write 'persistent' beside 'memory'."
    for path in sorted(unavailable(memory)):
        yield ("memory", *path.split(".")), "a look-up has no key and no value; read the query, 'input' or a stream."


def unavailable(memory: MemoryMixer) -> set[str]:
    """Return the paths of the read-out's choices that need a key, a value or a gate of the update."""
    found, gates = set(), dict(memory.named_gates())
    skip = memory.readout.skip
    if skip is not None and skip.of in ("key", "value"):
        found.add("readout.skip.of")
    for path in gates:
        if path.startswith("readout.") and any(_writes(need, gates) for need in _reads(path, gates)):
            found.add(path)
    if memory.readout.correction is not None:
        found.add("readout.correction")
    return found


def _reads(path: str, gates: Mapping[str, Any]) -> tuple[str, ...]:
    every = [gates[path], *(gate for _, gate in nested_gates(gates[path]))]
    return tuple(name for gate in every for name in (*gate.needs(), *(gate.from_ if gate.has_source else ())))


def _writes(name: str, gates: Mapping[str, Any]) -> bool:
    if name in ("key", "value") or name.startswith(("update.", "retention.", "bias.")):
        return True
    return name in gates and any(_writes(need, gates) for need in _reads(name, gates))
