"""The search: spaces, ladders, drivers, tasks, metrics and reports."""

if not __name__.startswith("archspec."):
    raise ImportError(
        f"imported as {__name__!r}; this folder is the package archspec.search: use `from archspec import search`"
    )
