"""GPU and CPU kernels: one folder a rule family, each with a public op, a reference and its faster forms."""

if not __name__.startswith("archspec."):
    raise ImportError(
        f"imported as {__name__!r}; this folder is the package archspec.kernels: use `from archspec import kernels`"
    )
