"""Layouts unrolled: the order in which layers run, with their shared weights and the loops' extra steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from archspec.schema import BlockName, Cycle, Halt, Layout, Loop, Repeat, Sequence


@dataclass(frozen=True)
class RunLayer:
    """Apply layer ``index``; ``scope`` tells its state from that of its other applications."""

    index: int
    scope: str


@dataclass(frozen=True)
class Remember:
    """Keep the current hidden states as a loop's input."""

    loop: int


@dataclass(frozen=True)
class Inject:
    """Add a loop's input again."""

    loop: int


@dataclass(frozen=True)
class Embed:
    """Add the sinusoidal code of a pass's number, and of the tokens' positions when ``positions`` says so."""

    number: int
    positions: bool = False


@dataclass(frozen=True)
class Ponder:
    """After a pass of a halting loop: decide which tokens halt, and collect what the loop returns.

    Args:
        loop: the loop's number among those that halt; its parameters are kept under it.
        halt: how it halts.
        first, last: whether this was the loop's first pass, its last.
    """

    loop: int
    halt: Halt
    first: bool
    last: bool


Instruction = RunLayer | Remember | Inject | Embed | Ponder


@dataclass
class Program:
    """The instructions of a layout, and the block that each layer's weights belong to."""

    instructions: list[Instruction] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)

    def halts(self) -> dict[int, Halt]:
        """Return how each loop that halts does, by its number."""
        return {step.loop: step.halt for step in self.instructions if isinstance(step, Ponder)}


def unroll(layout: Layout) -> Program:
    """Return the program of a layout: repeats and cycles make fresh layers, loops run the same ones again."""
    program = Program()
    _Unroller(program).run(layout, scope="")
    return program


class _Unroller:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.loops = 0
        self.halting = 0

    def run(self, layout: Layout, scope: str) -> None:
        if isinstance(layout, BlockName):
            self.program.instructions.append(RunLayer(len(self.program.blocks), scope))
            self.program.blocks.append(layout.name)
        elif isinstance(layout, Sequence):
            for part in layout.of:
                self.run(part, scope)
        elif isinstance(layout, Repeat):
            for _ in range(layout.repeat):
                self.run(layout.of, scope)
        elif isinstance(layout, Cycle):
            self.cycle(layout, scope)
        elif isinstance(layout, Loop):
            self.loop(layout, scope)

    def cycle(self, layout: Cycle, scope: str) -> None:
        """Tile the inner layout until enough layers have run, then cut."""
        left = layout.cycle
        while left > 0:
            before = len(self.program.instructions)
            self.run(layout.of, scope)
            for place in range(before, len(self.program.instructions)):
                if isinstance(self.program.instructions[place], RunLayer):
                    left -= 1
                if left == 0:
                    del self.program.instructions[place + 1 :]
                    break
        used = {step.index for step in self.program.instructions if isinstance(step, RunLayer)}
        del self.program.blocks[max(used) + 1 :]

    def loop(self, layout: Loop, scope: str) -> None:
        number = self.loops
        self.loops += 1
        halting = self.halting
        self.halting += layout.halt is not None
        self.program.instructions.append(Remember(number))
        first_layer = len(self.program.blocks)
        body: list[Instruction] = []
        for index in range(layout.loop):
            if layout.inject and index:
                self.program.instructions.append(Inject(number))
            if layout.embed != "none":
                self.program.instructions.append(Embed(index, layout.embed == "coordinates"))
            if index == 0:
                start = len(self.program.instructions)
                self.run(layout.of, f"{scope}pass{index}.")
                body = self.program.instructions[start:]
            else:
                old, new = f"{scope}pass0.", f"{scope}pass{index}."
                self.program.instructions.extend(_rescoped(step, old, new, first_layer) for step in body)
            if layout.halt is not None:
                first, last = index == 0, index == layout.loop - 1
                self.program.instructions.append(Ponder(halting, layout.halt, first, last))


def _rescoped(step: Instruction, old: str, new: str, first_layer: int) -> Instruction:
    if isinstance(step, RunLayer) and step.index >= first_layer and step.scope.startswith(old):
        return RunLayer(step.index, new + step.scope[len(old) :])
    return step
