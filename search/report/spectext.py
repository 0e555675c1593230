"""A spec's plain mapping as YAML that the loader reads back to the same data, short mappings on one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

LINE = 96
FIRST = ("version", "study", "name", "about")
_NUMERIC = "+-.0123456789"


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # libyaml where it is there
    def __init__(self, *args: Any, width: int, **options: Any) -> None:
        super().__init__(*args, width=width, **options)
        self.best_width = width

    def ignore_aliases(self, data: Any) -> bool:
        """The language has no anchors: what occurs twice is written twice."""
        return True


def _mapping(dumper: yaml.SafeDumper, value: Mapping[str, Any]) -> yaml.Node:
    return dumper.represent_mapping(
        "tag:yaml.org,2002:map", value.items(), flow_style=_fits_a_line(value, dumper.best_width)
    )


def _sequence(dumper: yaml.SafeDumper, value: list[Any] | tuple[Any, ...]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=_fits_a_line(value, dumper.best_width))


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # YAML 1.1 and the language disagree on what is a number (1e-3, 3:1): quote whatever could be one.
    quote = '"' if not value.isprintable() else "'" if value[:1] in _NUMERIC and value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style=quote)


def _fits_a_line(value: Any, width: int) -> bool:
    """A collection of plain values, or of one level of such, that leaves room for its key."""
    return _depth(value) <= 2 and len(str(value)) < width - 24


def _depth(value: Any) -> int:
    if isinstance(value, Mapping):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list | tuple):
        return 1 + max(map(_depth, value), default=0)
    return 0


_REPRESENTERS: tuple[tuple[type, Any], ...] = ((dict, _mapping), (list, _sequence), (tuple, _sequence), (str, _text))
for _kind, _represent in _REPRESENTERS:
    _Dumper.add_representer(_kind, _represent)  # plain values and, below, what remembers where it stood
    _Dumper.add_multi_representer(_kind, _represent)


def spec_text(spec: Mapping[str, Any], width: int = LINE) -> str:
    """Return the YAML of a spec, its keys in their order, the name first; characters that do not print are escaped."""
    ordered = {key: spec[key] for key in (*FIRST, *spec) if key in spec}
    text = _dump(ordered, width, allow_unicode=True)
    return text if text.replace("\n", "").isprintable() else _dump(ordered, width, allow_unicode=False)


def _dump(spec: Mapping[str, Any], width: int, *, allow_unicode: bool) -> str:
    return yaml.dump(dict(spec), Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode, width=width)
