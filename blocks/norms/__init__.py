"""Normalisations. One file a choice."""
