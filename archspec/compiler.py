"""Plan to module: ``compile`` joins a checked spec with the form that lowering chose for each mixer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archspec.blocks.declared import Declared, initialise
from archspec.blocks.mixer import MemoryMixerModule
from archspec.blocks.model import SequenceModel
from archspec.composition import Mixer, joined
from archspec.errors import UnsupportedError, unknown
from archspec.forms import FusedPieces, form_of
from archspec.loading import load
from archspec.lowering import decide
from archspec.rule import Rule
from archspec.schema import Block, MemoryMixer, Spec

BACKENDS = ("auto", "triton", "chunked", "reference")


def compile(  # noqa: A001 - the verb of the field and of torch.compile
    source: str | Path | Mapping[str, Any] | Spec,
    *,
    vocab_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> SequenceModel:
    """Return the module of a spec, with its parameters drawn.

    Args:
        source: a spec, a file, a shipped model's name or a mapping.
        vocab_size: number of tokens; it comes from the task, not from the architecture.
        seed: the parameters depend on it, on their own names and laws, and on nothing else.
        device: where the module lives.
        dtype: its floating-point type; fp32 when None. Memories and their gates stay in at least fp32.
        backend: ``auto`` picks the fastest form that fits; ``chunked`` the torch forms; ``reference`` the
            token-by-token recurrence that defines the result; ``triton`` insists on Triton kernels.

    Raises:
        SpecError: the spec is malformed or illegal.
        UnsupportedError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise UnsupportedError(f"compile: {unknown('backend', backend, BACKENDS)}")
    spec = load(source)
    kind = torch.device(device).type

    def build(mixer: Mixer, path: str, depth: tuple[int, int]) -> nn.Module:
        if isinstance(mixer, MemoryMixer):
            decision = decide(Rule.of(mixer, spec.model_dim), kind, backend)
            return MemoryMixerModule(mixer, path, spec.model_dim, depth, form_of(decision, backend))
        instances = {name: build(child, f"{path}.{joined(name)}", depth) for name, child in mixer.instances().items()}
        return mixer.build(instances, path, spec.model_dim, depth)

    def build_block(block: Block, path: str, depth: tuple[int, int]) -> nn.Module:
        return build(block.mixer, path, depth)

    model = SequenceModel(spec, vocab_size, build_block)
    initialise(model, seed)
    if backend in ("auto", "triton"):
        pieces = FusedPieces()
        for module in model.modules():
            if isinstance(module, Declared):
                module.pieces = pieces
    return model.to(device=device, dtype=dtype)
