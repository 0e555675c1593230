"""Projections and streams: where queries, keys, values and gates come from. One file a choice."""
