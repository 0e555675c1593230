"""Several memories of one kind, and a router that sends every token to some of them.

Sources: MoM (arXiv:2502.13685), SSE (arXiv:2507.16577).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, WithJsonSchema

from archspec.component import Count, Flag, Integer, Number, Text
from archspec.composition import Finding, Mixer, Path, joined
from archspec.declarations import mixer_parameters, num_buffered, source_parameters
from archspec.errors import nearest
from archspec.families import Dim, Part, Projection, Source
from archspec.fitting import blocks_divide, gate_blocks_divide
from archspec.initial import FAN_IN, ZEROS, Parameter, Parameters
from archspec.kept import Kept
from archspec.readouts import readout_findings, readout_kept, readout_parameters
from archspec.schema import MemoryMixer, Readout

if TYPE_CHECKING:
    from torch.nn import Module

Projected = Literal["query", "key", "value"]
PROJECTIONS: tuple[Projected, ...] = ("query", "key", "value")
CHOICES = (*PROJECTIONS, "streams", "gates", "memory", "bias", "retention", "update", "readout", "norm")
"""What ``share`` may name although it learns nothing in the mixer at hand."""

Weigh = Annotated[
    Literal["read", "read_and_write"],
    BeforeValidator(lambda value: "read_and_write" if value == "write_and_read" else value),
    WithJsonSchema({"enum": ["read", "read_and_write", "write_and_read"]}),
]


class Router(Source):
    """g = softmax(x W) over the experts; a token goes to those with the ``top_k`` largest g.

    Args:
        top_k: experts that take a token.
        renormalize: divide the weights of those taken by their sum.
        weigh: what a weight scales: what is read from its expert, or the strength of the write as well.
        balance_loss: weight of E sum_e f_e P_e in the auxiliary loss, f_e the share of the routed tokens that expert
            e takes and P_e its mean g over the tokens of a stretch (Switch Transformer, arXiv:2101.03961).
    """

    top_k: Count = 1
    renormalize: Flag = False
    weigh: Weigh = "read"
    balance_loss: Annotated[Number, Field(ge=0)] = 0.0


class Adapter(Part):
    """A low-rank addition x A B to a shared projection's linear map."""

    rank: Dim


