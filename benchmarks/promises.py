"""What a spec promises, checked on one small model: it trains, its forms agree, and it is as large as predicted."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from archspec import complexity
from archspec.blocks.carry import State
from archspec.blocks.model import SequenceModel, num_parameters
from archspec.compiler import compile  # noqa: A004
from archspec.schema import Spec

LENGTH, SPLIT, VOCABULARY = 7, 3, 5
# fp64 and seven tokens: forms differ in the order of sums, which roots, links and iterative solvers magnify.
TOLERANCE = 1e-7
OVERFLOWS = 1e15
"""From here on squares and cubes leave fp32."""
NUDGE = 1e-14
"""Relative change of parameters that rounding in fp64 stands behind, within a hundred operations."""


class Diverges(Exception):  # noqa: N818 - a finding as well
    """The equations of a document grow without bound, by the recurrence that defines them, in fp64."""


class Failure(Exception):  # noqa: N818 - what is found out about a document, not an error of this program
    """A legal document does not keep a promise; the message says which."""


class NotFinite(Failure):
    """A loss or gradient is not finite."""


class Disagreement(Failure):
    """Two ways to compute the same function give different results."""

    def __init__(self, what: str, difference: float) -> None:
        super().__init__(f"{what} differ by {difference:.1e}")
        self.difference = difference


def check(spec: Spec) -> None:
    """Hold one spec to its promises.

    Raises:
        Failure: the first promise it does not keep.
        Diverges: it cannot be held to them, because its own equations grow without bound: the recurrence in fp64
            passes 1e15 where fp32 is not finite, or moves by as much as two forms differ when its parameters move by
            their last digits.
    """
    tokens = items(spec)
    try:
        _trains(compile(spec, vocab_size=VOCABULARY), tokens)
    except NotFinite as failure:
        reached = largest(lambda: _trains(_plain(spec), tokens))
        if reached >= OVERFLOWS:
            raise Diverges(f"{failure}; the recurrence reaches {reached:.0e} in fp64") from failure
        raise
    _agrees(spec, tokens)
    _sizes(spec, tokens)


def items(spec: Spec) -> torch.Tensor:
    """Return what a model of this spec takes: tokens [2, LENGTH], or vectors [2, LENGTH, dim]."""
    generator = torch.Generator().manual_seed(0)
    width = getattr(spec.input, "dim", None)
    if width is None:
        return torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator)
    return torch.randn(2, LENGTH, width, generator=generator)


def _loss(spec: Spec, logits: torch.Tensor) -> torch.Tensor:
    """Return a loss of outputs [2, T, n]: of a class for each, or their squares."""
    if spec.output.kind == "continuous":
        return logits.square().mean()
    generator = torch.Generator().manual_seed(3)
    classes = torch.randint(0, logits.shape[-1], logits.shape[:2], generator=generator)
    return cross_entropy(logits.flatten(0, 1), classes.flatten())


def _plain(spec: Spec) -> SequenceModel:
    return compile(spec, vocab_size=VOCABULARY, dtype=torch.float64, backend="reference")


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest finite number that any operation gives; an exponential may give more than that in one step."""

    largest: float = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in func.name():  # whatever was in memory before
            return result
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
                self.largest = max(self.largest, float(x.abs().nan_to_num(0.0, 0.0, 0.0).max()))
                if func.name() in ("aten::exp", "aten::expm1") and bool(x.isposinf().any()):
                    self.largest = math.inf
        return result


def largest(run: Callable[[], object]) -> float:
    """Return the largest number on the way through ``run``, up to where it stops being finite."""
    mode = _Largest()  # type: ignore[no-untyped-call]
    with mode, suppress(NotFinite):
        run()
    return float(mode.largest)


def _agrees(spec: Spec, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        defined = perturbed(spec, "reference")(tokens).logits
        if not bool(defined.isfinite().all()):
            reached = largest(lambda: perturbed(spec, "reference")(tokens))
            found = f"the recurrence is not finite, and reaches {reached:.0e} in fp64"
            raise Diverges(found) if reached >= OVERFLOWS else Failure(found)
        try:
            _forms_agree(perturbed(spec), tokens, defined)
        except Disagreement as failure:
            moved = perturbed(spec, "reference", NUDGE)(tokens).logits
            change = float((moved - defined).abs().max())
            if failure.difference <= 10 * change or not bool(moved.isfinite().all()):
                raise Diverges(
                    f"{failure}; the recurrence itself by {change:.0e}, of parameters {NUDGE} apart"
                ) from None
            raise


def _forms_agree(model: SequenceModel, tokens: torch.Tensor, defined: torch.Tensor) -> None:
    whole = model(tokens)
    _agree(defined, whole.logits, "the recurrence and the whole sequence")
    head = model(tokens[:, :SPLIT])
    saved = io.BytesIO()
    torch.save(head.state.tensors, saved)
    saved.seek(0)
    rest = model(tokens[:, SPLIT:], State(torch.load(saved), head.state.position))
    _agree(torch.cat([head.logits, rest.logits], 1), whole.logits, "two stretches and the whole sequence")
    state, logits = None, []
    for t in range(LENGTH):
        step = model.step(tokens[:, t], state)
        state = step.state
        logits.append(step.logits)
    _agree(torch.stack(logits, 1), whole.logits, "single steps and the whole sequence")


def _sizes(spec: Spec, tokens: torch.Tensor) -> None:
    model = compile(spec, vocab_size=VOCABULARY, dtype=torch.float64)
    with torch.no_grad():
        state = model(tokens).state
    predicted = complexity.predict(spec, VOCABULARY)
    if predicted.parameters != num_parameters(model):
        raise Failure(f"{num_parameters(model)} parameters, and {predicted.parameters} predicted")
    kept = sum(tensor[0].numel() * tensor.element_size() for tensor in state.tensors.values())
    if predicted.state_bytes(LENGTH, "float64") != kept:
        raise Failure(f"{kept} bytes of state, and {predicted.state_bytes(LENGTH, 'float64')} predicted")


def perturbed(spec: Spec, backend: str = "auto", nudge: float = 0.0) -> SequenceModel:
    """Return a model in fp64 whose every parameter is away from special values, and ``nudge`` of itself further."""
    model = compile(spec, vocab_size=VOCABULARY, dtype=torch.float64, backend=backend)
    generator = torch.Generator().manual_seed(1)
    signs = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if nudge:
                parameter.mul_(1 + nudge * torch.randn(parameter.shape, generator=signs, dtype=torch.float64))
    return model


def _trains(model: SequenceModel, tokens: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        output = model(tokens)
        loss = _loss(model.spec, output.logits)
        if output.auxiliary_loss is not None:
            loss = loss + output.auxiliary_loss
        if not bool(loss.isfinite()):
            raise NotFinite("the training loss is not finite")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                raise NotFinite(f"the gradient of {name} is not finite")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _agree(first: torch.Tensor, second: torch.Tensor, what: str) -> None:
    if first.shape != second.shape:
        raise Failure(f"{what} give {tuple(first.shape)} and {tuple(second.shape)}")
    difference = float((first - second).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(second.abs().max())):
        raise Disagreement(what, difference)
