"""Towers of models in Flax, Equinox and Haiku."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.near import assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower, from_equinox, from_haiku, from_linen, from_nnx  # noqa: E402

X = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)


def check_dropout_and_training(tower: JaxTower) -> None:
    """Check that eval mode is deterministic, train mode follows torch's generator, and an optimizer lowers the loss."""
    x = torch.from_numpy(X).clone()
    tower.eval()
    assert torch.equal(tower(x), tower(x))
    tower.train()
    torch.manual_seed(0)
    first = tower(x)
    assert not torch.equal(tower(x), first)
    torch.manual_seed(0)
    assert torch.equal(tower(x), first)
    optimizer = torch.optim.Adam(tower.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (tower(x) - x[:, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_nnx() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed (pip install 'recis_hybrid[examples]')")

    class Model(nnx.Module):  # type: ignore[name-defined, misc]
        def __init__(self, rngs: Any) -> None:
            self.first = nnx.Linear(5, 32, rngs=rngs)
            self.norm = nnx.BatchNorm(32, momentum=0.5, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)
            self.last = nnx.Linear(32, 1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(self.dropout(jax.nn.relu(self.norm(self.first(x)))))

    model = Model(nnx.Rngs(0))
    tower = from_nnx(model)
    assert {"first.kernel", "norm.scale", "last.bias"} <= {name for name, _ in tower.named_parameters()}
    assert {name for name, _ in tower.named_buffers()} == {"norm.mean", "norm.var"}
    model.eval()
    assert_near(tower.eval()(torch.from_numpy(X).clone()).detach(), model(X))
    tower.train()(torch.from_numpy(X).clone())
    model.train()
    model(X)
    assert_near(tower.state_dict()["norm.mean"], model.norm.mean[...])
    check_dropout_and_training(tower)


def test_linen() -> None:
    linen = pytest.importorskip("flax.linen", reason="flax is not installed (pip install 'recis_hybrid[examples]')")

    class Model(linen.Module):  # type: ignore[name-defined, misc]
        @linen.compact
        def __call__(self, x: Any, train: bool) -> Any:
            x = linen.BatchNorm(use_running_average=not train, momentum=0.5)(linen.Dense(32)(x))
            return linen.Dense(1)(linen.Dropout(0.2, deterministic=not train)(jax.nn.relu(x)))

    model = Model()
    variables = model.init(jax.random.key(0), X, train=False)
    tower = from_linen(model, variables)
    assert {name for name, _ in tower.named_buffers()} == {
        "batch_stats.BatchNorm_0.mean",
        "batch_stats.BatchNorm_0.var",
    }
    expected = model.apply(variables, X, train=False)
    assert_near(tower.eval()(torch.from_numpy(X).clone()).detach(), expected)
    check_dropout_and_training(tower)
    with pytest.raises(ValueError, match="collection 'params'"):
        from_linen(model, {})


@pytest.mark.parametrize("name", ["train", "training", "is_training", "deterministic", "inference"])
def test_a_linen_module_receives_the_mode_under_any_name(name: str) -> None:
    linen = pytest.importorskip("flax.linen", reason="flax is not installed (pip install 'recis_hybrid[examples]')")
    trains = name not in ("deterministic", "inference")

    class Model(linen.Module):  # type: ignore[name-defined, misc]
        @linen.compact
        def __call__(self, x: Any, **mode: bool) -> Any:
            return linen.Dropout(0.5, deterministic=mode[name] is not trains)(linen.Dense(32)(x))

    # Set the signature that `__call__` would have with an explicit parameter.
    parameters = [inspect.Parameter(one, inspect.Parameter.POSITIONAL_OR_KEYWORD) for one in ("self", "x", name)]
    Model.__call__.__signature__ = inspect.Signature(parameters)
    model = Model()
    variables = model.init(jax.random.key(0), X, **{name: not trains})
    tower = from_linen(model, variables)
    x = torch.from_numpy(X).clone()
    assert (tower(x) == 0).any()
    assert not (tower.eval()(x) == 0).any()


def test_missing_arguments_of_a_linen_module_are_named() -> None:
    linen = pytest.importorskip("flax.linen", reason="flax is not installed (pip install 'recis_hybrid[examples]')")

    class Other(linen.Module):  # type: ignore[name-defined, misc]
        @linen.compact
        def __call__(self, x: Any, heads: int, evaluation: bool) -> Any:
            return linen.Dropout(0.5, deterministic=evaluation)(linen.Dense(heads)(x))

    x = torch.from_numpy(X).clone()
    tower = from_linen(Other(), Other().init(jax.random.key(0), X, 4, evaluation=True))
    with pytest.raises(
        TypeError, match=r"from_linen: .*Other.__call__\(self, x: .*: missing a required argument: 'heads'"
    ) as e:
        tower(x)
    assert "pass other arguments by keyword, as in tower(x, name=value)" in str(e.value)
    assert tower(x, heads=4, evaluation=True).shape == (len(X), 4)

    class Silent(linen.Module):  # type: ignore[name-defined, misc]
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dropout(0.5)(linen.Dense(4)(x))

    tower = from_linen(Silent(), {"params": Other().init(jax.random.key(0), X, 4, evaluation=True)["params"]})
    with pytest.raises(Exception, match="deterministic") as caught:
        tower(x)
    assert any("add a parameter `train`, and pass it to the layers" in note for note in caught.value.__notes__)


def test_other_adapters_pass_the_mode_by_name() -> None:
    eqx = pytest.importorskip("equinox", reason="equinox is not installed (pip install 'recis_hybrid[examples]')")

    class Model(eqx.Module):  # type: ignore[name-defined, misc]
        weight: Any

        def __call__(self, x: Any, training: bool) -> Any:
            return x @ self.weight * (1.0 if training else 2.0)

    x = torch.from_numpy(X).clone()
    tower = from_equinox(Model(jnp.ones((5, 1))))
    assert_near(tower(x), x.sum(1, keepdim=True))
    assert_near(tower.eval()(x), 2 * x.sum(1, keepdim=True))

    def f(params: Any, x: Any, *, training: bool) -> Any:
        return x * params["w"] * training

    plain = JaxTower(f, {"w": np.ones(1, np.float32)})
    with pytest.raises(TypeError, match="training") as caught:
        plain(x)
    assert any("to the call, as in tower(x, training=True)" in note for note in caught.value.__notes__)
    assert torch.equal(plain(x, training=True), x)


def test_equinox() -> None:
    eqx = pytest.importorskip("equinox", reason="equinox is not installed (pip install 'recis_hybrid[examples]')")

    class Model(eqx.Module):  # type: ignore[name-defined, misc]
        first: Any
        dropout: Any
        last: Any

        def __call__(self, x: Any, key: Any = None) -> Any:
            return self.last(self.dropout(jax.nn.relu(self.first(x)), key=key))

    one, two = jax.random.split(jax.random.key(0))
    model = Model(eqx.nn.Linear(5, 32, key=one), eqx.nn.Dropout(0.2), eqx.nn.Linear(32, 1, key=two))
    tower = from_equinox(model)
    assert [name for name, _ in tower.named_parameters()] == ["first.weight", "first.bias", "last.weight", "last.bias"]
    expected = jax.vmap(eqx.nn.inference_mode(model))(X)
    assert_near(tower.eval()(torch.from_numpy(X).clone()).detach(), expected)
    check_dropout_and_training(tower)


def test_init_and_apply() -> None:
    def apply(params: Any, key: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ params["mlp/~/linear_0"]["w"])
        if key is not None:
            hidden *= jax.random.bernoulli(key, 0.9, hidden.shape)
        return hidden @ params["mlp/~/linear_1"]["w"]

    random = np.random.default_rng(1)
    shapes = {"mlp/~/linear_0": (5, 32), "mlp/~/linear_1": (32, 1)}
    params = {name: {"w": 0.3 * random.normal(size=shape).astype(np.float32)} for name, shape in shapes.items()}
    tower = from_haiku(apply, params)
    assert [name for name, _ in tower.named_parameters()] == ["mlp/~/linear_0.w", "mlp/~/linear_1.w"]
    check_dropout_and_training(tower)


@pytest.mark.parametrize("adapter", [from_nnx, from_equinox, lambda model: from_linen(model, {})])
def test_other_models_are_refused(adapter: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a|module must be a.*got Linear"):
        adapter(torch.nn.Linear(1, 1))
