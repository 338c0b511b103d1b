from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid.ragged import Batch, RaggedTensor, batch_size, batch_to, build, checks
from tests.support.devices import no_synchronization, on_accelerators

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.lists(INT64, max_size=5), max_size=8))
def test_lists_survive_the_round_trip(rows: list[list[int]]) -> None:
    ragged = RaggedTensor.from_lists(rows)
    assert ragged.to_lists() == rows
    assert ragged.dtype == torch.int64
    assert ragged.batch_size == len(ragged) == len(rows)
    assert ragged.lengths().tolist() == [len(row) for row in rows]


@given(st.lists(st.binary(max_size=6), max_size=8))
def test_strings_survive_the_round_trip(strings: list[bytes]) -> None:
    column = RaggedTensor.from_strings(strings)
    assert column.values.dtype == torch.uint8
    assert column.to_strings(decode=False) == strings


@given(st.lists(st.text(max_size=6), max_size=8))
def test_text_is_encoded_as_utf8(strings: list[str]) -> None:
    column = RaggedTensor.from_strings(strings)
    assert column.to_strings() == strings
    assert column.to_strings(decode=False) == [string.encode() for string in strings]


@pytest.mark.parametrize(
    ("column", "row"),
    [(["a", b"\xff", b"\xfe"], 1), ([["a", "b"], [], ["c", b"\xff"]], 2), ([[["a"], []], [[b"\xff"]]], 1)],
)
def test_to_strings_names_the_row_that_is_not_utf8(column: list[Any], row: int) -> None:
    strings = RaggedTensor.from_strings(column)
    with pytest.raises(ValueError, match=rf"must be UTF-8, got b'\\xff' in row {row} \(invalid start byte at byte 0\)"):
        strings.to_strings()
    assert strings.to_strings(decode=False)[row] in (b"\xff", [b"c", b"\xff"], [[b"\xff"]])


def test_from_lists_accepts_a_dtype_and_weights() -> None:
    ragged = RaggedTensor.from_lists([[1, 2], [3]], dtype=torch.float64, weights=[[0.5, 2], [1]])
    assert ragged.dtype == torch.float64
    assert ragged.weights is not None
    assert ragged.weights.dtype == torch.float32
    assert ragged.weights.tolist() == [0.5, 2.0, 1.0]


def test_from_lists_rejects_weights_of_a_different_shape() -> None:
    with pytest.raises(ValueError, match=r"as many weights as values.*\[2\] values and \[1\] weights"):
        RaggedTensor.from_lists([[1, 2]], weights=[[1.0]])


def test_values_may_have_more_dimensions() -> None:
    ragged = RaggedTensor(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 3]))
    assert ragged.values[ragged.offsets[1] : ragged.offsets[2]].tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert str(ragged.to_lists()) == "[[[0.0, 1.0]], [[2.0, 3.0], [4.0, 5.0]]]"


def test_a_batch_without_rows_is_valid() -> None:
    ragged = RaggedTensor(torch.empty(0, dtype=torch.int64), torch.tensor([0]))
    assert ragged.batch_size == 0
    assert ragged.to_lists() == []
    assert ragged.lengths().shape == (0,)


