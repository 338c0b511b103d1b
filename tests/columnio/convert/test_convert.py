"""Conversion of Arrow arrays by spec; values are compared with to_pylist of pyarrow."""

from __future__ import annotations

import gc
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid.columnio import Column, Dense, Ragged, Text, Weighted
from recis_hybrid.columnio.convert.convert import Converter, converter
from recis_hybrid.columnio.convert.numbers import Place
from recis_hybrid.ragged import RaggedTensor

PLACE = Place("x", "some.parquet", "row group 0, rows 0 to 9 of it")
int64s = st.integers(-(2**63), 2**63 - 1)


def converter_of(array: Any, spec: Column | None = None) -> Converter:
    return converter(spec, array.type, PLACE)


def read(array: Any, spec: Column | None = None) -> torch.Tensor | RaggedTensor:
    each = converter_of(array, spec)
    return each.tensor(each.clean(array, PLACE))


def dense(array: Any, spec: Column | None = None) -> torch.Tensor:
    tensor = read(array, spec)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def ragged(array: Any, spec: Column | None = None) -> RaggedTensor:
    tensor = read(array, spec)
    assert isinstance(tensor, RaggedTensor)
    return tensor.validate()


@pytest.mark.parametrize(
    ("arrow_type", "dtype"),
    [
        (pa.int8(), torch.int8),
        (pa.int16(), torch.int16),
        (pa.int32(), torch.int32),
        (pa.int64(), torch.int64),
        (pa.uint8(), torch.uint8),
        (pa.uint16(), torch.int32),
        (pa.uint32(), torch.int64),
        (pa.uint64(), torch.int64),
        (pa.float16(), torch.float16),
        (pa.float32(), torch.float32),
        (pa.float64(), torch.float64),
        (pa.bool_(), torch.bool),
    ],
)
def test_a_number_is_read_in_the_dtype_of_the_file(arrow_type: Any, dtype: torch.dtype) -> None:
    array = pa.array([0, 1, 1, 0, 1], pa.int64()).cast(pa.uint8()).cast(arrow_type)
    assert torch.equal(dense(array), torch.tensor([0, 1, 1, 0, 1], dtype=dtype))
    assert dense(array[:0]).tolist() == []
    assert converter_of(array).spec == Dense(dtype)
    if arrow_type != pa.float16():
        filled = dense(pa.array([None, *array.to_pylist()], arrow_type), Dense(default=1))
        assert torch.equal(filled, torch.tensor([1, 0, 1, 1, 0, 1], dtype=dtype))


def test_numbers_are_not_copied() -> None:
    array = pa.array(range(100), pa.int64())
    address = array.buffers()[1].address
    assert dense(array).data_ptr() == address
    assert dense(array[7:]).data_ptr() == address + 7 * 8
    floats = pa.array([0.5] * 10, pa.float32())
    assert dense(floats).data_ptr() == floats.buffers()[1].address


def test_lists_and_strings_are_not_copied() -> None:
    lists = pa.array([[1, 2], [], [3]], pa.large_list(pa.int64()))
    assert ragged(lists).values.data_ptr() == lists.values.buffers()[1].address
    fixed = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2))
    assert dense(fixed).data_ptr() == fixed.values.buffers()[1].address
    strings = pa.array(["ab", "", "c"])
    assert ragged(strings).values.data_ptr() == strings.buffers()[2].address
    large = strings.cast(pa.large_string())
    assert ragged(large).offsets.data_ptr() == large.buffers()[1].address


def test_a_tensor_keeps_its_memory() -> None:
    array = pa.array([5] * 100_000, pa.int64())
    tensor, text = dense(array), ragged(pa.array(["ab"] * 100_000))
    del array
    gc.collect()
    other = [pa.array([6] * 100_000, pa.int64()) for _ in range(4)]
    assert len(other) == 4
    assert bool((tensor == 5).all())
    assert set(text.to_strings(decode=False)) == {b"ab"}


@given(st.lists(int64s, max_size=30), st.data())
def test_any_slice_of_any_int64(values: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(values)))
    stop = data.draw(st.integers(first, len(values)))
    array = pa.array(values, pa.int64())[first:stop]
    assert dense(array).tolist() == values[first:stop]


def test_unsigned_ids_keep_their_bits() -> None:
    assert dense(pa.array([0, 2**63, 2**64 - 1], pa.uint64())).tolist() == [0, -(2**63), -1]


def test_another_dtype() -> None:
    assert torch.equal(dense(pa.array([1, 3]), Dense(torch.float32)), torch.tensor([1.0, 3.0]))
    assert torch.equal(dense(pa.array([True, False]), Dense(torch.float32)), torch.tensor([1.0, 0.0]))
    assert torch.equal(dense(pa.array([0.1]), Dense(torch.float32)), torch.tensor([0.1]))
    assert torch.equal(dense(pa.array([-7, 7]), Dense(torch.int8)), torch.tensor([-7, 7], dtype=torch.int8))


