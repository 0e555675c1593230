"""Routed memories as a module: the router, the experts with what they share, and the read-out after combining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from archspec.blocks.carry import Carry
from archspec.blocks.declared import Declared
from archspec.blocks.form import Routing
from archspec.blocks.mixer import MemoryMixerModule
from archspec.blocks.projection import ProjectionModule
from archspec.blocks.readout import ReadoutModule
from archspec.blocks.source import SourceModule
from archspec.composition import Path
from archspec.initial import FAN_IN, Parameter

if TYPE_CHECKING:
    from archspec.blocks.mixers.routed import Routed


class RoutedModule(Declared):
    """x [B, T, D] to [B, T, D]; the equations are those of ``blocks.mixers.routed``.

    Every memory runs over all tokens, with steps of size 0 and decays of 1 where it takes none. What the memories
    share belongs to the first; projections that they share wholly are computed there once.
    """

    output: Tensor

    def __init__(
        self, config: Routed, instances: Mapping[Path, nn.Module], path: str, model_dim: int, depth: tuple[int, int]
    ) -> None:
        super().__init__(depth)
        self.config = config
        projected, dims = config.expert.projected_dims(model_dim), config.expert.dims(model_dim)
        self.router = SourceModule(
            config.router, f"{path}.router", model_dim, config.experts, vars(projected), has_weights=True
        )
        self.experts = nn.ModuleList(module for name, module in instances.items() if name[0] == "experts")
        self.always_on = nn.ModuleList(module for name, module in instances.items() if name[0] == "always_on")
        self.once = config.computed_once(model_dim)
        self._share(model_dim)
        inner = dims.num_heads * dims.value_dim
        self.readout = ReadoutModule(config.readout, f"{path}.readout", {"input": model_dim}, dims, depth)
        self.declare({"output": Parameter((inner, model_dim), FAN_IN, decayed=True)})

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Return the mixer's output [B, T, D] for x [B, T, D]; the state passes through ``carry``."""
        weights, taken = self._route(x, carry)
        streams = {"input": x}
        first = self._memories()[0]
        given: dict[str, Tensor] = {name: first.projections[name](streams, carry) for name in self.once}
        both = self.config.router.weigh == "read_and_write"
        read = x.new_zeros(*x.shape[:2], self.output.shape[0])
        for index, expert in enumerate(self._memories()[: len(self.experts)]):
            routing = Routing(taken[..., index], weights[..., index] if both else taken[..., index])
            found = expert.read_out(x, carry, routing, given)
            read = read + weights[..., index, None].to(x.dtype) * found
        for expert in self._memories()[len(self.experts) :]:
            own = {name: tensor for name, tensor in given.items() if name not in set(self.config.adapt)}
            read = read + expert.read_out(x, carry, None, own)
        combined: Tensor = self.readout(read, streams, carry)
        return combined @ self.output

    def _memories(self) -> list[MemoryMixerModule]:
        return [*self.experts, *self.always_on]  # type: ignore[list-item]

    def _route(self, x: Tensor, carry: Carry) -> tuple[Tensor, Tensor]:
        """Return the weights, 0 for experts that do not take a token, and 1 for those that do: [B, T, E] each."""
        router = self.config.router
        logits = self.router({"input": x}, carry)
        chances = logits.to(torch.float64 if x.dtype == torch.float64 else torch.float32).softmax(-1)
        taken = torch.zeros_like(chances).scatter(-1, chances.topk(router.top_k, dim=-1).indices, 1.0)
        weights = chances * taken
        if router.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if router.balance_loss:
            shares = taken.mean(dim=(0, 1)) / router.top_k
            balance = self.config.experts * (shares * chances.mean(dim=(0, 1))).sum()
            carry.auxiliary.append(router.balance_loss * balance)
        return weights, taken

    def _share(self, model_dim: int) -> None:
        """Drop every memory's output, and let all but the first borrow from it what they have in common."""
        first, *others = self._memories()
        owners = dict(first.named_modules())
        adapters = self.config.adapters(model_dim)
        for memory in self._memories():
            memory.without_output()
        for index, memory in enumerate(others, start=1):
            for name, module in memory.named_modules():
                for parameter in list(module.laws) if isinstance(module, Declared) else ():
                    lender = owners[name]
                    if self.config.shares(declared_path(f"{name}.{parameter}")) and isinstance(lender, Declared):
                        module.borrow(parameter, lender)
            adapted = self.config.adapt if index >= len(self.experts) else {}
            for projection in adapted:
                self._adapt(memory, projection, adapters)
            for projection in self.once:
                if projection not in adapted:
                    del memory.projections[projection]

    @staticmethod
    def _adapt(memory: MemoryMixerModule, projection: str, adapters: Mapping[str, Parameter]) -> None:
        module = memory.projections[projection]
        if not isinstance(module, ProjectionModule) or not isinstance(module.source, SourceModule):
            raise TypeError(f"{projection}: only a projection with a linear map of its own can be adapted")
        names = ("adapt_down", "adapt_up")
        module.source.adapt({name: adapters[f"{projection}.{name}"] for name in names})


def declared_path(name: str) -> str:
    """Return a module's parameter path as ``declarations`` names it: ``query.weight`` for projections.query.source.."""
    parts = [part for part in name.split(".") if part not in ("source", "inner", "")]
    if parts[0] in ("projections", "gates"):
        parts = parts[1:]
    return ".".join(parts).replace("/", ".")
