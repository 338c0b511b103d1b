from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recis_hybrid.saver import CheckpointError, CorruptCheckpoint, TableState
from recis_hybrid.saver.actions.write import write_tables
from recis_hybrid.saver.checkpoint import table_plan
from recis_hybrid.saver.checkpoint.local_table import local_table
from recis_hybrid.saver.checkpoint.table_plan import range_count
from recis_hybrid.saver.checkpoint.table_reader import read_table
from recis_hybrid.saver.format.manifest import FileEntry, TableEntry
from recis_hybrid.saver.format.tensor_file import DTYPES
from recis_hybrid.saver.runtime.ranks import Ranks
from tests.saver.fakes import HIGHEST, LOWEST, example_table

SORTED_IDS = [-1, 0, 5, LOWEST, HIGHEST]  # buckets 0, 7, 7, 65535, 65535
int64 = st.integers(LOWEST, HIGHEST)


def write_table(root: Path, part: str, name: str, state: TableState) -> TableEntry:
    table = local_table(f"Saver.save: part {part!r}, table {name!r}", name, state)
    return write_tables(root, Ranks(None), part, [table])[name]


def same_bits(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def table_of(rows: int, seed: int = 0) -> TableState:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(rows, generator=generator) * 7919 - 3000
    columns = {"ids": ids, "embedding": torch.randn(rows, 3, generator=generator)}
    return TableState(columns, torch.randint(0, 65536, (rows,), generator=generator), {"dim": 3})


def files_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("rows", "row_bytes", "count"),
    [
        (0, 0, 1),
        (2**26, 1, 1),
        (2**26 + 1, 1, 2),
        (2**27 + 1, 1, 4),
        (2**36, 1, 1024),
        (2**50, 1, 1024),
    ],
)
def test_the_number_of_files(rows: int, row_bytes: int, count: int) -> None:
    assert range_count(rows, row_bytes) == count


def test_rows_are_read_sorted(tmp_path: Path) -> None:
    table = example_table()
    entry = write_table(tmp_path, "engine", "user", table)
    assert entry.rows == 5
    assert [item.file.path for item in entry.ranges] == ["sparse/engine/user/00000-65535.safetensors"]
    back = read_table(tmp_path, "engine", "user", entry)
    assert back.columns["ids"].tolist() == SORTED_IDS
    assert back.buckets.tolist() == [0, 7, 7, 65535, 65535]
    assert list(back.columns) == ["ids", "embedding", "exp_avg"]
    assert back.meta == table.meta
    order = [table.columns["ids"].tolist().index(id_) for id_ in SORTED_IDS]
    for name, column in table.columns.items():
        assert same_bits(back.columns[name], column[order])
        assert back.columns[name].data_ptr() % 64 == 0


@settings(max_examples=40)
@given(st.dictionaries(int64, st.integers(0, 65535), max_size=40), st.randoms(use_true_random=False), st.data())
def test_equal_tables_give_equal_bytes(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[int, int], random: Any, data: Any
) -> None:
    ranges = data.draw(st.sampled_from([1, 4, 64]))
    pairs = list(rows.items())
    shuffled = random.sample(pairs, len(pairs))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_plan, "range_count", lambda rows, row_bytes: ranges)
        for order in (pairs, shuffled):
            root = tmp_path_factory.mktemp("table")
            ids = torch.tensor([id_ for id_, _ in order], dtype=torch.int64)
            table = TableState(
                {"ids": ids, "embedding": ids.double()[:, None]}, torch.tensor([b for _, b in order]), {}
            )
            table = replace(table, buckets=table.buckets.long())
            entry = write_table(root, "engine", "t", table)
            found.append(files_of(root))
            back = read_table(root, "engine", "t", entry)
    assert found[0] == found[1]
    assert len(found[0]) == ranges
    assert list(zip(back.buckets.tolist(), back.columns["ids"].tolist(), strict=True)) == sorted(
        (bucket, id_) for id_, bucket in pairs
    )


def test_a_large_table_is_split_at_fixed_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_plan, "RANGE_BYTES", 4096)
    table = table_of(1000)  # 20 bytes per row: five times 4096, so eight ranges
    entry = write_table(tmp_path, "engine", "t", table)
    assert [(item.first_bucket, item.last_bucket) for item in entry.ranges] == [
        (first, first + 8191) for first in range(0, 65536, 8192)
    ]
    for item in entry.ranges:
        tensors = load_file(tmp_path / item.file.path)
        inside = (table.buckets >= item.first_bucket) & (table.buckets <= item.last_bucket)
        assert sorted(tensors["ids"].tolist()) == sorted(table.columns["ids"][inside].tolist())
        bucket = dict(zip(table.columns["ids"].tolist(), table.buckets.tolist(), strict=True))
        for k, present in enumerate(tensors["buckets"].tolist()):
            first, last = tensors["bucket_offsets"][k : k + 2].tolist()
            ids = tensors["ids"][first:last].tolist()
            assert ids == sorted(ids)
            assert {bucket[id_] for id_ in ids} == {present}
    back = read_table(tmp_path, "engine", "t", entry)
    order = back.columns["ids"].argsort()
    live = table.columns["ids"].argsort()
    assert same_bits(back.columns["embedding"][order], table.columns["embedding"][live])
    assert torch.equal(back.buckets[order], table.buckets[live])


