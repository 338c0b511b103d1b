"""DataLoader workers of a process in which JAX has started: they yield batches, or raise where JAX would hang."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

pytestmark = [
    pytest.mark.jax,
    # JAX and Python 3.12+ warn about forks of multithreaded processes, which these tests need.
    pytest.mark.filterwarnings("ignore:.*fork.*"),
]
jax = pytest.importorskip("jax")
from recis_hybrid.bridge import JaxTower, to_jax  # noqa: E402


class Rows(Dataset[Any]):
    """Rows filled with their index; with ``uses_jax`` the worker computes with JAX."""

    def __init__(self, uses_jax: bool) -> None:
        self.uses_jax = uses_jax

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> torch.Tensor:
        value = torch.full((4,), float(row))
        if self.uses_jax:
            value = value + float(jax.jit(lambda x: x.sum())(to_jax(torch.zeros(16))))
        return value


@pytest.mark.parametrize(("method", "uses_jax"), [("fork", False), ("forkserver", True), ("spawn", True)])
def test_workers_feed_a_tower(method: str, uses_jax: bool) -> None:
    tower = JaxTower(lambda params, x: x * params["w"], {"w": torch.full((4,), 2.0)})
    tower(torch.zeros(4))  # starts JAX
    loader = DataLoader(Rows(uses_jax), batch_size=4, num_workers=1, multiprocessing_context=method, timeout=300)
    outputs = [tower(batch) for batch in loader]
    assert torch.cat(outputs)[:, 0].tolist() == [2.0 * row for row in range(8)]


def test_a_forked_worker_that_would_hang_raises() -> None:
    to_jax(torch.zeros(16))
    loader = DataLoader(Rows(uses_jax=True), batch_size=4, num_workers=1, multiprocessing_context="fork", timeout=300)
    with pytest.raises(RuntimeError, match=r"was forked after JAX had started.*forkserver"):
        next(iter(loader))
