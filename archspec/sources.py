"""Where a mixer's quantities come from: sizes, sources and gates, which every family of choices builds on.

A gate's tensor always has two trailing axes, [..., 1 or K, 1 or V]: ``head`` is [1, 1], ``key`` [K, 1], ``value``
[1, V], ``state`` [K, V].
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from archspec.component import FAMILIES, Component, Count, Integer, Number, Positive, StrictModel, Text
from archspec.errors import UnsupportedError
from archspec.initial import Initial, Offset, Parameters

if TYPE_CHECKING:
    from torch import Tensor

    from archspec.shapes import HeadDims

Per = Literal["head", "key", "value", "state"]
Order = Literal["decay_first", "together", "step_first"]
Activation = Literal[
    "none", "linear", "relu", "relu2", "silu", "gelu", "tanh", "sigmoid", "softplus", "softmax", "exp", "log_sigmoid"
]
Shift = Literal["none", "lerp"]
SMALLEST = {4: 2.0**-126, 8: 2.0**-1022}
"""The smallest normal number by the size of its type in bytes; gates are at least fp32."""


class Part(StrictModel):
    """A plain group of keys inside a document: frozen and strict like a component, but of one kind only."""


class Dim(Part):
    """A size: a fixed number, or ``ratio`` times another size, rounded to a multiple.

    ``{ratio: r, of: model_dim, multiple_of: m}`` is m * round(r * size / m), at least m.
    """

    short_forms: ClassVar[tuple[dict[str, Any], ...]] = ({"type": "integer", "minimum": 1},)

    fixed: Count | None = None
    ratio: Positive | None = None
    of: Literal["model_dim", "key_dim", "value_dim", "num_heads"] = "model_dim"
    multiple_of: Count = 1

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"fixed": value}
        if isinstance(value, Mapping) and "fixed" in value:
            return value
        if isinstance(value, Mapping) and "ratio" not in value:
            raise PydanticCustomError("dim_form", "a size is a whole number or a mapping with 'ratio'.")
        if not isinstance(value, Mapping | Dim):
            raise PydanticCustomError(
                "dim_form",
                "found {found}; required: a whole number or {ratio, of, multiple_of}.",
                {"found": repr(value)},
            )
        return value

    def resolve(self, sizes: Mapping[str, int]) -> int:
        """Return the size, given the sizes it may refer to by name."""
        if self.fixed is not None:
            return self.fixed
        target = (self.ratio or 1.0) * sizes[self.of]
        return max(self.multiple_of, self.multiple_of * round(target / self.multiple_of))


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Source(Component):
    """Where a stream, projection or gate takes its input, and the linear map in front of it.

    Stages: shift, linear (rank: two factors with ``hidden`` between; block_size: block-diagonal), conv.

    Args:
        from_: the input stream, another stream, or several, which are concatenated.
        shift: ``lerp`` mixes each token with the one before it by a learned weight per channel (RWKV).
        rank: factor the linear map through this many channels.
        hidden: activation between the two factors.
        block_size: the linear map is block-diagonal with blocks of this size.
        offset: law of the additive vector; absent means there is none. (A projection's "bias".)
        init: law of the weights; absent means normal with variance 1/d_in.
        conv: width in tokens of a causal depthwise convolution; 0 is none.
        conv_offset: law of the vector added after the convolution; absent means there is none.
    """

    from_: Annotated[
        tuple[Text, ...],
        BeforeValidator(_as_tuple),
        Field(alias="from", min_length=1),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
    ] = ("input",)
    shift: Shift = "none"
    rank: Dim | None = None
    hidden: Activation = "none"
    block_size: Count | None = None
    offset: Offset = None
    init: Initial | None = None
    conv: Annotated[Integer, Field(ge=0)] = 0
    conv_offset: Offset = None


class Gate(Source, family="gate", noun="gate"):
    """A scalar, per-channel or per-state quantity of each token: decay, step size, momentum, threshold, ...

    value = scale * f(z), z = the source's linear map of the token, one number for each of ``per``.

    Attributes:
        across_layers: whether ``value`` needs the parameter ``row`` of the same gate in all layers: known as ``rows``
            [L, H, 1 or K, 1 or V], with ``layer``, the index of the gate's own.
        starts_at_zero: whether the value is exactly zero in some layer, so that its logarithm does not exist.
        factors: fields with gates that the value is the product of.
        starting: fields with gates that are evaluated once, when the model is made.
        keeps: name of the tensor [B, 1, H, 1 or K, 1 or V] that ``accumulated`` passes on between tokens; None when
            a token's value depends on no other token.
    """

    per: Per = "head"
    scale: Number = 1.0

    has_source: ClassVar[bool] = True
    across_layers: ClassVar[bool] = False
    keeps: ClassVar[str | None] = None
    starts_at_zero: ClassVar[bool] = False
    factors: ClassVar[tuple[str, ...]] = ()
    starting: ClassVar[tuple[str, ...]] = ()
    sums_channels: ClassVar[bool] = False  # the value is a sum over channels: one number a head
    bounds: ClassVar[tuple[float, float]] = (-math.inf, math.inf)

    @property
    def value_range(self) -> tuple[float, float]:
        """The interval the value lies in, ``scale`` included."""
        low, high = (self.scale * bound if self.scale else 0.0 for bound in self.bounds)
        return min(low, high), max(low, high)

    @classmethod
    def from_name(cls, name: str) -> Component | None:
        """A bare name that is no kind refers to the mixer's ``gates:``."""
        named = _gate_kind("named")
        return named.model_validate({"name": name}) if named is not None else None

    @classmethod
    def from_number(cls, number: float) -> Component | None:
        """A bare number is a constant gate."""
        constant = _gate_kind("constant")
        return constant.model_validate({"value": number}) if constant is not None else None

    @classmethod
    def known_kinds(cls) -> list[str]:
        """Return every name that means a kind of gate."""
        return FAMILIES["gate"].known()

    @classmethod
    def parse_kind_exists(cls, name: str) -> bool:
        """Say whether ``name`` is a kind of gate, so that it cannot name one."""
        return name in cls.known_kinds()

    @property
    def granularity(self) -> Per:
        """What the value varies over; ``per``, unless a parameter of the gate varies over more."""
        return self.per

    def parameters(self, dims: HeadDims) -> Parameters:
        """Return the learned parameters beyond the source's linear map; none by default."""
        return {}

    def constants(self, num_heads: int, layer: int, num_layers: int) -> Mapping[str, tuple[float, ...]]:
        """Return fixed numbers per head, [H] each, for schedules over heads and depth; none by default."""
        return {}

    def needs(self) -> tuple[str, ...]:
        """Return the quantities of the mixer, by path, that this gate is derived from; none by default."""
        return ()

    def all_needs(self) -> tuple[str, ...]:
        """Return what this gate and the gates inside it are derived from."""
        inner = (needed for _, gate in gates_of(self) for needed in gate.all_needs())
        return (*self.needs(), *inner)

    def derived_range(self, low: float, high: float) -> tuple[float, float]:
        """Return the interval of the value, before ``scale``, when that of the named gate it needs is [low, high]."""
        return low, high

    def accumulated(self, z: Tensor, kept: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return what ``value`` needs of all tokens so far, by name, and what to keep; for gates with ``keeps``.

        Args:
            z: the source's linear map of a stretch of tokens.
            kept: what was kept before the stretch; None at the start of a sequence.
        """
        raise UnsupportedError(f"gate {self.kind}: a token's value depends on no other token.")

    @abstractmethod
    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """Return the value, before ``scale``.

        Args:
            z: the source's linear map, [B, T, H, 1 or K, 1 or V]; a zero of layout [1, 1, H, 1, 1] when the gate
                has no source.
            known: learned parameters ([H, 1 or K, 1 or V]), constants ([H, 1, 1]) and the quantities of ``needs``.
        """

    def log_value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """Return log(value), in the form that loses least; for decays.

        A value that underflows counts as the smallest number there is, so that its logarithm has a gradient.
        Of gates that are ``factors``, ``known`` has the logarithm as ``log.NAME`` when they have one.
        """
        value = self.value(z, known)
        return value.clamp(min=SMALLEST[value.dtype.itemsize]).log()


def _gate_kind(kind: str) -> type[Component] | None:
    return FAMILIES["gate"].members.get(kind)


def gate_size(per: Per, dims: HeadDims) -> tuple[int, int]:
    """Return the two trailing axes of a gate's tensor: [1 or K, 1 or V]."""
    return (
        dims.key_dim if per in ("key", "state") else 1,
        dims.value_dim if per in ("value", "state") else 1,
    )


def seen_dims(gate: Gate, dims: HeadDims, head: HeadDims) -> HeadDims:
    """Return the sizes that a gate and those inside it vary over: the whole head's for one that reads its vectors.

    Args:
        dims: sizes where the gate stands, which may be half of the head's.
        head: sizes of the head.
    """
    return replace(head, num_heads=dims.num_heads) if gate.sums_channels else dims


def joint_granularity(*grains: Per) -> Per:
    """Return what a product of quantities varies over, given what each of them does."""
    varies = set(grains) - {"head"}
    if not varies:
        return "head"
    return varies.pop() if len(varies) == 1 else "state"


@cache
def _field_names(model: type[Component | Part]) -> tuple[str, ...]:
    return tuple(model.model_fields)


def gates_of(component: Component | Part, prefix: str = "") -> Iterator[tuple[str, Gate]]:
    """Yield (dotted field name, gate) for every gate inside ``component``, its parts included."""
    for name in _field_names(type(component)):
        value = getattr(component, name)
        path = f"{prefix}{name}"
        if isinstance(value, Gate):
            yield path, value
        elif isinstance(value, Part):
            yield from gates_of(value, f"{path}.")


def starting_needs(gate: Gate) -> tuple[str, ...]:
    """Return what the gates that this one, or one inside it, starts as are derived from."""
    found: list[str] = []
    for name, inner in gates_of(gate):
        found += inner.all_needs() if name in gate.starting else starting_needs(inner)
    return tuple(found)


def nested_gates(component: Component | Part, prefix: str = "") -> Iterator[tuple[str, Gate]]:
    """Yield (dotted field name, gate) for every gate inside ``component``, and those inside these gates."""
    for path, gate in gates_of(component, prefix):
        yield path, gate
        yield from nested_gates(gate, f"{path}.")
