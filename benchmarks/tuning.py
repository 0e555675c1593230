"""Compile Triton kernels in many processes before anything is timed, and tune a peer's kernels once a head dim.

A compile worker launches nothing: a kernel's call compiles it into the disk cache that all processes share, and the
workers of one job split its kernels, a tuner's configurations counted one by one. What a peer's autotuner chose at
one number of heads and sequences it is made to use at others of the same head dims: the choice is its own, made by
timing its whole space on this card, but not made anew where only the heads or the batch differ.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.autotuner import Autotuner, OutOfResources, PTXASError
from triton.runtime.jit import JITFunction

# Names of a tuner's keys that count heads, or sequences: what else they hold are dims and switches.
_COUNTS = frozenset({"B", "H", "HV", "HQ", "NB"})
TRIAL_MS = 20
"""What a tuner's trial of a configuration takes; its library's default is 100."""

Choice = tuple[str, tuple[tuple[str, str], ...]]
Choices = dict[Choice, triton.Config]


def choice_of(tuner: Any, arguments: dict[str, Any]) -> Choice:
    """Return what a tuner's choice is shared by: its kernel and its keys other than numbers of heads and sequences."""
    names = [name for name in tuner.keys if name in arguments and name not in _COUNTS]
    dtypes = [(name, str(x.dtype)) for name, x in arguments.items() if hasattr(x, "dtype")]
    return tuner.base_fn.__name__, (*((name, str(arguments[name])) for name in names), *dtypes)


def _arguments(tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    known = dict(zip(tuner.arg_names, args, strict=False)) | kwargs
    return {name: x for name, x in known.items() if name in tuner.arg_names}


@contextmanager
def sharing_choices(choices: Choices) -> Iterator[None]:
    """Use the configurations in ``choices`` where they fit, tune other kernels, and add what is chosen for those."""
    usual, prune, bench = Autotuner.run, Autotuner.prune_configs, triton.testing.do_bench

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = usual(self, *args, **kwargs)
        if len(self.configs) > 1:
            choices.setdefault(choice_of(self, _arguments(self, args, kwargs)), self.best_config)
        return result

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[triton.Config]:
        known = choices.get(choice_of(self, _arguments(self, (), self.nargs | kwargs)))
        return prune(self, kwargs) if known is None else [known]

    with (
        patch.object(Autotuner, "run", run),
        patch.object(Autotuner, "prune_configs", prune_configs),
        patch.object(triton.testing, "do_bench", partial(bench, warmup=TRIAL_MS // 4, rep=TRIAL_MS)),
    ):
        yield


def _kernel_of(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells two kernels of one function apart, near enough: types, constants and launch options."""
    constants = {parameter.name for parameter in fn.params if parameter.is_constexpr}
    known = dict(zip(fn.arg_names, args, strict=False)) | kwargs

    def kind(name: str, value: Any) -> object:
        # No tensor is looked at: each look would wait for a device that many processes share.
        if hasattr(value, "dtype"):
            return str(value.dtype)
        if isinstance(value, int) and name in fn.arg_names and name not in constants:
            return value == 1, value % 16 == 0
        return repr(value)

    return fn, *sorted((name, str(kind(name, value))) for name, value in known.items())


@contextmanager
def compiling_only(part: int, parts: int, choices: Choices) -> Iterator[None]:
    """Compile every ``parts``-th distinct kernel that is called, from the ``part``-th on, and launch none."""
    launch = JITFunction.run
    numbers: dict[tuple[Any, ...], int] = {}

    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        number = numbers.setdefault(_kernel_of(self, args, kwargs), len(numbers))
        return launch(self, *args, grid=grid, warmup=True, **kwargs) if number % parts == part else None

    def compile_all(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        known = choices.get(choice_of(self, _arguments(self, args, kwargs)))
        for config in [known] if known else self.prune_configs(kwargs):
            try:
                self.fn.run(*args, **kwargs, **config.all_kwargs())
            except (OutOfResources, CompileTimeAssertionFailure, PTXASError):
                continue  # the tuner leaves such a configuration out, too

    with patch.object(JITFunction, "run", compile_kernel), patch.object(Autotuner, "run", compile_all):
        yield


def _compile(call: Callable[[], object], name: str, part: int, parts: int, choices: Choices) -> str | None:
    try:
        with compiling_only(part, parts, choices):
            call()
    except Exception as error:  # noqa: BLE001 - a peer may refuse this device: reported here and again when timed
        return f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # other processes share the card
    return None


def compile_ahead(
    pool: ProcessPoolExecutor, jobs: Iterable[tuple[str, Callable[[], object], int]], choices: Choices
) -> None:
    """Compile what the calls of ``jobs`` (name, call that can be sent to a process, workers) launch; wait for it."""
    running: list[Future[str | None]] = [
        pool.submit(_compile, call, name, part, parts, choices) for name, call, parts in jobs for part in range(parts)
    ]
    for message in sorted({future.result() or "" for future in running} - {""}):
        print(message, file=sys.stderr, flush=True)
