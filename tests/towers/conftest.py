"""Fixtures of the tests of towers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.rank_processes import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four Gloo ranks for the whole session."""
    started = Ranks()
    yield started
    started.close()
