"""TorchStep(check_gradients=True): errors of gradients that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, dense_parameters
from recis_hybrid.pipelines import NonFiniteGradientError, NonFiniteLossError, TorchStep, Train, Trainer
from recis_hybrid.ragged import Batch, RaggedTensor, batch_to
from tests.support.devices import on_devices
from tests.support.small import assert_same, bce, make_batches, make_step, state_of

LIST_IDS = RaggedTensor(torch.tensor([11, 12, 13, -1, 2**63 - 1, 12]), torch.tensor([0, 2, 2, 6]))


def faulty(values: Tensor, row: int, factor: float) -> Tensor:
    """Return values with another gradient of one row; the forward pass is unchanged."""
    factors = torch.ones_like(values)
    factors[row] = factor
    return values.detach() + (values - values.detach()) * factors


@pytest.mark.parametrize(
    ("config", "column", "row", "expected"),
    [
        ({}, torch.tensor([7, 8, 7]), 1, "(1 of 3 vectors, ids [8])"),
        ({"table": "shared"}, torch.tensor([[7, 8], [7, 9], [5, 5]]), 1, "(1 of 3 vectors, ids [7, 9])"),
        ({"combiner": "mean"}, LIST_IDS, 2, f"(1 of 3 vectors, ids [13, -1, {2**63 - 1}, 12])"),
        ({"combiner": "max", "max_length": 2}, LIST_IDS, 2, "(1 of 3 vectors, ids [13, -1])"),
        ({"combiner": None}, LIST_IDS, 3, "(1 of 6 vectors, ids [-1])"),
        ({"combiner": "tile", "max_length": 3}, LIST_IDS, 0, "(3 of 9 vectors, ids [11, 12])"),
        ({}, torch.arange(30).view(3, 10), 2, "(1 of 3 vectors, ids [20, 21, 22, 23, 24] and 5 more)"),
    ],
)
@on_devices
def test_the_ids_of_a_feature_are_named(
    config: dict[str, Any], column: Any, row: int, expected: str, device: str
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            configs = {"other": EmbeddingConfig(dim=2), "list": EmbeddingConfig(dim=4, **config)}
            self.engine = EmbeddingEngine(configs, optimizer=optim.SGD, device=device)

        def forward(self, batch: Batch) -> Tensor:
            vectors = self.engine(batch)
            return faulty(vectors["list"], row, math.nan).sum() + vectors["other"].sum()

    net = Net()
    step = TorchStep(net, lambda total: total, [optim.SGD(net.parameters(), lr=0.1)], label=None, check_gradients=True)
    batch = batch_to({"other": torch.tensor([1, 2, 3]), "list": column}, device)
    table = config.get("table", "list")
    with pytest.raises(NonFiniteGradientError) as error:
        step(batch)
    assert f"nothing was updated: feature 'list' of the table {table!r} {expected}. Batch" in str(error.value)
    assert "'other'" not in str(error.value)


def test_nothing_changes_and_training_continues() -> None:
    fault = {"on": False}

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return bce(faulty(logits, 3, math.inf) if fault["on"] else logits, labels)

    step, twin = make_step(loss, check_gradients=True), make_step()
    good, bad = make_batches(3), make_batches(1, seed=9)[0]
    for number, batch in enumerate(good):
        torch.manual_seed(number)
        twin(batch)
        torch.manual_seed(number)
        step(batch)
        before = state_of(twin)
        fault["on"] = True
        assert isinstance(bad["id"], Tensor)
        # Batch norm spreads the fault to all rows.
        with pytest.raises(NonFiniteGradientError, match=rf"step {number + 1 + 1} are not finite, .* parameter 'tower"):
            step({**bad, "id": good[0]["id"]})
        fault["on"] = False
        after = state_of(step)
        trained = [name for name in before if "running" not in name and "num_batches" not in name]
        assert_same(
            {n: after[n] for n in trained if "seen" not in n and "freq" not in n},
            {n: before[n] for n in trained if "seen" not in n and "freq" not in n},
        )
        for buffer, value in twin.model.named_buffers():  # which the forward pass has changed
            dict(step.model.named_buffers())[buffer].copy_(value)


def test_a_fault_of_the_tower_names_the_parameter() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 1), nn.Parameter(torch.zeros(3))

        def forward(self, vectors: Tensor) -> Tensor:
            return self.linear(vectors) + self.scale[:1].sqrt()

    step = make_step(tower=Tower(), check_gradients=True)
    # Backward of the root divides by zero.
    with pytest.raises(NonFiniteGradientError) as error:
        step(make_batches(1)[0])
    assert "nothing was updated: parameter 'tower.scale' (1 of 3 elements). Batch and rows are finite; " in str(
        error.value
    )


def test_the_cause_is_a_row_or_a_column_if_one_is_not_finite() -> None:
    batch = make_batches(1)[0]
    step = make_step(check_gradients=True)
    step(batch)
    table = step.engines[0].tables[0]
    table.store.blocks.write(table.rows(0, torch.tensor([7])), "embedding", torch.full((1, 4), math.nan))
    step.model.tower[0] = nn.Identity()  # type: ignore[union-attr, operator, index]
    step = TorchStep(
        step.model,
        bce,
        [torch.optim.SGD(dense_parameters(step.model)), *step.optimizers.values()][::2],
        check_gradients=True,
    )
    with pytest.raises(NonFiniteGradientError, match=r"Rows were not finite before .*: feature 'id' .* ids \[7\]\)"):
        step(batch)
    labels = torch.full((64,), math.nan)
    with pytest.raises(
        NonFiniteGradientError, match=r"loss of nan, .*columns 'label' \(64 of 64 values\) of the batch"
    ):
        make_step(check_gradients=True)({**batch, "label": labels})
    # The check comes before that of the loss.
    with pytest.raises(NonFiniteGradientError):
        Trainer(make_step(check_gradients=True), [{**batch, "label": labels}]).fit([Train()])
    with pytest.raises(NonFiniteLossError, match=r"columns 'label'"):
        Trainer(make_step(), [{**batch, "label": labels}]).fit([Train()])


def test_overflows_of_scaled_gradients_are_no_error() -> None:
    batch = make_batches(1)[0]
    options: dict[str, Any] = {"precision": "float16", "loss_scale": 4.0, "check_gradients": True}
    step = make_step(lambda logits, labels: bce(logits, labels) * math.inf, **options)
    step(batch)  # skipped, and the scale becomes 2
    step(batch)
    with pytest.raises(NonFiniteGradientError):
        step(batch)
