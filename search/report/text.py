"""Tables for terminals: as wide as the terminal, never broken mid-word, and safe to print whatever a name holds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

SPARKS = "▁▂▃▄▅▆▇█"
GAP = 2
MIN_STRETCH = 14


@dataclass(frozen=True)
class Row:
    """One line of a table, with lines of detail below it.

    Args:
        cells: the texts of the line, one per column.
        below: what follows on lines of their own, wrapped and indented.
        style: rich style of the line.
    """

    cells: Sequence[str]
    below: Sequence[str] = ()
    style: str = ""


@dataclass(frozen=True)
class Table:
    """Columns with headings; a column whose heading starts with '>' is flush right.

    Args:
        stretch: the column that gives way when there is little room.
        headed: whether the headings are shown.
    """

    headings: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    stretch: int = 1
    headed: bool = True

    def render(self, width: int) -> list[Text]:
        """Return the lines; a table too wide for ``width`` lists every row's cells under its first ones instead."""
        names = [heading.removeprefix(">") for heading in self.headings]
        cells = [list(map(clean, row.cells)) for row in self.rows]
        words = [max((cell_len(word) for word in name.split()), default=0) for name in names]
        widths = [max(words[at], *(cell_len(line[at]) for line in cells), 0) for at in range(len(names))]
        spare = width - sum(widths) - GAP * (len(widths) - 1)
        if spare < 0 and widths[self.stretch] + spare >= MIN_STRETCH:
            widths[self.stretch] += spare
            spare = 0
        return (
            self._stacked(names, width)
            if spare < 0
            else self._aligned(names, self._widened(names, widths, spare), width)
        )

    def _widened(self, names: list[str], widths: list[int], spare: int) -> list[int]:
        """Give what is left of the width to the tallest heading, again and again, while that makes it less tall."""
        while True:
            heights = [len(textwrap.wrap(name, max(1, size))) for name, size in zip(names, widths, strict=True)]
            at = max(range(len(names)), key=lambda index: heights[index])
            lower = range(widths[at] + 1, widths[at] + spare + 1)
            size = next((size for size in lower if len(textwrap.wrap(names[at], size)) < heights[at]), None)
            if size is None:
                return widths
            spare -= size - widths[at]
            widths[at] = size

    def _aligned(self, names: list[str], widths: list[int], width: int) -> list[Text]:
        wrapped_names = [textwrap.wrap(name, max(1, size)) for name, size in zip(names, widths, strict=True)]
        height = max(map(len, wrapped_names), default=0) if self.headed else 0
        filled = [[""] * max(0, height - len(lines)) + lines for lines in wrapped_names]
        found = [Text(self._line([lines[at] for lines in filled], widths), style="dim") for at in range(height)]
        for row in self.rows:
            found.append(Text(self._line(list(map(clean, row.cells)), widths), style=row.style))
            found += _indented(row.below, widths[0] + GAP, width)
        return found

    def _line(self, cells: list[str], widths: list[int]) -> str:
        aligned = []
        for cell, heading, width in zip(cells, self.headings, widths, strict=True):
            text = cell if cell_len(cell) <= width else set_cell_size(cell, width - 1) + "…"
            pad = " " * (width - cell_len(text))
            aligned.append(pad + text if heading.startswith(">") else text + pad)
        return (" " * GAP).join(aligned).rstrip()

    def _stacked(self, headings: list[str], width: int) -> list[Text]:
        found = []
        for row in self.rows:
            cells = list(map(clean, row.cells))
            found.append(Text(shortened("  ".join(cells[: self.stretch + 1]), width), style=row.style or "bold"))
            pairs = list(zip(headings, cells, strict=True))[self.stretch + 1 :]
            shown = [f"{heading} {cell}".strip() for heading, cell in pairs if cell]
            found += _indented([", ".join(shown), *row.below], 4, width)
        return found


def clean(text: str) -> str:
    """Return the text on one line, with characters that a terminal would obey replaced by U+FFFD."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def shortened(text: str, width: int) -> str:
    """Return the text cut to ``width`` cells, with an ellipsis where something is missing."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    """Return a text as lines of at most ``width`` cells, indented from the second on."""
    return textwrap.wrap(clean(text), max(20, width), subsequent_indent=" " * indent, break_on_hyphens=False) or [""]


def facts(pairs: Sequence[tuple[str, str]], width: int) -> list[Text]:
    """Return ``label  value`` lines, the values aligned and wrapped."""
    edge = max((cell_len(label) for label, _ in pairs), default=0) + GAP
    found = []
    for label, value in pairs:
        lines = wrapped(value, width - edge)
        found.append(Text.assemble((f"{clean(label):<{edge}}", "dim"), lines[0]))
        found += [Text(" " * edge + line) for line in lines[1:]]
    return found


def sparkline(values: Sequence[float]) -> str:
    """Return the values as a row of eighth-blocks, from the smallest to the largest."""
    low, high = min(values), max(values)
    if high == low:
        return SPARKS[3] * len(values)
    return "".join(SPARKS[round((value - low) / (high - low) * (len(SPARKS) - 1))] for value in values)


def console() -> Console:
    """Return the console of standard output; a pipe gets plain text, COLUMNS (or 80) wide."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def show(lines: Sequence[Text | str], out: Console) -> None:
    """Print the lines as they are."""
    for line in lines:
        out.print(line)


def _indented(texts: Sequence[str], indent: int, width: int) -> list[Text]:
    lines = [line for text in texts for line in wrapped(text, width - indent, indent=2)]
    return [Text(" " * indent + line, style="dim") for line in lines]
