"""Damage in every format: rejected with its location, or skipped, counted and reported."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.orc as po
import pyarrow.parquet as pq
import pytest
import torch

from recis_hybrid.columnio import BadFileError, ColumnDataset, ReadOptions, ShardOptions
from recis_hybrid.ragged import Batch

ROWS = 5000
SUFFIXES = [".parquet", ".orc", ".arrow", ".csv", ".jsonl"]


def write(path: Path, first: int = 0, rows: int = ROWS) -> None:
    """Write incompressible numbers, so that a truncation or a changed byte hits data."""
    generator = torch.Generator().manual_seed(first)
    noise = torch.randint(-(2**62), 2**62, (rows,), generator=generator).tolist()
    table = pa.table({"row": pa.array(range(first, first + rows), pa.int64()), "noise": pa.array(noise, pa.int64())})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=1000, use_dictionary=False, write_page_checksum=True)
    elif path.suffix == ".orc":
        po.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, 1000)
    elif path.suffix == ".csv":
        path.write_text("row,noise\n" + "".join(f"{first + k},{value}\n" for k, value in enumerate(noise)))
    else:
        path.write_text("".join(f'{{"row": {first + k}, "noise": {value}}}\n' for k, value in enumerate(noise)))


def rows_of(data: Any) -> list[int]:
    def row(batch: Batch) -> list[int]:
        column = batch["row"]
        assert isinstance(column, torch.Tensor)
        return column.tolist()

    return list(chain.from_iterable(row(batch) for batch in data))


def truncate(path: Path) -> None:
    content = path.read_bytes()
    # Text is cut within a line, so that the line is incomplete.
    path.write_bytes(content[: len(content) // 2] + (b',"' if path.suffix == ".jsonl" else b",,,\n"))


def flip(path: Path) -> None:
    """Change a byte of the fourth row group."""
    content = bytearray(path.read_bytes())
    content[pq.ParquetFile(path).metadata.row_group(3).column(1).data_page_offset + 2000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("read", [ReadOptions(), ReadOptions(num_threads=2), ReadOptions(prefetch=0)])
def test_a_truncated_file_is_rejected_or_skipped(tmp_path: Path, suffix: str, read: ReadOptions) -> None:
    write(tmp_path / f"a{suffix}")
    write(tmp_path / f"b{suffix}", ROWS)
    truncate(tmp_path / f"a{suffix}")
    with pytest.raises(BadFileError, match=rf"a{suffix}.*rewrite it, or skip it"):
        list(ColumnDataset(tmp_path, ["row", "noise"], 100, read=read))
    with pytest.warns(RuntimeWarning, match=rf"skipped .*a{suffix}"):
        data = ColumnDataset(tmp_path, ["row", "noise"], 100, read=replace(read, on_bad_file="skip"))
    assert rows_of(data) == list(range(ROWS, 2 * ROWS))
    (skipped,) = data.skipped
    assert (skipped.file, skipped.rows) == (str(tmp_path / f"a{suffix}"), 0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_garbage_is_rejected(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bytes(range(256)) * 10)
    with pytest.raises(ValueError, match=rf"a{suffix}"):
        ColumnDataset(path, ["row"], 10)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"b{suffix}")
    (tmp_path / f"a{suffix}").touch()
    if suffix in (".csv", ".jsonl"):
        # A text file without lines has no rows.
        assert ColumnDataset(tmp_path, ["row"], 10).num_rows == ROWS
        with pytest.raises(ValueError, match="there are no rows in"):
            ColumnDataset(tmp_path / f"a{suffix}", ["row"], 10)
    else:
        with pytest.raises(BadFileError, match=rf"a{suffix} \(0 bytes\) is not a complete"):
            ColumnDataset(tmp_path, ["row"], 10)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_rows(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"b{suffix}")
    write(tmp_path / f"a{suffix}", rows=0)
    assert rows_of(ColumnDataset(tmp_path, ["row"], 100)) == list(range(ROWS))
    with pytest.raises(ValueError, match="there are no rows in"):
        ColumnDataset(tmp_path / f"a{suffix}", ["row"], 10)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_unknown_column_and_a_column_of_another_type(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match=rf"a{suffix} has no column 'user'; it has row, noise: use one of these"):
        ColumnDataset(tmp_path, ["user"], 10)
    other = tmp_path / f"b{suffix}"
    write(other)
    renamed = pa.table({"row": ["x"], "noise": [1]})
    writers: dict[str, Callable[[], Any]] = {
        ".parquet": lambda: pq.write_table(renamed, other),
        ".orc": lambda: po.write_table(renamed, other),
        ".csv": lambda: other.write_text("row,noise\nx,1\n"),
        ".jsonl": lambda: other.write_text('{"row": "x", "noise": 1}\n'),
    }
    if suffix == ".arrow":
        with pa.OSFile(str(other), "wb") as sink, pa.ipc.new_file(sink, renamed.schema) as writer:
            writer.write_table(renamed)
    else:
        writers[suffix]()
    with pytest.raises(
        ValueError, match=rf"files must agree on the type of a column, but 'row' is int64 in .*a{suffix} and"
    ):
        ColumnDataset(tmp_path, ["row"], 10)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("read", [ReadOptions(), ReadOptions(num_threads=2), ReadOptions(prefetch=0)])
def test_only_the_damaged_row_group_is_skipped(tmp_path: Path, shuffle: bool, read: ReadOptions) -> None:
    write(tmp_path / "a.parquet")
    flip(tmp_path / "a.parquet")
    remaining = [*range(3000), *range(4000, ROWS)]

    def opened(**more: Any) -> ColumnDataset:
        return ColumnDataset(
            tmp_path,
            ["row", "noise"],
            300,
            shuffle=shuffle,
            read=replace(read, shuffle_buffer=700, on_bad_file="skip"),
            **more,
        )

    data = opened()
    with pytest.warns(RuntimeWarning, match=r"skipped row group 3 of .*a\.parquet: .*cannot be read"):
        got = list(data)
    assert sorted(rows_of(got)) == remaining
    # Batches keep their positions, so that ranks keep their numbers of batches.
    assert len(got) == len(data) == -(-ROWS // 300)
    (skipped,) = data.skipped
    assert (skipped.piece, skipped.rows) == ("row group 3", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        ranks = [opened(shard=ShardOptions(rank=rank, world_size=2)) for rank in range(2)]
        passes = [iter(rank) for rank in ranks]
        seen = [next(each) for _ in range(4) for each in passes]
        rest = opened()
        rest.load_state_dict(ranks[0].state_dict())
        assert sorted(rows_of(seen) + rows_of(rest)) == remaining


def test_damage_during_a_pass_is_raised(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    flip(tmp_path / "a.parquet")
    seen: list[int] = []
    data = ColumnDataset(tmp_path, ["row", "noise"], 1000, read=ReadOptions(num_threads=2))

    def consume() -> None:
        for batch in data:
            seen.extend(rows_of([batch]))

    with pytest.raises(BadFileError, match=r"row group 3 of .*a\.parquet cannot be read .*the file is damaged"):
        consume()
    assert seen == list(range(3000))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_that_is_removed(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "day"
    folder.mkdir()
    write(folder / f"a{suffix}")
    write(tmp_path / f"b{suffix}", ROWS)
    paths = [folder, tmp_path / f"b{suffix}"]
    strict = ColumnDataset(paths, ["row"], 100)
    lenient = ColumnDataset(paths, ["row"], 100, read=ReadOptions(on_bad_file="skip"))
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=rf"a{suffix} existed when the dataset was opened, but is missing now"):
        list(strict)
    with pytest.warns(RuntimeWarning, match="skipped"):
        assert rows_of(lenient) == list(range(ROWS, 2 * ROWS))
    assert sum(each.rows for each in lenient.skipped) == ROWS
    with pytest.raises(FileNotFoundError, match="day does not exist"):
        ColumnDataset(folder, ["row"], 100)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_rewritten_with_fewer_rows_is_rejected(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write(path)
    data = ColumnDataset(path, ["row"], 100)
    write(path, rows=ROWS - 1)
    with pytest.raises(BadFileError, match=rf"a{suffix}"):
        list(data)


def rewrite(path: Path, **options: Any) -> None:
    """Write the same number of rows and bytes at a later time."""
    before = path.stat()
    write(path, **options)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("read", [ReadOptions(), ReadOptions(num_threads=2), ReadOptions(prefetch=0)])
def test_a_rewritten_file_is_not_read_as_the_old_one(tmp_path: Path, suffix: str, read: ReadOptions) -> None:
    path = tmp_path / f"a{suffix}"
    write(path)
    write(tmp_path / f"b{suffix}", ROWS)
    strict = ColumnDataset(tmp_path, ["row"], 100, read=read)
    lenient = ColumnDataset(tmp_path, ["row"], 100, read=replace(read, on_bad_file="skip"))
    assert rows_of(strict) == list(range(2 * ROWS))
    rewrite(path, first=7)
    with pytest.raises(BadFileError, match=rf"a{suffix} changed since the dataset was opened .*open the dataset"):
        list(strict)
    with pytest.warns(RuntimeWarning, match="skipped"):
        assert rows_of(lenient) == list(range(ROWS, 2 * ROWS))
    assert sum(each.rows for each in lenient.skipped) == ROWS


def test_a_rewritten_parquet_file_is_not_read_with_the_old_footer(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"row": range(10)}), path)
    data = ColumnDataset(path, ["row"], 10)
    for other in ({"row": [number / 2 for number in range(10)]}, {"x": range(10)}, {"row": ["a"] * 10}):
        pq.write_table(pa.table(other), path)
        os.utime(path, ns=(0, 1))
        with pytest.raises(BadFileError, match=r"a\.parquet changed since"):
            list(data)


def test_a_file_rewritten_during_a_pass_yields_none_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path)
    passing = iter(ColumnDataset(path, ["row"], 100, read=ReadOptions(decoded_rows=100, prefetch=0)))
    seen = rows_of(islice(passing, 3))
    rewrite(path, first=ROWS)
    with pytest.raises(BadFileError, match=r"a\.parquet changed since"):
        seen += rows_of(passing)
    assert seen == list(range(len(seen)))


def test_a_file_removed_during_a_pass_is_read_to_the_end_of_its_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, rows=1000)
    passing = iter(ColumnDataset(path, ["row"], 100, read=ReadOptions(decoded_rows=100, prefetch=0)))
    next(passing)
    path.unlink()
    assert rows_of(passing) == list(range(100, 1000))
