"""Parameters, FLOPs and state bytes of a spec, predicted without building it.

Counting rules: parameters are those the compiled module registers. FLOPs are those of matrix products (a multiply
and an add are two), forward, per token, of the recurrent form at the given context length; element-wise work is not
counted. State bytes are what must be kept between tokens of one sequence: memories in fp32 (as every form keeps
them), stored keys, values, convolution and shift buffers in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from archspec.composition import Mixer
from archspec.declarations import mixer_parameters, num_accumulated, num_buffered
from archspec.initial import ZEROS, Parameter
from archspec.kept import Kept, Stored, num_older
from archspec.program import RunLayer, unroll
from archspec.rule import Rule
from archspec.schema import Block, BlockName, Cycle, Layout, Loop, MemoryMixer, Spec

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MEMORY_BYTES = 4


@dataclass(frozen=True)
class Complexity:
    """The predicted sizes of a compiled spec.

    Args:
        parameters: scalars learned.
        non_embedding_parameters: the same without the input's map, learned positions and an output of its own.
        flops_per_token: forward, at ``context`` tokens; of every pass of a loop that may halt.
        expected_flops_per_token: the same with the passes that a token takes before training.
        context: tokens in the context of the FLOPs.
        kept: what the state consists of.
    """

    parameters: int
    non_embedding_parameters: int
    flops_per_token: int
    expected_flops_per_token: int
    context: int
    kept: Kept

    def state_bytes(self, length: int, dtype: str = "float32") -> int:
        """Return the bytes of one sequence's state after ``length`` tokens, in a model of ``dtype``."""
        size = DTYPE_BYTES[dtype]
        wide = max(MEMORY_BYTES, size)
        stored = sum((wide if item.in_memory else size) * item.scalars(length) for item in self.kept.stored)
        return wide * self.kept.memory + size * self.kept.buffer + stored


def predict(spec: Spec, vocab_size: int = 256, context: int = 2048) -> Complexity:
    """Return the sizes of a spec compiled for a vocabulary.

    Args:
        spec: a checked spec.
        vocab_size: number of tokens; it comes from the task.
        context: tokens the last token sees; attention's FLOPs depend on it.
    """
    program = unroll(spec.layout)
    used = {name: spec.blocks[name] for name in spec.blocks if name in program.blocks}
    own = {name: sum(p.size for p in _block_parameters(block, spec).values()) for name, block in used.items()}
    non_embedding = sum(own[name] for name in program.blocks)
    if spec.norm is not None:
        non_embedding += sum(p.size for p in spec.norm.parameters(spec.model_dim).values())
    ends = (spec.input.parameters(spec.model_dim, vocab_size), spec.output.parameters(spec.model_dim, vocab_size))
    embedding = sum(parameter.size for end in ends for parameter in end.values())
    if spec.input.position == "learned":
        embedding += spec.input.max_length * spec.model_dim
    flops = spec.input.flops_per_item(spec.model_dim) + 2 * spec.output.width(vocab_size) * spec.model_dim
    each = {name: _block_flops(block, spec, context) for name, block in used.items()}
    keeps = {name: mixer_kept(block.mixer, spec.model_dim) for name, block in used.items()}
    kept = Kept(memory=0 if spec.output.pooled == "last" else spec.model_dim)
    for step in program.instructions:
        if isinstance(step, RunLayer):
            block = used[program.blocks[step.index]]
            kept += keeps[program.blocks[step.index]]
            if block.feed_forward is not None and block.feed_forward.shift == "lerp":
                kept += Kept(buffer=spec.model_dim)
    for halt in program.halts().values():
        non_embedding += sum(p.size for p in halt.parameters(spec.model_dim).values())
    most, expected = (flops + _layout_flops(spec.layout, each, spec.model_dim, halted) for halted in (False, True))
    return Complexity(non_embedding + embedding, non_embedding, most, expected, context, kept)


def _layout_flops(layout: Layout, each: Mapping[str, int], model_dim: int, halted: bool) -> int:
    """Return the FLOPs of a layout's layers and halting units, from those of each block.

    ``halted`` leaves out passes expected not to run.
    """
    if isinstance(layout, BlockName):
        return each[layout.name]
    if isinstance(layout, Cycle):
        return sum(each[name] for name in layout.names())
    once = sum(_layout_flops(part, each, model_dim, halted) for part in layout.inner())
    if not isinstance(layout, Loop) or layout.halt is None:
        return once * getattr(layout, layout.kind, 1)
    passes = layout.halt.expected_passes(layout.loop) if halted else layout.loop
    return passes * (once + 2 * model_dim)


def _block_parameters(block: Block, spec: Spec) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    _extend(found, "mixer", learned(block.mixer, spec.model_dim))
    if block.feed_forward is not None:
        _extend(found, "feed_forward", block.feed_forward.parameters(spec.model_dim))
        if block.feed_forward.shift == "lerp":
            found["feed_forward.shift_mix"] = Parameter((spec.model_dim,), ZEROS)
    norm = block.norm or spec.norm
    if norm is not None:
        for index in range(_num_norms(block)):
            _extend(found, f"norm{index}", norm.parameters(spec.model_dim))
    return found


def _num_norms(block: Block) -> int:
    has_channels = block.feed_forward is not None
    if block.placement == "parallel":
        return 1
    return (1 + has_channels) * (2 if block.placement == "sandwich" else 1)


