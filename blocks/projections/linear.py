"""Projections and streams with a learned linear map."""

from __future__ import annotations

from archspec.families import Projection, Stream


class LinearProjection(Projection, kind="linear"):
    """x W (rank and block_size as the source says), then conv, activation, norm, position and feature."""


class LinearStream(Stream, kind="linear"):
    """x W of width ``dim`` (the model's when absent), then conv, activation and norm."""
