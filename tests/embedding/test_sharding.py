"""On which ranks tables lie."""

import pytest

from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, sharding_of
from recis_hybrid.embedding.sharding import BYTES_PER_S, COLLECTIVE_S, REPLICA_BYTES, deal


@pytest.mark.parametrize("sharding", ["row", "table", "replicated"])
def test_what_a_config_says_counts(sharding: str) -> None:
    assert sharding_of(EmbeddingConfig(dim=8, sharding=sharding, expected_rows=1), 8) == sharding  # type: ignore[arg-type]


def test_auto_replicates_few_rows_and_spreads_many() -> None:
    def chosen(rows: int | None, dim: int, ranks: int) -> str:
        return sharding_of(EmbeddingConfig(dim=dim, sharding="auto", expected_rows=rows), ranks)

    assert chosen(None, 8, 2) == "row"
    for dim in (8, 128):
        for ranks in (4, 64):
            kinds = [chosen(rows, dim, ranks) for rows in (1, 10, 100, 10_000, 1_000_000)]
            assert kinds[0] == "replicated"
            assert kinds[-1] == "row"
            assert "replicated" not in kinds[kinds.index("row") :]
    # Of two ranks replicas send 4 bytes a row more, in one collective less; of long rows memory is the limit.
    even = round(COLLECTIVE_S * BYTES_PER_S / 4)
    assert [chosen(even - 1, 8, 2), chosen(even + 1, 8, 2)] == ["replicated", "row"]
    most = REPLICA_BYTES // (4 * 1024)
    assert [chosen(most, 1024, 2), chosen(most + 1, 1024, 2)] == ["replicated", "row"]


def test_loads_are_dealt_evenly() -> None:
    assert deal([], 3) == []
    assert deal([1.0, 1.0, 1.0, 1.0], 2) == [0, 1, 0, 1]
    assert deal([1.0, 5.0, 2.0, 2.0], 2) == [1, 0, 1, 1]
    assert deal([3.0, 3.0], 4) == [0, 1]


def test_one_process_shards_nothing() -> None:
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


def test_features_of_one_table_agree_about_it() -> None:
    with pytest.raises(ValueError, match="sharding=row against sharding=table"):
        EmbeddingEngine(
            {"a": EmbeddingConfig(dim=2, table="t"), "b": EmbeddingConfig(dim=2, table="t", sharding="table")}
        )
