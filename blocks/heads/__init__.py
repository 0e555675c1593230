"""Outputs: what a model says after every item. One file a choice."""
