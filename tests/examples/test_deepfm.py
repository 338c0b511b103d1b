from __future__ import annotations

import torch
from torch import Tensor, nn

from examples import deepfm
from recis_hybrid.ragged import Batch
from tests.support.near import assert_near


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({field: nn.Embedding(8, 3) for field in "ab"})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {field: table(batch[field]) for field, table in self.tables.items()}


def test_l2_counts_each_id_of_a_batch_once() -> None:
    torch.manual_seed(0)
    lookup = Lookup()
    model = deepfm.DeepFM(lookup, ["a", "b"], deepfm.make_towers("torch", 6, 0.0, seed=0), l2=0.5)
    batch: Batch = {"a": torch.tensor([1, 1, 1, 7]), "b": torch.tensor([0, 3, 0, 4])}
    model(batch)
    model.penalty.backward()
    for field, ids in (("a", [1, 7]), ("b", [0, 3, 4])):
        weight = lookup.tables[field].weight
        expected = torch.zeros_like(weight)
        expected[ids] = 0.5 * weight.detach()[ids]
        assert isinstance(weight.grad, Tensor)
        assert_near(weight.grad, expected)
    model.eval()
    logits = model(batch)
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert model.loss(logits, labels) == nn.functional.binary_cross_entropy_with_logits(logits, labels)


def test_the_pairs_are_all_dot_products_of_two_fields() -> None:
    torch.manual_seed(0)
    tower = nn.Module()
    tower.forward = lambda parts: torch.zeros(len(parts[0]))  # type: ignore[assignment]
    model = deepfm.DeepFM(Lookup(), ["a", "b"], nn.ModuleList([tower]))
    batch: Batch = {"a": torch.tensor([1, 2]), "b": torch.tensor([3, 4])}
    a, b = model.lookup(batch).values()
    assert_near(model(batch), a[:, 0] + b[:, 0] + (a[:, 1:] * b[:, 1:]).sum(1))