class Routed(Mixer, kind="routed"):
    """o = sum over the experts that take the token of g_e M_e(q) + sum over those always on of M_e(q), then W_o.

    An expert is a memory with its rule. A token that it does not take leaves its weights as they are (a step of size
    0, a decay of 1); streams, convolutions and the grid of anchors run over all tokens, whoever takes them. FLOPs
    are those of the memories that take a token; every form computes all of them.

    Args:
        experts: E, memories among which the router chooses.
        always_on: memories that take every token, with weight 1.
        router: how it chooses.
        share: paths of what the memories learn in common, such as ``query``, ``key.conv``, ``retention.gate.rate``.
        adapt: by projection, what the memories that are always on add to a shared one.
        of: the memory mixer; its read-out comes before combining.
        readout: norm and gate after combining.
    """

    experts: Count
    always_on: Annotated[Integer, Field(ge=0)] = 0
    router: Router = Router()
    share: tuple[Text, ...] = ()
    adapt: dict[Projected, Adapter] = Field(default_factory=dict)
    of: Mixer
    readout: Readout = Field(default_factory=Readout)

    def children(self) -> Mapping[Path, Mixer]:
        return {("of",): self.of}

    def instances(self) -> Mapping[Path, Mixer]:
        counts = {"experts": self.experts, "always_on": self.always_on}
        return {(name, index): self.of for name, count in counts.items() for index in range(count)}

    @property
    def expert(self) -> MemoryMixer:
        """The mixer of every expert; legality sees to it that it is a memory."""
        return cast(MemoryMixer, self.of)

    def shares(self, name: str) -> bool:
        """Say whether the memories have a parameter in common, given its path below the mixer."""
        spoken = spoken_path(name)
        return any(spoken == path or spoken.startswith(f"{path}.") for path in self.share)

    def computed_once(self, model_dim: int) -> tuple[Projected, ...]:
        """Return the projections that are one for all memories: wholly shared, and of the input itself."""
        names = list(mixer_parameters(self.expert, model_dim))
        found = []
        for projection in PROJECTIONS:
            learned = [name for name in names if name.startswith(f"{projection}.")]
            if learned and all(map(self.shares, learned)) and _reads_input(self.expert.projection(projection)):
                found.append(projection)
        return tuple(found)

    def adapters(self, model_dim: int) -> dict[str, Parameter]:
        """Declare what one memory that is always on adds to shared projections, by projection and name."""
        found = {}
        declared = mixer_parameters(self.expert, model_dim)
        for name, adapter in self.adapt.items():
            rank = adapter.rank.resolve(vars(self.expert.projected_dims(model_dim)))
            maps = {key.rpartition(".")[2]: p for key, p in declared.items() if key.startswith(f"{name}.")}
            d_in = maps["down" if "down" in maps else "weight"].shape[0]
            d_out = maps["up" if "up" in maps else "weight"].shape[-1]
            found[f"{name}.adapt_down"] = Parameter((d_in, rank), FAN_IN, decayed=True)
            found[f"{name}.adapt_up"] = Parameter((rank, d_out), ZEROS, decayed=True)
        return found

    def router_parameters(self, model_dim: int) -> dict[str, Parameter]:
        """Declare the router's map of a token to one number for each expert."""
        return source_parameters(
            self.router, model_dim, self.experts, vars(self.expert.projected_dims(model_dim)), has_weights=True
        )

    def own_parameters(self, model_dim: int) -> Parameters:
        dims = self.expert.dims(model_dim)
        found = {f"router.{name}": p for name, p in self.router_parameters(model_dim).items()}
        found.update(readout_parameters(self.readout, {"input": model_dim}, dims))
        found["output"] = Parameter((dims.num_heads * dims.value_dim, model_dim), FAN_IN, decayed=True)
        return found

    def parameters(self, model_dim: int, of: Callable[[Mixer], Parameters]) -> Parameters:
        found = dict(self.own_parameters(model_dim))
        learned = {name: p for name, p in of(self.of).items() if name != "output"}
        for index, path in enumerate(self.instances()):
            own = {name: p for name, p in learned.items() if index == 0 or not self.shares(name)}
            own.update(self.adapters(model_dim) if path[0] == "always_on" else {})
            found.update({f"{joined(path)}.{name}": p for name, p in own.items()})
        return found

    def flops(self, model_dim: int, context: int, of: Callable[[Mixer, int], int]) -> int:
        learned = mixer_parameters(self.expert, model_dim)
        once = {name: _maps(learned, name) for name in self.computed_once(model_dim)}
        each = of(self.of, context) - _maps(learned, "output") - sum(once.values())
        adapted = sum(once.get(name, 0) for name in self.adapt) + _maps(self.adapters(model_dim), "")
        active = (self.router.top_k + self.always_on) * each + self.always_on * adapted
        return self.own_flops(model_dim) + active + sum(once.values())

    def kept(self, model_dim: int, of: Callable[[Mixer], Kept]) -> Kept:
        learned = mixer_parameters(self.expert, model_dim)
        found = Kept(buffer=num_buffered(self.own_parameters(model_dim)))
        found += readout_kept(self.readout, self.expert.dims(model_dim))
        for index, path in enumerate(self.instances()):
            adapted = self.adapt if path[0] == "always_on" else {}
            given = [name for name in self.computed_once(model_dim) if name not in adapted] if index else []
            shared = {name: p for name, p in learned.items() if name.partition(".")[0] in given}
            found += of(self.of) + Kept(buffer=-num_buffered(shared))
        return found

    def findings(self, model_dim: int) -> Iterator[Finding]:
        if not isinstance(self.of, MemoryMixer):
            yield ("of",), f"an expert is a memory of its own; found {self.of.kind}: use a mixer with 'memory'."
            return
        yield from _expert_findings(self.of)
        if self.router.top_k > self.experts:
            yield ("router", "top_k"), f"{self.router.top_k} of {self.experts} experts; use at most {self.experts}."
        if self.router.top_k == 1 and self.router.renormalize:
            yield ("router", "renormalize"), "a single weight divided by itself is 1 and teaches the router nothing."
        if self.router.from_ != ("input",):
            yield ("router", "from"), "the router reads the mixer's input; streams are inside the experts."
        yield from blocks_divide(self.router, model_dim, self.experts, ("router",))
        yield from self._sharing_findings(model_dim)
        home = "write it under 'of', in its own 'readout'"
        yield from readout_findings(self.readout, ["input"], home)
        if self.readout.gate is None:
            return
        try:
            dims = self.expert.dims(model_dim)
        except ValueError:
            return  # sizes that do not fit are reported where they stand
        yield from gate_blocks_divide("readout.gate", self.readout.gate, {"input": model_dim}, dims)

    def _sharing_findings(self, model_dim: int) -> Iterator[Finding]:
        try:
            names = [spoken_path(name) for name in mixer_parameters(self.expert, model_dim)]
        except (ValueError, KeyError):
            return  # sizes or streams that do not fit are reported where they stand
        parts = [name.split(".") for name in names]
        known = sorted({".".join(part[: i + 1]) for part in parts for i in range(len(part))} | set(CHOICES))
        for index, path in enumerate(self.share):
            if path not in known:
                yield ("share", index), f"the experts learn nothing called {path!r}.{nearest(path, known)}"
        for name in self.adapt:
            if not self.always_on:
                yield ("adapt", name), "adapters belong to the memories that are always on; there are none."
            elif self.expert.projection(name).parts or not self.expert.projection(name).has_weights:
                yield ("adapt", name), "a low-rank addition needs a linear map; the projection has none of its own."
            elif not self.shares(f"{name}.weight") and not self.shares(f"{name}.up"):
                yield ("adapt", name), f"an adapter tells a shared projection apart; name {name!r} under 'share'."

    def normal_form(self, plain: dict[str, Any]) -> dict[str, Any]:
        """The order of ``share`` says nothing."""
        return {**plain, "share": sorted(set(plain["share"]))}

    def summary(self) -> str:
        always = f", {self.always_on} always on" if self.always_on else ""
        return f"routed: {self.router.top_k} of {self.experts} memories take a token{always}"

    def build(self, instances: Mapping[Path, Module], path: str, model_dim: int, depth: tuple[int, int]) -> Module:
        from archspec.blocks.routing import RoutedModule

        return RoutedModule(self, instances, path, model_dim, depth)


