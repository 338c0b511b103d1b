"""Keywords of a tower's function: keys, modes, state, static values; and remat."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.near import assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower  # noqa: E402


def ones(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def dropped(params: Any, x: Any, *, key: Any) -> Any:
    return x * params["w"] * (1 if key is None else jax.random.bernoulli(key, 0.5, x.shape))


def test_keys_are_drawn_from_torchs_generator_in_train_mode_only() -> None:
    tower = JaxTower(dropped, {"w": ones(256)})
    x = torch.ones(256)
    torch.manual_seed(3)
    first, second = tower(x), tower(x)
    torch.manual_seed(3)
    assert torch.equal(tower(x), first)
    assert not torch.equal(first, second)
    assert 64 < int(first.sum()) < 192
    assert torch.equal(tower.eval()(x), x)
    assert tower.compilations == 2


def test_activation_checkpointing_draws_the_same_key_again() -> None:
    tower = JaxTower(dropped, {"w": ones(256)})
    x = torch.ones(256, requires_grad=True)
    y = checkpoint(tower, x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the same elements were kept by dropout


def test_state_is_stored_in_train_mode_only() -> None:
    def normed(params: Any, x: Any, *, state: Any, train: bool) -> Any:
        mean = x.mean(0) if train else state["mean"]
        return (x - mean) * params["w"] + state["mean"] ** 2, {"mean": 0.5 * state["mean"] + 0.5 * x.mean(0)}

    tower = JaxTower(normed, {"w": ones(2)}, state={"mean": ones(2)})
    assert [name for name, _ in tower.named_buffers()] == ["mean"]
    assert list(tower.state_dict()) == ["w", "mean"]
    buffer = tower.state_dict()["mean"]
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]], requires_grad=True)
    y = tower(x)
    assert buffer.tolist() == [1.5, 2.5]  # the buffer was updated in place
    y[0, 0].backward()  # the old state, which backward reads, was not
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [0.5, -0.5]
    z = tower.eval()(x)
    assert_near(z.detach(), x.detach() - buffer + buffer**2)
    assert buffer.tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    ("returned", "message"),
    [(lambda x, s: x, r"must return \(outputs, state\)"), (lambda x, s: (x, s[:1]), "must keep its structure")],
)
def test_a_missing_or_incompatible_new_state_is_refused(returned: Any, message: str) -> None:
    tower = JaxTower(lambda params, x, *, state: returned(x, state), {}, state=ones(3), name="ranker")
    with pytest.raises(TypeError, match=message) as caught:
        tower(torch.ones(2))
    assert any("ranker" in note for note in caught.value.__notes__)


def test_static_keywords_trigger_compilations_and_are_distinguished_by_type() -> None:
    tower = JaxTower(lambda params, x, *, power=1: x**power / power, {})
    x = torch.tensor([4.0])
    with torch.no_grad():
        assert [float(tower(x, power=p)) for p in (1, 2, 2, 1.0, 0.5)] == [4, 8, 8, 4, 4]
    assert tower.compilations == 4
    with pytest.raises(TypeError, match="'power' is a Tensor, but keywords are static"):
        tower(x, power=x)
    with pytest.raises(TypeError, match="'power' is a list, which cannot be hashed"):
        tower(x, power=[1])


def deep(params: Any, x: Any) -> Any:
    for w in params:
        x = jnp.tanh(x @ w)
    return x


@pytest.mark.parametrize("remat", [True, jax.checkpoint_policies.dots_with_no_batch_dims_saveable])
def test_remat_saves_less_and_computes_the_same_gradients(remat: Any) -> None:
    weights = [np.random.default_rng(n).normal(size=(8, 8)).astype(np.float32) for n in range(4)]
    plain, tower = JaxTower(deep, weights), JaxTower(deep, weights, remat=remat)
    x = torch.randn(16, 8)
    expected, y = plain(x), tower(x)
    assert len(y.grad_fn.saved_tensors) < len(expected.grad_fn.saved_tensors)
    if remat is True:
        assert len(y.grad_fn.saved_tensors) == 6  # an empty anchor, the weights and x, but no computed tensor
    gradients = torch.autograd.grad(y.square().sum(), list(tower.parameters()))
    for ours, theirs in zip(
        gradients, torch.autograd.grad(expected.square().sum(), list(plain.parameters())), strict=True
    ):
        assert_near(ours, theirs)


def test_torch_func_is_refused() -> None:
    tower = JaxTower(lambda params, x: x * params["w"], {"w": ones(3)}, name="ranker")
    with pytest.raises(RuntimeError, match=r"ranker.*torch.func cannot transform"):
        torch.func.vmap(tower)(torch.ones(2, 3))
