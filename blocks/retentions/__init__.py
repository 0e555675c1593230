"""Retention gates: how much of the past is kept. One file a choice."""
