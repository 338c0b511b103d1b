"""CSV and JSON lines: values that do not fit the type of the first rows, and integers that do not fit into int64."""

from __future__ import annotations

import json
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid.columnio import BadFileError, Column, ColumnDataset, Dense, Ragged, ReadOptions, Text, Weighted
from recis_hybrid.ragged import RaggedTensor
from tests.support.columns import dense

SUFFIXES = [".csv", ".jsonl"]
# More than pyarrow reads at a time.
MANY = 200_000
BIG = 2**64 - 1


def write(path: Path, values: list[Any]) -> Path:
    """Write a column x of values, and a column y of row numbers."""
    if path.suffix == ".csv":
        lines = ["x,y", *(f"{value},{number}" for number, value in enumerate(values))]
    else:
        lines = [f'{{"x": {json.dumps(value)}, "y": {number}}}' for number, value in enumerate(values)]
    path.write_text("\n".join(lines) + "\n")
    return path


def numbers_of(data: ColumnDataset) -> list[Any]:
    return list(chain.from_iterable(dense(batch, "x").tolist() for batch in data))


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# Values of another type


INTEGERS = r"write 64-bit integers as Parquet, or as strings and read them as Text\(\)"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("first", "spec", "value", "message"),
    [
        (MANY, None, 0.5, r"'0\.5'.*, which is not int64; .* read it as Dense\(torch\.float32\)"),
        (MANY, None, BIG, rf"'{BIG}'.*, which is not int64; .* {INTEGERS}"),
        (MANY, Dense(torch.int32), 2**40, rf"'{2**40}'.*, which is not int32; .* read it as Dense\(torch\.int64\)"),
        (0, Dense(torch.int32), 2**40, rf"'{2**40}'.*, which is not int32; .* read it as Dense\(torch\.int64\)"),
        (0, Dense(torch.int64), 0.5, r"'0\.5'.*, which is not int64; .* read it as Dense\(torch\.float32\)"),
    ],
)
def test_a_value_of_another_type_is_not_damage(
    tmp_path: Path, suffix: str, first: int, spec: Column | None, value: Any, message: str
) -> None:
    path = write(tmp_path / f"a{suffix}", [*range(first), value])
    good = write(tmp_path / f"b{suffix}", [1])
    for bad in ("raise", "skip"):
        with pytest.raises(ValueError, match=rf"column 'x' of .*a{suffix} has the value {message}") as caught:
            list(ColumnDataset([path, good], {"x": spec}, 1000, read=ReadOptions(on_bad_file=bad)))  # type: ignore[arg-type]
        assert not isinstance(caught.value, BadFileError)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_remedy_works(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", [*range(MANY), 0.5])
    got = numbers_of(ColumnDataset(path, {"x": Dense(torch.float32)}, 1000))
    assert got == [*range(MANY), 0.5]


def test_words_after_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [*range(MANY), "u7"])
    with pytest.raises(
        ValueError, match=r"column 'x' .* has the value 'u7' in row 200002, which is not int64; .* Text\(\)"
    ):
        list(ColumnDataset(path, ["x"], 1000))
    assert sum(len(dense(batch, "y")) for batch in ColumnDataset(path, {"x": Text(), "y": None}, 1000)) == MANY + 1
    path = write(tmp_path / "a.jsonl", [*range(MANY), "u7"])
    with pytest.raises(
        ValueError, match=r"column 'x' .* has both a JSON number and a JSON string; .* rewrite the file with one"
    ):
        list(ColumnDataset(path, ["x"], 1000))


