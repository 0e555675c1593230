"""The YAML language: documents, blocks, mixers, layouts. What stands inside a mixer is in ``families``.

``docs/language.md`` describes it for users; loading (resolver, ``extends``, positions) is in ``loading``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from archspec.component import Component, Count, Flag, Integer, Number, Off, StrictModel, Text
from archspec.composition import Mixer
from archspec.ends import Head, Input
from archspec.families import (
    Bias,
    Dim,
    FeedForward,
    Gate,
    Memory,
    Norm,
    OutputStage,
    Part,
    Projection,
    Retention,
    Stream,
    Update,
    gates_of,
)
from archspec.initial import ZEROS, Initial, Parameter, Parameters
from archspec.shapes import HeadDims

LANGUAGE_VERSION = 1
WIDTH = Dim(ratio=1.0)


class About(Part):
    """Where a spec comes from and how faithful it is to its source."""

    title: Text = ""
    source: Text = ""
    equations: Text = ""
    fidelity: Literal["exact", "differs", "own"] = "own"
    differs: Text = ""

    @model_validator(mode="after")
    def _says_what_differs(self) -> About:
        if self.fidelity == "differs" and not self.differs:
            raise PydanticCustomError(
                "differs_missing", "'fidelity: differs' needs 'differs': what is not as published."
            )
        return self


class Correction(Part):
    """Read with q - D * read_key instead of q."""


class Skip(Part):
    """Add gate * stream to the read-out; ``of`` names the value, the query, the key or a stream."""

    of: Text = "value"
    gate: Gate = Field(default_factory=lambda: Gate.parse(1.0))


ReadoutStage = Literal["norm", "skip", "gate"]


class Readout(Part):
    """From what the memory returns to the mixer's output: correction before the read, then the stages in order."""

    correction: Gate | None = None
    norm: Annotated[Norm | None, Off] = None
    skip: Skip | None = None
    gate: Gate | None = None
    order: tuple[ReadoutStage, ReadoutStage, ReadoutStage] = ("norm", "skip", "gate")
    read: Literal["after", "before"] = "after"

    @model_validator(mode="before")
    @classmethod
    def _gate_per_value(cls, value: Any) -> Any:
        """The read-out gate varies per value channel unless it says otherwise; a gate of 1 is no gate."""
        if not isinstance(value, Mapping):
            return value
        found = dict(value)
        gate = found.get("gate")
        if isinstance(gate, Mapping) and "per" not in gate:
            found["gate"] = {**gate, "per": "value"}
        elif isinstance(gate, str) and Gate.parse_kind_exists(gate):
            found["gate"] = {"kind": gate, "per": "value"}
        elif gate == 1 and not isinstance(gate, bool):
            found["gate"] = None
        return found

    @model_validator(mode="after")
    def _order_is_complete(self) -> Readout:
        if sorted(self.order) != ["gate", "norm", "skip"]:
            raise PydanticCustomError("readout_order", "'order' names norm, skip and gate once each.")
        return self


@cache
def _projection(kind: str | None) -> Projection:
    """Return the projection of a kind as it is without fields; None: the default one."""
    return Projection.parse(kind or {})


