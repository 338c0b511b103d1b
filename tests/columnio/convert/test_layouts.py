"""Less common Arrow layouts, maps, fields of structs, nulls without a type, and types that differ between files."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid.columnio import Column, ColumnDataset, Dense, Ragged, Text, Weighted
from recis_hybrid.columnio.convert.convert import converter
from recis_hybrid.columnio.convert.layouts import field, field_type, plain, plain_type
from recis_hybrid.columnio.convert.numbers import Place
from recis_hybrid.ragged import RaggedTensor
from tests.support.columns import dense

PLACE = Place("x", "some.arrow")
int64s = st.integers(-(2**63), 2**63 - 1)


def read(array: Any, spec: Column | None = None) -> Any:
    conversion = converter(spec, array.type, PLACE)
    return conversion.tensor(conversion.clean(array, PLACE))


def write(path: Path, table: Any) -> Path:
    """Write an Arrow file, which keeps every type."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def lists(column: Any) -> Any:
    assert isinstance(column, RaggedTensor)
    column.validate()
    return column.to_strings(decode=False) if column.dtype == torch.uint8 else column.to_lists()


# Layouts


def dictionary_of_lists() -> Any:
    return pa.DictionaryArray.from_arrays(pa.array([1, 0, None], pa.int8()), pa.array([[1, 2], [3]]))


TENSORS = pa.FixedSizeListArray.from_arrays(pa.array(range(8), pa.float32()), 4)


@pytest.mark.parametrize(
    ("array", "spec", "want"),
    [
        (pa.array(["a", "b", "a"]).dictionary_encode(), None, [b"a", b"b", b"a"]),
        (pa.array(["a", "b"], pa.string_view()).cast(pa.string()).dictionary_encode(), None, [b"a", b"b"]),
        (pa.DictionaryArray.from_arrays(pa.array([1, 0]), pa.array(["a", "b"], pa.string_view())), None, [b"b", b"a"]),
        (dictionary_of_lists(), Ragged(null_as_empty=True), [[3], [1, 2], []]),
        (
            pa.ListArray.from_arrays([0, 1, 3], pa.array(["a", "b", "a"]).dictionary_encode()),
            None,
            [[b"a"], [b"b", b"a"]],
        ),
        (pc.run_end_encode(pa.array([1, 1, None, 2])), Dense(default=0), [1, 1, 0, 2]),
        (pc.run_end_encode(pa.array(["u", "u", "v"]))[1:], None, [b"u", b"v"]),
        (pa.array(["a", "é"], pa.string_view()), None, [b"a", "é".encode()]),
        (pa.array([b"a", b"\xff"], pa.binary_view()), None, [b"a", b"\xff"]),
        (pa.array([b"ab", b"\x00c"], pa.binary(2)), None, [b"ab", b"\x00c"]),
        (pa.array([[b"ab"], []], pa.list_(pa.binary(2))), None, [[b"ab"], []]),
        (
            pa.array([[1], None, [], [2, 3]], pa.list_view(pa.int64())),
            Ragged(null_as_empty=True),
            [[1], [], [], [2, 3]],
        ),
        (pa.array([[1], [2, 3]], pa.large_list_view(pa.int64()))[1:], None, [[2, 3]]),
        (pa.ListViewArray.from_arrays([2, 0, 0], [1, 2, 3], pa.array([7, 8, 9])), None, [[9], [7, 8], [7, 8, 9]]),
        (pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, 2], pa.int8())), None, [True, False, True]),
        (pa.array([uuid.UUID(int=5).bytes], pa.uuid()), None, [uuid.UUID(int=5).bytes]),
        (pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"])), None, [b"{}"]),
        (
            pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (2, 2)), TENSORS),
            None,
            [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]],
        ),
        (pa.array([1.5, None], pa.float16()), Dense(default=2), [1.5, 2.0]),
        (pa.array([2.0, 4.0], pa.float16()), Dense(torch.int64), [2, 4]),
    ],
)
def test_layouts_are_read_as_the_values_they_store(array: Any, spec: Column | None, want: list[Any]) -> None:
    got = read(array, spec)
    assert (lists(got) if isinstance(got, RaggedTensor) else got.tolist()) == want


def test_plain_arrays_are_not_copied() -> None:
    for array in (
        pa.array([1, 2]),
        pa.array([["a"], []]),
        pa.array([{"a": 1}]),
        pa.array([[1]], pa.list_(pa.int8(), 1)),
    ):
        assert plain(array) is array
        assert plain_type(array.type) == array.type


@given(st.lists(st.none() | st.lists(st.none() | st.sampled_from("abc"), max_size=3), max_size=8), st.data())
def test_any_slice_of_lists_of_dictionaries(rows: list[Any], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(first, len(rows)))
    array = pa.array(rows, pa.list_(pa.dictionary(pa.int8(), pa.string())))[first:stop]
    decoded = plain(array)
    decoded.validate(full=True)
    assert decoded.type == plain_type(array.type)
    assert decoded.to_pylist() == rows[first:stop]


