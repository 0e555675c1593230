"""Dot (Behrouz et al. 2025, "ATLAS"): the Omega rule with the exponential kernel's first terms."""

from __future__ import annotations

import pytest

from .plain import hold
from .test_omeganet import NARROW, omega_net


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dot(backend: str) -> None:
    hold("dot", omega_net, backend, length=24, narrow=NARROW)
