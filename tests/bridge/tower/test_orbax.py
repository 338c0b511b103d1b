"""Orbax and safetensors checkpoints of Flax and Equinox models load into towers, and towers are saved back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
ocp = pytest.importorskip("orbax.checkpoint")
equinox = pytest.importorskip("equinox")
linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
safetensors_flax = pytest.importorskip("safetensors.flax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower, from_equinox, from_linen, from_nnx, load_orbax, save_orbax  # noqa: E402
from recis_hybrid.saver import load_pretrained  # noqa: E402
from tests.support.near import assert_near  # noqa: E402

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


class Linen(linen.Module):  # type: ignore[misc]
    @linen.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x))


class Nnx(nnx.Module):  # type: ignore[misc]
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
        self.norm, self.dropout = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.norm(self.layers[1](self.layers[0](x))))


def linen_variables(seed: int) -> Any:
    variables = Linen().init(jax.random.key(seed), jnp.asarray(X))
    mean = {"BatchNorm_0": {"mean": jnp.full(4, float(seed)), "var": jnp.ones(4)}}
    return {**variables, "batch_stats": mean}


def nnx_module(seed: int) -> Any:
    module = Nnx(seed)
    module.norm.mean[...] = jnp.full(4, float(seed))
    module.eval()
    return module


def mlp(seed: int) -> Any:
    return equinox.nn.MLP(3, 2, 4, 1, key=jax.random.key(seed))


def save(path: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def restore(path: Path, target: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def outputs(tower: JaxTower) -> torch.Tensor:
    with torch.no_grad():
        return tower.eval()(torch.from_numpy(X).clone())  # type: ignore[no-any-return]


def as_tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def test_variables_of_linen(tmp_path: Path) -> None:
    saved = linen_variables(1)
    expected = as_tensor(Linen().apply(saved, X))
    tower = from_linen(Linen(), linen_variables(0))
    load_orbax(tower, save(tmp_path / "variables", saved))
    assert_near(outputs(tower), expected)
    save_orbax(tower, tmp_path / "back")
    back = restore(tmp_path / "back", linen_variables(0))
    jax.tree.map(np.testing.assert_array_equal, back, saved)
    state = {"step": 3, "model": saved, "opt_state": [jnp.ones(2)]}
    tower = from_linen(Linen(), linen_variables(0))
    load_orbax(tower, save(tmp_path / "state", state), key="model")
    assert_near(outputs(tower), expected)
    with pytest.raises(FileExistsError, match="save_orbax: .*back exists; save to a new folder"):
        save_orbax(tower, tmp_path / "back")


@pytest.mark.parametrize("pure", [False, True])
def test_modules_of_nnx(tmp_path: Path, pure: bool) -> None:
    saved = nnx_module(1)
    expected, state = as_tensor(saved(X)), nnx.state(saved)
    if pure:
        state = nnx.to_pure_dict(nnx.state(saved, nnx.Not(nnx.RngState)))
    tower = from_nnx(nnx_module(0))
    load_orbax(tower, save(tmp_path / "state", state))
    assert_near(outputs(tower), expected)
    save_orbax(tower, tmp_path / "back")
    definition, streams, rest = nnx.split(nnx_module(2), nnx.RngState, ...)
    nnx.replace_by_pure_dict(rest, restore(tmp_path / "back", nnx.to_pure_dict(rest)))
    assert_near(as_tensor(nnx.merge(definition, streams, rest)(X)), expected)


def test_modules_of_equinox(tmp_path: Path) -> None:
    saved = mlp(1)
    params, static = equinox.partition(saved, equinox.is_inexact_array)
    expected = as_tensor(jax.vmap(saved)(X))
    tower = from_equinox(mlp(0))
    load_orbax(tower, save(tmp_path / "module", params))
    assert_near(outputs(tower), expected)
    save_orbax(tower, tmp_path / "back")
    target = equinox.filter(mlp(2), equinox.is_inexact_array)
    assert_near(as_tensor(jax.vmap(equinox.combine(restore(tmp_path / "back", target), static))(X)), expected)


def test_steps_of_a_checkpoint_manager(tmp_path: Path) -> None:
    saved = linen_variables(1)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, args=ocp.args.StandardSave(saved))
    tower = from_linen(Linen(), linen_variables(0))
    load_orbax(tower, tmp_path / "run" / "7")
    assert_near(outputs(tower), as_tensor(Linen().apply(saved, X)))
    with pytest.raises(
        FileNotFoundError, match=r"run: is not an Orbax checkpoint; it contains the steps '7': pass one"
    ):
        load_orbax(tower, tmp_path / "run")


def test_floating_point_dtypes_are_converted(tmp_path: Path) -> None:
    tower = JaxTower(lambda params, x: x * params["w"], {"w": np.zeros(3, np.float32), "n": np.zeros(1, np.int32)})
    half = jnp.array([0.5, 1, -2], jnp.bfloat16)
    load_orbax(tower, save(tmp_path / "half", {"w": half, "n": jnp.ones(1, jnp.int32)}))
    assert tower.w.tolist() == [0.5, 1, -2]
    assert tower.w.dtype is torch.float32
    assert tower.n.tolist() == [1]


@pytest.mark.parametrize(
    ("tree", "key", "message"),
    [
        ({"w": jnp.zeros(3)}, "", r"the checkpoint lacks 'b'; it has 'w', and the tower 'b', 'w'; build"),
        ({"w": jnp.zeros(3), "b": jnp.zeros(1), "c": jnp.zeros(1)}, "", "the checkpoint also has 'c'"),
        ({"w": jnp.ones(3), "b": jnp.zeros(2)}, "", r"'b' has shape \[2\], but that of the tower \[1\]"),
        ({"w": jnp.ones(3), "b": jnp.zeros(1, jnp.int32)}, "", r"'b' has dtype torch.int32, but that of the tower"),
        ({"w": jnp.ones(3)}, "model.params", r"has nothing at the key 'model.params'; it has 'w'"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, tree: Any, key: str, message: str) -> None:
    tower = JaxTower(lambda params, x: x * params["w"], {"w": np.zeros(3, np.float32), "b": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=message):
        load_orbax(tower, save(tmp_path / "other", tree), key=key)
    assert not tower.w.any()


def test_safetensors(tmp_path: Path) -> None:
    saved = linen_variables(1)
    names = {f"{layer}.{name}": value for layer, some in saved["params"].items() for name, value in some.items()}
    stats = {f"batch_stats.BatchNorm_0.{name}": value for name, value in saved["batch_stats"]["BatchNorm_0"].items()}
    safetensors_flax.save_file(names | stats, tmp_path / "flax.safetensors")
    tower = from_linen(Linen(), linen_variables(0))
    load_pretrained(tower, tmp_path / "flax.safetensors")
    assert_near(outputs(tower), as_tensor(Linen().apply(saved, X)))
