"""Schedules of the emulated device, drawn by hypothesis: several in each run, more in ``make soak``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, currently_in_test_context, given, note, settings, strategies as st

from tests.support import emulated

SOAK = int(os.environ.get("SOAK", 1))
"""Factor of the numbers of schedules; ``make soak`` sets it."""


@dataclass(frozen=True)
class Schedule:
    """Settings of the emulated device, as ``emulated.configure`` takes them; a test also draws its data from the seed.

    To repeat a failure: ``EMULATED_SCHEDULE=seed,warps,yield_every,max_blocks,late python -m pytest TEST``.
    """

    seed: int
    warps: int
    yield_every: int
    max_blocks: int
    late: int

    @contextmanager
    def running(self) -> Iterator[torch.Generator]:
        """Run with this schedule, and yield a generator for the data of the test."""
        if currently_in_test_context():
            note(f"repeat with EMULATED_SCHEDULE={','.join(map(str, astuple(self)))}")
        with emulated.schedule(
            seed=self.seed,
            warps=self.warps,
            yield_every=self.yield_every,
            max_blocks=self.max_blocks,
            late=self.late,
        ):
            yield torch.Generator().manual_seed(self.seed)


def _schedules() -> st.SearchStrategy[Schedule]:
    if repeated := os.environ.get("EMULATED_SCHEDULE"):
        return st.just(Schedule(*map(int, repeated.split(","))))
    # One warp runs threads of one warp only; more than a block has mixes blocks.
    warps, yields, blocks = st.integers(1, 24), st.integers(1, 8), st.integers(1, 6)
    return st.builds(Schedule, st.integers(0, 2**31 - 2), warps, yields, blocks, st.integers(0, 2))


def on_schedules(count: int) -> Callable[[Callable[..., None]], Any]:
    """Run a test on the emulated device, once for each of ``count`` values of its argument ``schedule``.

    Schedules are not shrunk: a smaller one runs other interleavings. They are not stored either: see :class:`Schedule`.
    """

    def decorate(test: Callable[..., None]) -> Any:
        drawn = given(schedule=_schedules())(test)
        many = settings(
            max_examples=count * SOAK,
            phases=[Phase.generate],
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        return pytest.mark.emulated(many(drawn))

    return decorate
