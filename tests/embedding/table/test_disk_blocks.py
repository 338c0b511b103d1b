"""Tables with records on disk: training, evaluation and checkpoints are bitwise those of tables in memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recis_hybrid import ops, optim
from recis_hybrid.embedding import (
    EmbeddingConfig,
    EmbeddingEngine,
    HashTable,
    MinFrequency,
    Placement,
    Unused,
)
from recis_hybrid.embedding.checkpoint import ordered_records
from recis_hybrid.embedding.checkpoint.ordered_records import OrderedRecords
from recis_hybrid.embedding.table import disk_blocks
from recis_hybrid.embedding.table.disk_blocks import DiskBlocks, DiskSnapshot
from recis_hybrid.pipelines import TorchStep, Train, Trainer
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.saver import Saver
from recis_hybrid.saver.checkpoint import table_plan

EACH = 3 * 32 + 16 + ops.disk.BYTES_OF_A_FRAME
"""Bytes of a cached record of dim 8 with the state of Adam."""


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.disk, "SEGMENT_BYTES", 8192)


def placed(path: Path, records: int = 100) -> Placement:
    return Placement(blocks="disk", path=path, cache_bytes=records * EACH)


def engine_of(placement: Placement | None, **more: Any) -> tuple[EmbeddingEngine, Any]:
    configs = {
        "id": EmbeddingConfig(dim=8, placement=placement),
        "list": EmbeddingConfig(dim=8, placement=placement, combiner="mean", admission=MinFrequency(2)),
    }
    engine = EmbeddingEngine(configs, optimizer=optim.Adam, **more)
    return engine, engine.make_optimizer(lr=0.1)


def batch_of(step: int, ids: int = 600, length: int = 50) -> dict[str, Tensor | RaggedTensor]:
    generator = torch.Generator().manual_seed(step)

    def draw() -> Tensor:
        return (torch.rand(length, generator=generator) ** 3 * ids).long() - 20

    return {"id": draw(), "list": RaggedTensor(draw(), torch.tensor([0, 7, 7, 30, length]))}


def train(engine: EmbeddingEngine, optimizer: Any, steps: range) -> list[Tensor]:
    """Train, and return all outputs of every step."""
    outputs = []
    for step in steps:
        batch = batch_of(step)
        engine.prefetch(batch_of(step + 1) if step % 2 else batch)
        found = engine(batch)
        outputs.append(torch.cat([values.detach() for values in found.values()]))
        sum((values.square().sum() for values in found.values()), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 16 == 9:
            engine.evict(Unused(steps=12))
        if step % 32 == 25:
            engine.compact()
    return outputs


def assert_equal(found: EmbeddingEngine, expected: EmbeddingEngine) -> None:
    for ours, theirs in zip(found.tables, expected.tables, strict=True):
        for member in range(len(theirs.members)):
            a, b = ours.export(member), theirs.export(member)
            assert a.keys() == b.keys()
            assert [name for name in b if not torch.equal(a[name], b[name])] == []


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[tuple[tuple[EmbeddingEngine, Any], tuple[EmbeddingEngine, Any]]]:
    yield engine_of(placed(tmp_path)), engine_of(None)
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def blocks_of(table: HashTable) -> DiskBlocks:
    assert isinstance(table.store.blocks, DiskBlocks)
    return table.store.blocks


def test_training_is_bitwise_that_of_memory(engines: Any) -> None:
    (disk, optimizer), (memory, other) = engines
    assert (disk.prefetch_depth, memory.prefetch_depth) == (2, 0)
    ours, theirs = train(disk, optimizer, range(70)), train(memory, other, range(70))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert_equal(disk, memory)
    disk.eval(), memory.eval()
    queries = {"id": torch.arange(-40, 50), "list": torch.arange(-40, 50).view(9, 10)}
    for name, values in disk(queries).items():
        assert torch.equal(values, memory(queries)[name])
    for table in disk.tables:
        figures = blocks_of(table).figures()
        assert min(figures.hits, figures.misses, figures.prefetched, figures.written_back) > 0
        assert table.cache_statistics().hit_rate == figures.hits / (figures.hits + figures.misses)  # type: ignore[union-attr]
    assert sum(blocks_of(table).figures().moved for table in disk.tables) > 0


def test_checkpoints_and_deltas_of_a_moment_are_saved_while_training_goes_on(engines: Any, tmp_path: Path) -> None:
    (disk, optimizer), (memory, other) = engines
    savers = [Saver(tmp_path / "disk", async_save=True), Saver(tmp_path / "memory")]
    for number, steps in enumerate((range(40), range(40, 55), range(55, 80))):
        for engine, each, saver in ((disk, optimizer, savers[0]), (memory, other, savers[1])):
            train(engine, each, steps)
            saver.save(number, {"engine": engine, "optimizer": each}, delta=True)
    savers[0].wait()
    for number in range(3):
        # A checkpoint of either is loaded into either.
        loaded, expected = engine_of(placed(tmp_path, 80)), engine_of(None)
        Saver(tmp_path / "disk").load({"engine": loaded[0], "optimizer": loaded[1]}, number)
        Saver(tmp_path / "memory").load({"engine": expected[0], "optimizer": expected[1]}, number)
        assert_equal(loaded[0], expected[0])
        steps = [tmp_path / name / f"step_{number:06d}" for name in ("disk", "memory")]
        ours, theirs = (sorted(path.name for path in step.rglob("*")) for step in steps)
        assert ours == theirs
    back = engine_of(None)
    Saver(tmp_path / "disk").load({"engine": back[0], "optimizer": back[1]}, 2)
    pairs = zip(train(*loaded, range(80, 100)), train(*back, range(80, 100)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_save_reads_each_record_of_the_log_once_in_bounded_memory(
    engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_blocks, "_PIECE_BYTES_OF_SAVE", 90 * 112)
    monkeypatch.setattr(ordered_records, "_READ_BYTES", 7 * 112)
    monkeypatch.setattr(ordered_records, "_SORTED_ROWS", 130)
    monkeypatch.setattr(table_plan, "RANGE_BYTES", 16 * 112)
    (disk, optimizer), (memory, other) = engine_of(placed(tmp_path)), engines[1]
    train(disk, optimizer, range(20)), train(memory, other, range(20))
    log: list[int] = []
    pieces: list[int] = []
    read, read_piece = DiskSnapshot.read, OrderedRecords.read

    def watched(snapshot: DiskSnapshot, rows: Tensor, memory: Tensor | None = None) -> Tensor:
        log.append(rows.numel())
        return read(snapshot, rows, memory)

    def watched_piece(records: OrderedRecords, piece: int) -> Tensor:
        found = read_piece(records, piece)
        pieces.append(found.size(0))
        return found

    monkeypatch.setattr(DiskSnapshot, "read", watched)
    monkeypatch.setattr(OrderedRecords, "read", watched_piece)
    for name, engine, each in (("disk", disk, optimizer), ("memory", memory, other)):
        Saver(tmp_path / name).save(1, {"engine": engine, "optimizer": each})
    files = [path for path in (tmp_path / "disk").rglob("*.safetensors") if "sparse" in path.parts]
    for path in files:
        assert path.read_bytes() == (tmp_path / "memory" / path.relative_to(tmp_path / "disk")).read_bytes()
    rows = [len(table) for table in disk.tables]
    assert min(rows) > 90
    assert sum(log) == sum(rows)
    assert max(log + pieces) == 90
    # A piece that another thread has replaced is read again, at most one for each file.
    assert sum(pieces) <= sum(rows) + 90 * len(files)


def test_a_save_without_space_for_a_copy_of_the_records_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_blocks, "_PIECE_BYTES_OF_SAVE", 90 * 112)
    engine, optimizer = engine_of(placed(tmp_path))
    train(engine, optimizer, range(30))
    expected = engine.checkpoint_state().tables["id"].columns
    reader = engine.checkpoint_snapshot(None)().tables["id"].reader
    assert reader is not None
    n = expected["ids"].numel()
    out = {name: torch.full_like(values, 7) for name, values in expected.items() if name != "ids"}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(RuntimeError, match=r"table id: a copy of its records in .*: File too large; free space"):
            reader.read(0, n, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    reader.read(0, n, out)
    assert [name for name in out if not torch.equal(out[name], expected[name])] == []


def test_files_are_saved_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_blocks, "_PIECE_BYTES_OF_SAVE", 40 * 112)
    engine, optimizer = engine_of(placed(tmp_path))
    train(engine, optimizer, range(30))
    expected = engine.checkpoint_state().tables

    def files_of(name: str) -> list[tuple[str, int, int]]:
        n = expected[name].columns["ids"].numel()
        return [(name, first, stop) for first, stop in pairwise([*range(0, n, 17), n])]

    one, two = files_of("id"), files_of("list")
    mixed = [file for pair in zip_longest(one, two) for file in pair if file is not None]
    for files in (one + two, (one + two)[::-1], [one[0], one[-1], *one[1:-1]], mixed, [*one[:2], *two, *one[2:]]):
        tables = engine.checkpoint_snapshot(None)().tables
        for name, first, stop in files:
            reader, columns = tables[name].reader, expected[name].columns
            assert reader is not None
            out = {key: torch.full_like(values[first:stop], 7) for key, values in columns.items() if key != "ids"}
            reader.read(first, stop, out)
            assert [key for key in out if not torch.equal(out[key], columns[key][first:stop])] == []


def test_a_frozen_feature_of_a_trained_table(tmp_path: Path) -> None:
    def run(placement: Placement | None) -> tuple[EmbeddingEngine, list[Tensor]]:
        configs = {
            "id": EmbeddingConfig(dim=8, placement=placement),
            "list": EmbeddingConfig(dim=8, table="id", combiner="mean", trainable=False, placement=placement),
        }
        engine = EmbeddingEngine(configs, optimizer=optim.Adam)
        return engine, train(engine, engine.make_optimizer(lr=0.1), range(40))

    disk, ours = run(placed(tmp_path, 110))
    memory, theirs = run(None)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert_equal(disk, memory)
    (table,) = disk.tables
    figures = blocks_of(table).figures()
    assert min(figures.misses, figures.written_back) > 0
    assert set(table.ids(0).tolist()) <= {int(i) for step in range(40) for i in batch_of(step)["id"]}


def test_rows_in_state_dict_and_erased_rows(engines: Any, tmp_path: Path) -> None:
    (disk, optimizer), (memory, other) = engines
    train(disk, optimizer, range(20)), train(memory, other, range(20))
    for engine in (disk, memory):
        engine.rows_in_state_dict = "record"
        table = engine.tables[0]
        table.erase(0, table.ids(0)[::3])
        table.insert(0, torch.arange(5000, 5300), {"embedding": torch.arange(300.0).repeat(8, 1).T})
    assert_equal(disk, memory)
    again, _ = engine_of(placed(tmp_path), rows_in_state_dict="record")
    again.load_state_dict(memory.state_dict())
    assert_equal(again, memory)
    assert disk.state_dict().keys() == memory.state_dict().keys()


def test_a_trainer_reads_the_records_of_the_next_batch_ahead(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            configs = {"id": EmbeddingConfig(dim=8, placement=placed(tmp_path))}
            self.engine = EmbeddingEngine(configs, optimizer=optim.Adam)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.engine({"id": batch["id"]})["id"].sum(1)

    model = Model()
    batches = [{"id": batch_of(step)["id"], "label": torch.ones(50)} for step in range(60)]
    step = TorchStep(model, torch.nn.functional.mse_loss, [model.engine.make_optimizer(lr=0.1)], label="label")
    Trainer(step, batches).fit([Train()])
    figures = blocks_of(model.engine.tables[0]).figures()
    # All but those of the first batches, those still in the memory of the log, and those replaced in between.
    assert figures.prefetched > figures.misses / 4 > 0


def test_memory_is_counted_apart(tmp_path: Path) -> None:
    engine, optimizer = engine_of(placed(tmp_path))
    train(engine, optimizer, range(30))
    report = engine.memory()
    assert report["disk"] >= 2 * 8192
    assert report["blocks"] == 0
    assert report["cache"] >= 2 * 100 * EACH
    assert report["locations"] >= 8 * sum(len(table) for table in engine.tables)
    parts = ("id_map", "blocks", "cache", "locations", "free_rows", "admission")
    assert report["total"] == sum(report[part] for part in parts)
    assert all(text in engine.describe() for text in ("cpu/disk", "hit rate"))


def test_a_batch_larger_than_the_cache_is_refused_and_the_table_stays_usable(engines: Any) -> None:
    (disk, optimizer), (memory, other) = engines
    train(disk, optimizer, range(20)), train(memory, other, range(20))
    many = {"id": torch.arange(1000, 1500), "list": RaggedTensor(torch.arange(3), torch.tensor([0, 3]))}
    with pytest.raises(RuntimeError, match=r"table id: a call uses 500 rows at once, but the cache holds 100 records"):
        disk(many)
    with pytest.raises(RuntimeError, match=r"table id: a call uses \d+ rows at once"):
        disk.eval()({**many, "id": disk.tables[0].ids(0)})
    disk.train()
    assert_equal(disk, memory)
    ours, theirs = train(disk, optimizer, range(20, 30)), train(memory, other, range(20, 30))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _is_unnamed(link: Path, folder: Path) -> bool:
    target = os.readlink(link)
    return target.startswith(str(folder)) and target.endswith(" (deleted)")


def test_a_batch_whose_records_cannot_be_read_inserts_no_id(engines: Any, tmp_path: Path) -> None:
    (disk, optimizer), (memory, other) = engines
    train(disk, optimizer, range(20)), train(memory, other, range(20))
    table = disk.tables[0]
    blocks_of(table).snapshot()  # writes all records
    files = [file for file in Path("/proc/self/fd").iterdir() if file.is_symlink() and _is_unnamed(file, tmp_path)]
    contents = [file.read_bytes() for file in files]
    for file in files:
        os.truncate(file, 0)
    locations = blocks_of(table).locations
    unread = [i for i in table.ids(0).tolist() if int(locations[table.rows(0, torch.tensor([i]))]) & 1][:20]
    ids = torch.tensor([9001, *unread, 9002, 9001])
    with pytest.raises(RuntimeError, match=r"table id: the file of its records in .* (is shorter|does not hold)"):
        disk({"id": ids, "list": RaggedTensor(torch.tensor([], dtype=torch.int64), torch.tensor([0]))})
    assert table.rows(0, torch.tensor([9001, 9002])).tolist() == [-1, -1]
    for file, content in zip(files, contents, strict=True):
        with file.open("r+b") as same:
            same.write(content)
    assert_equal(disk, memory)
    ours, theirs = train(disk, optimizer, range(20, 40)), train(memory, other, range(20, 40))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert_equal(disk, memory)


def test_a_snapshot_between_lookup_and_update_keeps_the_update(engines: Any) -> None:
    (disk, optimizer), (memory, other) = engines
    train(disk, optimizer, range(20)), train(memory, other, range(20))
    for engine, each in ((disk, optimizer), (memory, other)):
        found = engine(batch_of(20))
        state = engine.checkpoint_state()
        sum((values.square().sum() for values in found.values()), torch.zeros(())).backward()
        each.step()
        each.zero_grad()
        del state
        train(engine, each, range(21, 40))
    assert_equal(disk, memory)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"blocks='disk' needs path=.*got None"):
        Placement(blocks="disk", cache_bytes=1 << 20)
    with pytest.raises(ValueError, match=r"blocks='disk' needs cache_bytes=.*got 0"):
        Placement(blocks="disk", path=tmp_path)
    with pytest.raises(ValueError, match=r"blocks='disk' needs id_map='cpu', got id_map='cuda'"):
        Placement(blocks="disk", path=tmp_path, cache_bytes=1 << 20, id_map="cuda")
    with pytest.raises(ValueError, match=r"path='/tmp' needs blocks='disk', got blocks='cpu'"):
        Placement(blocks="cpu", path="/tmp")
    with pytest.raises(ValueError, match=r"path must be an existing folder, got ''"):
        Placement(blocks="disk", path="", cache_bytes=1 << 20)
    with pytest.raises(TypeError, match=r"path must be a str or a Path, got 3"):
        Placement(blocks="disk", path=3, cache_bytes=1 << 20)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"table id: cache_bytes=999 is too small .*use at least {64 * EACH}"):
        engine_of(Placement(blocks="disk", path=tmp_path, cache_bytes=999))
    with pytest.raises(RuntimeError, match=r"table id: cannot create the file of its records in .*absent"):
        engine_of(placed(tmp_path / "absent"))
    table = engine_of(placed(tmp_path))[0].tables[0]
    with pytest.raises(RuntimeError, match=r"table id: its records are on disk, .*jax.jit"):
        table.lend(10, lambda: None)
    table.insert(0, torch.arange(3))  # is not lent
