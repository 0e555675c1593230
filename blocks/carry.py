"""What passes from one stretch of a sequence to the next: named tensors and a position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class State:
    """A model's state after some tokens: a pytree that can be saved, moved and sliced.

    Args:
        tensors: by the path of the module that keeps it; every one has the batch as its first axis.
        position: how many tokens came before the next one.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    position: int = 0

    def to(self, *args: Any, **kwargs: Any) -> State:
        """Return the state with ``Tensor.to`` applied to every tensor."""
        return State({name: tensor.to(*args, **kwargs) for name, tensor in self.tensors.items()}, self.position)

    def detach(self) -> State:
        """Return the state cut from the graph that made it."""
        return State({name: tensor.detach() for name, tensor in self.tensors.items()}, self.position)


def _flatten(state: State) -> tuple[list[Any], Any]:
    names = sorted(state.tensors)
    return [state.tensors[name] for name in names], (tuple(names), state.position)


def _unflatten(leaves: Any, context: Any) -> State:
    names, position = context
    return State(dict(zip(names, leaves, strict=True)), position)


pytree.register_pytree_node(State, _flatten, _unflatten, serialized_type_name="archspec.State")


@dataclass
class Carry:
    """One pass over a stretch of tokens: what came in, what goes out, and what layers share.

    Args:
        incoming: tensors of the state before the stretch; None at the start of a sequence.
        position: index of the stretch's first token.
        outgoing: filled by the modules as they run.
        shared: quantities that later layers read from earlier ones (the first layer's values).
        auxiliary: losses that modules add to the task's.
        scope: prefix that tells one application of shared weights from another.
        inplace: whether modules may write what goes out into the tensors that came in.
    """

    incoming: Mapping[str, Tensor] | None
    position: int
    outgoing: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    auxiliary: list[Tensor] = field(default_factory=list)
    scope: str = ""
    inplace: bool = False

    def take(self, path: str) -> Tensor | None:
        """Return what the module at ``path`` kept, or None at the start of a sequence."""
        return None if self.incoming is None else self.incoming[self.scope + path]

    def take_all(self, path: str) -> dict[str, Tensor] | None:
        """Return the tensors kept below ``path`` by their local names, or None at the start of a sequence."""
        if self.incoming is None:
            return None
        prefix = f"{self.scope}{path}."
        return {name[len(prefix) :]: kept for name, kept in self.incoming.items() if name.startswith(prefix)}

    def put(self, path: str, tensor: Tensor) -> None:
        """Keep a tensor for the next stretch."""
        self.outgoing[self.scope + path] = tensor
