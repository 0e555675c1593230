"""Training through a CUDA graph against training without one, on a card; what it refuses; which models it can take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import archspec
from archspec.blocks.model import SequenceModel
from archspec.errors import ShapeError, UnsupportedError, UsageError
from archspec.loading import MODELS
from archspec.training_graph import TrainingGraph, check_inputs, device_of, held_pass, where

VOCABULARY, SHAPE = 64, (2, 96)
# The kernels are the same, but the capture may give a matrix product another workspace, and with it another order of
# sums: a rounding of bf16 here and there.
TOLERANCE = 0.01


TRAINED = ["deltanet", "gated_deltanet", "kda", "mamba2", "transformer", "universal_transformer", "kimi_linear"]


def loss_of(model: SequenceModel) -> Callable[[Tensor], Tensor]:
    def loss(tokens: Tensor) -> Tensor:
        return functional.cross_entropy(model(tokens[:, :-1]).logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    return loss


def build(name: str, dtype: torch.dtype | None = torch.bfloat16) -> SequenceModel:
    return archspec.compile(name, vocab_size=VOCABULARY, device="cuda", dtype=dtype)


def batches(count: int, shape: tuple[int, int] = SHAPE) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randint(VOCABULARY, shape, generator=generator).cuda()


def assert_close(found: Tensor | None, wanted: Tensor | None, tolerance: float, name: str) -> None:
    assert found is not None, name
    assert wanted is not None, name
    with torch.no_grad():
        error = float((found.double() - wanted.double()).norm()) / (float(wanted.double().norm()) or 1.0)
    assert error <= tolerance, (name, error)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["deltanet", "kda", "mamba2", "transformer", "gated_deltanet", "universal_transformer"]
)
def test_on_the_card_a_replay_is_a_pass(name: str) -> None:
    model, twin = build(name), build(name)
    step, loss = TrainingGraph(model, loss_of(model), next(batches(1))), loss_of(twin)
    for tokens in batches(3):
        value = step(tokens)
        twin.zero_grad(set_to_none=True)
        wanted = loss(tokens)
        torch.autograd.backward(wanted)
        assert_close(value, wanted.detach(), 1e-3, "loss")
        for (path, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert_close(parameter.grad, other.grad, TOLERANCE, path)


@pytest.mark.gpu
@pytest.mark.parametrize("set_to_none", [True, False, None])
def test_on_the_card_an_optimizer_trains_alike(set_to_none: bool | None) -> None:
    model, twin = build("deltanet", None), build("deltanet", None)
    step, loss = TrainingGraph(model, loss_of(model), next(batches(1))), loss_of(twin)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (model, twin)]
    for tokens in batches(3):
        if set_to_none is not None:
            optimizers[0].zero_grad(set_to_none=set_to_none)
        step(tokens)
        optimizers[1].zero_grad()
        torch.autograd.backward(loss(tokens))
        for optimizer in optimizers:
            optimizer.step()
    for (path, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        # Adam's step is the sign of a gradient that is all rounding; three of them are lr each.
        assert_close(parameter, other, 0.01, path)


@pytest.mark.gpu
def test_on_the_card_weights_are_cast_anew_in_every_replay() -> None:
    model, twin = build("gated_deltanet", None), build("gated_deltanet", None)

    def cast(own: SequenceModel) -> Callable[[Tensor], Tensor]:
        def loss(tokens: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return loss_of(own)(tokens)

        return loss

    with torch.autocast("cuda", torch.bfloat16):  # an outer context, whose cache outlives the passes
        step = TrainingGraph(model, cast(model), next(batches(1)))
    with torch.no_grad():
        for parameter in (*model.parameters(), *twin.parameters()):
            parameter.mul_(0.5)
    for tokens in batches(2):
        assert_close(step(tokens), cast(twin)(tokens).detach(), 1e-3, "loss")


@pytest.mark.gpu
def test_on_the_card_two_graphs_of_a_model_take_turns() -> None:
    model, twin = build("deltanet"), build("deltanet")
    shapes = [SHAPE, (3, 40)]
    steps = [TrainingGraph(model, loss_of(model), next(batches(1, shape))) for shape in shapes]
    turns = [list(batches(2, shape)) for shape in shapes]
    for index, which in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        tokens, step = turns[which][index], steps[which]
        value = step(tokens.cpu())  # from anywhere
        twin.zero_grad()
        wanted = loss_of(twin)(tokens)
        torch.autograd.backward(wanted)
        assert_close(value, wanted.detach(), 1e-3, "loss")
        for (path, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert_close(parameter.grad, other.grad, TOLERANCE, path)
    with pytest.raises(ShapeError, match=r"input 0 is torch.int64 \[3, 40\]; the graph was captured for"):
        steps[0](next(batches(1, shapes[1])))


def synchronised(value: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return value


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda value: value * float(value.detach()), "the host waits for the card at"),
        (lambda value: value * torch.tensor([2.0], device="cuda")[0], "the host waits for the card at"),
        (synchronised, "CUDA cannot capture"),
    ],
)
def test_on_the_card_a_pass_that_waits_is_refused_and_training_goes_on(
    spoil: Callable[[Tensor], Tensor], said: str
) -> None:
    model = build("deltanet")
    loss, tokens = loss_of(model), next(batches(1))
    stream = torch.cuda.current_stream()
    with pytest.raises(UnsupportedError, match=said) as raised:
        TrainingGraph(model, lambda tokens: spoil(loss(tokens)), tokens)
    assert "test_training_graph.py" in str(raised.value)
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.cuda.empty_cache()
    torch.autograd.backward(loss(tokens))
    wanted = [parameter.grad for parameter in model.parameters()]
    step = TrainingGraph(model, loss, tokens)
    step(tokens)
    for (path, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
        assert_close(parameter.grad, gradient, TOLERANCE, path)


@pytest.mark.gpu
def test_on_the_card_what_the_graph_cannot_see_is_refused() -> None:
    model, tokens = build("deltanet"), next(batches(1))
    loss = loss_of(model)
    held = loss(tokens)
    torch.autograd.backward(held)
    with pytest.raises(UnsupportedError, match=r"an earlier pass through .* is still held"):
        TrainingGraph(model, loss, tokens)
    del held
    with pytest.raises(UsageError, match=r"loss returned torch.bfloat16 \[2, 96, 64\]; required is one number"):
        TrainingGraph(model, lambda tokens: model(tokens).logits, tokens)
    step = TrainingGraph(model, loss, tokens)
    weight = model.embedding.weight
    weight.data = weight.data.clone()
    with pytest.raises(UnsupportedError, match=r"TrainingGraph: embedding.weight was moved, replaced, frozen or set"):
        step(tokens)


def test_a_model_off_the_card_is_refused() -> None:
    with pytest.raises(UnsupportedError) as raised:
        TrainingGraph(nn.Linear(2, 2), lambda x: x.sum(), torch.zeros(1, 2))
    assert str(raised.value) == (
        "TrainingGraph: a CUDA graph needs the model on one CUDA device, found cpu; train with loss(..).backward()."
    )
    with pytest.raises(UnsupportedError, match="found cpu, meta;"):
        device_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
    with pytest.raises(UnsupportedError, match="found no parameters;"):
        device_of(nn.ReLU())


def test_other_batches_are_refused() -> None:
    fixed = (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    check_inputs(fixed, (torch.ones(2, 3), torch.ones(2, dtype=torch.long)))
    with pytest.raises(ShapeError) as raised:
        check_inputs(fixed, (torch.ones(1, 3), torch.ones(2, dtype=torch.long)))
    assert str(raised.value) == (
        "TrainingGraph: input 0 is torch.float32 [1, 3]; the graph was captured for torch.float32 [2, 3]. Make another "
        "graph for it, or train with loss(..).backward()."
    )
    with pytest.raises(ShapeError, match=r"input 1 is torch.int32 \[2\]"):
        check_inputs(fixed, (torch.ones(2, 3), torch.ones(2, dtype=torch.int32)))
    with pytest.raises(ShapeError, match=r"found 1 inputs; the graph was captured with 2\."):
        check_inputs(fixed, (torch.ones(2, 3),))


def test_a_held_pass_is_found() -> None:
    model = archspec.compile("deltanet", vocab_size=VOCABULARY).requires_grad_(False)
    model.layers[0].requires_grad_(True)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert held_pass(model) is None
    output = model(tokens)
    torch.autograd.backward(output.logits.sum())
    found = held_pass(model)
    assert found is not None
    assert found.startswith("an earlier pass through layers.0.")
    output.logits = output.logits.detach()
    assert held_pass(model) is not None, "the state holds it too"
    del output
    assert held_pass(model) is None


def test_the_place_of_an_error_is_outside_torch() -> None:
    with pytest.raises(RuntimeError) as raised:
        functional.linear(torch.zeros(2, 3), torch.zeros(4, 5))
    assert where(raised.value).endswith("(functional.linear(torch.zeros(2, 3), torch.zeros(4, 5)))")
    assert "test_training_graph.py:" in where(raised.value)


aten = torch.ops.aten
LOOKS = {aten.nonzero.default, aten.masked_select.default, aten._linalg_check_errors.default}


class Waits(Exception):  # noqa: N818
    """An operation for which the host would wait for the card."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations whose result the host reads, and copies of host tensors inside an operation.

    On the meta device, which has no numbers, ``.item()`` and ``bool(tensor)`` are refused by torch.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        copied = any(tensor.is_cpu and tensor.ndim for tensor in tensors) and any(tensor.is_meta for tensor in tensors)
        if func in LOOKS or copied:
            raise Waits(str(func))
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Refuses what copies Python numbers to the device, which operations do not show."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            raise Waits("torch.tensor")
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            for index in args[1] if isinstance(args[1], tuple) else (args[1],):
                if isinstance(index, list) or (isinstance(index, Tensor) and index.dtype == torch.bool):
                    raise Waits("index")
        return func(*args, **kwargs)