def test_values_in_lists_of_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*([number] for number in range(MANY)), [1, 0.5]])
    with pytest.raises(
        ValueError, match=r"column 'x' .* value '0\.5', which is not int64; .* Ragged\(torch\.float32\)"
    ):
        list(ColumnDataset(path, ["y", "x"], 1000))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_column_that_is_not_read_may_have_any_later_values(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", [*range(MANY), 0.5])
    assert ColumnDataset(path, ["y"], 1000).num_rows == MANY + 1


def test_bytes_that_are_not_text_are_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", list(range(MANY)))
    path.write_bytes(path.read_bytes().replace(b"\n199990,", b"\n\x01\x02\x01\x02\x01\x02,"))
    good = write(tmp_path / "b.csv", [1])
    with pytest.raises(BadFileError, match=r"block 0 of .*a\.csv cannot be read"):
        list(ColumnDataset(path, ["x"], 1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert numbers_of(ColumnDataset([path, good], ["x"], 1000, read=ReadOptions(on_bad_file="skip"))) == [1]


# Integers that do not fit into int64


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("spec", [None, Dense(), Dense(torch.int64)])
@given(values=st.lists(st.integers(0, BIG), min_size=1, max_size=20))
def test_64_bit_ids_keep_their_bits(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, spec: Column | None, values: list[int]
) -> None:
    path = write(tmp_path_factory.mktemp("ids") / f"a{suffix}", values)
    (batch,) = ColumnDataset(path, {"x": spec}, 100)
    assert dense(batch, "x").dtype == torch.int64
    assert dense(batch, "x").tolist() == [signed(value) for value in values]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_small_and_large_ids_are_joined(tmp_path: Path, suffix: str) -> None:
    small = write(tmp_path / f"a{suffix}", [-5, 3])
    large = write(tmp_path / f"b{suffix}", [BIG, 2**53 + 1])
    for paths, want in (([small, large], [-5, 3, -1, 2**53 + 1]), ([large, small], [-1, 2**53 + 1, -5, 3])):
        data = ColumnDataset(paths, ["x"], 3)
        assert numbers_of(data) == want


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("values", [[-1, BIG], [BIG, -1], [2**64, 5]])
def test_integers_beyond_64_bits_are_rejected(tmp_path: Path, suffix: str, values: list[int]) -> None:
    path = write(tmp_path / f"a{suffix}", values)
    with pytest.raises(TypeError, match=rf"column 'x' of .*a{suffix} .* with Dense\(torch\.float64\)"):
        ColumnDataset(path, ["x"], 10)
    with pytest.raises(ValueError, match=r"column 'x' .* 64-bit integers as Parquet, or as strings"):
        ColumnDataset(path, {"x": Dense(torch.int64)}, 10)
    assert numbers_of(ColumnDataset(path, {"x": Dense(torch.float64)}, 10)) == [float(value) for value in values]
    # A column that is not read does not matter.
    assert ColumnDataset(path, ["y"], 10).num_rows == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("first", [BIG, 1])
def test_large_ids_in_files_of_many_blocks(tmp_path: Path, suffix: str, first: int) -> None:
    values = [first, *range(2**63, 2**63 + MANY)]
    path = write(tmp_path / f"a{suffix}", values)
    assert numbers_of(ColumnDataset(path, ["x"], 50_000)) == [signed(value) for value in values]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("values", [[0.5, BIG], [5, 0.5], [-5, 0.5], [BIG, 0.5], [-1, BIG, 1e3 + 0.25], [-1, 0.5]])
def test_floats_stay_floats(tmp_path: Path, suffix: str, values: list[float]) -> None:
    path = write(tmp_path / f"a{suffix}", values)
    data = ColumnDataset(path, ["x"], 10)
    assert numbers_of(data) == [float(value) for value in values]
    assert data.columns == {"x": Dense(torch.float64)}


def test_large_ids_in_lists_and_structs_of_json(tmp_path: Path) -> None:
    rows = [
        {"ids": [1, BIG], "pairs": [{"weight": 0.5, "id": BIG}], "deep": [[BIG - 1], []]},
        {"ids": [], "pairs": [{"weight": 2, "id": 2**53 + 1}], "deep": []},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for specs in (
        {"ids": None, "pairs": None, "deep": None},
        {"ids": Ragged(torch.int64), "pairs": Weighted(), "deep": Ragged()},
    ):
        (batch,) = ColumnDataset(path, specs, 10)
        ids, pairs, deep = (batch[name] for name in ("ids", "pairs", "deep"))
        assert isinstance(ids, RaggedTensor)
        assert isinstance(pairs, RaggedTensor)
        assert isinstance(deep, RaggedTensor)
        assert ids.to_lists() == [[1, -1], []]
        assert pairs.to_lists() == [[-1], [2**53 + 1]]
        assert pairs.weights is not None
        assert pairs.weights.tolist() == [0.5, 2]
        assert deep.to_lists() == [[[-2], []], []]
