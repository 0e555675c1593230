"""The families of choices and what each must be able to do: abstract bases, no choice of their own.

Every method is pure: tensors in, tensors out, any dtype and device. Tensors inside a memory have the layout
[B, H, C, d] (C tokens of one head side by side; C = 1 in the token-by-token recurrence). A gate's tensor always has
two trailing axes, [..., 1 or K, 1 or V]: ``head`` is [1, 1], ``key`` [K, 1], ``value`` [1, V], ``state`` [K, V].

Sources: the four choices are those of Miras (arXiv:2504.13173, section 3).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError, core_schema

from archspec.component import FAMILIES, Component, Count, Flag, Number, Off, Positive, also
from archspec.errors import UnsupportedError
from archspec.initial import ZEROS, Parameter, Parameters
from archspec.sources import (
    Activation,
    Dim,
    Gate,
    Order,
    Part,
    Per,
    Shift,
    Source,
    gate_size,
    gates_of,
    joint_granularity,
    nested_gates,
    seen_dims,
    starting_needs,
)
from archspec.streams import Blend, FeatureMap, Norm, Position, Projection, Stream, StreamFields

if TYPE_CHECKING:
    from torch import Tensor

    from archspec.blocks.pieces import Pieces
    from archspec.shapes import HeadDims

__all__ = [
    "Activation",
    "Anchor",
    "AtAnchor",
    "Bias",
    "Blend",
    "Dim",
    "FeatureMap",
    "FeedForward",
    "Gate",
    "Linear",
    "Memory",
    "Norm",
    "Order",
    "OutputStage",
    "Part",
    "Per",
    "Position",
    "Projection",
    "ReadKey",
    "Retention",
    "Scale",
    "Shift",
    "Source",
    "Step",
    "Stream",
    "StreamFields",
    "Update",
    "Window",
    "gate_size",
    "gates_of",
    "joint_granularity",
    "nested_gates",
    "seen_dims",
    "starting_needs",
]

Scale = Annotated[
    Number | None,
    BeforeValidator(lambda value: None if value == "rsqrt" else value),
    WithJsonSchema({"anyOf": [{"const": "rsqrt"}, {"type": "number"}, {"type": "null"}]}),
]

Linear = Callable[[str, "Tensor"], "Tensor"]


class Memory(Component, family="memory", noun="memory"):
    """M(W, x): what is stored per head, and how it is read.

    A memory describes its network once, over the primitive ``linear(name, x)`` = x @ W[name]. The recurrence, the
    chunkwise form and the kernels each supply their own ``linear``.

    Attributes:
        grows: whether tokens are stored instead of weights.
        is_linear: whether M is one linear map without a residual.
        keyless: whether there are no keys: it is written and read as a whole.
    """

    grows: ClassVar[bool] = False
    is_linear: ClassVar[bool] = False
    keyless: ClassVar[bool] = False

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
        error: ``value`` when delta = -v whatever the prediction; ``residual`` when delta = M(k) - v; ``weighted`` when
            that is multiplied by the gate ``weights``; ``nonlinear`` otherwise. Lowering reads it.
    """

    window: Window | None = None
    read_key: ReadKey | None = None
    erase_key: Literal["key", "read_key"] = "key"

    error: ClassVar[Literal["value", "residual", "weighted", "nonlinear"]] = "nonlinear"

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
        reduce: ``sum`` adds the chunk's steps; ``mean`` divides their sum at the i-th token by i (TTT); ``learned``
            multiplies it by max(0, 1/i + d_i), d learned from 0 (TTT's code).
        lag: the first token of a chunk takes the true step, the rest run linearly from it (Miras, section 5).
        link: where the retention's link applies: at every ``token``, or at the ``anchor`` only.
    """

    short_forms: ClassVar[tuple[dict[str, Any], ...]] = ({"type": "integer", "minimum": 1},)

    every: Count
    reduce: Literal["sum", "mean", "learned"] = "sum"
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

    @property
    def parameters(self) -> Parameters:
        """What is learned: d."""
        return {"anchor_share": Parameter((self.every,), ZEROS)} if self.reduce == "learned" else {}

    def shares(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """Return max(0, 1/i + d_i) [every], or None where nothing is learned."""
        if self.reduce != "learned":
            return None
        learned = parameters["anchor_share"]
        return (learned.new_tensor([1 / i for i in range(1, self.every + 1)]) + learned).clamp(min=0)


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


class OutputStage(Component, family="output_stage", noun="output stage"):
    """One step from what a memory's read-out returns, H V channels a token, to the mixer's output of the model's."""

    @classmethod
    def from_name(cls, name: str) -> Component | None:
        """A bare name that is no kind is an activation."""
        known = FAMILIES[cls.family].members.get("activation")
        return known.model_validate({"function": name}) if known is not None and name in get_args(Activation) else None

    def width(self, width: int, model_dim: int) -> int:
        """Return the channels that come out, of ``width`` that come in; as many by default."""
        return width

    def needs_width(self, model_dim: int) -> int | None:
        """Return how many channels must come in; None takes any number."""
        return None

    def parameters(self, width: int, model_dim: int) -> Parameters:
        """Return what is learned, for ``width`` channels coming in; nothing by default."""
        return {}

    @abstractmethod
    def apply(self, y: Tensor, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return [B, T, width'] for y [B, T, width] and x [B, T, D], what the mixer was given."""


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
