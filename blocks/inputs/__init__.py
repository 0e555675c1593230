"""Inputs: what a model reads. One file a choice."""