VALUES = torch.arange(3)


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        (torch.tensor([0, 3], dtype=torch.int32), TypeError, "offsets must be int64, got torch.int32"),
        (torch.tensor([[0, 3]]), ValueError, r"must be \[B \+ 1\].*int64\[1, 2\]"),
        (torch.empty(0, dtype=torch.int64), ValueError, r"the offsets \[0\]"),
        (torch.tensor([1, 3]), ValueError, "must start with 0, got 1"),
        (torch.tensor([0, 2, 1, 3]), ValueError, "must not decrease, got 2 and then 1 at row 1"),
        (torch.tensor([0, -1, 3]), ValueError, "must not decrease, got 0 and then -1 at row 0"),
        (torch.tensor([0, 2]), ValueError, "end with the number of values, 3, got 2"),
        (torch.tensor([0, 4]), ValueError, "end with the number of values, 3, got 4"),
        (np.array([0, 3]), TypeError, "offsets must be a torch.Tensor, got ndarray"),
    ],
)
def test_wrong_offsets_are_rejected(offsets: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RaggedTensor(VALUES, offsets)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.ones(3, dtype=torch.float64), TypeError, "weights must be float32"),
        (torch.ones(2), ValueError, r"\[N\], one for each value, N = 3, got float32\[2\]"),
        (torch.ones(3, 1), ValueError, r"\[N\], one for each value, N = 3, got float32\[3, 1\]"),
        (torch.ones(3, device="meta"), ValueError, "values must be on one device, got meta and cpu"),
    ],
)
def test_wrong_weights_are_rejected(weights: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RaggedTensor(VALUES, torch.tensor([0, 3]), weights)


def test_other_wrong_tensors_are_rejected() -> None:
    with pytest.raises(ValueError, match="without dimensions"):
        RaggedTensor(torch.tensor(1), torch.tensor([0]))
    with pytest.raises(ValueError, match="got cpu and meta"):
        RaggedTensor(VALUES.to("meta"), torch.tensor([0, 3]))


def test_ragged_tensors_are_frozen_and_compare_by_identity() -> None:
    one, other = RaggedTensor.from_lists([[1]]), RaggedTensor.from_lists([[1]])
    assert one == one  # noqa: PLR0124
    assert one != other
    with pytest.raises(FrozenInstanceError):
        one.values = VALUES  # type: ignore[misc]


def test_repr_shows_shapes_but_no_content() -> None:
    assert repr(RaggedTensor.from_lists([[1.0]], weights=[[2.0]])) == (
        "RaggedTensor(batch_size=1, values=float32[1], weights=float32[1], device=cpu)"
    )


def test_to_returns_self_if_nothing_moves() -> None:
    ragged = RaggedTensor.from_lists([[1, 2], []], weights=[[1, 2], []])
    assert ragged.to("cpu") is ragged
    moved = ragged.to("meta")
    assert moved.device == moved.offsets.device == torch.device("meta")
    assert moved.weights is not None
    assert moved.weights.device.type == "meta"


def test_to_strings_rejects_numbers() -> None:
    with pytest.raises(TypeError, match="uint8"):
        RaggedTensor.from_lists([[1]]).to_strings(decode=False)


def test_validate_finds_overwritten_offsets() -> None:
    ragged = RaggedTensor.from_lists([[1], [2]])
    assert ragged.validate() is ragged
    ragged.offsets[1] = 5
    with pytest.raises(ValueError, match="must not decrease, got 5 and then 2"):
        ragged.validate()


def test_compiled_functions_can_build_ragged_tensors() -> None:
    def double(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ragged = RaggedTensor(values, offsets)
        return ragged.values * 2 + ragged.lengths().sum()

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert compiled(VALUES, torch.tensor([0, 1, 3])).tolist() == [3, 5, 7]


def test_batch_helpers() -> None:
    batch: Batch = {"id": torch.tensor([1, 2]), "clicks": RaggedTensor.from_lists([[7, 8], []])}
    assert batch_size(batch) == 2
    moved = batch_to(batch, "meta")
    assert [column.device.type for column in moved.values()] == ["meta", "meta"]
    assert batch_to(batch, "cpu")["id"] is batch["id"]


def test_columns_with_different_numbers_of_rows_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"\{'id': 3, 'clicks': 1\}"):
        batch_size({"id": VALUES, "clicks": RaggedTensor.from_lists([[7]])})
    with pytest.raises(ValueError, match="no columns"):
        batch_size({})


def test_unused_values_are_valid_on_a_gpu() -> None:
    lists, short = torch.tensor([0, 2, 3]), torch.tensor([0, 1])
    checks.check_content(4, lists, (short,), tail=True)
    with pytest.raises(ValueError, match=r"outer\[0\] must end with the number of lists of the next level, 2, got 1"):
        checks.check_content(3, lists, (short,))
    with pytest.raises(ValueError, match="offsets must end with the number of values, 2, got 3"):
        checks.check_content(2, lists, (), tail=True)


@on_accelerators
def test_nothing_waits_for_a_gpu(device: str) -> None:
    ragged = RaggedTensor.from_lists([[1, 2], []]).to(device)
    with no_synchronization(device):
        again = RaggedTensor(ragged.values + 1, ragged.offsets.clone())
        lengths = again.lengths()
        assert repr(again).endswith(f"device={device}:0)")
    assert lengths.tolist() == [2, 0]
    assert again.to("cpu").to_lists() == [[2, 3], []]
    RaggedTensor(ragged.values, ragged.offsets.clamp(max=1)).validate()  # a value after the last list
    broken = RaggedTensor(ragged.values, ragged.offsets + 1)
    with pytest.raises(ValueError, match="must start with 0, got 1"):
        broken.validate()


def test_rows_of_weighted_strings() -> None:
    strings = RaggedTensor.from_strings([["abc", "de"], ["f"]])
    column = RaggedTensor(strings.values, strings.offsets, torch.tensor([1.0, 2.0, 3.0]), strings.outer)
    assert [row.to_strings(decode=False) for row in column] == [[b"abc", b"de"], [b"f"]]
    assert column[0].weights is None
    weights = column[1:].weights
    assert weights is not None
    assert weights.tolist() == [3.0]


def test_unused_values_are_dropped() -> None:
    # As in results from a GPU, whose size is an upper bound.
    column = RaggedTensor.unchecked(torch.tensor([1, 2, 7, 7]), torch.tensor([0, 1, 2]), torch.ones(4))
    both = RaggedTensor.concat([column, column]).validate()
    assert both.to_lists() == [[1], [2], [1], [2]]
    assert both.weights is not None
    assert both.weights.shape == (4,)
    assert column.to_padded(2, padding=-1).tolist() == [[1, -1], [2, -1]]
    lists = RaggedTensor.unchecked(column.values, torch.tensor([0, 1, 2, 2, 2]), None, (torch.tensor([0, 1, 2]),))
    assert RaggedTensor.concat([lists, lists]).validate().to_lists() == [[[1]], [[2]], [[1]], [[2]]]


@pytest.mark.parametrize("strings", [False, True])
def test_unused_values_of_a_gpu_are_dropped_on_the_cpu(strings: bool) -> None:
    values = torch.arange(9, dtype=torch.uint8 if strings else torch.int64)
    # Rows of two lists and one list; two more lists and four more values are unused.
    weights = torch.arange(5.0 if strings else 9.0)
    whole = RaggedTensor.unchecked(values, torch.tensor([0, 1, 3, 5, 6, 9]), weights, (torch.tensor([0, 2, 3]),))
    rows = whole._in_use().validate()
    assert rows.to_lists() == [[[0], [1, 2]], [[3, 4]]]
    assert rows.weights is not None
    assert rows.weights.tolist() == list(range(3 if strings else 5))


@on_accelerators
def test_columns_shortened_on_a_gpu_are_valid_on_the_cpu(device: str) -> None:
    offsets = torch.tensor([0, 1, 3], device=device)
    column = RaggedTensor.unchecked(torch.arange(5, device=device), offsets, torch.ones(5, device=device))
    assert column.to("cpu").validate().to_lists() == [[0], [1, 2]]
    assert column.to(device) is column


# Indices, compared with nested Python lists


def plain(result: Any) -> Any:
    return result.to_lists() if isinstance(result, RaggedTensor) else result.tolist()


def indexed(nested: Any, which: Sequence[Any]) -> Any:
    if not which:
        return nested
    first, rest = which[0], which[1:]
    if isinstance(first, int):
        return indexed(nested[first], rest)
    chosen = nested[first] if isinstance(first, slice) else [nested[row] for row in first]
    return [indexed(item, rest) for item in chosen]


bounds = st.one_of(st.none(), st.integers(-5, 5), st.sampled_from([2**63, -(2**63), 2**200]))
slices = st.builds(slice, bounds, bounds, st.one_of(st.none(), st.sampled_from([1, 2, 3, -1, -2, 2**70, -(2**70)])))
inner_index = st.one_of(slices, st.integers(-3, 3))


@given(
    st.lists(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=3), max_size=4),
    st.one_of(slices, st.integers(-5, 4), st.lists(st.integers(0, 1), max_size=3)),
    st.lists(inner_index, max_size=2),
    st.booleans(),
)
def test_indices_match_nested_lists(rows: Any, first: Any, inner: list[Any], nested: bool) -> None:
    values = torch.tensor([item for row in rows for part in row for item in part], dtype=torch.int64)
    offsets = build.offsets_of([len(part) for row in rows for part in row])
    outer = build.offsets_of([len(row) for row in rows])
    column = RaggedTensor(values, offsets, values * 0.5, (outer,))
    if not nested:
        rows = [[item for part in row for item in part] for row in rows]
        column = RaggedTensor(values, offsets[outer], column.weights)
    which = (first, *inner)[: column.levels + 1]
    try:
        want = indexed(rows, which)
    except IndexError:
        with pytest.raises(IndexError):
            column[which]
        return
    got = column[which]
    assert plain(got) == want
    if isinstance(got, RaggedTensor):
        got.validate()
        assert got.weights is not None
        assert torch.equal(got.weights, got.values * 0.5)