def test_unsupported_types_are_rejected_with_a_remedy() -> None:
    for array, message in (
        (pa.array([{"a": 1}]), r"read lists of structs .* with Weighted\(\), .* columns named x\.a$"),
        (pa.array([[(1, "a")]], pa.map_(pa.int64(), pa.string())), r"columns named x\.key, x\.value$"),
        (pa.array([(1, 2, 3)], pa.month_day_nano_interval()), r"write it as numbers, strings or lists of these$"),
    ):
        with pytest.raises(TypeError, match=message):
            read(array)
    for array in (
        pa.array([b"ab"], pa.binary(2)),
        pa.array(["a"], pa.string_view()),
        pa.array(["a"]).dictionary_encode(),
    ):
        with pytest.raises(TypeError, match=r"with Text\(\)"):
            read(array, Dense())


# Maps and structs


def test_json_specs_do_not_create_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"u": {"id": 1.0, "n": "01"}, "tags": ["a", "b"], "deep": [[1], []]}\n')
    (tmp_path / "b.jsonl").write_text('{"u": null, "tags": [], "deep": [[2]], "rare": 5}\n')
    specs: dict[str, Column | None] = {
        "u.id": Dense(torch.int64, default=-1),
        "u.n": Text(default=""),
        "tags": Text(),
        "deep": Ragged(torch.int64),
        "rare": Dense(torch.int64, default=0),
    }
    (batch,) = ColumnDataset(tmp_path, specs, 10)
    assert dense(batch, "u.id").tolist() == [1, -1]
    assert lists(batch["u.n"]) == [b"01", b""]
    assert lists(batch["tags"]) == [[b"a", b"b"], []]
    assert lists(batch["deep"]) == [[[1], []], [[2]]]
    assert dense(batch, "rare").tolist() == [0, 5]
    with pytest.raises(ValueError, match=r"no row at the beginning of .*a\.jsonl.* has a column 'rrare'"):
        ColumnDataset(tmp_path, {"rrare": Dense(torch.int64, default=0)}, 10)


def test_maps_are_ids_with_weights_or_two_columns(tmp_path: Path) -> None:
    scores = pa.array([[(7, 1.5)], None, [], [(8, 2.0), (9, None)]], pa.map_(pa.int64(), pa.float64()))
    path = write(
        tmp_path / "a.arrow",
        pa.table({"x": scores, "names": pa.array([[("a", "u")]] * 4, pa.map_(pa.string(), pa.string()))}),
    )
    specs: dict[str, Column | None] = {
        "x": Weighted(null_as_empty=True, default_weight=0.5),
        "x.key": Ragged(null_as_empty=True),
        "x.value": Ragged(null_as_empty=True, default=-1),
        "names.key": None,
        "names.value": None,
    }
    (batch,) = ColumnDataset(path, specs, 10)
    weighted = batch["x"]
    assert lists(weighted) == lists(batch["x.key"]) == [[7], [], [], [8, 9]]
    assert isinstance(weighted, RaggedTensor)
    assert weighted.weights is not None
    assert weighted.weights.tolist() == [1.5, 2.0, 0.5]
    assert lists(batch["x.value"]) == [[1.5], [], [], [2.0, -1.0]]
    assert lists(batch["names.key"]) == [[b"a"]] * 4
    assert lists(batch["names.value"]) == [[b"u"]] * 4


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_fields_of_structs_are_columns(tmp_path: Path, suffix: str, shuffle: bool) -> None:
    rows = [{"row": 0, "age": 7, "in": {"city": "x"}}, None, {"row": 2, "age": None, "in": None}]
    user = pa.array(
        rows, pa.struct([("row", pa.int64()), ("age", pa.int64()), ("in", pa.struct([("city", pa.string())]))])
    )
    bought = pa.array([[{"id": 1, "w": 0.5}], [], [{"id": 2, "w": 1.0}, {"id": 3, "w": 2.0}]])
    table = pa.table({"user": user, "bought": bought, "a.b": [1, 2, 3]})
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        write(path, table)
    specs: dict[str, Column | None] = {
        "user.age": Dense(default=-1),
        "user.in.city": Text(default="?"),
        "bought.id": None,
        "bought.w": None,
        "a.b": None,
    }
    data = ColumnDataset(path, specs, 10, shuffle=shuffle)
    (batch,) = data
    order = [value - 1 for value in dense(batch, "a.b").tolist()]
    assert sorted(order) == [0, 1, 2]
    assert dense(batch, "user.age").tolist() == [[7, -1, -1][row] for row in order]
    assert lists(batch["user.in.city"]) == [[b"x", b"?", b"?"][row] for row in order]
    assert lists(batch["bought.id"]) == [[[1], [], [2, 3]][row] for row in order]
    assert lists(batch["bought.w"]) == [[[0.5], [], [1.0, 2.0]][row] for row in order]
    with pytest.raises(ValueError, match=r"has no column 'user\.agee' \(did you mean user\.row, user\.age"):
        ColumnDataset(path, ["user.agee"], 10)


