"""DataLoader workers beside a JAX that has started: they give batches, and where JAX would hang they say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

pytestmark = [
    pytest.mark.jax,
    # JAX, and Python from 3.12 on, warn of every fork beside threads: that is what is tried here.
    pytest.mark.filterwarnings("ignore:.*fork.*"),
]
jax = pytest.importorskip("jax")
from recis_hybrid.bridge import JaxTower, to_jax  # noqa: E402


class Rows(Dataset[Any]):
    """Rows of their own number; with `crosses` a worker uses JAX."""

    def __init__(self, crosses: bool) -> None:
        self.crosses = crosses

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> torch.Tensor:
        value = torch.full((4,), float(row))
        if self.crosses:
            value = value + float(jax.jit(lambda x: x.sum())(to_jax(torch.zeros(16))))
        return value


@pytest.mark.parametrize(("method", "crosses"), [("fork", False), ("forkserver", True), ("spawn", True)])
def test_workers_feed_a_tower(method: str, crosses: bool) -> None:
    tower = JaxTower(lambda params, x: x * params["w"], {"w": torch.full((4,), 2.0)})
    tower(torch.zeros(4))  # JAX has started
    loader = DataLoader(Rows(crosses), batch_size=4, num_workers=1, multiprocessing_context=method, timeout=120)
    outputs = [tower(batch) for batch in loader]
    assert torch.cat(outputs)[:, 0].tolist() == [2.0 * row for row in range(8)]


def test_a_forked_worker_that_would_hang_is_told_so() -> None:
    to_jax(torch.zeros(16))
    loader = DataLoader(Rows(crosses=True), batch_size=4, num_workers=1, multiprocessing_context="fork", timeout=120)
    with pytest.raises(RuntimeError, match=r"was forked after JAX had started.*forkserver"):
        next(iter(loader))
