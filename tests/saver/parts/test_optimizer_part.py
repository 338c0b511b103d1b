from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from recis_hybrid.saver import CheckpointError, CheckpointMismatch, CorruptCheckpoint, Saver
from tests.saver.fakes import edit_manifest

Build = Callable[[Iterable[Any]], Optimizer]


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def train(net: nn.Module, optimizer: Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 3, generator=generator)).square().mean().backward()
        optimizer.step()


def assert_same(a: Any, b: Any) -> None:
    """Assert equal types, and bitwise equal tensors."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


BUILDS: dict[str, Build] = {
    "adam": lambda p: Adam(p, lr=0.01, betas=(0.8, 0.95)),
    "amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=1 / 3),
    "adagrad": lambda p: Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, centered=True),
    "tensor lr": lambda p: Adam(p, lr=torch.tensor(0.01)),
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", BUILDS)
def test_an_optimizer_is_restored_bit_for_bit(tmp_path: Path, name: str, steps: int) -> None:
    net, live = model(), model(1)
    optimizer, restored = BUILDS[name](net.parameters()), BUILDS[name](live.parameters())
    train(net, optimizer, steps)
    train(live, restored, 2)  # this state is replaced
    for group in restored.param_groups:
        group["lr"] = 77.0
    Saver(tmp_path).save(1, {"net": net, "optimizer": optimizer})
    expected = optimizer.state_dict()
    Saver(tmp_path).load({"net": live, "optimizer": restored})
    assert_same(restored.state_dict(), expected)
    assert {id(p) for p in restored.state} <= {id(p) for p in live.parameters()}
    train(net, optimizer, 4)
    train(live, restored, 4)
    assert_same(live.state_dict(), net.state_dict())
    assert_same(restored.state_dict(), optimizer.state_dict())


def test_files_use_the_names_of_torch(tmp_path: Path) -> None:
    net = model()
    optimizer = Adam(net.parameters(), lr=torch.tensor(0.01))
    train(net, optimizer, 2)
    directory = Saver(tmp_path).save(1, {"optimizer": optimizer})
    tensors = load_file(directory / "dense" / "optimizer.safetensors")
    state = {f"state.{i}.{key}" for i in range(4) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(tensors) == state | {"groups.0.lr"}
    assert tensors["state.3.step"].item() == 2


def groups_of(net: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": net[0].parameters(), "lr": 0.5}, {"params": net[2].parameters(), "weight_decay": 0.1}]


def test_groups_keep_their_own_values(tmp_path: Path) -> None:
    net, live = model(), model(1)
    optimizer, restored = SGD(groups_of(net), momentum=0.9), SGD(groups_of(live), momentum=0.9)
    optimizer.param_groups[1]["lr"] = 0.25
    optimizer.param_groups[0]["initial_lr"] = 0.5  # set by schedulers
    train(net, optimizer, 2)
    Saver(tmp_path).save(1, {"net": net, "optimizer": optimizer})
    Saver(tmp_path).load({"net": live, "optimizer": restored})
    assert [group["lr"] for group in restored.param_groups] == [0.5, 0.25]
    assert_same(restored.state_dict(), optimizer.state_dict())


class Tower(nn.Module):
    """Layers in the given order, all of the same shape."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(3, 3) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def state_of(net: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {name: optimizer.state[p] for name, p in net.named_parameters() if p in optimizer.state}