@given(st.lists(st.none() | st.lists(st.none() | int64s, max_size=3), max_size=7), st.booleans(), st.data())
def test_any_field_of_structs_in_lists(rows: list[Any], large: bool, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(rows)))
    struct = pa.struct([("b", pa.string()), ("a", pa.int64())])
    values = [row and [None if each is None else {"a": each, "b": ""} for each in row] for row in rows]
    array = pa.array(values, (pa.large_list if large else pa.list_)(struct))[first:]
    got = field(array, ("a",))
    got.validate(full=True)
    assert got.type == field_type(array.type, ("a",))
    assert got.to_pylist() == rows[first:]


# All nulls


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        (Dense(default=1), [1, 1]),
        (Dense(default=1.5), [1.5, 1.5]),
        (Dense(torch.float64, default=1), [1.0, 1.0]),
        (Dense(torch.bool, default=1), [True, True]),
        (Dense(torch.int32, default=1, length=2), [[1, 1], [1, 1]]),
        (Dense(unit="s", default=9), [9, 9]),
        (Dense(scale=2, default=9), [9, 9]),
        (Ragged(torch.int64, null_as_empty=True), [[], []]),
        (Text(default="z"), [b"z", b"z"]),
        (Text(null_as_empty=True), [[], []]),
        (Weighted(null_as_empty=True), [[], []]),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv", ".jsonl"])
def test_a_column_of_only_nulls_takes_the_default(tmp_path: Path, suffix: str, spec: Column, want: list[Any]) -> None:
    path = tmp_path / f"a{suffix}"
    table = pa.table({"x": pa.nulls(2), "y": [1, 2]})
    if suffix == ".parquet":
        pq.write_table(table, path)
    elif suffix == ".arrow":
        write(path, table)
    elif suffix == ".csv":
        if isinstance(spec, Text | Ragged | Weighted) or spec.length:
            pytest.skip("CSV has neither lists nor nulls of text")
        path.write_text("x,y\n,1\n,2\n")
    else:
        if spec == Text(null_as_empty=True):
            pytest.skip("null_as_empty needs lists, and JSON text is not a list")
        path.write_text('{"x": null, "y": 1}\n{"x": null, "y": 2}\n')
    (batch,) = ColumnDataset(path, {"x": spec}, 10)
    got = batch["x"]
    assert (lists(got) if isinstance(got, RaggedTensor) else got.tolist()) == want


def test_a_column_without_a_type_needs_a_spec(tmp_path: Path) -> None:
    for spec in (None, Dense(), Ragged(null_as_empty=True)):
        with pytest.raises(
            TypeError,
            match=r"all its values are null, .*; use a spec with a type, as in Dense\(",
        ):
            read(pa.nulls(2), spec)
    with pytest.raises(ValueError, match=r"has 2 nulls in 2 values.*Dense\(default=0\)"):
        read(pa.nulls(2), Dense(torch.int64))
    assert lists(read(pa.array([[], None], pa.list_(pa.null())), Ragged(torch.int64, null_as_empty=True))) == [[], []]
    # A file of nulls takes the type of another file with values.
    for number, values in enumerate((pa.nulls(1), pa.array([5]), pa.nulls(2))):
        pq.write_table(pa.table({"x": values}), tmp_path / f"{number}.parquet")
    (batch,) = ColumnDataset(tmp_path, {"x": Dense(default=0)}, 10)
    assert dense(batch, "x").tolist() == [0, 5, 0, 0]


def test_empty_lists_count_as_missing_if_a_length_is_set() -> None:
    for arrow_type in (pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_view(pa.int64())):
        array = pa.array([[1, 2], [], None, [3, 4]], arrow_type)
        assert read(array, Dense(length=2, default=9)).tolist() == [[1, 2], [9, 9], [9, 9], [3, 4]]
        with pytest.raises(ValueError, match=r"has 2 null or empty lists in 4 values.*Dense\(length=2, default=0\)"):
            read(array, Dense(length=2))
    with pytest.raises(ValueError, match=r"has 1 lists of length 1 instead of 2"):
        read(pa.array([[1], []]), Dense(length=2, default=0))


# Floats that are integers