def _extend(found: dict[str, Parameter], prefix: str, more: Mapping[str, Parameter]) -> None:
    found.update({f"{prefix}.{name}": parameter for name, parameter in more.items()})


def learned(mixer: Mixer, model_dim: int) -> Mapping[str, Parameter]:
    """Return every parameter of a mixer and of those inside it, by a path of its own."""
    if isinstance(mixer, MemoryMixer):
        return mixer_parameters(mixer, model_dim)
    return mixer.parameters(model_dim, lambda child: learned(child, model_dim))


def _block_flops(block: Block, spec: Spec, context: int) -> int:
    flops = 0 if block.feed_forward is None else block.feed_forward.flops_per_token(spec.model_dim)
    return flops + mixer_flops(block.mixer, spec.model_dim, context)


def mixer_flops(mixer: Mixer, model_dim: int, context: int) -> int:
    """Return the FLOPs of a mixer's matrix products, a token, forward, at ``context`` tokens."""
    if not isinstance(mixer, MemoryMixer):
        return mixer.flops(model_dim, context, lambda child, seen: mixer_flops(child, model_dim, seen))
    rule = Rule.of(mixer, model_dim)
    starts = {f"memory.{name}" for name in rule.memory.initial(rule.dims)}
    maps = (p.size for name, p in mixer_parameters(mixer, model_dim).items() if p.decayed and name not in starts)
    return 2 * sum(maps) + _rule_flops(rule, context)


def _rule_flops(rule: Rule, context: int) -> int:
    """Matrix products of the recurrent form: predict, pull back and read, or score and mix the stored tokens."""
    dims, heads = rule.dims, rule.dims.num_heads
    if getattr(rule.memory, "cache", "tokens") == "statistics":
        return 2 * heads * (dims.key_dim + dims.value_dim)
    if rule.memory.grows:
        window, sinks, stride = _sight(rule)
        older = 0 if window is None else max(0, context - window)
        seen = context - older + num_older(older, sinks, stride)
        flops = 2 * heads * seen * (dims.key_dim + dims.value_dim)
        if getattr(rule.update, "fit", None) is None:
            return flops
        # Covariances of keys, one solution of them, and its products with the keys.
        return flops + 2 * heads * (seen * (dims.key_dim**2 + 2 * dims.key_dim) + dims.key_dim**3 // 3)
    sizes = [rows * columns for rows, columns in rule.memory.weights(dims).values()]
    total = sum(sizes)
    # The error needs M(k) unless it is -v; its gradient in each weight is one outer product, and it passes back
    # through every layer but the first.
    predict_flops = 0 if rule.bias.error == "value" and len(sizes) == 1 else total
    back = total + (total - sizes[0])
    return 2 * heads * (predict_flops + back + total)


def _sight(rule: Rule) -> tuple[int | None, int, int | None]:
    """Return window, sinks and stride of a memory of tokens."""
    memory = rule.memory
    return getattr(memory, "window", None), getattr(memory, "sinks", 0), getattr(memory, "stride", None)


def mixer_kept(mixer: Mixer, model_dim: int) -> Kept:
    """Return what a mixer and those inside it keep between tokens."""
    if not isinstance(mixer, MemoryMixer):
        return mixer.kept(model_dim, lambda child: mixer_kept(child, model_dim))
    buffered = num_buffered(mixer_parameters(mixer, model_dim))
    accumulated = num_accumulated(mixer, mixer.dims(model_dim))
    return _rule_kept(Rule.of(mixer, model_dim), mixer) + Kept(memory=accumulated, buffer=buffered)


def _rule_kept(rule: Rule, mixer: MemoryMixer) -> Kept:
    dims = rule.dims
    if not rule.memory.grows:
        anchor = rule.update.anchor
        copies = 1 + len(rule.update.buffers) + (anchor is not None) + rule.links_at_anchors
        copies += anchor is not None and anchor.reduce == "learned"
        total = copies * sum(rows * columns for rows, columns in rule.memory.weights(dims).values())
        if rule.update.solves:
            total += dims.key_dim**2
        return Kept(memory=dims.num_heads * total, stored=_window_kept(rule, mixer))
    if getattr(rule.memory, "cache", "tokens") == "statistics":
        return Kept(memory=dims.num_heads * (dims.value_dim + 2))
    groups = {name: mixer.projection(name).heads or dims.num_heads for name in ("key", "value")}  # type: ignore[arg-type]
    heads = groups["key"] if groups["key"] == groups["value"] else dims.num_heads
    window, sinks, stride = _sight(rule)
    store = Stored(0, None if window is None else window - 1, mixer.prefix, sinks=sinks, stride=stride)
    stored = [replace(store, each=heads * (dims.key_dim + dims.value_dim))]
    if rule.retention.decay_gate is not None:
        stored.append(replace(store, each=dims.num_heads, in_memory=True))
    return Kept(stored=tuple(stored))


def _window_kept(rule: Rule, mixer: MemoryMixer) -> tuple[Stored, ...]:
    """The last tokens of a windowed loss: keys, values, and the gates their errors need."""
    window, dims = rule.bias.window, rule.dims
    if window is None:
        return ()
    each = dims.key_dim * (1 + (rule.bias.read_key is not None)) + dims.value_dim
    for path, gate in mixer.named_gates():
        if path.startswith("bias.") and not path.startswith("bias.read_key."):
            each += dims.value_dim if rule.granularity(gate) == "value" else 1
    return (Stored(dims.num_heads * each, window.length - 1, mixer.prefix, in_memory=True),)
