"""JaxState: checkpoints of pytrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxState  # noqa: E402
from recis_hybrid.saver import Saver  # noqa: E402


def make(scale: float) -> Any:
    params = {"w": jnp.arange(6.0).reshape(2, 3) * scale, "b": jnp.full(3, scale, jnp.bfloat16)}
    return {
        "params": params,
        "optimizer": optax.adam(0.1).init(params),
        "key": jax.random.key(int(scale)),
        "n": jnp.int32(scale),
    }


def test_a_checkpoint_restores_a_pytree(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    state = JaxState(make(3.0))
    saver.save(1, {"jax": state})
    state.tree = jax.tree.map(lambda leaf: leaf, make(5.0))
    other = JaxState(make(7.0))
    saver.load({"jax": other})
    expected, got = make(3.0), other.tree
    assert jax.tree.structure(expected) == jax.tree.structure(got)
    assert jnp.array_equal(jax.random.key_data(got["key"]), jax.random.key_data(expected["key"]))
    assert jax.random.uniform(got["key"]) == jax.random.uniform(expected["key"])
    del expected["key"], got["key"]
    assert all(
        a.dtype == b.dtype and bool((a == b).all())
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True)
    )


def test_saving_and_loading_copy() -> None:
    state = JaxState({"w": jnp.ones(16)})
    saved = state.state_dict()
    saved["['w']"].zero_()
    assert float(state.tree["w"].sum()) == 16
    state.load_state_dict(saved)
    saved["['w']"].fill_(9)
    assert float(state.tree["w"].sum()) == 0


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"leaf \"\['lr'\]\" must be a JAX array, got float; convert it"):
        JaxState({"lr": 0.1})
    state = JaxState({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"another pytree \(\['w'\]: saved float32\[4\], expected float32\[3\]\)"):
        state.load_state_dict({"['w']": torch.ones(4)})
    with pytest.raises(ValueError, match=r"\['v'\]: saved float32\[3\], expected nothing, \['w'\]: saved nothing"):
        state.load_state_dict({"['v']": torch.ones(3)})
    assert float(state.tree["w"].sum()) == 3
