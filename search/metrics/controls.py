"""The controls: plain sizes, predicted from the spec, that every other metric must beat as a predictor of quality.

Non-embedding parameters alone rank transformers almost perfectly, so a metric is only worth its time where it ranks
models of equal size.
"""

from __future__ import annotations

from typing import ClassVar

from archspec.errors import ArchspecError
from archspec.search.families import Direction, Metric, MetricContext


class Control(Metric):
    """A figure that complexity predicts without building a model; smaller is cheaper."""

    direction: ClassVar[Direction] = "minimize"

    def measure(self, context: MetricContext) -> dict[str, float]:
        """Return the figure of the same name.

        Raises:
            ArchspecError: when the context does not hold it.
        """
        if self.kind not in context.figures:
            raise ArchspecError(
                f"metric {self.kind}: the context's figures are {', '.join(sorted(context.figures)) or 'empty'}; "
                f"pass what complexity predicts, {self.kind} among it"
            )
        return {self.kind: float(context.figures[self.kind])}


class NonEmbeddingParameters(Control, kind="non_embedding_parameters"):
    """Learned numbers outside the token embedding and the output projection."""


class FlopsPerToken(Control, kind="flops_per_token"):
    """Floating-point operations of the forward pass, per token."""


class StateSize(Control, kind="state_size"):
    """Numbers in the recurrent state of one sequence, over all layers."""
