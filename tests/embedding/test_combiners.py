"""Combiners and their gradients against plain torch, with a table of known rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal
from recis_hybrid.ragged import RaggedTensor
from tests.support.devices import on_devices
from tests.support.near import assert_near

IDS, BAGS = 12, 9
LENGTHS = [3, 0, 1, 5, 2, 0, 7, 1, 4]


def bags(device: str, *, weighted: bool) -> RaggedTensor:
    generator = torch.Generator().manual_seed(1)
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    ids = torch.randint(0, IDS, (sum(LENGTHS),), generator=generator)
    weights = torch.rand(sum(LENGTHS), generator=generator) - 0.2 if weighted else None
    return RaggedTensor(ids.to(device), offsets.to(device), None if weights is None else weights.to(device))


def reference(weight: Tensor, column: RaggedTensor, combiner: str | None, max_length: int | None) -> Tensor:
    rows = []
    for b in range(BAGS):
        begin, end = int(column.offsets[b]), int(column.offsets[b + 1])
        end = end if max_length is None else min(end, begin + max_length)
        ids = column.values[begin:end].cpu()
        vectors = weight[ids]
        shares = torch.ones(end - begin) if column.weights is None else column.weights[begin:end].cpu()
        if combiner is None:
            rows.append(vectors)
        elif combiner == "tile":
            assert max_length is not None
            padded = torch.cat([vectors, torch.zeros(max_length - vectors.size(0), weight.size(1))])
            rows.append(padded.reshape(1, -1))
        elif end == begin:
            rows.append(torch.zeros(1, weight.size(1)))
        elif combiner == "max":
            rows.append(vectors.max(dim=0, keepdim=True).values)
        else:
            total = (shares[:, None] * vectors).sum(0, keepdim=True)
            norm = {"sum": torch.ones(()), "mean": shares.sum(), "sqrtn": shares.square().sum().sqrt()}[combiner]
            rows.append(total / norm)
    return torch.cat(rows)


CASES = [
    *[(combiner, None, weighted) for combiner in ("sum", "mean", "sqrtn") for weighted in (False, True)],
    ("sum", 2, True),
    ("mean", 2, False),
    ("max", None, False),
    ("max", 3, False),
    ("tile", 4, False),
    ("tile", 1, False),
    (None, None, False),
    (None, 2, False),
]


@on_devices
@pytest.mark.parametrize("dim", [1, 5, 16, 64])
@pytest.mark.parametrize(("combiner", "max_length", "weighted"), CASES)
def test_values_and_gradients_agree_with_plain_torch(
    device: str, dim: int, combiner: str | None, max_length: int | None, weighted: bool
) -> None:
    config = EmbeddingConfig(dim=dim, combiner=combiner, max_length=max_length, initializer=Normal(0, 1))
    engine = EmbeddingEngine({"item": config}, device=device)
    table, column = engine.tables[0], bags(device, weighted=weighted)
    table.insert(0, torch.arange(IDS))
    weight = table.export(0, torch.arange(IDS))["embedding"].cpu().requires_grad_()
    want = reference(weight, column, combiner, max_length)
    got = engine({"item": column})["item"]
    assert got.shape == want.shape
    assert_near(got, want)
    gradient = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    want.backward(gradient)
    got.backward(gradient.to(device))
    optim.SGD(engine.parameters(), lr=1.0).step()
    assert weight.grad is not None
    after = table.export(0, torch.arange(IDS))["embedding"].cpu()
    assert_near(after, weight - weight.grad)


@on_devices
@pytest.mark.parametrize("combiner", ["sum", "mean", "max", "tile", None])
def test_dense_columns_are_bags_of_equal_length(device: str, combiner: str | None) -> None:
    config = EmbeddingConfig(dim=4, combiner=combiner, max_length=3 if combiner == "tile" else None)
    engine = EmbeddingEngine({"item": config}, device=device)
    ids = torch.tensor([[1, 2, 3], [3, 3, 4]], device=device)
    ragged = RaggedTensor(ids.reshape(-1), torch.tensor([0, 3, 6], device=device))
    dense, same = engine({"item": ids})["item"], engine({"item": ragged})["item"]
    assert dense.shape == {"tile": (2, 12), None: (2, 3, 4)}.get(combiner, (2, 4))
    assert torch.equal(dense.reshape(same.shape), same)


@on_devices
def test_weights_from_a_separate_column(device: str) -> None:
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=4, weights="w", combiner="mean")}, device=device)
    column = bags(device, weighted=True)
    assert column.weights is not None
    plain = RaggedTensor(column.values, column.offsets)
    expected = EmbeddingEngine({"item": EmbeddingConfig(dim=4, combiner="mean")}, device=device)({"item": column})
    for weights in (column.weights, RaggedTensor(column.weights, column.offsets)):
        assert torch.equal(engine({"item": plain, "w": weights})["item"], expected["item"])


def test_the_mean_with_weights_that_sum_to_zero_is_zero() -> None:
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2, combiner="mean")})
    column = RaggedTensor(torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor([1.0, -1.0]))
    assert engine({"item": column})["item"].tolist() == [[0.0, 0.0]]


def test_max_of_unknown_ids_and_of_nan() -> None:
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2, combiner="max", unknown="zeros")})
    engine.tables[0].insert(0, torch.tensor([1, 2]), {"embedding": torch.tensor([[-1.0, 3.0], [torch.nan, -5.0]])})
    engine.eval()
    got = engine({"item": torch.tensor([[1, 9], [9, 9], [1, 2]])})["item"]
    assert got[:2].tolist() == [[0.0, 3.0], [0.0, 0.0]]
    assert torch.isnan(got[2, 0])
    assert got[2, 1] == 3.0


@pytest.mark.parametrize(
    ("settings", "column", "error", "message"),
    [
        (
            {"combiner": "max"},
            RaggedTensor(torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([1.0])),
            ValueError,
            "feature 'item': the combiner 'max' takes no weights, but the column carries some",
        ),
        ({"weights": "w"}, torch.tensor([[1, 2]]), KeyError, "feature 'item': the batch has no column 'w'"),
    ],
)
def test_bad_weights_are_refused(settings: dict, column: object, error: type[Exception], message: str) -> None:
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2, **settings)})
    with pytest.raises(error, match=message):
        engine({"item": column})  # type: ignore[dict-item]


def test_weights_of_wrong_shape_or_dtype_are_refused() -> None:
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2, weights="w")})
    ids = torch.tensor([[1, 2]])
    with pytest.raises(
        ValueError, match=r"one weight for each id, but 'w' has the shape \[1, 1\] and the ids have \[1, 2\]"
    ):
        engine({"item": ids, "w": torch.ones(1, 1)})
    with pytest.raises(TypeError, match="'w' must be floating-point numbers, got torch.int64; cast them"):
        engine({"item": ids, "w": ids})
    with pytest.raises(ValueError, match="'w' must not require a gradient"):
        engine({"item": ids, "w": torch.ones(1, 2, requires_grad=True)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"combiner": "tile"}, "the combiner 'tile' needs max_length"),
        ({"combiner": None, "weights": "w"}, "the combiner None takes no weights"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"dtype": torch.float64}, "dtype must be one of .*got torch.float64"),
        ({"state_dtype": torch.float16}, "state_dtype must be torch.float32 or the dtype torch.float32"),
        ({"unknown": "nan"}, "unknown must be one of 'first_value', 'zeros', got 'nan'"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingConfig(dim=2, **settings)
