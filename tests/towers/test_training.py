"""Fine-tuning of towers: recomputed activations, accumulated gradients, averages and unfreezing in a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recis_hybrid.metrics import MSE
from recis_hybrid.pipelines import EMA, Evaluate, TorchStep, Train, Trainer
from recis_hybrid.towers import HfTower, hf_tower, param_groups, select
from tests.support.near import assert_near
from tests.support.pretrained import Regression, model_of

pytestmark = [pytest.mark.jax, pytest.mark.usefixtures("compiled_fast")]
pytest.importorskip("jax")
transformers = pytest.importorskip("transformers")

FRAMEWORKS: list[Any] = ["torch", "jax"]
FIELDS = {
    "vocab_size": 13,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
# Two layers of sums.
ALLOWED = 2048


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    model_of(transformers.BertConfig(**FIELDS, max_position_embeddings=12)).save_pretrained(path)
    return path


def tower_of(base: Path, framework: Any, rows: int, **options: Any) -> HfTower:
    return hf_tower(base, framework, classes={"batch": [rows], "length": [6]}, **options)


def without_dropout(tower: HfTower) -> HfTower:
    """Return the tower in evaluation mode for ever, in which gradients are those of train mode without dropout."""
    tower.train = lambda mode=True: tower  # type: ignore[method-assign,assignment]
    return tower


def rows_of(number: int, rows: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [
        {"ids": torch.randint(1, 13, (rows, 6), generator=draw), "label": torch.randn(rows, generator=draw)}
        for _ in range(number)
    ]


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients, except of the biases of keys, which are rounding errors, as softmax ignores them."""
    named = module.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None and not name.endswith("key.bias")}


def saved_bytes_and_gradients(tower: HfTower) -> tuple[int, dict[str, Tensor]]:
    tower.train()
    found: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in tower.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = tower(rows_of(1, 8)[0]["ids"])
    output.square().sum().backward()
    return sum(found.values()), gradients_of(tower)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_recomputed_activations_take_less_memory_and_give_the_same_gradients(base: Path, framework: Any) -> None:
    plain, expected = saved_bytes_and_gradients(tower_of(base, framework, 8, pool="mean"))
    less, gradients = saved_bytes_and_gradients(tower_of(base, framework, 8, pool="mean", recompute=True))
    assert less < plain / 3
    assert_near(gradients, expected, ALLOWED)  # with the same dropout


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_accumulated_gradients_are_those_of_the_whole_batch(base: Path, framework: Any) -> None:
    halves = rows_of(2, 4)
    whole = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    found = []
    for batches, rows in ((halves, 4), ([whole], 8)):
        model = Regression(without_dropout(tower_of(base, framework, rows, pool="cls")))
        step = TorchStep(model, nn.functional.mse_loss, [torch.optim.SGD(model.parameters(), lr=0.0)])
        step(*batches)
        found.append(gradients_of(model))
    assert_near(found[0], found[1], ALLOWED)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_trainer_unfreezes_layers_with_their_learning_rates(base: Path, framework: Any) -> None:
    model = Regression(tower_of(base, framework, 4, pool="mean", freeze=True))
    groups = param_groups(model, {"tower.*": {"lr": 0.01}}, layer_decay=0.5)
    assert [group.get("lr") for group in groups] == [0.01 * 0.5**height for height in (3, 2, 1, 0)] + [None]
    top = select(model, "tower.*.layer.1.*")
    step = TorchStep(model, nn.functional.mse_loss, [torch.optim.SGD(groups, lr=0.1)])
    ema = EMA(model, 0.5)
    trainer = Trainer(step, rows_of(2, 4), rows_of(1, 4), metrics={"mse": MSE()}, callbacks=[ema])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def changed() -> set[str]:
        return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}

    head = {"head.weight", "head.bias"}
    trainer.fit([Train()])
    assert changed() == head == set(ema.averages)
    trainer.fit([Train(unfreeze=list(top.values())), Evaluate(), Evaluate(name="ema", within=ema.averaged)])
    # The softmax does not depend on the bias of the keys.
    assert head | set(top) - changed() <= head | {name for name in top if name.endswith("key.bias")}
    assert changed() <= head | set(top)
    assert set(ema.averages) == head | set(top)
    assert trainer.figures["ema"] != trainer.figures["eval"]