def test_dictionaries_are_read_as_their_values() -> None:
    assert dense(pa.array([5, 6, 5]).dictionary_encode()).tolist() == [5, 6, 5]
    strings = pa.array(["a", None, "a"]).dictionary_encode()
    assert ragged(strings, Text(default="-")).to_strings(decode=False) == [b"a", b"-", b"a"]


@given(st.lists(st.none() | st.lists(st.none() | int64s, max_size=5), max_size=12), st.booleans(), st.data())
def test_any_lists_with_nulls(rows: list[list[int | None] | None], large: bool, data: st.DataObject) -> None:
    arrow_type = (pa.large_list if large else pa.list_)(pa.int64())
    first = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(first, len(rows)))
    got = ragged(pa.array(rows, arrow_type)[first:stop], Ragged(default=-9, null_as_empty=True))
    assert got.to_lists() == [[-9 if value is None else value for value in row or []] for row in rows[first:stop]]


def test_values_below_a_null_list_are_not_read() -> None:
    offsets, values = pa.array([0, 2, 4], pa.int32()), pa.array([1, 2, 3, 4])
    array = pa.ListArray.from_arrays(offsets, values, mask=pa.array([True, False]))
    assert ragged(array, Ragged(null_as_empty=True)).to_lists() == [[], [3, 4]]


@given(st.lists(st.none() | st.lists(st.none() | int64s, min_size=3, max_size=3), max_size=9), st.booleans(), st.data())
def test_any_lists_of_one_length(rows: list[list[int | None] | None], fixed: bool, data: st.DataObject) -> None:
    arrow_type = pa.list_(pa.int64(), 3) if fixed else pa.list_(pa.int64())
    first = data.draw(st.integers(0, len(rows)))
    got = dense(pa.array(rows, arrow_type)[first:], Dense(length=3, default=4))
    want = [[4 if value is None else value for value in row or [None] * 3] for row in rows[first:]]
    assert got.shape == (len(rows) - first, 3)
    assert got.tolist() == want


def test_a_slice_of_clean_lists() -> None:
    for array in (pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64(), 2)), pa.array([[1], [2, 3], [4]])):
        each = converter_of(array)
        got = each.tensor(each.clean(array, PLACE).slice(1, 2))
        rows = got.to_lists() if isinstance(got, RaggedTensor) else got.tolist()
        assert rows == array.to_pylist()[1:]


@given(st.lists(st.none() | st.binary(max_size=6), max_size=12), st.data())
def test_any_strings_with_nulls(rows: list[bytes | None], data: st.DataObject) -> None:
    arrow_type = data.draw(st.sampled_from([pa.binary(), pa.large_binary()]))
    first = data.draw(st.integers(0, len(rows)))
    array = pa.array(rows, arrow_type)
    each = converter_of(array, Text(default="é"))
    want = ["é".encode() if row is None else row for row in rows]
    assert ragged(array[first:], Text(default="é")).to_strings(decode=False) == want[first:]
    cut = each.tensor(each.clean(array, PLACE)[first:])
    assert isinstance(cut, RaggedTensor)
    assert cut.validate().to_strings(decode=False) == want[first:]


@pytest.mark.parametrize("arrow_type", [pa.string(), pa.large_string(), pa.string_view()])
def test_strings_of_every_layout(arrow_type: Any) -> None:
    assert ragged(pa.array(["a", "", "é"], arrow_type)).to_strings(decode=False) == [b"a", b"", b"\xc3\xa9"]
    assert ragged(pa.array(["", ""], arrow_type)).to_strings(decode=False) == [b"", b""]


@pytest.mark.parametrize(
    ("array", "spec", "remedy"),
    [
        (pa.array([1, None]), None, r"use Dense\(default=0\)"),
        (pa.array(["a", None]), None, r'use Text\(default=""\)'),
        (pa.array([[1], None]), None, r"use Ragged\(null_as_empty=True\)"),
        (pa.array([[1], [None]]), Ragged(), r"use Ragged\(default=0\)"),
        (pa.array([[1], None]), Dense(length=1), r"use Dense\(length=1, default=0\)"),
    ],
)
def test_nulls_are_rejected_unless_allowed(array: Any, spec: Column | None, remedy: str) -> None:
    message = r"column 'x' of some\.parquet \(row group 0, rows 0 to 9 of it\) has 1 null in 2 values, .*"
    with pytest.raises(ValueError, match=message + remedy):
        read(array, spec)


