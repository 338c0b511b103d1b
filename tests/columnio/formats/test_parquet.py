"""Parquet files that are damaged, missing, or have unexpected columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recis_hybrid.columnio import ColumnDataset, Dense, ReadOptions

ROWS = 5000


def table(**columns: Any) -> Any:
    numbers = torch.randint(-(2**62), 2**62, (ROWS,), generator=torch.Generator().manual_seed(0))
    return pa.table({"id": pa.array(numbers.numpy()), "label": pa.array([0.5] * ROWS, pa.float32()), **columns})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "part.parquet"
    pq.write_table(
        table(), path, row_group_size=1000, compression="none", use_dictionary=False, write_page_checksum=True
    )
    return path


def test_a_missing_column_is_rejected_with_the_existing_ones(file: Path) -> None:
    with pytest.raises(ValueError, match=r"part\.parquet has no column 'user'; it has id, label: use one of these"):
        ColumnDataset(file, ["id", "user"], 10)


def test_a_wrong_type_is_rejected_before_any_row_is_read(tmp_path: Path) -> None:
    pq.write_table(table(name=["a"] * ROWS), tmp_path / "part.parquet")
    with pytest.raises(TypeError, match=r"column 'name' of .*part\.parquet is string, which Dense.*with Text\(\)"):
        ColumnDataset(tmp_path, {"name": Dense(torch.int64)}, 10)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_null_in_a_required_column_names_its_rows(tmp_path: Path, prefetch: int) -> None:
    values = [1] * ROWS
    path = tmp_path / "part.parquet"
    pq.write_table(table(user=[*values[:1200], None, *values[1201:]]), path, row_group_size=1000)
    message = (
        r"column 'user' of .*part\.parquet \(row group 1, rows 0 to 999 of it\) has 1 null in 1000 values.*default=0"
    )
    with pytest.raises(ValueError, match=message):
        list(ColumnDataset(path, ["user"], 100, read=ReadOptions(prefetch=prefetch)))
    read = list(ColumnDataset(path, {"user": Dense(default=0)}, ROWS))
    assert read[0]["user"].sum() == ROWS - 1  # type: ignore[union-attr]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9999])
def test_a_truncated_file_is_rejected(file: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    message = r"part\.parquet \(\d+ bytes\) is not a complete Parquet file .*rewrite it, or skip it"
    with pytest.raises(ValueError, match=message):
        ColumnDataset(file, ["id"], 10)


def test_another_format_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    path.write_text("id,label\n" + "1,0\n" * 100)
    with pytest.raises(ValueError, match="is not a complete Parquet file"):
        ColumnDataset(path, ["id"], 10)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_changed_byte_is_rejected_if_the_file_has_checksums(file: Path, prefetch: int) -> None:
    start = pq.ParquetFile(file).metadata.row_group(3).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[start + 2000] ^= 1
    file.write_bytes(content)
    passing = iter(ColumnDataset(file, ["id"], 1000, read=ReadOptions(prefetch=prefetch)))
    for _ in range(3):
        next(passing)
    message = r"row group 3 of .*part\.parquet cannot be read .*; the file is damaged: rewrite it, or skip it"
    with pytest.raises(ValueError, match=message):
        next(passing)


def test_a_removed_file_is_named_in_the_error(file: Path) -> None:
    data = ColumnDataset(file, ["id"], 1000)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"part\.parquet"):
        list(data)


def test_files_that_disagree_are_rejected(file: Path, tmp_path: Path) -> None:
    pq.write_table(table(label=[1] * ROWS), tmp_path / "part2.parquet")
    message = (
        r"'label' is float in .*part\.parquet and int64 in .*part2\.parquet; .* read the files separately, or rewrite"
    )
    with pytest.raises(ValueError, match=message):
        ColumnDataset(tmp_path, ["id", "label"], 10)
    assert ColumnDataset(tmp_path, ["id"], 10).num_rows == 2 * ROWS


def test_a_column_missing_in_a_later_file_names_that_file(file: Path, tmp_path: Path) -> None:
    pq.write_table(table().select(["id"]), tmp_path / "part2.parquet")
    with pytest.raises(ValueError, match=r"part2\.parquet has no column 'label'; it has id: "):
        ColumnDataset(tmp_path, ["id", "label"], 10)


def test_two_columns_of_one_name_are_rejected(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["id", "id"])
    pq.write_table(twice, tmp_path / "part.parquet")
    with pytest.raises(ValueError, match=r"part\.parquet has 2 columns named 'id'; give each a unique name"):
        ColumnDataset(tmp_path, ["id"], 10)


def test_an_empty_file_is_rejected_unless_another_has_rows(file: Path, tmp_path: Path) -> None:
    pq.write_table(table().slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(
        ValueError, match=r"there are no rows in .*empty\.parquet; check the files and the job that wrote them"
    ):
        ColumnDataset(tmp_path / "empty.parquet", ["id"], 10)
    assert ColumnDataset(tmp_path, ["id"], 10).num_rows == ROWS