def _as_stages(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value if isinstance(value, tuple) else (value,)


STAGE_SCHEMA = {"x-archspec-family": "output_stage"}
STAGES_SCHEMA = {"anyOf": [STAGE_SCHEMA, {"type": "array", "items": STAGE_SCHEMA}]}


class MemoryMixer(Mixer, kind="memory"):
    """Memory x attentional bias x retention gate x update rule, with the projections and read-out around them.

    Args:
        prefix: learned tokens that the mixer reads before the first of a sequence (persistent memory).
        num_heads: H, memories side by side.
        key_dim, value_dim: sizes over all heads when relative, of one head when a number.
        streams: named signals that projections and gates can read.
        gates: named gates, for a quantity that several coordinates share.
        qkv, qk, query, key, value: projections; the general ones first, the specific amend them.
        output: stages from the read-out to the model's width; absent is one linear map.
    """

    prefix: Annotated[Integer, Field(ge=0)] = 0
    num_heads: Count = 1
    key_dim: Dim = WIDTH
    value_dim: Dim = WIDTH
    streams: dict[Text, Stream] = Field(default_factory=dict)
    gates: dict[Text, Gate] = Field(default_factory=dict)
    qkv: Projection | None = None
    qk: Projection | None = None
    query: Projection | None = None
    key: Projection | None = None
    value: Projection | None = None
    memory: Memory
    bias: Bias = Field(default_factory=lambda: Bias.parse("l2"))
    retention: Retention = Field(default_factory=lambda: Retention.parse("none"))
    update: Update
    readout: Readout = Field(default_factory=Readout)
    output: Annotated[tuple[OutputStage, ...], BeforeValidator(_as_stages), WithJsonSchema(STAGES_SCHEMA)] = ()

    @property
    def stages(self) -> tuple[OutputStage, ...]:
        """The stages of the output; none where it is one linear map, as when nothing is written."""
        return () if self.output == (OutputStage.parse("linear"),) else self.output

    def projection(self, name: Literal["query", "key", "value"]) -> Projection:
        """Return the effective projection: ``qkv``, amended by ``qk`` (query and key only), amended by its own.

        Without keys in the memory, query and key are 1.
        """
        if self.memory.keyless and name != "value":
            return _projection("constant")
        layers = [self.qkv, self.qk if name != "value" else None, getattr(self, name)]
        effective: Component = _projection(None)
        for layer in layers:
            if layer is not None:
                effective = effective.amended(layer)
        return effective  # type: ignore[return-value]

    def named_gates(self) -> Iterator[tuple[str, Gate]]:
        """Yield (dotted path, gate) for every gate of the mixer, the shared ones first."""
        for name, gate in self.gates.items():
            yield f"gates.{name}", gate
        for field in ("bias", "retention", "update", "readout"):
            yield from gates_of(getattr(self, field), f"{field}.")

    def projected_dims(self, model_dim: int) -> HeadDims:
        """Return the sizes of one head's projections, before feature maps.

        Raises:
            ValueError: when a relative size does not divide by the number of heads.
        """
        sizes = {"model_dim": model_dim, "num_heads": self.num_heads}
        found: dict[str, int] = {}
        for name in ("key_dim", "value_dim"):
            dim: Dim = Dim(fixed=1) if self.memory.keyless and name == "key_dim" else getattr(self, name)
            size = dim.resolve({**sizes, **found})
            if dim.fixed is None:
                if size % self.num_heads:
                    raise ValueError(
                        f"{name} is {size} over all heads, which num_heads={self.num_heads} does not divide; "
                        f"change the ratio, model_dim or num_heads"
                    )
                size //= self.num_heads
            found[name] = size
        return HeadDims(model_dim, self.num_heads, found["key_dim"], found["value_dim"])

    def dims(self, model_dim: int) -> HeadDims:
        """Return the sizes the memory sees: key_dim is that of the key's feature map."""
        dims = self.projected_dims(model_dim)
        feature = self.projection("key").feature
        key_dim = feature.output_dim(dims.key_dim) if feature is not None else dims.key_dim
        return HeadDims(dims.model_dim, dims.num_heads, key_dim, dims.value_dim)


class Block(StrictModel):
    """A sequence mixer and a channel mixer with their residual connections.

    Args:
        placement: ``pre`` x + f(norm x); ``post`` norm(x + f x); ``sandwich`` x + norm f(norm x);
            ``parallel`` x + mixer(norm x) + feed_forward(norm x).
    """

    mixer: Mixer
    feed_forward: Annotated[FeedForward | None, Off] = None
    norm: Annotated[Norm | None, Off] = None
    placement: Literal["pre", "post", "sandwich", "parallel"] = "pre"


class Layout(Component, family="layout", noun="layout"):
    """How blocks follow each other: a name, a list, ``repeat``, ``loop`` or ``cycle``."""

    @classmethod
    def from_name(cls, name: str) -> Component | None:
        """A bare name is a block."""
        return BlockName(name=name)

    @classmethod
    def from_list(cls, items: list[Any]) -> Component | None:
        """A bare list is a sequence."""
        return cls.parse({"kind": "sequence", "of": items})

    @classmethod
    def infer_kind(cls, mapping: Mapping[str, Any]) -> str | None:
        """A mapping is told by its counting key."""
        return next((key for key in ("repeat", "loop", "cycle") if key in mapping), None)

    def names(self) -> Iterator[str]:
        """Yield the blocks' names in order, every application once."""
        yield from ()

    def inner(self) -> tuple[Layout, ...]:
        """Return the layouts that this one is made of."""
        of = getattr(self, "of", ())
        return of if isinstance(of, tuple) else (of,)


class BlockName(Layout, kind="block"):
    """One block, by name."""

    name: Text

    def names(self) -> Iterator[str]:
        yield self.name


class Sequence(Layout, kind="sequence"):
    """Several layouts one after another."""

    of: tuple[Layout, ...] = Field(min_length=1)

    def names(self) -> Iterator[str]:
        for part in self.of:
            yield from part.names()


class Repeat(Layout, kind="repeat"):
    """A layout several times, with fresh weights each time."""

    repeat: Annotated[Count, Field(le=1024)]
    of: Layout

    def names(self) -> Iterator[str]:
        for _ in range(self.repeat):
            yield from self.of.names()


class Cycle(Layout, kind="cycle"):
    """A layout tiled until ``cycle`` layers are reached, then cut."""

    cycle: Annotated[Count, Field(le=1024)]
    of: Layout

    def names(self) -> Iterator[str]:
        once = list(self.of.names())
        for index in range(self.cycle):
            yield once[index % len(once)]


class Halt(Part):
    """Adaptive computation time: every token takes as many passes of a loop as it asks for.

    After pass n a token of state s_n has h_n = sigmoid(w . s_n + b). It halts at the first pass N with
    h_1 + ... + h_N >= 1 - epsilon, and at the last pass at the latest; its state stands still from then on, for
    others to read. The loop returns sum_{n < N} h_n s_n + R s_N with the remainder R = 1 - sum_{n < N} h_n, and
    adds ``ponder`` times the mean of N + R to the auxiliary loss.

    Args:
        epsilon: what the halting probability may miss.
        ponder: weight of the ponder cost.
        offset: law of b; w starts at zero.

    Source: Graves (arXiv:1603.08983), for every token as in the Universal Transformer (arXiv:1807.03819).
    """

    short_forms: ClassVar[tuple[dict[str, Any], ...]] = ({"const": "act"},)

    kind: Literal["act"] = "act"
    epsilon: Annotated[Number, Field(gt=0, lt=1)] = 0.01
    ponder: Annotated[Number, Field(ge=0)] = 0.01
    offset: Initial = Initial(constant=1.0)

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    def parameters(self, model_dim: int) -> Parameters:
        """Return w and b."""
        return {"weight": Parameter((model_dim, 1), ZEROS, decayed=True), "offset": Parameter((1,), self.offset)}

    def expected_passes(self, most: int) -> int:
        """Return N at the start, where h = sigmoid(b): exact for a constant b, with b = 0 for other laws."""
        chance = 1 / (1 + math.exp(-(self.offset.constant or 0.0)))
        return min(most, max(1, math.ceil((1 - self.epsilon) / chance - 1e-12)))


class Loop(Layout, kind="loop"):
    """A layout several times with the same weights (recurrent depth).

    Args:
        inject: add the loop's input again before each pass.
        embed: a sinusoidal code is added before each pass: of the pass number (``sinusoidal``), or of the token's
            position as well (``coordinates``: arXiv:1807.03819).
        halt: ``act`` lets every token decide after how many passes it halts.
    """

    loop: Annotated[Count, Field(le=1024)]
    of: Layout
    inject: Flag = False
    embed: Literal["none", "sinusoidal", "coordinates"] = "none"
    halt: Annotated[Halt | None, Off] = None

    def names(self) -> Iterator[str]:
        for _ in range(self.loop):
            yield from self.of.names()


class Spec(StrictModel):
    """A whole document: one sequence model.

    Args:
        name: what it is called; not part of its architecture.
        model_dim: D, width of the residual stream.
        norm: the norm of blocks that name none, and before the output.
        blocks: blocks by name.
        layout: how they follow each other.
    """

    version: Literal[1] = 1
    name: Annotated[Text, Field(min_length=1, max_length=200)]
    about: About = Field(default_factory=About)
    model_dim: Annotated[Count, Field(le=65536)]
    input: Input = Field(default_factory=lambda: Input.parse("tokens"))
    output: Head = Field(default_factory=lambda: Head.parse("tokens"))
    norm: Annotated[Norm | None, Off] = Field(default_factory=lambda: Norm.parse("rms"))
    blocks: dict[Text, Block] = Field(min_length=1)
    layout: Layout

    MAX_LAYERS: ClassVar[int] = 1024

    def dump(self) -> dict[str, Any]:
        """Return the plain document: every field by its YAML name, defaults written out."""
        return self.model_dump(mode="json", by_alias=True)