def test_an_empty_table(tmp_path: Path) -> None:
    entry = write_table(tmp_path, "engine", "t", table_of(0))
    back = read_table(tmp_path, "engine", "t", entry)
    assert back.columns["embedding"].shape == (0, 3)
    assert back.buckets.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_round_trips_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    table = table_of(9)
    item = torch.empty((), dtype=DTYPES[dtype]).element_size()
    raw = torch.arange(9 * 2 * item, dtype=torch.uint8).reshape(9, -1)
    column = (raw % 2).bool()[:, :2] if dtype == "bool" else raw.view(DTYPES[dtype])
    columns = {**table.columns, "flat": column[:, 0], "wide": column, "strided": column.t().contiguous().t()}
    columns |= {"none": column[:, :0]}
    entry = write_table(tmp_path, "engine", "t", replace(table, columns=columns))
    back = read_table(tmp_path, "engine", "t", entry)
    position = {id_: row for row, id_ in enumerate(back.columns["ids"].tolist())}
    order = [position[id_] for id_ in table.columns["ids"].tolist()]
    for name in ("flat", "wide", "strided", "none"):
        bits = back.columns[name].view(torch.uint8) if name != "none" else back.columns[name].new_empty(0)
        assert bits.numel() == columns[name].numel() * item
        rows = torch.stack([back.columns[name].contiguous().view(torch.uint8).reshape(9, -1)[i] for i in order])
        assert torch.equal(rows, columns[name].contiguous().view(torch.uint8).reshape(9, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"embedding": torch.zeros(2, 3)}}, r"first column must be 'ids', got the columns \['embedding'\]"),
        ({"columns": {"ids": torch.zeros(2, dtype=torch.int32)}}, r"ids must be int64 \[n\].*int32 \[2\]"),
        ({"columns": {"ids": torch.zeros(2, 1, dtype=torch.int64)}}, r"ids must be int64 \[n\].*int64 \[2, 1\]"),
        ({"columns": {"ids": torch.tensor([8, 8])}}, "an id must have one row, 8 has more"),
        ({"columns": {"ids": torch.tensor([8, 9]), "embedding": torch.zeros(3, 1)}}, r"'embedding' must have 2 rows"),
        ({"columns": {"ids": torch.tensor([8, 9]), "step": torch.tensor(1)}}, "'step' must have 2 rows"),
        ({"columns": {"ids": torch.tensor([8, 9]), "buckets": torch.zeros(2)}}, "must not be named 'buckets'"),
        ({"columns": {"ids": torch.tensor([8, 9]), "__metadata__": torch.zeros(2)}}, "not '__metadata__'"),
        ({"columns": {"ids": torch.tensor([8, 9]), "": torch.zeros(2)}}, "not empty"),
        ({"columns": {"ids": torch.tensor([8, 9]), "x": [1, 2]}}, "'x' must be a tensor, got list"),
        (
            {"columns": {"ids": torch.tensor([8, 9]), "x": torch.zeros(2, dtype=torch.complex128)}},
            "got torch.complex128",
        ),
        ({"columns": {"ids": torch.tensor([8, 9]), "x": torch.zeros(2, 2).to_sparse()}}, "must be dense"),
        ({"columns": {"ids": torch.tensor([8, 9]), "x": torch.zeros(2, 2, device="meta")}}, "must be dense"),
        ({"buckets": torch.tensor([0])}, r"buckets must be int64 \[n\].*int64 \[1\]"),
        ({"buckets": torch.tensor([0.0, 1.0])}, r"buckets must be int64 \[n\].*float32 \[2\]"),
        ({"buckets": torch.tensor([0, 65536])}, "buckets must be from 0 to 65535, got 0 to 65536"),
        ({"buckets": torch.tensor([-1, 5])}, "buckets must be from 0 to 65535, got -1 to 5"),
        ({"meta": {"dim": (1,)}}, r"meta must be JSON that reads back equal"),
    ],
)
def test_invalid_states_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"part 'engine', table 't'.*{message}"):
        write_table(tmp_path, "engine", "t", replace(table_of(2), **change))


def sealed(root: Path, entry: TableEntry) -> TableEntry:
    """Return the manifest entry of the current file."""
    (item,) = entry.ranges
    data = (root / item.file.path).read_bytes()
    file = FileEntry(item.file.path, len(data), (f"{zlib.crc32(data):08x}",))
    return replace(entry, ranges=(replace(item, file=file),))