def test_indices_of_strings_and_of_values_of_more_dimensions() -> None:
    words = RaggedTensor.from_strings([["abc", "de"], [], ["f"]])
    weighted = RaggedTensor(words.values, words.offsets, torch.tensor([1.0, 2.0, 3.0]), words.outer)
    assert weighted[:2, ::-1].to_strings(decode=False) == [[b"de", b"abc"], []]
    assert weighted[:2, ::-1].weights.tolist() == [2, 1]
    assert weighted[:, :, 1:].to_strings(decode=False) == [[b"bc", b"e"], [], [b""]]
    assert weighted[:, :, 1:].weights.tolist() == [1, 2, 3]
    assert weighted[[0, 2], 0].to_strings(decode=False) == [b"abc", b"f"]
    assert weighted[[0, 2], 0].weights is None
    assert weighted[0, 1:].to_strings(decode=False) == [b"de"]
    assert weighted[..., :1].to_strings(decode=False) == [[b"a", b"d"], [], [b"f"]]
    assert words[:, :, 0].to_lists() == [[97, 100], [], [102]]
    assert RaggedTensor.from_strings(["ab", "c"])[:, 0].tolist() == [97, 99]
    vectors = RaggedTensor(torch.arange(8).view(4, 2), torch.tensor([0, 3, 4]))
    assert vectors[:, :1, 1].to_lists() == [[1], [7]]
    assert vectors[:, -1, ::-1].tolist() == [[5, 4], [7, 6]]
    assert vectors[0, :, 0].tolist() == [0, 2, 4]
    assert vectors[..., 0].to_lists() == [[0, 2, 4], [6]]
    assert vectors[0, ...].tolist() == vectors[0].tolist()


