"""Choice of shardings, and assignment of tables to ranks."""

from __future__ import annotations

from typing import Any

import pytest

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, sharding_of
from recis_hybrid.embedding.planner.coalesce import plan_tables
from recis_hybrid.embedding.planner.sharding import COLLECTIVE_S, LOOKUP_S, REPLICA_BYTES, columns_of, deal


@pytest.mark.parametrize("sharding", ["row", "table", "column", "replicated"])
def test_an_explicit_sharding_is_used(sharding: str) -> None:
    assert sharding_of(EmbeddingConfig(dim=8, sharding=sharding, expected_rows=1), 8) == sharding  # type: ignore[arg-type]


def test_auto_replicates_small_tables_and_shards_large_ones() -> None:
    def chosen(rows: int | None, dim: int, ranks: int) -> str:
        return sharding_of(EmbeddingConfig(dim=dim, sharding="auto", expected_rows=rows), ranks)

    assert chosen(None, 8, 2) == "row"
    for dim in (8, 128):
        for ranks in (4, 64):
            kinds = [chosen(rows, dim, ranks) for rows in (1, 10, 100, 10_000, 1_000_000)]
            assert kinds[0] == "replicated"
            assert kinds[-1] == "row"
            assert "replicated" not in kinds[kinds.index("row") :]
    # Replicas save a collective, but the cost of many lookups outweighs that.
    even = round(COLLECTIVE_S / LOOKUP_S)
    assert [chosen(even // 2, 8, 2), chosen(even * 2, 8, 2)] == ["replicated", "row"]
    assert chosen(1, REPLICA_BYTES // 4, 2) == "replicated"
    assert chosen(1, REPLICA_BYTES // 4 + 1, 2) != "replicated"


def test_auto_splits_few_long_rows_by_column() -> None:
    def chosen(rows: int, dim: int, ranks: int, rule: Any = optim.Adam) -> str:
        return sharding_of(EmbeddingConfig(dim=dim, sharding="auto", expected_rows=rows), ranks, rule.row_state())

    assert [chosen(100, dim, 8) for dim in (16, 4096)] == ["replicated", "column"]
    assert [chosen(rows, 4096, 8) for rows in (1, 100, 100_000)] == ["replicated", "column", "row"]
    assert chosen(100, 4096, 8, optim.RowwiseAdagrad) == "row"  # no rank would have a whole row
    assert chosen(100, 4096, 1025) == "row"  # fewer than 4 elements each


def test_column_widths_are_multiples_of_four() -> None:
    assert columns_of(64, 4) == [16] * 4
    assert columns_of(18, 2) == [8, 10]
    assert columns_of(19, 4) == [4, 4, 4, 7]
    for ranks in range(1, 9):
        for dim in range(4 * ranks, 90):
            widths = columns_of(dim, ranks)
            assert sum(widths) == dim
            assert min(widths) >= 4
            assert all(width % 4 == 0 for width in widths[:-1])
            assert max(widths) - min(widths) < 8


def test_rows_that_cannot_be_split_by_column_are_refused() -> None:
    config = EmbeddingConfig(dim=16, sharding="column")
    with pytest.raises(ValueError, match="at least 4 elements of a row for each of 5 ranks, got dim=16; use sharding="):
        plan_tables({"a": config}, (), coalesce=True, ranks=5)
    with pytest.raises(ValueError, match=r"table a: .* but \['sum'\] belong to a whole row"):
        plan_tables({"a": config}, optim.RowwiseAdagrad.row_state(), coalesce=True, ranks=2)
    assert plan_tables({"a": config}, optim.RowwiseAdagrad.row_state(), coalesce=True)[0].sharding == "row"


def test_loads_are_balanced() -> None:
    assert deal([], 3) == []
    assert deal([1.0, 1.0, 1.0, 1.0], 2) == [0, 1, 0, 1]
    assert deal([1.0, 5.0, 2.0, 2.0], 2) == [1, 0, 1, 1]
    assert deal([3.0, 3.0], 4) == [0, 1]


def test_one_process_does_not_shard() -> None:
    configs = {
        "a": EmbeddingConfig(dim=2, sharding="replicated"),
        "b": EmbeddingConfig(dim=2, sharding="table"),
        "c": EmbeddingConfig(dim=2),
    }
    for engine in (EmbeddingEngine(configs), EmbeddingEngine(configs, group=False, prefetch_depth=3)):
        assert len(engine.tables) == 1
        assert engine.group is None
        assert engine.share == 1.0
        assert engine.traffic.total == 0
        engine.prefetch({})
        engine.prefetch_rows()


def test_features_of_one_table_must_have_the_same_sharding() -> None:
    with pytest.raises(ValueError, match="sharding=row against sharding=table"):
        EmbeddingEngine(
            {"a": EmbeddingConfig(dim=2, table="t"), "b": EmbeddingConfig(dim=2, table="t", sharding="table")}
        )
