"""A function of tensors, written down once as the operations it makes, and run again without anything in between.

Run token by token, a rule spends most of its time outside the operations on its weights: in building vector-Jacobian
products, in looking gates up and laying them out. None of that depends on the numbers. Recorded, a token is a flat
list of operations on tensors; it gives the same numbers, and automatic differentiation sees through it as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

Program = Callable[..., tuple[Tensor, ...]]

LOOKS: frozenset[Any] = frozenset({aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default})
"""Operations whose result decides what comes next: what follows them may be another list for other numbers."""
VIEWS: frozenset[Any] = frozenset({aten.view.default, aten._unsafe_view.default})
SAME: frozenset[Any] = VIEWS | {aten.expand.default}
PLAIN: dict[Any, Callable[..., Any]] = {
    aten.mul.Tensor: torch.mul,
    aten.mul.Scalar: torch.mul,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.div.Tensor: torch.div,
    aten.neg.default: torch.neg,
    aten.exp.default: torch.exp,
    aten.bmm.default: torch.bmm,
    aten.view.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
    aten.transpose.int: torch.transpose,
    aten.sum.dim_IntList: torch.sum,
    aten.pow.Tensor_Scalar: torch.pow,
}
"""The same operations by the shortest way from Python."""


class CannotRecord(Exception):  # noqa: N818 - no error: the function is run as it is written
    """A function looks at the numbers it is given, so that one list of operations does not stand for it."""


def recorded(function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor]) -> Program:
    """Return the operations of ``function`` on contiguous tensors like ``arguments`` as a function of such tensors.

    Raises:
        CannotRecord: the function looks at numbers, or writes into its arguments.
    """
    given = [argument.detach() for argument in arguments]
    recorder = _Recorder(given)
    with torch.no_grad(), recorder:
        results = function(*given)
    graph = recorder.graph
    graph.output(tuple(recorder.node(result) for result in results))
    _shorten(graph)
    module: Any = fx.GraphModule(recorder.constants, graph)
    program: Program = module.forward
    return program


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every operation into a graph whose inputs are ``arguments``."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.constants = torch.nn.Module()
        self.seen: list[Tensor] = []  # alive, so that no other tensor gets the identity of one of them
        self.nodes: dict[int, fx.Node] = {}
        for index, argument in enumerate(arguments):
            self._note(argument, self.graph.placeholder(f"x{index}"))
        self.given = frozenset(self.nodes)

    def node(self, tensor: Tensor) -> fx.Node:
        """Return where a tensor comes from; one from outside is a constant."""
        if id(tensor) not in self.nodes:
            name = f"constant_{len(list(self.constants.buffers()))}"
            self.constants.register_buffer(name, tensor.detach())
            self._note(tensor, self.graph.get_attr(name))
        return self.nodes[id(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LOOKS:
            raise CannotRecord(f"{func} looks at the numbers")
        if func._schema.is_mutable and any(id(x) in self.given for x in args if isinstance(x, Tensor)):
            raise CannotRecord(f"{func} writes into what was given")
        node = self.graph.call_function(func, self._as_nodes(args), self._as_nodes(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._note(result, node)
        else:
            for index, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._note(part, self.graph.call_function(_item, (node, index)))
        return result

    def _as_nodes(self, tree: Any) -> Any:
        return fx.node.map_aggregate(tree, lambda x: self.node(x) if isinstance(x, Tensor) else x)

    def _note(self, tensor: Tensor, node: fx.Node) -> None:
        self.seen.append(tensor)
        self.nodes[id(tensor)] = node
        node.meta["shape"] = tuple(tensor.shape)


def _item(parts: Sequence[Tensor], index: int) -> Tensor:
    return parts[index]


def _shorten(graph: fx.Graph) -> None:
    """Leave out what changes nothing, and say once what is said twice."""
    written = {argument for node in graph.nodes if _mutates(node) for argument in node.all_input_nodes}
    said: dict[tuple[Any, str, str], Any] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or _mutates(node) or node in written:
            continue
        other = _plainer(node)
        if other is not node:
            node.replace_all_uses_with(other)
            continue
        same = said.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "call_function" and node.target in PLAIN:
            node.target = PLAIN[node.target]


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _plainer(node: Any) -> Any:
    """Return an earlier node with the same value, or this one, in its shortest form."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return node
    source: Any = node.args[0]
    if node.target in VIEWS and source.target in VIEWS:
        source = source.args[0]
        node.args = (source, node.args[1])
    if node.target is aten.bmm.default and source.meta["shape"][-1] == 1:
        node.target = aten.mul.Tensor  # an outer product
    if node.target is aten.add.Tensor and isinstance(node.args[1], fx.Node) and not node.kwargs:
        other: Any = node.args[1]
        if other.target is aten.neg.default and other.meta["shape"] == node.meta["shape"]:
            node.target, node.args = aten.sub.Tensor, (source, other.args[0])
    if node.target in SAME and source.meta.get("shape") == node.meta["shape"]:
        return source
    if node.target in (aten.mul.Tensor, aten.mul.Scalar) and node.args[1] == 1:
        return source
    if node.target is aten.transpose.int and source.target is aten.transpose.int and source.args[1:] == node.args[1:]:
        return source.args[0]
    return node