@pytest.mark.parametrize(
    ("array", "spec", "message"),
    [
        (pa.array(["a"]), Dense(), r"'x' of some\.parquet .* is string, which Dense.* cannot read; .*with Text\(\)"),
        (pa.array([1]), Text(), r"is int64, which Text.* cannot read; read numbers with Dense\(\)"),
        (pa.array([1]), Dense(length=2), r"is int64, which Dense.* cannot read"),
        (pa.array([[1]]), Dense(), r"cannot read; read lists of numbers with Ragged\(\), or with Dense\(length"),
        (pa.array([[1]]), Text(), "read lists of numbers with"),
        (
            pa.array([{"a": 1}]),
            None,
            "which cannot become a tensor; read lists of structs .* with Weighted",
        ),
        (
            pa.array([None]),
            None,
            r"is null: all its values are null, .*; use a spec with a type, as in Dense\(",
        ),
        (pa.array([["a"]]), Ragged(), r"read strings and lists of strings with Text\(\)"),
        (pa.array([1]), Dense(torch.bool), r"is int64, which loses information as torch\.bool"),
        (pa.array([1]), Dense(torch.complex64), r"cannot be read as torch\.complex64; choose one of"),
        (pa.array([1]), "Dense", "needs a Dense, Ragged, Text or Weighted as its spec, got 'Dense'"),
    ],
)
def test_a_spec_that_does_not_fit_is_rejected(array: Any, spec: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        converter_of(array, spec)


@pytest.mark.parametrize("default", [2**63, -0.5, float("nan"), float("inf")])
def test_a_default_that_does_not_fit_is_rejected(default: float) -> None:
    with pytest.raises(ValueError, match=r"read as torch\.int64: default .* does not fit; use another"):
        converter_of(pa.array([1]), Dense(default=default))


def test_values_that_do_not_fit_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"'x' of some\.parquet .* does not fit into torch\.int8 .*wider dtype"):
        read(pa.array([1, 300]), Dense(torch.int8))
    with pytest.raises(ValueError, match=r"has 2 lists of length 1, 3 instead of 2; read it with Ragged\(\)"):
        read(pa.array([[1, 2], [1], [1, 2, 3]]), Dense(length=2))


def weighted(array: Any, spec: Column | None = None) -> tuple[list[Any], list[float]]:
    got = ragged(array, spec)
    assert got.weights is not None
    assert got.weights.dtype == torch.float32
    return got.to_strings(decode=False) if got.dtype == torch.uint8 else got.to_lists(), got.weights.tolist()


@pytest.mark.parametrize(
    ("fields", "id_field"),
    [
        ([("weight", pa.float32()), ("id", pa.int64())], 1),
        ([("weight", pa.int64()), ("id", pa.int64())], 1),
        ([("id", pa.int64()), ("weight", pa.int32())], 0),
        ([("id", pa.int64()), ("count", pa.int64())], 0),
        ([("weight", pa.int64()), ("item", pa.int64())], 1),
        ([("score", pa.float64()), ("item", pa.int32())], 1),
        ([("score", pa.float64()), ("item", pa.string())], 1),
        ([("count", pa.int64()), ("item", pa.string())], 1),
        ([("item", pa.uint64()), ("score", pa.float16())], 0),
    ],
)
def test_ids_and_weights_of_structs_are_recognized_by_name_or_type(
    fields: list[tuple[str, Any]], id_field: int
) -> None:
    text = pa.types.is_string(fields[id_field][1])
    (name, _), (other, _) = fields[id_field], fields[1 - id_field]
    pairs = [[(99, 7)], [], [(3, 2)]]
    rows = [[{name: str(one) if text else one, other: two} for one, two in row] for row in pairs]
    array = pa.array(rows, pa.list_(pa.struct(fields)))
    for spec in (None, Weighted()):
        each = converter_of(array, spec)
        got = each.tensor(each.clean(array, PLACE))
        assert isinstance(got, RaggedTensor)
        assert got.weights is not None
        assert got.weights.tolist() == [7, 2]
        assert (got.to_strings(decode=False) if text else got.to_lists()) == (
            [[b"99"], [], [b"3"]] if text else [[99], [], [3]]
        )


@pytest.mark.parametrize("types", [(pa.int64(), pa.int64()), (pa.float32(), pa.float64()), (pa.string(), pa.string())])
def test_structs_without_a_distinguishable_id_are_rejected(types: tuple[Any, Any]) -> None:
    struct = pa.struct([("a", types[0]), ("b", types[1])])
    with pytest.raises(
        TypeError,
        match=r"column 'x' of .* neither names nor types .* distinguish .*name them id and weight, or",
    ):
        converter_of(pa.array([[]], pa.list_(struct)), Weighted())


