"""What results say of where they come from, and where they are kept."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def current_commit() -> str:
    """Return the short hash of the checkout, or "unknown" where git cannot tell."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def keep(benchmark: str, text: str) -> None:
    """Write a benchmark's table of this month."""
    (RESULTS / f"{benchmark}_{datetime.date.today():%Y%m}.md").write_text(text)
