"""Output stages: what stands between a memory's read-out and the residual stream. One file a choice."""
