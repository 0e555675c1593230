"""The report as one file: the page's parts, the data and a content policy, put together.

Nothing is fetched and nothing can be: the policy allows exactly the script and the style written here, by their
hashes, so that text from a user's spec stays text even where a browser would be misled.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

SCRIPTS = ("util.js", "scale.js", "plot.js", "plot_controls.js", "detail.js", "table.js", "main.js")
_PLACEHOLDER = re.compile(r"@@([A-Z]+)@@")
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render(payload: Mapping[str, Any]) -> str:
    """Return the HTML document that shows ``payload`` (``search.report.payload`` says what that is).

    Raises:
        ValueError: when the payload holds a number that JSON cannot carry.
    """
    script = '"use strict";\n' + "".join(_part(name) for name in SCRIPTS)
    style = _part("page.css")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    values = {
        "POLICY": html.escape(policy, quote=False),
        "TITLE": html.escape(f"{payload['study']} - archspec report"),
        "STYLE": style,
        "DATA": embed_json(payload),
        "SCRIPT": script,
    }
    parts = _PLACEHOLDER.split(_part("page.html"))  # text, name, text, name, ...: values are never scanned again
    return "".join(values[part] if index % 2 else part for index, part in enumerate(parts))


def embed_json(value: object) -> str:
    """Return JSON that can stand inside a script element: no character of it can close one or open a comment."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _part(name: str) -> str:
    return files(__package__).joinpath("page", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