PAIRS = pa.list_(pa.struct([("item", pa.int64()), ("score", pa.float64())]))


@given(st.lists(st.none() | st.lists(st.tuples(int64s, st.integers(0, 9)), max_size=4), max_size=9), st.data())
def test_any_structs_of_ids_and_weights(rows: list[list[tuple[int, int]] | None], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(first, len(rows)))
    structs = [row and [{"item": one, "score": other} for one, other in row] for row in rows]
    each = converter_of(pa.array(structs, PAIRS), Weighted(null_as_empty=True))
    # Sliced before and after clean.
    for got in (
        each.tensor(each.clean(pa.array(structs, PAIRS)[first:stop], PLACE)),
        each.tensor(each.clean(pa.array(structs, PAIRS), PLACE)[first:stop]),
    ):
        assert isinstance(got, RaggedTensor)
        got.validate()
        assert got.weights is not None
        assert got.to_lists() == [[one for one, _ in row or []] for row in rows[first:stop]]
        assert got.weights.tolist() == [other for row in rows[first:stop] for _, other in row or []]


@given(st.lists(st.lists(st.tuples(int64s, st.integers(-8, 8)), max_size=4), max_size=9))
def test_any_text_of_ids_and_weights(rows: list[list[tuple[int, int]]]) -> None:
    array = pa.array([[f"{one}:{other / 4}" for one, other in row] for row in rows], pa.list_(pa.string()))
    ids, weights = weighted(array, Weighted())
    assert ids == [[one for one, _ in row] for row in rows]
    assert weights == [other / 4 for row in rows for _, other in row]


def test_string_ids_have_weights() -> None:
    array = pa.array([[{"id": "a", "weight": 1.0}, {"id": "", "weight": 2.0}], [], [{"id": "é", "weight": 3.0}]])
    assert weighted(array) == ([[b"a", b""], [], ["é".encode()]], [1.0, 2.0, 3.0])
    assert weighted(array[1:]) == ([[], ["é".encode()]], [3.0])


def test_defaults_of_weighted_columns() -> None:
    assert weighted(pa.array([["1:0.5", "2"], ["3:4"]]), Weighted(default_weight=1)) == ([[1, 2], [3]], [0.5, 1, 4])
    assert weighted(pa.array([["1|2"]]), Weighted(separator="|")) == ([[1]], [2])
    nulls = pa.array([[{"item": None, "score": None}]], PAIRS)
    assert weighted(nulls, Weighted(default=7, default_weight=0.5)) == ([[7]], [0.5])


@pytest.mark.parametrize(
    ("array", "spec", "message"),
    [
        (
            pa.array([["1"]]),
            Weighted(),
            r"1 strings without ':' between id and weight, such as '1'; .*default_weight",
        ),
        (pa.array([["a:1"]]), Weighted(), r'a string that is not "id:weight" .*structs for ids that are strings'),
        (pa.array([["1:x"]]), Weighted(), r'a string that is not "id:weight"'),
        (pa.array([["1:1", None]]), Weighted(), "has 1 null in 2 values.*an id and a weight in every string"),
        (pa.array([[None]], PAIRS), None, "an id and a weight in every struct"),
        (pa.array([[{"item": None, "score": 1.0}]], PAIRS), None, r"has 1 null in 1 values.*Weighted\(default=0\)"),
        (pa.array([[{"item": 1, "score": None}]], PAIRS), None, r"Weighted\(default_weight=1\)"),
        (pa.array([None], PAIRS), None, r"Weighted\(null_as_empty=True\)"),
    ],
)
def test_invalid_weighted_columns_are_rejected(array: Any, spec: Column | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(array, spec)


@given(st.lists(st.lists(st.lists(int64s, max_size=3), max_size=3), max_size=6), st.data())
def test_any_lists_of_lists(rows: list[list[list[int]]], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(first, len(rows)))
    array = pa.array(rows, pa.list_(pa.large_list(pa.int64())))
    each = converter_of(array)
    assert ragged(array[first:stop]).to_lists() == rows[first:stop]
    got = each.tensor(each.clean(array, PLACE)[first:stop])
    assert isinstance(got, RaggedTensor)
    assert got.validate().to_lists() == rows[first:stop]


@given(st.lists(st.lists(st.binary(max_size=3), max_size=3), max_size=6), st.data())
def test_any_lists_of_strings(rows: list[list[bytes]], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(rows)))
    array = pa.array(rows, pa.list_(pa.binary()))
    each = converter_of(array)
    got = each.tensor(each.clean(array, PLACE)[first:])
    assert isinstance(got, RaggedTensor)
    assert got.validate().to_strings(decode=False) == rows[first:]