def spoken_path(name: str) -> str:
    """Return a parameter's path as a document speaks of it: ``retention.gate.rate`` for ``..gate.log_rate``."""
    return ".".join(part.removeprefix("log_") for part in name.split(".") if part != "source")


def _maps(parameters: Parameters, below: str) -> int:
    """Return the FLOPs of the matrices at or below a path."""
    prefix = f"{below}." if below else ""
    return 2 * sum(p.size for name, p in parameters.items() if p.decayed and (name == below or name.startswith(prefix)))


def _reads_input(projection: Projection) -> bool:
    sources = projection.parts or (projection,)
    return all(part.from_ == ("input",) and part.derived is None for part in sources)


def _expert_findings(of: MemoryMixer) -> Iterator[Finding]:
    """A token that is not taken must leave the weights as they are, and must not be looked at later."""
    update, retention = of.update, of.retention
    if of.memory.grows:
        yield ("of", "memory"), "a token that is not taken leaves no trace in weights; use a memory such as 'matrix'."
    elif update.buffers:
        yield (
            ("of", "update"),
            f"{update.kind} moves the weights even where a token is not taken; use 'gradient_descent'.",
        )
    if retention.feeds_back:
        yield ("of", "retention"), f"{retention.kind} moves the weights even where a token is not taken."
    if update.anchor is not None and update.anchor.reduce != "sum":
        yield ("of", "update", "anchor", "reduce"), "a mean over a chunk counts tokens that are not taken; use 'sum'."
    if of.bias.window is not None:
        yield ("of", "bias", "window"), "a window holds tokens that are not taken; remove it."
    if of.stages:
        yield ("of", "output"), "what the memories return is combined before one linear map; remove 'output'."
    if of.prefix:
        yield ("of", "prefix"), "learned tokens have no router to choose for them; remove 'prefix'."
    for name in PROJECTIONS:
        if of.projection(name).blend is not None:
            yield ("of", name, "blend"), "experts have no projection of the first layer in common; remove 'blend'."
