"""OptaxOptimizer, compared with the same transformation in plain JAX and with torch's optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.near import OF_ADAM, assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower, OptaxOptimizer, copies  # noqa: E402
from recis_hybrid.saver import CheckpointMismatch, Saver  # noqa: E402

RANDOM = np.random.default_rng(0)
PARAMS = {
    "layers": [
        {"w": RANDOM.normal(size=(5, 8)).astype(np.float32), "b": np.zeros(8, np.float32)},
        {"w": RANDOM.normal(size=(8, 1)).astype(np.float32), "b": np.zeros(1, np.float32)},
    ]
}
X = RANDOM.normal(size=(20, 16, 5)).astype(np.float32)


def mlp(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["layers"][0]["w"] + params["layers"][0]["b"])
    return hidden @ params["layers"][1]["w"] + params["layers"][1]["b"]


def train(tower: JaxTower, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        optimizer.zero_grad()
        tower(torch.from_numpy(X[number]).clone()).square().mean().backward()
        optimizer.step()


def weights(tower: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in tower.named_parameters()}


TRANSFORMATIONS = {
    "adamw": optax.adamw(optax.cosine_decay_schedule(1e-2, 20), weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "sgd": optax.sgd(0.1),
    "by name": optax.multi_transform(
        {"w": optax.adam(1e-2), "b": optax.set_to_zero()},
        lambda params: {name: name.rpartition(".")[2] for name in params},
    ),
}


@pytest.mark.parametrize("kind", TRANSFORMATIONS)
def test_steps_equal_those_of_the_transformation_in_jax(kind: str) -> None:
    transformation = TRANSFORMATIONS[kind]
    tower = JaxTower(mlp, PARAMS)
    before = copies()
    optimizer = OptaxOptimizer(tower.named_parameters(), transformation)
    train(tower, optimizer, range(20))
    assert copies() == before  # neither parameters nor gradients nor state are copied

    names = [name for name, _ in tower.named_parameters()]
    _, tree = jax.tree.flatten(PARAMS)
    params = {name: jnp.array(leaf) for name, leaf in zip(names, jax.tree.leaves(PARAMS), strict=True)}
    state = transformation.init(params)

    @jax.jit
    def step(params: Any, state: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.mean(jnp.square(mlp(jax.tree.unflatten(tree, [params[name] for name in names]), x)))

        changes, state = transformation.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, changes), state

    for x in X:
        params, state = step(params, state, x)
    for name, weight in weights(tower).items():
        assert_near(weight, params[name], where=name)


def test_a_torch_module_trains_like_with_a_torch_optimizer() -> None:
    ours, theirs = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
    theirs.load_state_dict(ours.state_dict())
    steps = [
        OptaxOptimizer(ours.named_parameters(), optax.adam(1e-2)),
        torch.optim.Adam(theirs.parameters(), lr=1e-2),
    ]
    for _ in range(10):
        x = torch.randn(4, 16)
        for module, optimizer in zip((ours, theirs), steps, strict=True):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert_near(weights(ours), weights(theirs), OF_ADAM)


def test_parameters_move_into_jax_memory_and_stay_the_same_objects() -> None:
    tower = JaxTower(mlp, PARAMS)
    parameters = list(tower.parameters())
    # Held to the end, so that jax cannot be given their addresses.
    before = [parameter.detach() for parameter in parameters]
    optimizer = OptaxOptimizer(tower.named_parameters(), optax.sgd(0.1))
    train(tower, optimizer, range(2))
    assert all(a is b for a, b in zip(parameters, tower.parameters(), strict=True))
    assert all(p.data_ptr() != old.data_ptr() for p, old in zip(parameters, before, strict=True))
    assert all(p.requires_grad and p.is_leaf for p in parameters)


def test_missing_gradients_are_zero_and_a_step_without_any_does_nothing() -> None:
    tower = JaxTower(mlp, PARAMS)
    optimizer = OptaxOptimizer(tower.named_parameters(), optax.adam(0.1))
    before = weights(tower)
    optimizer.step()
    torch.testing.assert_close(weights(tower), before, rtol=0, atol=0)
    assert int(optimizer.state_dict()["state"][0]["[0].count"]) == 0
    first = next(tower.parameters())
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert int(optimizer.state_dict()["state"][0]["[0].count"]) == 1
    changed = [name for name, weight in weights(tower).items() if not torch.equal(weight, before[name])]
    assert len(changed) == 1


def test_frozen_parameters_stay_as_they_are() -> None:
    tower = JaxTower(mlp, PARAMS)
    optimizer = OptaxOptimizer(tower.named_parameters(), optax.adamw(0.1, weight_decay=0.5))
    train(tower, optimizer, range(1))
    frozen = tower.get_submodule("layers.0")
    before, pointers = weights(tower), [p.data_ptr() for p in frozen.parameters()]
    frozen.requires_grad_(False)
    train(tower, optimizer, range(1, 3))
    changed = [name for name, weight in weights(tower).items() if not torch.equal(weight, before[name])]
    assert changed == ["layers.1.b", "layers.1.w"]
    assert [p.data_ptr() for p in frozen.parameters()] == pointers
    tower.requires_grad_(True)
    train(tower, optimizer, range(3, 4))
    assert not any(torch.equal(weight, before[name]) for name, weight in weights(tower).items())


def test_gradients_that_jax_cannot_use_are_copied_and_counted() -> None:
    tower = JaxTower(lambda params, x: x * params["w"], {"w": np.ones((4, 6), np.float32)})
    (w,) = tower.parameters()
    w.grad = torch.arange(24.0).view(6, 4).t()
    before = copies()
    OptaxOptimizer(tower.named_parameters(), optax.sgd(1.0)).step()
    assert copies() == before + 1
    assert torch.equal(w.detach(), 1 - torch.arange(24.0).view(6, 4).t())


def test_a_step_between_forward_and_backward_makes_backward_raise() -> None:
    tower = JaxTower(mlp, PARAMS)
    optimizer = OptaxOptimizer(tower.named_parameters(), optax.sgd(0.1))
    x = torch.from_numpy(X[0]).clone()
    late = tower(x).sum()
    tower(x).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_training_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    whole = JaxTower(mlp, PARAMS)
    train(whole, OptaxOptimizer(whole.named_parameters(), TRANSFORMATIONS["adamw"]), range(20))

    first = JaxTower(mlp, PARAMS)
    optimizer = OptaxOptimizer(first.named_parameters(), TRANSFORMATIONS["adamw"])
    train(first, optimizer, range(12))
    saver = Saver(tmp_path)
    saver.save(12, {"tower": first, "optimizer": optimizer})
    train(first, optimizer, range(12, 14))  # does not change the saved copy

    second = JaxTower(mlp, PARAMS)
    again = OptaxOptimizer(second.named_parameters(), TRANSFORMATIONS["adamw"])
    saver.load({"tower": second, "optimizer": again})
    train(second, again, range(12, 20))
    torch.testing.assert_close(weights(second), weights(whole), rtol=0, atol=0)

    other = JaxTower(lambda params, x: x * params["w"], {"w": np.ones(3, np.float32)})
    with pytest.raises(CheckpointMismatch):
        saver.load({"optimizer": OptaxOptimizer(other.named_parameters(), optax.sgd(0.1))})
    with pytest.raises(ValueError, match="another transformation or to other parameters"):
        again.load_state_dict(OptaxOptimizer(second.named_parameters(), optax.adagrad(0.1)).state_dict())


class Layers(torch.nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({name: torch.nn.Linear(16, 16) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def adam_state(optimizer: OptaxOptimizer, names: list[str]) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{name}: {key}": value for i, name in enumerate(names) for key, value in state[i].items()}


def test_state_follows_the_names_of_parameters(tmp_path: Path) -> None:
    transformation = optax.multi_transform(
        {"bias": optax.sgd(0.1, momentum=0.9), "weight": optax.adam(0.1)},
        lambda params: {name: name.rpartition(".")[2] for name in params},
    )

    def make(*names: str) -> tuple[Layers, OptaxOptimizer]:
        module = Layers(*names)
        return module, OptaxOptimizer(module.named_parameters(), transformation)

    first, optimizer = make("a", "b", "c")
    for _ in range(3):
        optimizer.zero_grad()
        first(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    saver = Saver(tmp_path)
    saver.save(1, {"model": first, "optimizer": optimizer})
    expected = adam_state(optimizer, [name for name, _ in first.named_parameters()])
    assert all(any(name in key for key in expected) for name in (".mu[*]", ".nu[*]", ".trace[*]"))
    second, reordered = make("c", "a", "b")
    saver.load({"model": second, "optimizer": reordered})
    torch.testing.assert_close(
        adam_state(reordered, [name for name, _ in second.named_parameters()]), expected, rtol=0, atol=0
    )
    third, fewer = make("c", "new", "a")
    with pytest.raises(CheckpointMismatch, match="parameter 'model.layers.b.bias' is in the checkpoint only"):
        saver.load({"optimizer": fewer, "model": third})
    saver.load_some({"model": third, "optimizer": fewer}, strict=False)
    names = [name for name, _ in third.named_parameters()]
    found = adam_state(fewer, names)
    for key, value in found.items():
        if ".new." not in key or "[*]" not in key:
            assert torch.equal(value, expected[key.replace(".new.", ".a.")]), key
        else:
            assert not value.any(), key


def test_state_of_earlier_versions_is_loaded_by_order() -> None:
    tower, other = JaxTower(mlp, PARAMS), JaxTower(mlp, PARAMS)
    optimizer, again = (OptaxOptimizer(each.named_parameters(), optax.adam(0.1)) for each in (tower, other))
    train(tower, optimizer, range(2))
    leaves = [torch.from_numpy(np.array(leaf)) for leaf in jax.tree.leaves(optimizer._state)]
    again.load_state_dict({"state": {0: {f"leaf{n}": leaf for n, leaf in enumerate(leaves)}}, "param_groups": []})
    torch.testing.assert_close(again.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_a_transformation_without_state() -> None:
    tower = JaxTower(mlp, PARAMS)
    optimizer = OptaxOptimizer(tower.named_parameters(), optax.sgd(0.1))
    assert optimizer.state_dict()["state"] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    train(tower, optimizer, range(1))


def test_groups_and_schedulers_of_torch_are_refused() -> None:
    tower = JaxTower(mlp, PARAMS)
    optimizer = OptaxOptimizer(tower.named_parameters(), optax.sgd(0.1))
    with pytest.raises(NotImplementedError, match="add_param_group is not supported.*optax.multi_transform"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 1
    for make in (
        lambda: torch.optim.lr_scheduler.StepLR(optimizer, 10),
        lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5),
        lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ):
        with pytest.raises(KeyError, match=r"'lr'.*use an optax schedule"):
            make()


def test_steps_in_inference_mode_are_the_same() -> None:
    found = []
    for within in (False, True):
        tower = JaxTower(mlp, PARAMS)
        with torch.inference_mode(within):
            optimizer = OptaxOptimizer(tower.named_parameters(), optax.adam(0.1))
        for number in range(3):
            optimizer.zero_grad()
            tower(torch.from_numpy(X[number]).clone()).square().mean().backward()
            with torch.inference_mode(within), torch.no_grad():
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
        found.append(weights(tower))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_bad_input() -> None:
    tower = JaxTower(mlp, PARAMS)
    with pytest.raises(TypeError, match=r"\(name, parameter\) pairs, got Parameter; pass module.named_parameters\(\)"):
        OptaxOptimizer(tower.parameters(), optax.sgd(0.1))
    with pytest.raises(ValueError, match="distinct names, got \\[\\]"):
        OptaxOptimizer([], optax.sgd(0.1))
    named = list(tower.named_parameters())
    with pytest.raises(ValueError, match="distinct names"):
        OptaxOptimizer([*named, named[0]], optax.sgd(0.1))
    with pytest.raises(ValueError, match="share needs the ranks of a group; also pass group"):
        OptaxOptimizer(named, optax.sgd(0.1), share=lambda: 0.5)
    odd = torch.nn.Parameter(torch.zeros(33)[1:])
    with pytest.raises(ValueError, match="OptaxOptimizer: parameter 'odd'"):
        OptaxOptimizer([("odd", odd)], optax.sgd(0.1))
