"""Two Gloo processes train a torch tower beside a JAX tower under DDP, and agree with one process."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.jax

PROGRAM = """
import sys
import numpy as np
import torch
import torch.distributed as dist
import jax.numpy as jnp
from recis_hybrid.bridge import JaxTower

rank, world, folder = int(sys.argv[1]), 2, sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)

def build():
    torch.manual_seed(0)
    weights = {"w": np.random.default_rng(0).normal(size=(6, 1)).astype(np.float32)}
    tower = JaxTower(lambda params, x: jnp.tanh(x) @ params["w"], weights)
    return torch.nn.Sequential(torch.nn.Linear(5, 6), tower)

def train(model, x, y):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(8):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()

x, y = torch.randn(16, 5, generator=torch.Generator().manual_seed(1)), torch.ones(16, 1)
alone = build()
start = alone[1].w.detach().clone()
train(alone, x, y)
assert not torch.allclose(alone[1].w, start)
for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
    together = build()
    half = slice(8 * rank, 8 * rank + 8)
    train(torch.nn.parallel.DistributedDataParallel(together, **options), x[half].clone(), y[half].clone())
    for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
dist.destroy_process_group()
print("agrees")
"""


def test_ddp_agrees_with_one_process_in_all_bucket_modes(root: Path, tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path)],
            cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            out, errors = rank.communicate(timeout=300)
            assert "agrees" in out, errors[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
