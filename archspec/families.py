"""The families of choices and what each must be able to do: abstract bases, no choice of their own.

Every method is pure: tensors in, tensors out, any dtype and device. Tensors inside a memory have the layout
[B, H, C, d] (C tokens of one head side by side; C = 1 in the token-by-token recurrence). A gate's tensor always has
two trailing axes, [..., 1 or K, 1 or V]: ``head`` is [1, 1], ``key`` [K, 1], ``value`` [1, V], ``state`` [K, V].

Sources: the four choices are those of Miras (arXiv:2504.13173, section 3).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError, core_schema

from archspec.component import FAMILIES, Component, Count, Flag, Integer, Number, Off, Positive, StrictModel, Text, also
from archspec.errors import UnsupportedError
from archspec.initial import Initial, Offset, Parameters

if TYPE_CHECKING:
    from torch import Tensor

    from archspec.blocks.pieces import Pieces
    from archspec.shapes import HeadDims

Per = Literal["head", "key", "value", "state"]
Order = Literal["decay_first", "together", "step_first"]
Activation = Literal[
    "none", "linear", "relu", "relu2", "silu", "gelu", "tanh", "sigmoid", "softplus", "softmax", "exp", "log_sigmoid"
]
Shift = Literal["none", "lerp"]
Scale = Annotated[
    Number | None,
    BeforeValidator(lambda value: None if value == "rsqrt" else value),
    WithJsonSchema({"anyOf": [{"const": "rsqrt"}, {"type": "number"}, {"type": "null"}]}),
]


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


class Norm(Component, family="norm", noun="norm"):
    """A normalisation over the last axis (or, with ``over: model``, over all heads together).

    Args:
        per_head: every head has a learned scale and shift of its own (a group norm's), instead of one for all.
    """

    eps: Positive = 1e-6
    over: Literal["head", "model"] = "head"
    per_head: Flag = False

    @model_validator(mode="after")
    def _one_head_or_all(self) -> Norm:
        if self.per_head and self.over == "model":
            raise PydanticCustomError(
                "norm_heads", "over model has a scale for every channel of every head already: remove 'per_head'."
            )
        return self

    def parameters(self, dim: int) -> Parameters:
        """Return the learned scale and shift for an axis of ``dim`` channels; none by default."""
        return {}

    def parameters_of(self, num_heads: int, dim: int) -> Parameters:
        """Return the learned scale and shift for heads of ``dim`` channels: one for all, or ``per_head``."""
        if not self.per_head:
            return self.parameters(dim)
        return {name: replace(p, shape=(num_heads, *p.shape)) for name, p in self.parameters(dim).items()}

    @abstractmethod
    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Normalise ``x`` [..., dim] over its last axis."""


class Position(Component, family="position", noun="position"):
    """A position law on queries and keys: acts on one head's vector at a known token index."""

    @abstractmethod
    def apply(self, x: Tensor, positions: Tensor, *, is_query: bool) -> Tensor:
        """Encode ``x`` [B, T, H, K] at the integer ``positions`` [T]."""


class FeatureMap(Component, family="feature", noun="feature map"):
    """phi: what a key and a query become before the memory sees them."""

    def output_dim(self, dim: int) -> int:
        """Return the size of phi(x) for x of size ``dim``."""
        return dim

    def parameters(self, num_heads: int, dim: int) -> Parameters:
        """Return the learned parameters; none by default."""
        return {}

    @abstractmethod
    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return phi(x) for ``x`` [B, T, H, K]."""


class StreamFields(Source):
    """What streams and projections have in common: a source, a width, an activation and a norm.

    Attributes:
        has_weights: whether the source's linear map exists.
    """

    dim: Dim | None = None
    activation: Activation = "none"
    norm: Annotated[Norm | None, Off] = None

    has_weights: ClassVar[bool] = True


class Stream(StreamFields, family="stream", noun="stream", default_kind="linear"):
    """A named signal inside a mixer that projections and gates can read."""


class Gate(Source, family="gate", noun="gate"):
    """A scalar, per-channel or per-state quantity of each token: decay, step size, momentum, threshold, ...

    value = scale * f(z), z = the source's linear map of the token, one number for each of ``per``.

    Attributes:
        across_layers: whether ``value`` needs the parameter ``row`` of the same gate in all layers: known as ``rows``
            [L, H, 1 or K, 1 or V], with ``layer``, the index of the gate's own.
        starts_at_zero: whether the value is exactly zero in some layer, so that its logarithm does not exist.
        factors: fields with gates that the value is the product of.
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
        """Return log(value), in the form that loses least; for decays."""
        return self.value(z, known).log()


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


class Blend(Part):
    """Mix a projection with the same projection of the first layer: x <- lerp(x, x_first, gate)."""

    with_: Annotated[Literal["first_layer"], Field(alias="with")]
    gate: Gate


class Projection(StreamFields, family="projection", noun="projection", default_kind="linear"):
    """Query, key or value. Stages: shift, linear, conv, activation, norm, blend, position, feature.

    Attributes:
        has_source: whether it reads the token; else ``vector`` gives what stands before the activation.

    Args:
        heads: number of groups; heads share the projection within a group.
        position: position law on the vector of each head.
        blend: mixing with the first layer's projection.
        feature: the feature map.
        parts: several projections, concatenated along the head's vector.
    """

    heads: Count | None = None
    position: Annotated[Position | None, Off] = None
    blend: Blend | None = None
    feature: Annotated[FeatureMap | None, Off] = None
    parts: tuple[Projection, ...] = ()

    has_source: ClassVar[bool] = True

    def own_parameters(self, num_heads: int, dim: int) -> Parameters:
        """Return what a projection without a source learns; nothing by default."""
        return {}

    def vector(self, num_heads: int, dim: int, parameters: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Return the vector [H, dim] of a projection without a source, of the dtype and device of ``like``."""
        raise UnsupportedError(f"projection {self.kind}: it reads the token and has no vector of its own.")

    def dump(self) -> dict[str, Any]:
        """Return the keys that were written, and the kind if it was: what is left out is left to amend."""
        written = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return {"kind": self.kind, **written} if self.names_its_kind else written

    @classmethod
    def from_list(cls, items: list[Any]) -> Component | None:
        """A bare list is the concatenation of its parts."""
        return cls.parse({"kind": "linear", "parts": items})


Linear = Callable[[str, "Tensor"], "Tensor"]


class Memory(Component, family="memory", noun="memory"):
    """M(W, x): what is stored per head, and how it is read.

    A memory describes its network once, over the primitive ``linear(name, x)`` = x @ W[name]. The recurrence, the
    chunkwise form and the kernels each supply their own ``linear``.
    """

    grows: ClassVar[bool] = False

    @abstractmethod
    def weights(self, dims: HeadDims) -> Mapping[str, tuple[int, int]]:
        """Return name -> (d_in, d_out) of one head's weights W; empty for a memory of tokens."""

    @abstractmethod
    def network(self, linear: Linear, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return M(W, x) [B, H, C, V'] for x [B, H, C, K], calling ``linear(name, x)`` once for each weight."""

    @abstractmethod
    def initial(self, dims: HeadDims) -> Parameters:
        """Return the learned start weights by weight name; a name left out starts at zero."""

    def parameters(self, dims: HeadDims) -> Parameters:
        """Return what the outer loop learns inside the network and no update touches; none by default."""
        return {}

    def target(self, value: Tensor) -> Tensor:
        """Return what M(k) is compared with: the value [B, H, C, V], unless the memory stores more."""
        return value

    def finish(self, read: Tensor, dims: HeadDims) -> Tensor:
        """Return the read-out [B, H, C, V] from M(W, q): scaling and normalising."""
        return read

    def axis(self, weight: str, per: Per) -> Literal["none", "input", "output", "both", "illegal"]:
        """Say along which axis of ``weight`` a gate of granularity ``per`` varies."""
        return "none" if per == "head" else "illegal"


class Window(Part):
    """The Omega rule: the loss sums over the last ``length`` tokens, each weighed by a gate (arXiv:2505.23735)."""

    length: Count
    weights: Gate | None = None


class ReadKey(Part):
    """The key that the error is read with, when it is not the key that is written: p = norm(scale * k)."""

    scale: Gate | None = None
    norm: Annotated[Norm | None, Off] = None


class Bias(Component, family="bias", noun="attentional bias"):
    """The loss l(M(k), v) that a memory descends; the error delta is its gradient in the prediction.

    Attributes:
        error: ``value`` when delta = -v whatever the prediction; ``residual`` when delta = M(k) - v;
            ``nonlinear`` otherwise. Lowering reads it.
    """

    window: Window | None = None
    read_key: ReadKey | None = None
    erase_key: Literal["key", "read_key"] = "key"

    error: ClassVar[Literal["value", "residual", "nonlinear"]] = "nonlinear"

    @abstractmethod
    def loss(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        """Return l [...] for prediction and value [..., V]; ``gates`` by field name, [..., 1 or V]."""

    @abstractmethod
    def gradient(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        """Return delta = dl / d prediction, [..., V]."""


class Retention(Component, family="retention", noun="retention gate"):
    """How much of the past is kept: a decay alpha on the dual weights, its order, and a link W = link(Z).

    Attributes:
        has_link: whether ``link`` is not the identity.
        turns: whether the decay is complex, so that states come in pairs.
        feeds_back: whether the linked weights replace the dual after each token (proximal maps), so that the dual
            is not linear in the increments.
        needs_start: whether the link has no value at Z = 0, so that the memory must start from learned weights.
    """

    order: Order = "decay_first"

    has_link: ClassVar[bool] = False
    turns: ClassVar[bool] = False
    feeds_back: ClassVar[bool] = False
    needs_start: ClassVar[bool] = False

    @property
    def decay_gate(self) -> Gate | None:
        """The gate whose value is alpha, which stands in the field ``gate``; None when nothing decays."""
        return None

    def gate_dims(self, dims: HeadDims) -> HeadDims:
        """Return the sizes that the retention's own gates vary over; those of the head by default."""
        return dims

    def laid_out(self, gate: Tensor) -> Tensor:
        """Return one of the retention's own gates on the axes of the head, [..., 1 or K, 1 or V]."""
        return gate

    def keep(self, weight: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        """Return what a token keeps of a weight [B, H, d_in, d_out]: alpha o weight.

        Args:
            gates: the retention's gates by field name, broadcasting against the weight; ``gate`` is log(alpha).
        """
        return gates["gate"].exp() * weight if "gate" in gates else weight

    def receive(self, increment: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        """Return what a token adds to a weight, from the update's increment; all of it by default."""
        return increment

    def link(self, dual: Tensor) -> Tensor:
        """Return W from the dual Z [B, H, d_in, d_out] of one weight; the identity by default."""
        return dual

    def project(self, dual: Tensor) -> Tensor:
        """Return what is kept of the dual after a token, for proximal rules; everything by default."""
        return dual


class Anchor(Part):
    """Where gradients are taken: at the weights of the last multiple of ``every`` tokens.

    Args:
        every: C, tokens from one anchor to the next.
        reduce: ``sum`` adds the chunk's steps; ``mean`` divides the i-th token's by i (TTT).
        lag: the first token of a chunk takes the true step, the rest run linearly from it (Miras, section 5).
        link: where the retention's link applies: at every ``token``, or at the ``anchor`` only.
    """

    short_forms: ClassVar[tuple[dict[str, Any], ...]] = ({"type": "integer", "minimum": 1},)

    every: Count
    reduce: Literal["sum", "mean"] = "sum"
    lag: Flag = False
    link: Literal["token", "anchor"] = "token"

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise PydanticCustomError(
                "anchor_form",
                "an anchor is 'token', a chunk length or {every, ...}; found {found}.",
                {"found": repr(value)},
            )
        return {"every": value} if isinstance(value, int) and not isinstance(value, bool) else value


class _Token:
    """ "token" means no anchor: gradients at the current weights."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(
            lambda value: None if value == "token" else value, handler(source)
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        return also(handler(schema), {"const": "token"})


AtAnchor = Annotated[Anchor | None, _Token()]


@dataclass(frozen=True)
class Step:
    """What an update rule sees of one token, for one weight of the memory.

    Args:
        gradient: dl/dW at the evaluation point, [B, H, d_in, d_out], without any step size.
        stepped: the same with its step sizes: eta * gradient, erase and write parts each with their own.
        gates: the rule's gates by field name, each broadcasting against the gradient.
        key: k_t [B, H, K], for rules that need the input itself.
        point: the weight at the evaluation point W*.
        value: v_t [B, H, V], for rules that split the error.
    """

    gradient: Tensor
    stepped: Tensor
    gates: Mapping[str, Tensor]
    key: Tensor
    point: Tensor
    value: Tensor


class Update(Component, family="update", noun="update rule"):
    """How the weights move: turns the gradient of the bias into an increment of the dual weights.

    Args:
        step_size: eta, the strength of a step.
        write_size: the strength with which the value is written, when it is not eta (l2 and dot only).
        anchor: where the gradient is taken; ``token`` is the current weights.
    """

    step_size: Gate = Field(default_factory=lambda: Gate.parse(1.0))
    write_size: Gate | None = None
    anchor: AtAnchor = None

    parametric: ClassVar[bool] = True
    solves: ClassVar[bool] = False
    buffers: ClassVar[tuple[str, ...]] = ()

    @property
    def steps_per_token(self) -> int:
        """How many (key, value, step) triples each token brings; 1 unless the rule takes several steps."""
        return 1

    def increment(self, step: Step, buffers: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the increment of one weight [B, H, d_in, d_out] and the new buffers, by name."""
        raise UnsupportedError(f"update {self.kind}: it has no increment; it is not a parametric rule.")

    def momentum_input(self, step: Step) -> Tensor:
        """Return x_t, what a token adds to each of ``buffers``: S_t = mu_t S_{t-1} + x_t, mu the gate of its name."""
        return -step.stepped


class FeedForward(Component, family="feed_forward", noun="feed-forward"):
    """The channel mixer after the sequence mixer."""

    expansion: Positive = 4.0
    multiple_of: Count = 1
    shift: Shift = "none"

    def hidden_dim(self, model_dim: int) -> int:
        """Return the inner width: expansion * D rounded to a multiple."""
        return Dim(ratio=self.expansion, multiple_of=self.multiple_of).resolve({"model_dim": model_dim})

    @abstractmethod
    def parameters(self, model_dim: int) -> Parameters:
        """Return the learned matrices."""

    @abstractmethod
    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the output [B, T, D] for x [B, T, D]."""

    def apply_fused(self, x: Tensor, parameters: Mapping[str, Tensor], pieces: Pieces) -> Tensor:
        """Return the same with the fused kernels that serve x; kinds that have a use for one override this."""
        return self.apply(x, parameters)

    def flops_per_token(self, model_dim: int) -> int:
        """Return multiply-adds counted as two, one token, forward."""
        return 2 * sum(parameter.size for parameter in self.parameters(model_dim).values() if parameter.decayed)


def gates_of(component: Component | Part, prefix: str = "") -> Iterator[tuple[str, Gate]]:
    """Yield (dotted field name, gate) for every gate inside ``component``, its parts included."""
    for name in type(component).model_fields:
        value = getattr(component, name)
        path = f"{prefix}{name}"
        if isinstance(value, Gate):
            yield path, value
        elif isinstance(value, Part):
            yield from gates_of(value, f"{path}.")


def nested_gates(component: Component | Part, prefix: str = "") -> Iterator[tuple[str, Gate]]:
    """Yield (dotted field name, gate) for every gate inside ``component``, and those inside these gates."""
    for path, gate in gates_of(component, prefix):
        yield path, gate
        yield from nested_gates(gate, f"{path}.")