def saved_tower(root: Path, make: Build = Adam) -> tuple[Tower, Optimizer]:  # type: ignore[assignment]
    net = Tower("a", "b", "c")
    optimizer = make(net.parameters())
    train(net, optimizer, 3)
    Saver(root).save(1, {"model": net, "dense": optimizer})
    return net, optimizer


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel])
def test_state_follows_the_names_of_parameters(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    net, optimizer = saved_tower(tmp_path)
    other = Tower("c", "a", "b")
    groups = [{"params": other.layers["c"].parameters(), "lr": 0.7}, {"params": []}]
    restored = Adam(
        [*groups, {"params": [*other.layers["a"].parameters(), *other.layers["b"].parameters()], "lr": 3.0}]
    )
    restored.param_groups[1]["lr"] = 0.9
    Saver(tmp_path).load({"model": wrap(other), "dense": restored})
    assert_same(state_of(other, restored), state_of(net, optimizer))
    # The hyperparameters are those of the parameters' group in the checkpoint; a group without parameters has none.
    assert [group["lr"] for group in restored.param_groups] == [1e-3, 0.9, 1e-3]


def test_a_new_layer_loses_no_moments_of_the_others(tmp_path: Path) -> None:
    net, optimizer = saved_tower(tmp_path)
    other = Tower("new", "c", "a")
    restored = Adam(other.parameters(), lr=0.5)
    train(other, restored, 1)
    fresh = {name: dict(state) for name, state in state_of(other, restored).items()}
    saver = Saver(tmp_path)
    with pytest.raises(
        CheckpointMismatch,
        match=r"'dense' does not fit .* parameter 'model.layers.b.bias' is in the checkpoint only \(float32 \[3\]\); .*"
        r"parameter 'model.layers.new.bias' is in the live object only \(float32 \[3\]\)",
    ):
        saver.load({"dense": restored, "model": other})
    with pytest.raises(CheckpointMismatch, match=r"dense: model.layers.b.* is in the checkpoint only"):
        saver.load_some({"dense": restored, "model": other})
    loaded = saver.load_some({"dense": restored, "model": other}, strict=False)
    assert set(loaded.loaded) == {
        f"{part}layers.{layer}.{kind}"
        for part in ("model: ", "dense: model.")
        for layer in "ac"
        for kind in ("weight", "bias")
    }
    assert "dense: model.layers.new.weight" in loaded.missing
    assert "dense: model.layers.b.weight" in loaded.unused
    found, expected = state_of(other, restored), state_of(net, optimizer)
    for name, state in found.items():
        assert_same(state, fresh[name] if ".new." in name else expected[name])
    assert restored.param_groups[0]["lr"] == 0.5  # hyperparameters stay
    train(other, restored, 1)
    assert {float(state["step"]) for state in state_of(other, restored).values()} == {2.0, 4.0}


def test_state_is_loaded_under_other_names_and_by_pattern(tmp_path: Path) -> None:
    net, optimizer = saved_tower(tmp_path)
    other = Tower("x", "b")
    restored = Adam(other.parameters())
    parts = {"dense": restored, "model": other}
    Saver(tmp_path).load_some(parts, only="layers.a.*", rename={"layers.a.*": "layers.x.*"})
    expected = {name.replace(".a.", ".x."): s for name, s in state_of(net, optimizer).items() if ".a." in name}
    assert_same(state_of(other, restored), expected)
    wide = Tower("a", "b", "c")
    wide.layers["b"] = nn.Linear(3, 3).double()
    loaded = Saver(tmp_path).load_some({"dense": Adam(wide.parameters()), "model": wide}, strict=False)
    assert "dense: model.layers.b.bias: checkpoint float32 [3], live object float64 [3]" in loaded.unfit
    for strict in (True, False):
        sgd = SGD(other.parameters(), momentum=0.9)
        if strict:
            with pytest.raises(CheckpointMismatch, match="dense: optimizer: checkpoint Adam, live object SGD"):
                Saver(tmp_path).load_some({"dense": sgd, "model": other}, only="layers.b.*")
        else:
            loaded = Saver(tmp_path).load_some({"dense": sgd, "model": other}, only="layers.b.*", strict=False)
            assert loaded.unfit == ["dense: optimizer: checkpoint Adam, live object SGD"]
        assert not sgd.state


def test_parameters_of_several_modules_are_told_apart(tmp_path: Path) -> None:
    net, loss = Tower("a"), Tower("a")
    optimizer = Adam([*net.parameters(), *loss.parameters()])
    train(nn.Sequential(net, loss), optimizer, 2)
    saver = Saver(tmp_path)
    saver.save(1, {"model": net, "loss": loss, "dense": optimizer})
    other, another = Tower("a"), Tower("a")
    restored = Adam([*another.parameters(), *other.parameters()])
    saver.load({"model": other, "loss": another, "dense": restored})
    assert_same(state_of(other, restored), state_of(net, optimizer))
    assert_same(state_of(another, restored), state_of(loss, optimizer))
    restored = Adam([*another.parameters(), *other.parameters()])
    saver.load_some({"model": other, "loss": another, "dense": restored})
    assert_same(state_of(another, restored), state_of(loss, optimizer))


def test_groups_saved_with_different_hyperparameters_are_not_merged(tmp_path: Path) -> None:
    saved_tower(tmp_path, lambda p: Adam([{"params": [each], "lr": 0.1 + n} for n, each in enumerate(p)]))
    other = Tower("a", "b", "c")
    with pytest.raises(
        CheckpointMismatch,
        match=r"'model.layers.a.weight' and 'model.layers.a.bias' share a parameter group .* differ in \['lr'\] in",
    ):
        Saver(tmp_path).load({"model": other, "dense": Adam(other.parameters())})


def test_a_checkpoint_without_names_is_loaded_by_order(tmp_path: Path) -> None:
    net, optimizer = saved_tower(tmp_path)
    edit_manifest(tmp_path / "step_000001", lambda d: d["parts"]["dense"]["meta"].pop("names"))
    other = Tower("c", "a", "b")
    restored = Adam(other.parameters())
    Saver(tmp_path).load({"model": other, "dense": restored})
    assert_same(list(restored.state.values()), list(optimizer.state.values()))
    with pytest.raises(
        CheckpointError, match="part 'dense': the parameters of the optimizer have no names, because it"
    ):
        Saver(tmp_path).load_some({"model": other, "dense": restored})
    with pytest.raises(CheckpointMismatch, match="group 0: checkpoint 6 parameters, live object 2"):
        Saver(tmp_path).load({"model": other, "dense": Adam(other.layers["a"].parameters())})


@pytest.mark.parametrize(
    "names", [3, [], [[["model", "a"]]], [[["model", "layers.a.bias"]] * 6], [[["model"]] * 6], [[["model", 1]] * 6]]
)
def test_forged_names_are_refused(tmp_path: Path, names: Any) -> None:
    saved_tower(tmp_path)
    edit_manifest(tmp_path / "step_000001", lambda d: d["parts"]["dense"]["meta"].update(names=names))
    other = Tower("a", "b", "c")
    for load in (Saver(tmp_path).load, Saver(tmp_path).load_some):
        with pytest.raises(CorruptCheckpoint, match="part 'dense': meta.names must have a part and a name for each"):
            load({"model": other, "dense": Adam(other.parameters())})


def test_state_wider_than_its_parameter_stays_wide(tmp_path: Path) -> None:
    # torch's load_state_dict casts such state to the parameter's dtype.
    nets = [nn.Linear(3, 2).bfloat16() for _ in range(2)]
    optimizers = [Adam(net.parameters()) for net in nets]
    for parameter in nets[0].parameters():
        moments = {key: torch.full(parameter.shape, 1 / 3) for key in ("exp_avg", "exp_avg_sq")}
        optimizers[0].state[parameter] = {"step": torch.tensor(3.0), **moments}
    Saver(tmp_path).save(1, {"optimizer": optimizers[0]})
    Saver(tmp_path).load({"optimizer": optimizers[1]})
    assert optimizers[1].state[nets[1].weight]["exp_avg"].dtype == torch.float32
    assert_same(optimizers[1].state_dict(), optimizers[0].state_dict())


@pytest.mark.parametrize(
    ("live", "message"),
    [
        (lambda net: SGD(net.parameters(), lr=0.1), "optimizer: checkpoint Adam, live object SGD"),
        (lambda net: Adam(groups_of(net)), "parameter groups: checkpoint 1, live object 2"),
        (lambda net: Adam(net[0].parameters()), "group 0: checkpoint 4 parameters, live object 2"),
        (
            lambda net: Adam(nn.Sequential(nn.Linear(3, 5), nn.Linear(4, 1)).parameters()),
            r"group 0, parameter 0: checkpoint float32 \[4, 3\], live object float32 \[5, 3\]",
        ),
        (
            lambda net: Adam(net.double().parameters()),
            r"group 0, parameter 0: checkpoint float32 \[4, 3\], live object float64 \[4, 3\]",
        ),
    ],
)
def test_another_optimizer_is_refused(tmp_path: Path, live: Callable[[nn.Sequential], Optimizer], message: str) -> None:
    net = model()
    optimizer = Adam(net.parameters())
    train(net, optimizer, 2)
    Saver(tmp_path).save(1, {"optimizer": optimizer})
    other = live(model(1))
    before = other.state_dict()
    with pytest.raises(CheckpointMismatch, match=f"part 'optimizer' does not fit the live object: .*{message}"):
        Saver(tmp_path).load({"optimizer": other})
    assert_same(other.state_dict(), before)


def test_state_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    net = model()
    lbfgs = LBFGS(net.parameters())

    def closure() -> torch.Tensor:
        lbfgs.zero_grad()
        loss: torch.Tensor = net(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    lbfgs.step(closure)
    with pytest.raises(CheckpointError, match=r"part 'optimizer', state of parameter 0 must be JSON"):
        Saver(tmp_path).save(1, {"optimizer": lbfgs})
    adam = Adam(net.parameters())
    adam.param_groups[0]["limit"] = math.inf
    with pytest.raises(CheckpointError, match=r"part 'optimizer', parameter group 0 must be JSON"):
        Saver(tmp_path).save(1, {"optimizer": adam})
    adam = Adam(net.parameters())
    adam.state["all"] = {"x": 1}  # type: ignore[index]
    with pytest.raises(CheckpointError, match="must belong to parameters, got the key 'all'"):
        Saver(tmp_path).save(1, {"optimizer": adam})


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.pop("state"),
        lambda meta: meta.pop("groups"),
        lambda meta: meta["groups"].append({}),
        lambda meta: meta["groups"].clear(),
        lambda meta: meta.update(groups=[1]),
        lambda meta: meta["state"].pop("0"),
        lambda meta: meta["state"].update({"4": {}}),
        lambda meta: meta["state"].update({"-1": {}}),
        lambda meta: meta["state"].update({"x": {}}),
        lambda meta: meta["state"].update({"0": 3}),
        lambda meta: meta.update(state=[]),
        lambda meta: meta.pop("parameters"),
        lambda meta: meta.update(parameters=[3]),
    ],
)
def test_a_forged_part_is_refused_before_any_change(tmp_path: Path, change: Callable[[Any], object]) -> None:
    net = model()
    optimizer = Adam(net.parameters())
    train(net, optimizer, 2)
    directory = Saver(tmp_path).save(1, {"optimizer": optimizer, "net": net})
    edit_manifest(directory, lambda d: change(d["parts"]["optimizer"]["meta"]))
    live = model(1)
    before = live[0].weight.detach().clone()
    with pytest.raises(
        CorruptCheckpoint,
        match=r"part 'optimizer': (groups, state and tensors|meta.parameters must) .* There is no other step",
    ):
        Saver(tmp_path).load({"net": live, "optimizer": Adam(live.parameters())})
    assert torch.equal(live[0].weight, before)
