"""What the first event of a run says of its search file."""

from __future__ import annotations

from typing import Any

from archspec.search.records import FORMAT
from archspec.search.requests import stages
from archspec.search.searchfile import SearchFile
from archspec.search.settings import score_name


def opening(search: SearchFile) -> dict[str, Any]:
    """Return what readers of a run need to know of its search file."""
    settings = search.settings
    return {
        "format": FORMAT,
        "study": settings.study,
        "seed": settings.seed,
        "objectives": [objective.as_dict() for objective in search.objectives],
        "tasks": {
            name: {
                "kind": task.kind,
                "primary": score_name(name, task.primary),
                "scores": {score_name(name, score): way for score, way in task.scores.items()},
            }
            for name, task in settings.tasks.items()
        },
        "metrics": dict(search.metrics),
        "soft_constraints": {
            name: bounds.model_dump(mode="json") for name, bounds in settings.soft_constraints.items()
        },
        "rungs": [
            {
                "rung": rung.rung,
                "tokens": rung.tokens,
                "stages": stages(settings, index),
                "promote": None if rung.promote is None else rung.promote.model_dump(mode="json"),
            }
            for index, rung in enumerate(settings.ladder)
        ],
        "space": vars(search.space.size),
    }
