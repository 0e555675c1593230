"""Modules whose parameters are declared (shape and law) and drawn later, each from its own path and the seed.

A parameter's values depend on the seed, its name in the model and its law, and on nothing else: not on the order of
construction, not on the global random state, not on what other layers are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from archspec.blocks.pieces import Pieces
from archspec.initial import Initial, Parameter, Parameters


class Declared(nn.Module):
    """A module with declared parameters; ``depth`` is (layer, number of layers) for laws that vary with depth.

    ``pieces`` are the fused kernels that a compiled model may use; None is plain torch.
    """

    pieces: Pieces | None = None

    def __init__(self, depth: tuple[int, int] = (0, 1)) -> None:
        super().__init__()
        self.depth = depth
        self.laws: dict[str, Parameter] = {}
        self._lenders: dict[str, Declared] = {}  # a plain mapping: what is lent belongs to its lender alone

    def declare(self, parameters: Parameters) -> None:
        """Register parameters by name; their values are undefined until ``initialise``."""
        for name, parameter in parameters.items():
            self.laws[name] = parameter
            self.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))

    def settle(self) -> None:
        """Change what has to start from other parameters, once all are drawn; nothing by default."""

    def borrow(self, name: str, lender: Declared) -> None:
        """Use another module's parameter instead of one's own; it is drawn, counted and saved there only."""
        del self._parameters[name], self.laws[name]
        self._lenders[name] = lender

    def pieces_for(self, x: Tensor) -> Pieces | None:
        """Return the fused pieces when there are any and they serve tensors like x."""
        return self.pieces if self.pieces is not None and self.pieces.serves(x) else None

    def values(self) -> dict[str, Tensor]:
        """Return the parameters that this module uses by name, its own and borrowed ones."""
        found = {name: getattr(self, name) for name in self.laws}
        found.update({name: lender.values()[name] for name, lender in self._lenders.items()})
        return found


class Named(nn.Module):
    """Modules by name, whatever the name: ``nn.ModuleDict`` refuses those of its own methods (keys, values, type)."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._modules.update(modules)

    def __getitem__(self, name: str) -> nn.Module:
        return dict(self.named_children())[name]

    def items(self) -> list[tuple[str, nn.Module]]:
        """Return (name, module) in the order given."""
        return list(self.named_children())


def initialise(model: nn.Module, seed: int) -> None:
    """Draw every declared parameter of ``model`` in place, in fp32 on the CPU, whatever the model's device."""
    for prefix, module in model.named_modules():
        if not isinstance(module, Declared):
            continue
        for name, parameter in module.laws.items():
            path = f"{prefix}.{name}" if prefix else name
            drawn = draw(parameter, path, seed, module.depth)
            with torch.no_grad():
                getattr(module, name).copy_(drawn)
    for module in model.modules():
        if isinstance(module, Declared):
            module.settle()


def draw(parameter: Parameter, path: str, seed: int, depth: tuple[int, int] = (0, 1)) -> Tensor:
    """Return the initial values of one parameter, from (seed, path) and its law."""
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    values = _sample(parameter.law, parameter.shape, generator, depth)
    return values.log() if parameter.logarithm else values


def _sample(law: Initial, shape: tuple[int, ...], generator: torch.Generator, depth: tuple[int, int]) -> Tensor:
    if law.constant is not None:
        return torch.full(shape, law.constant)
    if law.normal is not None:
        return torch.randn(shape, generator=generator) * law.normal
    if law.uniform is not None:
        low, high = law.uniform
        # 1 - u lies in (0, 1]: a rate drawn from U(0, 16) is never 0, whose logarithm is stored.
        return low + (high - low) * (1 - torch.rand(shape, generator=generator))
    if law.log_uniform is not None:
        return _log_uniform(*law.log_uniform, shape, generator)
    if law.linspace is not None:
        return _spread(torch.linspace(*law.linspace, shape[_axis(shape)]), shape)
    if law.arange is not None:
        return _spread(law.arange + torch.arange(shape[_axis(shape)], dtype=torch.float32), shape)
    if law.ring is not None:
        low, high = (radius**2 for radius in law.ring)
        return -0.5 * torch.log(low + (high - low) * (1 - torch.rand(shape, generator=generator)))
    if law.law == "hippo":
        return _spread(_hippo_frequencies(shape[_axis(shape)]), shape)
    if law.law == "dt":
        step = _log_uniform(1e-3, 0.1, shape, generator).clamp(min=1e-4)
        return step + torch.log(-torch.expm1(-step))  # softplus^-1(step)
    if law.law == "identity":
        # A vector multiplies channel by channel: its identity is one in each.
        return torch.eye(shape[-2], shape[-1]).expand(shape).clone() if len(shape) > 1 else torch.ones(shape)
    if law.law == "by_depth":
        layer, num_layers = depth
        ratio = layer / max(num_layers - 1, 1)
        place = torch.linspace(0, 1, shape[_axis(shape)])
        return _spread(-(-5.0 + 12.0 * place ** (0.3 + 1.3 * ratio)), shape)
    # A vector multiplies or adds channel by channel: one input each.
    return torch.randn(shape, generator=generator) / math.sqrt(shape[-2] if len(shape) > 1 else 1)


def _log_uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    place = torch.rand(shape, generator=generator)
    return (math.log(low) + place * (math.log(high) - math.log(low))).exp()


def _hippo_frequencies(count: int) -> Tensor:
    """Return the positive imaginary parts of the eigenvalues of HiPPO-N, of 2 ``count`` states; real parts are -1/2.

    HiPPO-N is -1/2 plus the skew-symmetric matrix of entries sqrt(n + 1/2) sqrt(m + 1/2), positive above the diagonal
    (S4D, arXiv:2206.11893, section 2.1; S5, arXiv:2208.04933, appendix B.1.1).
    """
    root = (torch.arange(2 * count, dtype=torch.float64) + 0.5).sqrt()
    outer = root[:, None] * root
    skew = outer.triu(1) - outer.tril(-1)
    frequencies: Tensor = torch.linalg.eigvalsh(torch.complex(torch.zeros_like(skew), -skew))
    return frequencies[count:].float()


def _axis(shape: tuple[int, ...]) -> int:
    """Return where sequences run: over the key channels of a gate [H, K, V], else its value channels, else heads.

    (The states of every channel of Mamba start alike, whatever the number of channels.) Other shapes have one axis
    that is longest.
    """
    if len(shape) == 3:
        return next((axis for axis in (1, 2) if shape[axis] > 1), 0)
    return shape.index(max(shape))


def _spread(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Lay a sequence along one axis of ``shape`` and repeat it along the others."""
    axis = _axis(shape)
    return values.reshape([-1 if index == axis else 1 for index in range(len(shape))]).expand(shape).clone()
