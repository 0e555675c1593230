"""The base of every sequence mixer, and what a mixer made of other mixers says about itself. No torch.

A mixer that is no memory of its own (``blocks/mixers``, one file a kind) declares its children, what it learns and
keeps beyond them, what is illegal about it, and how its module is made from theirs. Everything that walks a spec
(the compiler, predictions, legality, the normal form, plans) asks these methods and knows no kind by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from archspec.component import Component, Integer
from archspec.errors import UnsupportedError
from archspec.initial import Initial, Parameter, Parameters
from archspec.kept import Kept

if TYPE_CHECKING:
    from torch.nn import Module

Path = tuple[str | int, ...]
Finding = tuple[Path, str]


@dataclass(frozen=True)
class Lowered:
    """How a mixer that is no rule runs, in the words of ``lowering.Decision``."""

    family: str
    form: str
    reason: str


class Mixer(Component, family="mixer", noun="mixer", default_kind="memory"):
    """The sequence mixer of a block: x [B, T, D] to [B, T, D] with a state."""

    def children(self) -> Mapping[Path, Mixer]:
        """Return the mixers inside this one, by their path in the document below it; none by default."""
        return {}

    def instances(self) -> Mapping[Path, Mixer]:
        """Return the mixers to build, by the path of their module: the children, unless one is built several times."""
        return self.children()

    def own_parameters(self, model_dim: int) -> Parameters:
        """Return what is learned beyond the instances' parameters, by path; nothing by default."""
        return {}

    def parameters(self, model_dim: int, of: Callable[[Mixer], Parameters]) -> Parameters:
        """Return everything learned, by path; ``of`` returns that of a mixer inside."""
        found = dict(self.own_parameters(model_dim))
        for path, mixer in self.instances().items():
            found.update({f"{joined(path)}.{name}": parameter for name, parameter in of(mixer).items()})
        return found

    def own_flops(self, model_dim: int) -> int:
        """Return the FLOPs of matrix products beyond the instances', a token, forward."""
        return 2 * sum(parameter.size for parameter in self.own_parameters(model_dim).values() if parameter.decayed)

    def flops(self, model_dim: int, context: int, of: Callable[[Mixer, int], int]) -> int:
        """Return the FLOPs of matrix products of a token, forward; ``of(mixer, context)`` is that of one inside."""
        return self.own_flops(model_dim) + sum(of(mixer, context) for mixer in self.instances().values())

    def own_state(self, model_dim: int) -> Kept:
        """Return what is kept between tokens beyond what the instances keep; nothing by default."""
        return Kept()

    def kept(self, model_dim: int, of: Callable[[Mixer], Kept]) -> Kept:
        """Return everything kept between tokens; ``of`` returns that of a mixer inside."""
        return sum((of(mixer) for mixer in self.instances().values()), self.own_state(model_dim))

    def findings(self, model_dim: int) -> Iterator[Finding]:
        """Yield (path below this mixer, sentence) for what is illegal about it; its children speak for themselves."""
        yield from ()

    def normal_form(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Return the normal form, from the fields as plain data with the children in their normal forms."""
        return plain

    def summary(self) -> str:
        """Return the line that ``explain`` shows of this mixer beyond its memories."""
        return self.kind

    def lowered(self) -> Lowered | None:
        """Say how this mixer's own recurrence runs; None when it has none beyond its children's."""
        return None

    def build(self, instances: Mapping[Path, Module], path: str, model_dim: int, depth: tuple[int, int]) -> Module:
        """Return the module of this composition from those of its instances; called as module(x, carry).

        Args:
            instances: the modules of ``instances``, by the same paths.
            path: where its state is kept.
            model_dim: D.
            depth: (layer, number of layers).
        """
        raise UnsupportedError(f"mixer {self.kind}: it composes no mixers; the compiler builds it itself.")


class Prefixed(Mixer):
    """A composition that may read learned tokens before the first of a sequence (persistent memory).

    Args:
        prefix: P, how many of them; its mixers read them like any token, and nothing is predicted of them.
    """

    prefix: Annotated[Integer, Field(ge=0)] = 0

    def own_parameters(self, model_dim: int) -> Parameters:
        return {"prefix": Parameter((self.prefix, model_dim), Initial(normal=0.02))} if self.prefix else {}

    def kept(self, model_dim: int, of: Callable[[Mixer], Kept]) -> Kept:
        return super().kept(model_dim, of).after(self.prefix)

    def behind(self) -> str:
        """Return how a summary mentions the learned tokens."""
        return f", behind {self.prefix} learned tokens" if self.prefix else ""


def joined(path: Path) -> str:
    """Return a path as modules and states write it: ``of.0``."""
    return ".".join(map(str, path))


def inside(mixer: Mixer, path: Path = ()) -> Iterator[tuple[Path, Mixer]]:
    """Yield (path in the document, mixer) for a mixer and every one inside it, outer ones first."""
    yield path, mixer
    for name, child in mixer.children().items():
        yield from inside(child, (*path, *name))
