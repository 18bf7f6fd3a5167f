"""Parametrisations of which `make test-fast` runs a few."""

import pytest


def mostly_slow(values, fast):
    """The values; those for which `fast(value)` is False are marked slow."""
    row = lambda value: value if isinstance(value, tuple) else (value,)
    return [value if fast(value) else pytest.param(*row(value), marks=pytest.mark.slow) for value in values]
