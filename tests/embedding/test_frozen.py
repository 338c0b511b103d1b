"""Read-only tables: rows without optimizer state, next to trained tables, and in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, Unused
from recis_hybrid.embedding.planner.coalesce import plan_tables
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Saver
from tests.support.sharded import rows_of

BATCH: Batch = {name: torch.arange(1, 6) for name in ("user", "item", "old")}


def engine_of(frozen: tuple[str, ...] = (), dim: int = 64, **more: Any) -> EmbeddingEngine:
    configs = {name: EmbeddingConfig(dim=dim, trainable=name not in frozen) for name in BATCH}
    return EmbeddingEngine(configs, optimizer=optim.Adam, **more)


def train(engine: EmbeddingEngine, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        batch = {name: column + step for name, column in BATCH.items()}
        sum(value.square().sum() for value in engine(batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(frozen: tuple[str, ...] = (), steps: int = 2) -> tuple[EmbeddingEngine, optim.Adam]:
    engine = engine_of(frozen)
    optimizer = optim.Adam(engine.parameters(), lr=0.1)
    train(engine, optimizer, steps)
    return engine, optimizer


def embeddings(engine: EmbeddingEngine) -> dict[str, torch.Tensor]:
    return {name: columns["embedding"] for name, columns in rows_of(engine).items()}


def assert_same_except_state(a: EmbeddingEngine, b: EmbeddingEngine) -> None:
    """Compare the columns of the rows of b with those of a, which may have more columns."""
    for name, columns in rows_of(b).items():
        for column, values in columns.items():
            assert torch.equal(values, rows_of(a)[name][column]), (name, column)


def assert_same(a: EmbeddingEngine, b: EmbeddingEngine) -> None:
    assert_same_except_state(a, b)
    assert_same_except_state(b, a)


def test_rows_of_read_only_tables_keep_no_optimizer_state() -> None:
    # 64 floats and 16 bytes of metadata, padded to a cache line; with optimizer state, two moments of 64 floats more.
    engine = engine_of(frozen=("old",))
    by_name = {member.name: table for table in engine.tables for member in table.members}
    assert by_name["old"].layout.record_bytes == -(-(64 * 4 + 16) // 64) * 64 == 320
    assert by_name["user"].layout.record_bytes == 3 * 64 * 4 + 64 == 832
    by_name["old"].load(0, torch.arange(1000), {})
    blocks = by_name["old"].store.blocks
    assert blocks.nbytes == 320 * blocks.capacity
    assert list(by_name["old"].store.export_none()) == ["ids", "embedding", "updated_step", "seen_step", "frequency"]


def test_read_only_tables_are_only_coalesced_with_each_other() -> None:
    assert [len(table.members) for table in engine_of(frozen=("old",)).tables] == [2, 1]
    assert [len(table.members) for table in engine_of(frozen=("old", "user")).tables] == [2, 1]


def test_a_read_only_table_does_not_affect_training() -> None:
    base, _ = trained()
    state = base.checkpoint_state()
    frozen, free = engine_of(frozen=("old",)), engine_of()
    for engine in (frozen, free):
        engine.load_checkpoint_state(state)
        train(engine, optim.Adam(engine.parameters(), lr=0.1), 2, first=1)
    for name in ("user", "item"):
        for column, values in rows_of(frozen)[name].items():
            assert torch.equal(values, rows_of(free)[name][column]), (name, column)
    assert torch.equal(embeddings(frozen)["old"], embeddings(base)["old"])
    assert not torch.equal(embeddings(free)["old"][:5], embeddings(base)["old"][:5])


def test_a_read_only_table_loads_a_trained_checkpoint_and_vice_versa(tmp_path: Path) -> None:
    engine, optimizer = trained()
    saver = Saver(tmp_path)
    saver.save(1, {"engine": engine, "optimizer": optimizer})
    frozen = engine_of(frozen=("old",))
    sparse = optim.Adam(frozen.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="table 'old', column 'exp_avg' is in the checkpoint only"):
        saver.load({"engine": frozen, "optimizer": sparse})
    assert_same_except_state(engine, frozen)
    saver.save(2, {"engine": frozen, "optimizer": sparse})
    again = engine_of(frozen=("old",))
    saver.load({"engine": again})  # the same columns as saved, so there is no warning
    assert_same(again, frozen)
    free = engine_of()
    with pytest.warns(UserWarning, match="table 'old', column 'exp_avg' is in the live object only"):
        saver.load({"engine": free, "optimizer": optim.Adam(free.parameters(), lr=0.1)})
    assert torch.equal(embeddings(free)["old"], embeddings(engine)["old"])
    assert not rows_of(free)["old"]["exp_avg"].any()
    assert torch.equal(rows_of(free)["user"]["exp_avg"], rows_of(engine)["user"]["exp_avg"])
    before = embeddings(free)["old"]
    train(free, optim.Adam(free.parameters(), lr=0.1), 1)
    assert not torch.equal(embeddings(free)["old"], before)


def test_some_tables_of_another_run_can_be_loaded_and_frozen(tmp_path: Path) -> None:
    engine, optimizer = trained()
    Saver(tmp_path).save(1, {"engine": engine, "optimizer": optimizer})
    frozen = engine_of(frozen=("old", "user"))
    loaded = Saver(tmp_path).load_some({"engine": frozen}, only=["old", "item"])
    assert len(loaded.loaded) == 2
    for name in ("old", "item"):
        assert torch.equal(embeddings(frozen)[name], embeddings(engine)[name])
    assert torch.equal(rows_of(frozen)["item"]["exp_avg"], rows_of(engine)["item"]["exp_avg"])


@pytest.mark.parametrize("frozen", [("old",), ()])
def test_the_first_delta_after_a_layout_change_is_a_full_part(tmp_path: Path, frozen: tuple[str, ...]) -> None:
    # A delta of rows without moments cannot build on rows with moments, nor vice versa.
    engine, optimizer = trained(() if frozen else ("old",))
    saver = Saver(tmp_path)
    saver.save(1, {"engine": engine, "optimizer": optimizer}, delta=True)
    train(engine, optimizer, 1, first=2)
    saver.save(2, {"engine": engine, "optimizer": optimizer}, delta=True)
    other = engine_of(frozen)
    sparse = optim.Adam(other.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="loaded into tables of another kind"):
        saver.load({"engine": other, "optimizer": sparse})
    for step in (3, 4):
        train(other, sparse, 1, first=step)
        saver.save(step, {"engine": other, "optimizer": sparse}, delta=True)
        restored = engine_of(frozen)
        assert saver.load({"engine": restored}, step) == step
        assert_same(other, restored)


def test_a_state_dict_is_loaded_into_read_only_and_trained_tables() -> None:
    engine, _ = trained()
    engine.rows_in_state_dict = "record"
    frozen = engine_of(frozen=("old",), rows_in_state_dict="record")
    frozen.load_state_dict(engine.state_dict())
    assert_same_except_state(engine, frozen)
    free = engine_of()
    free.load_state_dict(frozen.state_dict())
    assert torch.equal(embeddings(free)["old"], embeddings(engine)["old"])


def test_column_sharding_ignores_the_state_of_read_only_tables() -> None:
    # RowwiseAdagrad keeps one number per whole row, but no rank has a whole row. Read-only rows have no such state.
    configs = {"a": EmbeddingConfig(dim=16, sharding="column", trainable=False)}
    (plan,) = plan_tables(configs, optim.RowwiseAdagrad.row_state(), coalesce=True, ranks=2)
    assert (plan.sharding, plan.layout.state) == ("column", ())


def shared(frozen: str | None = None, unknown: Any = "first_value", **more: Any) -> EmbeddingEngine:
    """Return an engine whose table "t" is trained by "a" and "b", or by one of them if the other is frozen."""
    configs = {
        name: EmbeddingConfig(dim=4, table="t", trainable=name != frozen, unknown=unknown, **more) for name in "ab"
    }
    return EmbeddingEngine({**configs, "c": EmbeddingConfig(dim=4, **more)}, optimizer=optim.Adam, seed=5)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("frozen", ["a", "b"])
def test_a_frozen_feature_of_a_trained_table_only_reads_it(frozen: str, functional: bool) -> None:
    other = "b" if frozen == "a" else "a"
    engine, alone = (
        shared(frozen),
        EmbeddingEngine(
            {other: EmbeddingConfig(dim=4, table="t"), "c": EmbeddingConfig(dim=4)}, optimizer=optim.Adam, seed=5
        ),
    )
    assert [len(table.members) for table in engine.tables] == [2]
    assert f"{frozen} frozen" in engine.describe()
    optimizers = [each.make_optimizer(lr=0.1) for each in (engine, alone)]
    for step in range(4):
        ids = torch.arange(step, step + 4)
        # The frozen feature reads ids that have rows, ids that get one from the other feature now, and unknown ids.
        batch: Batch = {other: ids, frozen: torch.tensor([[step - 1, step + 3], [50, 51]]), "c": ids}
        with torch.no_grad():
            expected = alone.eval()(
                {other: torch.cat([torch.tensor([step - 1, step + 3]), torch.tensor([50, 51])]), "c": ids}
            )
            alone.train()
        for each, optimizer in zip((engine, alone), optimizers, strict=True):
            mine = {name: batch[name] for name in each.configs}
            if functional:
                values, ctx = each.lookup(mine)
                gradients = {name: 2 * value for name, value in values.items() if name != frozen}
                each.apply_gradients(ctx, gradients, optimizer)
            else:
                values = each(mine)
                assert all(value.requires_grad == (name != frozen) for name, value in values.items())
                sum(value.square().sum() for value in values.values()).backward()
                optimizer.step()
                optimizer.zero_grad()
            if each is engine:
                found = values[frozen].detach()
        assert torch.equal(found, expected[other].view(2, 2, 4).sum(1))
    assert_same(engine, alone)  # ids, embeddings, moments, and when and how often rows were seen
    assert not {50, 51} & set(rows_of(engine)["t"]["ids"].tolist())
    assert engine.evict(Unused(1)) == alone.evict(Unused(1)) > 0


def test_a_frozen_feature_is_looked_up_after_the_trained_ones_and_counts_nothing() -> None:
    engine = shared("a", unknown="zeros", admission=MinFrequency(2))
    for _ in range(3):
        values = engine({"a": torch.tensor([1, 7]), "b": torch.tensor([1, 1]), "c": torch.tensor([0])})
        assert values["a"][0].any()  # admitted in this batch by the trained feature
        assert not values["a"][1].any()
    assert rows_of(engine)["t"]["ids"].tolist() == [1]
    assert rows_of(engine)["t"]["frequency"].tolist() == [6]
    engine.eval()
    values = engine({"a": torch.tensor([1, 7]), "b": torch.tensor([1, 7]), "c": torch.tensor([0])})
    assert torch.equal(values["a"], values["b"])


def test_freezing_a_feature_of_a_trained_table_does_not_change_checkpoints(tmp_path: Path) -> None:
    engine = shared()
    engine({name: torch.arange(9) for name in "abc"})
    Saver(tmp_path).save(1, {"engine": engine, "sparse": engine.make_optimizer()})
    frozen = shared("a")
    Saver(tmp_path).load({"engine": frozen, "sparse": frozen.make_optimizer()})
    assert_same(frozen, engine)
    with pytest.raises(
        ValueError, match="'a' and 'b' share the table 't' but have different settings: dim=2 against dim=3"
    ):
        EmbeddingEngine(
            {"a": EmbeddingConfig(dim=2, table="t"), "b": EmbeddingConfig(dim=3, table="t", trainable=False)}
        )
