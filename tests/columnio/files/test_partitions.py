"""Columns in folder names, with and without columns of the same name in the files."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recis_hybrid.columnio import BadFileError, Column, ColumnDataset, Dense, ReadOptions, Text
from recis_hybrid.columnio.files.partitions import partitions_of
from recis_hybrid.ragged import RaggedTensor
from tests.support.columns import dense


def write(root: Path, folder: str, **columns: Any) -> None:
    (root / folder).mkdir(parents=True)
    pq.write_table(pa.table(columns), root / folder / "a.parquet", row_group_size=1)


def rows(data: ColumnDataset) -> list[int]:
    return [row for batch in data for row in dense(batch).tolist()]


def strings(column: Any) -> Any:
    assert isinstance(column, RaggedTensor)
    return column.to_strings(decode=False)


def test_names_of_folders() -> None:
    for paths, want in (
        (["day=7/a", "day=8/a"], [{"day": 7}, {"day": 8}]),
        (["a%20b=1/x", "a%20b=2/x"], [{"a b": 1}, {"a b": 2}]),
        (["k%3Dl=a%2Fb/x"], [{"k=l": "a/b"}]),
        (["day=07/a", "day=8/a"], [{"day": "07"}, {"day": "8"}]),
        (["day=7/a", "day=x/a"], [{"day": "7"}, {"day": "x"}]),
        (["day=7/a", "day=/a", "day=__HIVE_DEFAULT_PARTITION__/a"], [{"day": 7}, {"day": None}, {"day": None}]),
        (["day=7/a", f"day={2**63}/a"], [{"day": "7"}, {"day": str(2**63)}]),
        (["Day=1/day=2/a"], [{"Day": 1, "day": 2}]),
        (["=1/a", "day/a"], [{}, {}]),
        (["day=1/x/day=1/a"], [{"day": 1}]),
    ):
        assert partitions_of(paths) == want
    with pytest.raises(ValueError, match=r"the folders of day=1/day=2/a have both day=1 and day=2"):
        partitions_of(["day=1/day=2/a"])


def test_keys_that_differ_by_case_are_different_columns(tmp_path: Path) -> None:
    write(tmp_path, "Day=1", row=[0])
    with pytest.raises(ValueError, match=r"has no column 'day' \(did you mean Day\?\)"):
        ColumnDataset(tmp_path, ["day"], 10)
    (batch,) = ColumnDataset(tmp_path, ["Day"], 10)
    assert dense(batch, "Day").tolist() == [1]


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (["7", "8"], [pa.array([7, 7], pa.int32()), pa.array([8, 8], pa.int32())]),
        (["7", "8"], [pa.array(["7", "7"]), pa.array(["8", "8"])]),
        (
            ["2024-01-01", "2024-01-02"],
            [pa.array([datetime.date(2024, 1, day)] * 2, pa.date32()) for day in (1, 2)],
        ),
        (["a%20b", "c"], [pa.array(["a b"] * 2).dictionary_encode(), pa.array(["c"] * 2).dictionary_encode()]),
    ],
)
def test_a_column_that_agrees_with_its_folder_is_read(tmp_path: Path, keys: list[str], values: list[Any]) -> None:
    for number, (key, column) in enumerate(zip(keys, values, strict=True)):
        write(tmp_path, f"day={key}", row=[2 * number, 2 * number + 1], day=column)
    whole = ColumnDataset(tmp_path, ["row", "day"], 10)
    assert rows(whole) == [0, 1, 2, 3]
    value = values[1][0].as_py()
    (batch,) = ColumnDataset(tmp_path, ["row", "day"], 10, filters=[("day", "==", value)])
    (all_rows,) = whole
    assert dense(batch).tolist() == [2, 3]
    got, every = batch["day"], all_rows["day"]
    if isinstance(got, RaggedTensor):
        assert strings(got) == [value.encode()] * 2
        assert strings(every)[2:] == strings(got)
    else:
        assert dense(batch, "day").tolist() == dense(all_rows, "day").tolist()[2:]


def test_null_keys_and_columns_of_nulls(tmp_path: Path) -> None:
    write(tmp_path, "day=__HIVE_DEFAULT_PARTITION__", row=[0], day=pa.array([None], pa.int64()))
    write(tmp_path, "day=5", row=[1], day=pa.array([5]))
    (batch,) = ColumnDataset(tmp_path, {"row": None, "day": Dense(default=-1)}, 10)
    assert dict(zip(dense(batch).tolist(), dense(batch, "day").tolist(), strict=True)) == {0: -1, 1: 5}
    assert rows(ColumnDataset(tmp_path, ["row"], 10, filters=[("day", "==", None)])) == [0]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            pa.array([8, 9]),
            r"'day' of .*day=8/a\.parquet is 9 in row 0 of row group 1, but its folder name has 8",
        ),
        (pa.array([8, None]), r"is None in row 0 of row group 1, but its folder name has 8"),
        (pa.array(["8", "eight"]), r"is 'eight' in row 0 of row group 1"),
    ],
)
@pytest.mark.parametrize("bad", ["raise", "skip"])
@pytest.mark.parametrize("filters", [None, [("day", "==", 8)], [("day", "==", 7)], [("day", "!=", 7)]])
def test_a_column_that_contradicts_its_folder_is_rejected(
    tmp_path: Path, column: Any, message: str, bad: Any, filters: Any
) -> None:
    text = pa.types.is_string(column.type)
    write(tmp_path, "day=7", row=[0, 1], day=pa.array([7, 7]).cast(column.type))
    write(tmp_path, "day=8", row=[2, 3], day=column)
    if text and filters is not None:
        filters = [(name, sign, str(value)) for name, sign, value in filters]
    with pytest.raises(ValueError, match=message) as caught:
        list(ColumnDataset(tmp_path, ["day"], 10, filters=filters, read=ReadOptions(on_bad_file=bad)))
    assert not isinstance(caught.value, BadFileError)
    # A column that is not read is not compared.
    assert rows(ColumnDataset(tmp_path, ["row"], 10)) == [0, 1, 2, 3]
    # Folder names can be ignored.
    specs: dict[str, Column | None] = {"row": None, "day": Text(default="") if text else Dense(default=-1)}
    (batch,) = ColumnDataset(tmp_path, specs, 10, read=ReadOptions(partitions=False))
    assert dense(batch).tolist() == [0, 1, 2, 3]
    days = strings(batch["day"]) if text else dense(batch, "day").tolist()
    assert days == (
        [b"7", b"7", b"8", b"eight"] if text else [7, 7, *(v if v is not None else -1 for v in column.to_pylist())]
    )


def test_a_column_of_another_type_than_its_folder_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, "day=monday", row=[0], day=pa.array([1]))
    with pytest.raises(ValueError, match=r"'day' of .* is int64, but its folder name has 'monday'"):
        list(ColumnDataset(tmp_path, ["day"], 10))


def test_a_folder_name_rules_out_files_if_the_footer_agrees(tmp_path: Path) -> None:
    from recis_hybrid.columnio.files.opening import open_files

    write(tmp_path, "day=7", row=[0, 1], day=pa.array([7, 7]))
    write(tmp_path, "day=8", row=[2, 3], day=pa.array([8, 8]))
    files = open_files(tmp_path, ["row"], [("day", "==", 8)])
    assert [Path(str(piece.opened.file)).parent.name for piece in files.pieces] == ["day=8", "day=8"]


def test_states_with_url_encoded_keys(tmp_path: Path) -> None:
    for root in ("one", "two"):
        write(tmp_path / root, "a%20b=1", row=[0, 1, 2])
    first = ColumnDataset(tmp_path / "one" / "a%20b=1", ["row", "a b"], 2)
    next(iter(first))
    second = ColumnDataset(tmp_path / "two" / "a%20b=1", ["row", "a b"], 2)
    second.load_state_dict(first.state_dict())
    assert rows(second) == [2]