def rewrite(root: Path, entry: TableEntry, change: dict[str, Tensor], drop: str = "") -> TableEntry:
    """Replace tensors of the file, keep its metadata, and return its new manifest entry."""
    path = root / entry.ranges[0].file.path
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(path), **change}
    save_file({name: t.clone() for name, t in tensors.items() if name != drop}, path, metadata=metadata)
    return sealed(root, entry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([-1, 5, 0, LOWEST, HIGHEST])}, "rows must be sorted"),
        ({"ids": torch.tensor([-1, 0, 0, LOWEST, HIGHEST])}, "rows must be sorted"),
        ({"buckets": torch.tensor([7, 0, 65535], dtype=torch.int32)}, "buckets must ascend from 0 to 65535"),
        ({"buckets": torch.tensor([-1, 0, 65535], dtype=torch.int32)}, "buckets must ascend from 0 to 65535"),
        ({"buckets": torch.tensor([0, 7, 65536], dtype=torch.int32)}, "buckets must ascend from 0 to 65535"),
        ({"bucket_offsets": torch.tensor([0, 1, 3, 4])}, "bucket_offsets from 0 to 5"),
        ({"bucket_offsets": torch.tensor([1, 2, 3, 5])}, "bucket_offsets from 0 to 5"),
        ({"bucket_offsets": torch.tensor([0, 3, 1, 5])}, "bucket_offsets from 0 to 5"),
        ({"bucket_offsets": torch.tensor([0, 5])}, r"must hold .*bucket_offsets int64 \[4\]"),
        (
            {"embedding": torch.zeros(5, 3)},
            r"must hold .*embedding float32 \[5, 2\].*holds .*embedding float32 \[5, 3\]",
        ),
        ({"embedding": torch.zeros(5, 2).half()}, r"holds .*embedding float16 \[5, 2\]"),
        ({"extra": torch.zeros(1)}, r"holds .*extra float32 \[1\]"),
    ],
)
def test_files_that_contradict_the_manifest_are_refused(
    tmp_path: Path, change: dict[str, Tensor], message: str
) -> None:
    entry = write_table(tmp_path, "engine", "user", example_table())
    entry = rewrite(tmp_path, entry, change)
    with pytest.raises(CorruptCheckpoint, match=rf"00000-65535.safetensors \(part 'engine', table 'user'\).*{message}"):
        read_table(tmp_path, "engine", "user", entry)


@pytest.mark.parametrize("missing", ["ids", "buckets", "bucket_offsets", "exp_avg"])
def test_a_missing_tensor_is_refused(tmp_path: Path, missing: str) -> None:
    entry = write_table(tmp_path, "engine", "user", example_table())
    entry = rewrite(tmp_path, entry, {}, drop=missing)
    with pytest.raises(CorruptCheckpoint, match=rf"must hold .*{missing}"):
        read_table(tmp_path, "engine", "user", entry)


def test_a_file_of_another_table_is_refused(tmp_path: Path) -> None:
    entry = write_table(tmp_path, "engine", "user", example_table())
    with pytest.raises(CorruptCheckpoint, match="its metadata must be .*'item'.*is .*'user'"):
        read_table(tmp_path, "engine", "item", entry)


def test_false_row_counts_allocate_no_memory(tmp_path: Path) -> None:
    entry = write_table(tmp_path, "engine", "user", example_table())
    huge = replace(entry, rows=2**60, ranges=(replace(entry.ranges[0], rows=2**60),))
    with pytest.raises(CorruptCheckpoint, match="must hold"):
        read_table(tmp_path, "engine", "user", huge)


@pytest.mark.parametrize("data", [b"", b"12345678", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"\x01\0\0\0\0\0\0\0["])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    entry = write_table(tmp_path, "engine", "user", example_table())
    (tmp_path / entry.ranges[0].file.path).write_bytes(data)
    entry = sealed(tmp_path, entry)
    with pytest.raises(CorruptCheckpoint, match=r"00000-65535.safetensors \(part 'engine', table 'user'\)"):
        read_table(tmp_path, "engine", "user", entry)


def test_sorted_and_unsorted_rows_give_equal_files(tmp_path: Path) -> None:
    table = example_table()
    order = torch.tensor([2, 3, 1, 4, 0])  # by (bucket, id)
    columns = {name: column[order] for name, column in table.columns.items()}
    entries = []
    for folder, state in (("a", table), ("b", TableState(columns, table.buckets[order], table.meta))):
        (tmp_path / folder).mkdir()
        entries.append(write_table(tmp_path / folder, "part", "t", state))
    assert entries[0] == entries[1]
    twice = TableState({"ids": torch.tensor([8, 8])}, torch.tensor([1, 1]), {})
    with pytest.raises(CheckpointError, match="an id must have one row, 8 has more"):
        write_table(tmp_path, "part", "t", twice)
