"""Compositions of sequence mixers. One file a choice."""
