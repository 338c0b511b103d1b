"""Remote files: a real S3 server on this machine, fsspec, and explicit file systems."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch

from recis_hybrid.columnio import BadFileError, ColumnDataset, ReadOptions, Windows
from recis_hybrid.columnio.files.paths import find_files


def table(first: int, stop: int) -> Any:
    return pa.table(
        {"row": pa.array(range(first, stop), pa.int64()), "text": [f"é{row}" for row in range(first, stop)]}
    )


def rows_of(data: ColumnDataset) -> list[int]:
    columns = [batch["row"] for batch in data]
    assert all(isinstance(column, torch.Tensor) for column in columns)
    return list(chain.from_iterable(column.tolist() for column in columns))  # type: ignore[union-attr]


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> pafs.S3FileSystem:
    """A bucket with three files in day folders, and one hidden file."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mine")
    # Do not ask the machine for credentials.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    filesystem = pafs.S3FileSystem(
        endpoint_override=s3_server, scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    filesystem.create_dir("bucket")
    for day, first in ((1, 0), (2, 10), (3, 20)):
        pq.write_table(
            table(first, first + 10), f"bucket/clicks/day={day}/a.parquet", filesystem=filesystem, row_group_size=4
        )
    with filesystem.open_output_stream("bucket/clicks/_temporary/a.parquet") as sink:
        sink.write(b"not yet")
    return filesystem


def test_a_folder_and_a_pattern_on_s3(s3: pafs.S3FileSystem, s3_server: str) -> None:
    where = f"?endpoint_override={s3_server}&scheme=http&region=us-east-1"
    for path in ("s3://bucket/clicks", "s3://bucket/clicks/day=*/*.parquet", "s3://bucket/clicks/**/a.parquet"):
        data = ColumnDataset(path + where, ["row", "day", "text"], 7, read=ReadOptions(num_threads=2))
        batches = list(data)
        assert rows_of(data) == list(range(30))
        days = [day for batch in batches for day in batch["day"].tolist()]  # type: ignore[union-attr]
        assert days == [1] * 10 + [2] * 10 + [3] * 10
    some = ColumnDataset(f"s3://bucket/clicks/day=[12]{where}", ["row"], 7, shuffle=True)
    assert sorted(rows_of(some)) == list(range(20))
    with pytest.raises(FileNotFoundError, match="clicks/nowhere.* does not exist; check the path"):
        ColumnDataset(f"s3://bucket/clicks/nowhere{where}", ["row"], 7)
    with pytest.raises(FileNotFoundError, match="no file matches .*check the pattern"):
        ColumnDataset(f"s3://bucket/clicks/*.orc{where}", ["row"], 7)


def test_a_pass_over_s3_is_resumed_and_filtered(s3: pafs.S3FileSystem) -> None:
    def opened(prefetch: int = 2) -> ColumnDataset:
        wanted = [("day", ">", 1), ("row", "<", 28)]
        return ColumnDataset(
            "bucket/clicks",
            ["row"],
            3,
            read=ReadOptions(filesystem=s3, num_threads=2, prefetch=prefetch),
            shuffle=True,
            filters=wanted,
        )

    whole = rows_of(opened())
    assert sorted(whole) == list(range(10, 28))
    data = opened()
    passing = iter(data)
    seen = [row for _ in range(2) for row in next(passing)["row"].tolist()]  # type: ignore[union-attr]
    resumed = opened(prefetch=0)
    resumed.load_state_dict(data.state_dict())
    assert seen + rows_of(resumed) == whole


def test_a_removed_object_is_named_in_the_error(s3: pafs.S3FileSystem) -> None:
    data = ColumnDataset("bucket/clicks/day=3", ["row"], 3, read=ReadOptions(filesystem=s3))
    s3.delete_file("bucket/clicks/day=3/a.parquet")
    with pytest.raises(FileNotFoundError, match=r"clicks/day=3/a\.parquet"):
        list(data)


def test_a_rewritten_object_is_named_in_the_error(s3: pafs.S3FileSystem) -> None:
    data = ColumnDataset("bucket/clicks/day=3", ["row"], 3, read=ReadOptions(filesystem=s3))
    pq.write_table(table(20, 31), "bucket/clicks/day=3/a.parquet", filesystem=s3, row_group_size=4)
    with pytest.raises(BadFileError, match=r"clicks/day=3/a\.parquet changed since the dataset was opened"):
        list(data)


def test_windows_on_s3(s3: pafs.S3FileSystem, s3_server: str) -> None:
    for day in (1, 3):
        with s3.open_output_stream(f"bucket/clicks/day={day}/_SUCCESS") as sink:
            sink.write(b"")
    windows = Windows(f"s3://bucket/clicks?endpoint_override={s3_server}&scheme=http&region=us-east-1", idle_s=0)
    got = [(window.name, rows_of(ColumnDataset(window.paths, ["row"], 5))) for window in windows]
    assert got == [("day=1", list(range(10))), ("day=3", list(range(20, 30)))]


def test_fsspec_urls_and_file_systems(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for first in (0, 10):
        with memory.open(f"/clicks/part-{first:02}.parquet", "wb") as sink:
            pq.write_table(table(first, first + 10), sink)
    try:
        assert rows_of(ColumnDataset("memory://clicks", ["row"], 7)) == list(range(20))
        assert rows_of(ColumnDataset("memory://clicks/part-1*", ["row"], 7)) == list(range(10, 20))
        assert rows_of(ColumnDataset("/clicks", ["row"], 7, read=ReadOptions(filesystem=memory))) == list(range(20))
    finally:
        memory.rm("/clicks", recursive=True)
    pq.write_table(table(0, 5), tmp_path / "a.parquet")
    assert rows_of(ColumnDataset(f"file://{tmp_path}", ["row"], 7)) == list(range(5))
    below = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    assert rows_of(ColumnDataset("a.parquet", ["row"], 7, read=ReadOptions(filesystem=below))) == list(range(5))
    assert [file.path for file in find_files("", ReadOptions(filesystem=below))] == ["a.parquet"]
    wrong: Any = "s3"
    with pytest.raises(TypeError, match="filesystem must come from pyarrow.fs or fsspec, got str"):
        ColumnDataset("clicks", ["row"], 7, read=ReadOptions(filesystem=wrong))
