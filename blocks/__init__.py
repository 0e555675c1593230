"""The parts of a sequence model: memories, biases, retentions, updates, and the layers around them."""

if not __name__.startswith("archspec."):
    raise ImportError(
        f"imported as {__name__!r}; this folder is the package archspec.blocks: use `from archspec import blocks`"
    )
