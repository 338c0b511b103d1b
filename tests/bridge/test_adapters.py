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
    """In eval mode it is deterministic, in train mode the generator decides, and an optimizer makes it better."""
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
    with pytest.raises(TypeError, match=r"takes a.*got Linear"):
        adapter(torch.nn.Linear(1, 1))