def one_of_each(name: str) -> dict[str, Any]:
    """Return a shipped model with one layer of each of its blocks; a loop as it is."""
    spec = archspec.load(name)
    layout = {} if spec.layout.kind == "loop" else {"layout": list(spec.blocks)}
    return {"extends": name, "name": "one_of_each", **layout}


def train_on_meta(source: Any) -> None:
    """Run a pass for kernels and constants to settle, then one in which the host must not wait."""
    model = archspec.compile(source, vocab_size=VOCABULARY, device="meta")
    tokens = torch.zeros(2, 5, dtype=torch.long, device="meta")

    def run() -> None:
        output = model(tokens)
        total = output.logits.square().sum()
        torch.autograd.backward(total if output.auxiliary_loss is None else total + output.auxiliary_loss)

    run()
    with Operations(), Calls():
        run()


# Their feature map lays out its monomials from Python numbers in every pass.
WAITING = {"deep_transformer", "dot"}
NAMES = sorted({path.stem for path in MODELS.glob("*.yaml")} - WAITING)


@pytest.mark.parametrize("name", NAMES)
def test_the_host_does_not_wait_in_a_pass_of_a_shipped_model(name: str) -> None:
    train_on_meta(one_of_each(name))


@pytest.mark.parametrize(
    "memory",
    [
        {"kind": "kv", "window": 2, "sinks": 1, "stride": 2},
        {"kind": "kv", "window": 1, "stride": 3, "top_k": 1},
    ],
)
def test_the_host_does_not_wait_for_which_tokens_stay(memory: dict[str, Any]) -> None:
    mixer = {"memory": memory}
    train_on_meta({"extends": "sliding_window", "name": "thin", "blocks": {"main": {"mixer": mixer}}})


def test_models_that_wait_are_known() -> None:
    with pytest.raises(Waits, match=r"torch\.tensor"):
        train_on_meta(one_of_each("deep_transformer"))
    linear = nn.Linear(2, 2, device="meta")
    x = torch.zeros(3, 2, device="meta")
    lookers: list[Callable[[], object]] = [
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 0),
        lambda: x[x > 0],
        lambda: x[[0, 1]],
        lambda: x[torch.tensor([0, 1])],
        lambda: linear(x) * torch.ones(2),
    ]
    for look in lookers:
        with pytest.raises((Waits, RuntimeError)), Operations(), Calls():
            look()
