"""Specs that ship with archspec: published models and searches, each headed by its source."""

if not __name__.startswith("archspec."):
    raise ImportError(
        f"imported as {__name__!r}; this folder is the package archspec.specs: use `from archspec import specs`"
    )
