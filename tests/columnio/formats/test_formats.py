"""All formats yield the same rows; columns in folder names; filters; text formats without types."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.orc as po
import pyarrow.parquet as pq
import pytest
import torch

from recis_hybrid.columnio import (
    BadFileError,
    Column,
    ColumnDataset,
    Dense,
    Ragged,
    ReadOptions,
    ShardOptions,
    Text,
    Weighted,
)
from recis_hybrid.columnio.files.file_set import OpenedFile
from recis_hybrid.columnio.formats import SUFFIXES, format_of
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.columns import dense

ROWS = 53


def table(first: int = 0, stop: int = ROWS, nested: bool = True) -> Any:
    rows = range(first, stop)
    flat = {
        "row": pa.array(rows, pa.int64()),
        "label": pa.array([row % 2 / 4 for row in rows], pa.float64()),
        "name": pa.array([f"é{row}" for row in rows]),
    }
    lists = {
        "list": pa.array([[row] * (row % 4) for row in rows], pa.list_(pa.int64())),
        "deep": pa.array([[[row], [], [1, 2]][: row % 4] for row in rows], pa.list_(pa.list_(pa.int64()))),
        "tags": pa.array([[str(row)] * (row % 3) for row in rows], pa.list_(pa.string())),
        "weighted": pa.array(
            [[{"id": row, "weight": 0.5}] * (row % 3) for row in rows],
            pa.list_(pa.struct([("id", pa.int64()), ("weight", pa.float64())])),
        ),
    }
    return pa.table(flat | lists if nested else flat)


def write_parquet(content: Any, path: Path) -> None:
    pq.write_table(content, path, row_group_size=10)


def write_orc(content: Any, path: Path) -> None:
    po.write_table(content, path)


def write_arrow(content: Any, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, content.schema) as writer:
        writer.write_table(content, 10)


def write_stream(content: Any, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content, 10)


def write_csv(content: Any, path: Path) -> None:
    pcsv.write_csv(content, path)


def write_json(content: Any, path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in content.to_pylist()))


def write_csv_gz(content: Any, path: Path) -> None:
    with gzip.open(path, "wb") as sink:
        pcsv.write_csv(content, sink)


def write_tsv(content: Any, path: Path) -> None:
    pcsv.write_csv(content, path, write_options=pcsv.WriteOptions(delimiter="\t"))


def write_json_gz(content: Any, path: Path) -> None:
    with gzip.open(path, "wt") as sink:
        sink.write("".join(json.dumps(row) + "\n" for row in content.to_pylist()))


Writer = Callable[[Any, Path], None]
NESTED: dict[str, Writer] = {
    ".parquet": write_parquet,
    ".orc": write_orc,
    ".arrow": write_arrow,
    ".feather": write_arrow,
    ".arrows": write_stream,
    ".stream.arrow": write_stream,
    ".jsonl": write_json,
    ".json.gz": write_json_gz,
}
FLAT: dict[str, Writer] = {".csv": write_csv, ".csv.gz": write_csv_gz, ".tsv": write_tsv}
ALL = NESTED | FLAT


def ragged(batch: Batch, name: str) -> RaggedTensor:
    column = batch[name]
    assert isinstance(column, RaggedTensor)
    return column.validate()


def rows_of(data: ColumnDataset) -> list[int]:
    return list(chain.from_iterable(dense(batch).tolist() for batch in data))


@pytest.mark.parametrize("suffix", sorted(NESTED))
@pytest.mark.parametrize("threads", [1, 2])
def test_every_format_supports_every_kind_of_column(tmp_path: Path, suffix: str, threads: int) -> None:
    NESTED[suffix](table(0, 20), tmp_path / f"a{suffix}")
    NESTED[suffix](table(20, ROWS), tmp_path / f"b{suffix}")
    data = ColumnDataset(tmp_path, table().column_names, 7, read=ReadOptions(num_threads=threads))
    seen: list[int] = []
    for batch in data:
        rows = dense(batch).tolist()
        seen += rows
        assert dense(batch, "label").tolist() == [row % 2 / 4 for row in rows]
        assert ragged(batch, "name").to_strings(decode=False) == [f"é{row}".encode() for row in rows]
        assert ragged(batch, "list").to_lists() == [[row] * (row % 4) for row in rows]
        assert ragged(batch, "deep").to_lists() == [[[row], [], [1, 2]][: row % 4] for row in rows]
        assert ragged(batch, "tags").to_strings(decode=False) == [[str(row).encode()] * (row % 3) for row in rows]
        weighted = ragged(batch, "weighted")
        assert weighted.to_lists() == [[row] * (row % 3) for row in rows]
        assert weighted.weights is not None
        assert weighted.weights.tolist() == [0.5] * sum(row % 3 for row in rows)
    assert seen == list(range(ROWS))


@pytest.mark.parametrize("suffix", sorted(ALL))
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_format_is_resumed_on_another_number_of_ranks(tmp_path: Path, suffix: str, shuffle: bool) -> None:
    ALL[suffix](table(0, 20, nested=False), tmp_path / f"a{suffix}")
    ALL[suffix](table(20, ROWS, nested=False), tmp_path / f"b{suffix}")

    def opened(**options: Any) -> ColumnDataset:
        return ColumnDataset(tmp_path, ["row"], 4, shuffle=shuffle, seed=3, **options)

    whole = rows_of(opened())
    assert sorted(whole) == list(range(ROWS))
    ranks = [opened(shard=ShardOptions(rank=rank, world_size=2)) for rank in range(2)]
    passes = [iter(rank) for rank in ranks]
    seen = [dense(next(each)).tolist() for _ in range(3) for each in passes]
    resumed = [opened(shard=ShardOptions(rank=rank, world_size=3)) for rank in range(3)]
    for rank in resumed:
        rank.load_state_dict(ranks[1].state_dict())
    rest = [rows_of(rank) for rank in resumed]
    assert list(chain.from_iterable(seen)) == whole[:24]
    assert sorted(chain.from_iterable(rest)) == sorted(whole[24:])


@pytest.mark.parametrize("suffix", sorted(ALL))
def test_only_the_requested_columns_are_read(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ALL[suffix](table(nested=False), tmp_path / f"a{suffix}")
    requested: list[list[str]] = []
    used = format_of(f"a{suffix}")
    read = used.read

    def watched(file: Any, contents: Any, piece: int, columns: list[str], *rest: Any) -> Any:
        requested.append(columns)
        for batch in read(file, contents, piece, columns, *rest):
            assert set(batch.schema.names) == set(columns)
            yield batch

    monkeypatch.setattr(used, "read", watched)
    data = ColumnDataset(tmp_path, ["row"], 10, filters=pc.field("label") > 0)
    assert rows_of(data) == list(range(1, ROWS, 2))
    assert {tuple(columns) for columns in requested} == {("label",), ("row", "label")}


def test_formats_are_mixed_in_a_folder(tmp_path: Path) -> None:
    for number, (suffix, write) in enumerate(sorted(ALL.items())):
        write(table(number * 10, number * 10 + 10, nested=False), tmp_path / f"{number}{suffix}")
    data = ColumnDataset(tmp_path, ["row", "label", "name"], 7, shuffle=True)
    assert sorted(rows_of(data)) == list(range(10 * len(ALL)))


def test_the_suffix_determines_the_format() -> None:
    assert {format_of(f"x{suffix}").NAME for suffix in SUFFIXES} == {"Parquet", "ORC", "Arrow", "CSV", "JSON lines"}
    assert format_of("part-0").NAME == "Parquet"


# Text formats have no types


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_specs_determine_the_types_of_text(tmp_path: Path, suffix: str) -> None:
    rows = [{"id": "7", "x": 1, "day": "2024-01-01"}, {"id": "08", "x": 2.5, "day": "2024-01-02"}]
    path = tmp_path / f"a{suffix}"
    lines = (
        [json.dumps(row) for row in rows] if suffix == ".jsonl" else ["id,x,day", "7,1,2024-01-01", "08,2.5,2024-01-02"]
    )
    path.write_text("\n".join(lines) + "\n")
    specs: dict[str, Column | None] = {"id": Text(), "x": Dense(torch.float32), "day": Text()}
    (batch,) = ColumnDataset(path, specs, 10)
    assert ragged(batch, "id").to_strings(decode=False) == [b"7", b"08"]
    assert dense(batch, "x").tolist() == [1.0, 2.5]
    assert ragged(batch, "day").to_strings(decode=False) == [b"2024-01-01", b"2024-01-02"]


def test_csv_nulls_take_the_default(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("row,x\n1,\n2,5\n")
    (batch,) = ColumnDataset(tmp_path, {"row": None, "x": Dense(default=-1)}, 10)
    assert dense(batch, "x").tolist() == [-1, 5]
    with pytest.raises(ValueError, match=r"'x' of .*a\.csv \(block 0, rows 0 to 1 of it\) has 1 null in 2 values"):
        list(ColumnDataset(tmp_path, ["x"], 10))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_text_of_many_blocks_keeps_the_types_of_the_first(tmp_path: Path, suffix: str) -> None:
    count = 200_000
    path = tmp_path / f"a{suffix}"
    values = [*range(count), 0.5]
    line = '{{"row": {}, "x": "abc"}}' if suffix == ".jsonl" else "{},abc"
    path.write_text("\n".join(["row,x"] * (suffix == ".csv") + [line.format(value) for value in values]) + "\n")
    # A single float in the last line, far beyond the first block.
    with pytest.raises(ValueError, match=rf"column 'row' of .*a{suffix} has the value '0\.5'.*Dense\(torch\.float32\)"):
        list(ColumnDataset(path, ["row"], 1000))
    data = ColumnDataset(path, {"row": Dense(torch.float64)}, 50_000)
    assert (data.num_rows, [len(dense(batch)) for batch in data]) == (count + 1, [50_000] * 4 + [1])


# Columns of folders


def test_folder_names_are_columns(tmp_path: Path) -> None:
    for day, country, first in ((7, "fr", 0), (8, "a%2Fb", 10), (9, "__HIVE_DEFAULT_PARTITION__", 20)):
        folder = tmp_path / f"day={day}" / f"country={country}"
        folder.mkdir(parents=True)
        pq.write_table(table(first, first + 10), folder / "part.parquet")
    data = ColumnDataset(tmp_path, {"day": None, "row": None, "country": Text(default="?")}, 15)
    batches = list(data)
    assert torch.cat([dense(batch, "day") for batch in batches]).tolist() == [7] * 10 + [8] * 10 + [9] * 10
    names = list(chain.from_iterable(ragged(batch, "country").to_strings(decode=False) for batch in batches))
    assert names == [b"fr"] * 10 + [b"a/b"] * 10 + [b"?"] * 10
    (only,) = ColumnDataset(tmp_path, ["day"], 30)
    assert dense(only, "day").tolist() == [7] * 10 + [8] * 10 + [9] * 10


def test_a_column_missing_from_one_folder_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "day=7").mkdir()
    pq.write_table(table(), tmp_path / "day=7" / "a.parquet")
    pq.write_table(table(), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has no column 'day'"):
        ColumnDataset(tmp_path, ["day"], 10)


# Filters


@pytest.mark.parametrize("suffix", sorted(ALL))
@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        (pc.field("row") > 40, lambda row: row > 40),
        ([("row", "<", 9), ("label", "==", 0)], lambda row: row < 9 and row % 2 == 0),
        ([[("row", "<", 3)], [("name", "==", "é33")]], lambda row: row < 3 or row == 33),
    ],
)
def test_rows_are_counted_after_the_filter(tmp_path: Path, suffix: str, filters: Any, wanted: Any) -> None:
    ALL[suffix](table(0, 20, nested=False), tmp_path / f"a{suffix}")
    ALL[suffix](table(20, ROWS, nested=False), tmp_path / f"b{suffix}")
    want = [row for row in range(ROWS) if wanted(row)]
    data = ColumnDataset(tmp_path, ["row"], 2, filters=filters)
    assert data.num_rows == len(want)
    assert rows_of(data) == want
    ranks = [
        ColumnDataset(tmp_path, ["row"], 2, filters=filters, shard=ShardOptions(rank=rank, world_size=2))
        for rank in range(2)
    ]
    passes = [iter(rank) for rank in ranks]
    seen = [dense(next(each)).tolist() for each in passes]
    data.load_state_dict(ranks[0].state_dict())
    assert sorted([*chain.from_iterable(seen), *rows_of(data)]) == want


def test_a_filter_rules_out_row_groups_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for day in (1, 2):
        (tmp_path / f"day={day}").mkdir()
        write_parquet(table(), tmp_path / f"day={day}" / "a.parquet")
    read: list[tuple[str, int]] = []
    original = OpenedFile.read

    def watched(self: OpenedFile, piece: int, columns: list[str], rows: int, threads: bool) -> Any:
        read.append((self.file.path.split("/")[-2], piece))
        return original(self, piece, columns, rows, threads)

    monkeypatch.setattr(OpenedFile, "read", watched)
    data = ColumnDataset(tmp_path, ["row", "day"], 5, filters=[("day", "=", 2), ("row", ">=", 35)])
    assert rows_of(data) == list(range(35, ROWS))
    # Read once to count rows, and once for the rows.
    assert sorted(read) == [("day=2", 3), ("day=2", 3), ("day=2", 4), ("day=2", 4), ("day=2", 5), ("day=2", 5)]


def test_invalid_filters_are_rejected(tmp_path: Path) -> None:
    write_parquet(table(), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"filters \(nowhere > 1\) do not fit the columns \['row'"):
        ColumnDataset(tmp_path, ["row"], 5, filters=pc.field("nowhere") > 1)
    with pytest.raises(TypeError, match="filters must be a pyarrow expression or a list of"):
        ColumnDataset(tmp_path, ["row"], 5, filters=7)
    with pytest.raises(ValueError, match=r"there are no rows that match the filters \(row > 99\)"):
        ColumnDataset(tmp_path, ["row"], 5, filters=pc.field("row") > 99)
    state = ColumnDataset(tmp_path, ["row"], 5, filters=pc.field("row") > 1).state_dict()
    with pytest.raises(ValueError, match=r"filters was '\(row > 1\)' and is '\(row >= 2\)'"):
        ColumnDataset(tmp_path, ["row"], 5, filters=pc.field("row") >= 2).load_state_dict(state)


# Weighted


def test_two_parallel_columns(tmp_path: Path) -> None:
    columns = pa.table({"ids": [[1, 2], [], [3]], "w": [[0.5, 1.5], [], [2.0]], "short": [[1.0], [], [1.0]]})
    pq.write_table(columns, tmp_path / "a.parquet")
    (batch,) = ColumnDataset(tmp_path, {"ids": Weighted(weights="w")}, 10)
    assert list(batch) == ["ids"]
    got = ragged(batch, "ids")
    assert got.weights is not None
    assert (got.to_lists(), got.weights.tolist()) == ([[1, 2], [], [3]], [0.5, 1.5, 2.0])
    with pytest.raises(ValueError, match=r"'ids' of .* has 2 ids but 1 weights in 'short' in row 0 .*per id"):
        list(ColumnDataset(tmp_path, {"ids": Weighted(weights="short")}, 10))
    with pytest.raises(ValueError, match="has no column 'nowhere'"):
        ColumnDataset(tmp_path, {"ids": Weighted(weights="nowhere")}, 10)


@pytest.mark.parametrize("suffix", [".parquet", ".orc", ".arrow", ".jsonl"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_text_of_ids_and_weights(tmp_path: Path, suffix: str, shuffle: bool) -> None:
    rows = [[f"{row}:{row / 2}"] * (row % 3) for row in range(ROWS)]
    NESTED[suffix](pa.table({"row": range(ROWS), "w": rows}), tmp_path / f"a{suffix}")
    data = ColumnDataset(tmp_path, {"row": None, "w": Weighted()}, 8, shuffle=shuffle)
    for batch in data:
        got, numbers = ragged(batch, "w"), dense(batch).tolist()
        assert got.weights is not None
        assert got.to_lists() == [[row] * (row % 3) for row in numbers]
        assert got.weights.tolist() == [row / 2 for row in numbers for _ in range(row % 3)]


def test_several_levels_take_null_as_empty(tmp_path: Path) -> None:
    columns = pa.table({"deep": pa.array([[[1], None], None], pa.list_(pa.list_(pa.int64()))), "tags": [["a"], None]})
    pq.write_table(columns, tmp_path / "a.parquet")
    specs: dict[str, Column | None] = {"deep": Ragged(null_as_empty=True), "tags": Text(null_as_empty=True)}
    (batch,) = ColumnDataset(tmp_path, specs, 10)
    assert ragged(batch, "deep").to_lists() == [[[1], []], []]
    assert ragged(batch, "tags").to_strings(decode=False) == [[b"a"], []]
    with pytest.raises(ValueError, match=r"'tags' .* has 1 null .*use Text\(null_as_empty=True\)"):
        list(ColumnDataset(tmp_path, ["tags"], 10))


def test_a_truncated_stream_is_damaged(tmp_path: Path) -> None:
    write_stream(table(), tmp_path / "a.arrows")
    whole = (tmp_path / "a.arrows").read_bytes()
    # At its end, between two batches, and within a batch.
    with pa.BufferReader(whole) as source:
        reader = pa.ipc.open_stream(source)
        reader.read_next_batch()
        between = source.tell()
    for size in (len(whole) - 8, between, between - 8):
        (tmp_path / "a.arrows").write_bytes(whole[:size])
        with pytest.raises(BadFileError, match=r"a\.arrows .* is not a complete Arrow file"):
            ColumnDataset(tmp_path, ["row"], 10)


def test_arrow_files_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_arrow(table(), tmp_path / "a.arrow")
    addresses: list[int] = []
    original = OpenedFile.read

    def watched(self: OpenedFile, *rest: Any) -> Any:
        for batch in original(self, *rest):
            addresses.append(batch.column("row").buffers()[1].address)
            yield batch

    monkeypatch.setattr(OpenedFile, "read", watched)
    data = ColumnDataset(tmp_path, ["row"], 10)
    # Opening has read it once, to count rows.
    addresses.clear()
    batches = list(data)
    assert [dense(batch).data_ptr() for batch in batches] == addresses


# Real data


@pytest.mark.parametrize("suffix", sorted(ALL))
@pytest.mark.parametrize("name", ["adult/test", "ml100k/sequences", "ml100k/items", "frappe/strings/test"])
def test_real_data_is_the_same_in_every_format(data_dir: Path, tmp_path: Path, name: str, suffix: str) -> None:
    whole = pq.read_table(data_dir / name)
    nested = [field.name for field in whole.schema if pa.types.is_nested(field.type)]
    if suffix in FLAT and nested:
        whole = whole.drop_columns(nested)
    ALL[suffix](whole, tmp_path / f"a{suffix}")
    specs: dict[str, Column | None] = {}
    for field in whole.schema:
        # Text does not distinguish int32 or float from wider numbers, nor a string of digits from a number.
        specs[field.name] = Text(default="") if pa.types.is_string(field.type) else None
    got: dict[str, list[Any]] = {name: [] for name in specs}
    for batch in ColumnDataset(tmp_path, specs, 4096, read=ReadOptions(num_threads=2)):
        for column, values in batch.items():
            if isinstance(values, RaggedTensor):
                values.validate()
                strings = values.dtype == torch.uint8
                got[column] += values.to_strings(decode=False) if strings else values.to_lists()
            else:
                got[column] += values.tolist()
    for field in whole.schema:
        want = whole.column(field.name).to_pylist()
        if pa.types.is_string(field.type):
            want = [(value or "").encode() for value in want]
        elif pa.types.is_list(field.type) and pa.types.is_string(field.type.value_type):
            want = [[value.encode() for value in row] for row in want]
        if pa.types.is_float32(field.type) and suffix in (*FLAT, ".jsonl", ".json.gz"):
            assert got[field.name] == pytest.approx(want), field.name
        else:
            assert got[field.name] == want, field.name