def test_rows_by_masks_and_lists() -> None:
    column = RaggedTensor.from_lists([[1, 2], [], [3]])
    assert column[...].to_lists() == column[()].to_lists() == column[:, :].to_lists() == [[1, 2], [], [3]]
    assert column[np.int64(2)].tolist() == column[torch.tensor(2)].tolist() == column[np.array(2)].tolist() == [3]
    assert column[np.array([2, 0])].to_lists() == column[torch.tensor([2, 0], dtype=torch.uint8)].to_lists()
    assert column[np.array([True, False, True])].to_lists() == column[[True, False, True]].to_lists()
    assert column[[True, False, True], :1].to_lists() == [[1], [3]]
    assert column[range(2)].to_lists() == [[1, 2], []]
    assert column[[]].to_lists() == []
    assert column[torch.tensor(0) : np.int64(1)].to_lists() == [[1, 2]]


OTHER_TYPES: list[Any] = [
    None,
    True,
    np.True_,
    "a",
    b"a",
    1.0,
    {0},
    {0: 1},
    object(),
    (None,),
    (0, None),
    (0, True),
    (slice(None), None),
    (slice(None), "a"),
    (slice(None), 1.5),
    slice(0.5),
    [0.5],
    [None],
    np.array(1.0),
    (slice(None), slice("a", None)),
]


@pytest.mark.parametrize("which", OTHER_TYPES)
def test_indices_of_other_types(which: Any) -> None:
    with pytest.raises(TypeError):
        RaggedTensor.from_lists([[1, 2], [3]])[which]


@pytest.mark.parametrize(
    "which",
    [
        2,
        -3,
        [2],
        [[0]],
        [True],
        [True] * 3,
        (0, 0, 0),
        (slice(None), 1),
        (0, 5),
        (0, -3),
        (slice(None), [0]),
        (slice(None), torch.tensor([True])),
        (..., ..., 0),
        (slice(None), slice(None), slice(None)),
        2**70,
        torch.tensor(True),
    ],
)
def test_indices_out_of_range(which: Any) -> None:
    with pytest.raises(IndexError):
        RaggedTensor.from_lists([[1, 2], [3]])[which]


def test_a_step_of_0_raises() -> None:
    for which in (slice(None, None, 0), (slice(None), slice(None, None, 0)), (0, slice(None, None, 0))):
        with pytest.raises(ValueError, match="step"):
            RaggedTensor.from_lists([[1]])[which]