@pytest.mark.parametrize(("arrow_type", "bits"), [(pa.float16(), 11), (pa.float32(), 24), (pa.float64(), 53)])
def test_whole_floats_become_integers_if_they_are_exact(arrow_type: Any, bits: int) -> None:
    fits = [0.0, -3.0, float(2**bits), None]
    assert read(pa.array(fits, arrow_type), Dense(torch.int64, default=-1)).tolist() == [0, -3, 2**bits, -1]
    assert lists(read(pa.array([[1.0], []], pa.list_(arrow_type)), Ragged(torch.int64))) == [[1], []]
    for wrong in (0.5, float(2 ** (bits + 1)), float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=rf"has the float {re.escape(repr(wrong))}, .* not an integer .*\(at most {2**bits}\)"
        ):
            read(pa.array([1.0, wrong], arrow_type), Dense(torch.int64))
    with pytest.raises(ValueError, match=r"does not fit into torch\.int8"):
        read(pa.array([300.0], arrow_type), Dense(torch.int8))


# Files that differ


def open_all(tmp_path: Path, arrays: Sequence[Any], spec: Column | None) -> Any:
    for number, array in enumerate(arrays):
        # Different columns, in a different order.
        columns = {"x": array, "y": array} if number % 2 else {"z": array, "x": array}
        write(tmp_path / f"{number}.arrow", pa.table(columns))
    (batch,) = ColumnDataset(tmp_path, {"x": spec}, 100)
    got = batch["x"]
    return lists(got) if isinstance(got, RaggedTensor) else got.tolist()


TOP = 2**64 - 1


@pytest.mark.parametrize(
    ("one", "other", "spec", "want"),
    [
        (pa.array([TOP], pa.uint64()), pa.array([5]), None, [-1, 5]),
        (pa.array([[TOP]], pa.list_(pa.uint64())), pa.array([[5]]), None, [[-1], [5]]),
        (pa.array([[TOP]], pa.large_list(pa.uint64())), pa.array([[5]]), None, [[-1], [5]]),
        (pa.array([[TOP]], pa.list_(pa.uint64(), 1)), pa.array([[5]], pa.list_(pa.int64(), 1)), None, [[-1], [5]]),
        (pa.array([[TOP]], pa.list_(pa.uint64(), 1)), pa.array([[5, 6]]), None, [[-1], [5, 6]]),
        (pa.array([[[TOP]]], pa.list_(pa.list_(pa.uint64()))), pa.array([[[5], []]]), None, [[[-1]], [[5], []]]),
        (pa.array([[TOP]], pa.list_view(pa.uint64())), pa.array([[5]], pa.large_list(pa.int32())), None, [[-1], [5]]),
        (pa.array([1], pa.int8()), pa.array([2**40]), None, [1, 2**40]),
        (pa.array([1.5], pa.float32()), pa.array([0.1]), None, [1.5, 0.1]),
        (pa.array([1]), pa.array([2.0]), Dense(torch.int64), [1, 2]),
        (pa.array([1]), pa.array([2.5]), Dense(torch.float32), [1.0, 2.5]),
        (pa.array([True]), pa.array([0.25]), Dense(torch.float32), [1.0, 0.25]),
        (pa.array(["a"]), pa.array(["b"], pa.large_string()), None, [b"a", b"b"]),
        (pa.array(["a"]).dictionary_encode(), pa.array(["b"], pa.string_view()), None, [b"a", b"b"]),
        (pa.array([["a"]]), pa.array([["b"]], pa.large_list(pa.large_string())), None, [[b"a"], [b"b"]]),
    ],
)
def test_types_that_can_be_joined(tmp_path: Path, one: Any, other: Any, spec: Column | None, want: list[Any]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "back").mkdir()
    assert open_all(tmp_path / "there", [one, other], spec) == want
    assert open_all(tmp_path / "back", [other, one], spec) == want[::-1]


def test_structs_with_fields_in_a_different_order(tmp_path: Path) -> None:
    one = pa.array([[{"id": 1, "weight": 0.5}]])
    other = pa.array(
        [[{"weight": 0.25, "id": 3}]], pa.large_list(pa.struct([("weight", pa.float32()), ("id", pa.uint64())]))
    )
    assert open_all(tmp_path, [one, other], None) == [[1], [3]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1]), pa.array([1.5])),
        (pa.array([1]), pa.array(["a"])),
        (pa.array([1]), pa.array([True])),
        (pa.array([1]), pa.array([[1]])),
        (pa.array([1]), pa.array([1], pa.timestamp("s"))),
        (pa.array([1], pa.duration("s")), pa.array([1], pa.timestamp("s"))),
    ],
)
def test_types_that_cannot_be_joined_are_rejected(tmp_path: Path, one: Any, other: Any) -> None:
    with pytest.raises(
        ValueError, match=r"'x' is .* in .*0\.arrow and .* in .*1\.arrow; .* read the files separately, or rewrite"
    ):
        open_all(tmp_path, [one, other], None)
