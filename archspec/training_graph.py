"""Training through a CUDA graph: one launch for a whole forward and backward pass, whatever the number of layers."""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from archspec.errors import ShapeError, UnsupportedError, UsageError

EAGERLY = "train with loss(..).backward()"


class TrainingGraph:
    """The forward and backward pass of a loss as one CUDA graph, replayed on new batches of the same shapes.

        step = TrainingGraph(model, loss, tokens)
        for tokens in batches:
            value = step(tokens)  # the gradients are in parameter.grad
            optimizer.step()

    Every step launches what the first one did. Where the host takes longer to launch the kernels of a pass than the
    card takes to run them, that is the faster way; the numbers are the same.

    - Gradients are fixed tensors that a call writes over: ``zero_grad`` is not needed, what it sets to None is put
      back, and passes do not add up. Gradients that were there before the capture are lost.
    - What the forward pass keeps for the backward one, the gradients and the loss lie in the graph's own memory, from
      the capture until the graph is deleted (and gradients, until nothing holds them).
    - ``loss`` runs three times, at the capture only: what it does beside operations on the card happens then, and
      Python numbers in it are constants. It may open ``torch.autocast``, and draw from the card's default generator.
    - Clipping, the optimizer, its schedule and evaluation go on as ever, between the calls.

    Args:
        model: a model whose parameters and buffers are on one CUDA device, in the mode that it is to be trained in.
        loss: returns the scalar loss of a batch; called as ``loss(*inputs)``.
        inputs: a batch; only its shapes and dtypes matter later. Inputs get no gradients.

    Raises:
        UnsupportedError: a model that is not on one CUDA device; passes that wait for the card, or that CUDA cannot
            capture for another reason; a pass through the model that is still held.
        UsageError: nothing to train, or a loss that is not a scalar of the model's parameters.

    Source: whole-network capture, PyTorch's notes on CUDA semantics.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], *inputs: Tensor) -> None:
        device = device_of(model)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._places = _places(model)
        gc.collect()  # what only a cycle of references holds is not held
        held = held_pass(model)
        if held is not None:
            raise UnsupportedError(f"TrainingGraph: {held}")
        with torch.cuda.device(device):
            self.inputs = tuple(given.detach().to(device, copy=True) for given in inputs)
            try:
                self._graph, self._value = self._captured(loss)
                self._gradients = [parameter.grad for parameter in self._parameters]
            except BaseException:
                self._forget()
                raise

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the loss of a batch, a tensor that the next call writes over, with its gradients in the parameters.

        Args:
            inputs: tensors of the captured shapes and dtypes, on any device; pinned ones are copied without waiting.

        Raises:
            ShapeError: inputs of other shapes or dtypes.
            UnsupportedError: a parameter or buffer that was moved, replaced, frozen or set free since the capture.
        """
        check_inputs(self.inputs, inputs)
        for place in self._places:
            place.check()
        for fixed, given in zip(self.inputs, inputs, strict=True):
            fixed.copy_(given, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
        return self._value

    def _captured(self, loss: Callable[..., Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        # torch.cuda.graph does not leave its stream when a capture fails; this context does.
        with torch.cuda.stream(stream), torch.enable_grad():
            self._pass(loss)  # compiles kernels, makes workspaces and constants
            with _no_waiting():
                self._pass(loss)
            self._forget()
            found = _capture(lambda: self._pass(loss))
        torch.cuda.current_stream().wait_stream(stream)
        return found

    def _pass(self, loss: Callable[..., Tensor]) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None  # so that the pass makes it anew, in the graph's memory
        # Weights cast by an earlier pass are not this one's, nor are this one's anyone else's.
        torch.clear_autocast_cache()
        value = loss(*self.inputs)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(
                f"TrainingGraph: loss returned {found}; required is one number with a gradient, a function of the "
                "model's parameters."
            )
        torch.autograd.backward(value)
        torch.clear_autocast_cache()
        return value.detach()

    def _forget(self) -> None:
        """Free what passes before the capture left, so that the graph does not need memory beside it."""
        for parameter in self._parameters:
            parameter.grad = None
        gc.collect()
        torch.cuda.empty_cache()


class _Place(NamedTuple):
    """Where the graph reads a parameter or buffer."""

    name: str
    holder: dict[str, Tensor | None]
    key: str
    tensor: Tensor
    address: int
    learned: bool

    def check(self) -> None:
        if (
            self.holder.get(self.key) is not self.tensor
            or self.tensor.data_ptr() != self.address
            or self.tensor.requires_grad != self.learned
        ):
            raise UnsupportedError(
                f"TrainingGraph: {self.name} was moved, replaced, frozen or set free since the capture, and the graph "
                "trains what was there; write new values into it in place (tensor.copy_), or make another graph."
            )


def _places(model: nn.Module) -> list[_Place]:
    found = []
    for path, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    name = f"{path}.{key}" if path else key
                    found.append(_Place(name, holder, key, tensor, tensor.data_ptr(), tensor.requires_grad))
    return found


def device_of(model: nn.Module) -> torch.device:
    """Return the CUDA device that all of the model is on.

    Raises:
        UnsupportedError: there is no such device.
        UsageError: no parameter of the model is learned.
    """
    found = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(found) != 1 or next(iter(found)).type != "cuda":
        names = ", ".join(sorted(str(device) for device in found)) or "no parameters"
        raise UnsupportedError(
            f"TrainingGraph: a CUDA graph needs the model on one CUDA device, found {names}; {EAGERLY}."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("TrainingGraph: no parameter of the model requires a gradient; set requires_grad first.")
    return found.pop()


def held_pass(model: nn.Module) -> str | None:
    """Return what is wrong when something keeps an earlier pass through the model alive, or None when nothing does.

    Autograd adds a parameter's gradient on the stream of the first pass that is still held, which is not captured.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        _notes(parameter)["archspec.held"] = True
        # A node that nothing else holds is gone by now, and this is a fresh one.
        if "archspec.held" in _notes(parameter):
            return (
                f"an earlier pass through {name} is still held, by its loss, an output or a state; delete it (del "
                "loss) or detach it before the capture."
            )
    return None


def _notes(parameter: Tensor) -> dict[str, Any]:
    """Return what is noted at the node that adds up a parameter's gradient."""
    node: Any = get_gradient_edge(parameter).node
    notes: dict[str, Any] = node.metadata
    return notes


def check_inputs(fixed: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    """Check that inputs have the number, shapes and dtypes of the captured ones.

    Raises:
        ShapeError: they have not.
    """
    if len(inputs) != len(fixed):
        raise ShapeError(f"TrainingGraph: found {len(inputs)} inputs; the graph was captured with {len(fixed)}.")
    for index, (wanted, given) in enumerate(zip(fixed, inputs, strict=True)):
        if given.shape != wanted.shape or given.dtype != wanted.dtype:
            raise ShapeError(
                f"TrainingGraph: input {index} is {given.dtype} {list(given.shape)}; the graph was captured for "
                f"{wanted.dtype} {list(wanted.shape)}. Make another graph for it, or {EAGERLY}."
            )


def _capture(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return the graph of what ``run`` launches, and its result.

    Raises:
        UnsupportedError: CUDA refused an operation; the process can go on without the graph.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    failure: RuntimeError | None = None
    try:
        # Other threads (a loader that pins memory) may use the card meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                value = run()
            except RuntimeError as error:
                failure = error
                raise
    except RuntimeError as error:
        if failure is not None and error is not failure:
            # CUDA dropped the capture, and torch stopped there: its allocator still gives to the graph's pool.
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        cause = failure or error
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        message = f"CUDA cannot capture {where(cause)}: {str(cause).splitlines()[0]}"
        traceback.clear_frames(cause.__traceback__)  # which hold the pass
        raise UnsupportedError(f"TrainingGraph: {message}; change that operation, or {EAGERLY}.") from cause
    return graph, value


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Refuse operations for which the host waits for the card, before a capture that they would break."""
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode(2)
    try:
        yield
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        message = f"the host waits for the card at {where(error)}, and a CUDA graph cannot"
        traceback.clear_frames(error.__traceback__)  # which hold the pass
        raise UnsupportedError(
            f"TrainingGraph: {message}; keep numbers on the card there (no .item(), no tensor from Python numbers, no "
            f"boolean index), or {EAGERLY}."
        ) from error
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)


def where(error: BaseException) -> str:
    """Return the last line of an error's traceback that is neither torch's nor this module's."""
    torch_folder = str(Path(torch.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(torch_folder) and frame.filename != __file__
    ]
    if not frames:
        return "an operation of the backward pass"
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})"
