"""Distinct, Length, Mask, DecimalString and Cross(distinct=True) against Python lists, strings and sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, strategies as st

from recis_hybrid.features import (
    Cast,
    Column,
    Cross,
    DecimalString,
    Distinct,
    Feature,
    FeatureEngine,
    Hash,
    Length,
    Mask,
    Mod,
    StringMultiHash,
    Truncate,
    Vocabulary,
)
from recis_hybrid.ragged import RaggedTensor
from tests.support import hashes
from tests.support.devices import EDGE_IDS, on_devices
from tests.support.features import apply, plain

ids = st.one_of(st.integers(-3, 3), st.sampled_from(EDGE_IDS))
rows_of_ids = st.lists(st.lists(ids, max_size=7), max_size=6)


def ragged(rows: Any, weights: Any = None) -> RaggedTensor:
    return RaggedTensor.from_lists(rows, dtype=torch.int64, weights=weights)


@given(rows_of_ids)
@example([[1] * 100, [], [2, 1, 2]])
def test_distinct_keeps_first_occurrences(rows: list[list[int]]) -> None:
    assert plain(apply(Distinct(), ragged(rows))) == [list(dict.fromkeys(row)) for row in rows]
    weights = [[float(place) for place in range(len(row))] for row in rows]
    result = apply(Distinct(), ragged(rows, weights))
    want = [row.index(one) for row in rows for one in dict.fromkeys(row)]
    assert result.weights.tolist() == want


@on_devices
def test_distinct_of_other_forms(device: str) -> None:
    column = RaggedTensor.from_lists([[3, 3], []]).to(device)
    narrow = RaggedTensor(column.values.int(), column.offsets)
    engine = FeatureEngine([Feature("result", ops=[Distinct(), Mod(2)], source="x")])
    assert engine({"x": narrow})["result"].to_lists() == [[1], []]  # type: ignore[union-attr]
    dense = torch.tensor([5, 5], device=device)
    assert engine({"x": dense})["result"].tolist() == [1, 1]  # type: ignore[union-attr]
    for bad, message in (
        (dense.view(1, 2), "Distinct takes one id for each row .*from_padded"),
        (RaggedTensor.from_lists([[[1]]]), "Distinct takes one id for each row"),
        (RaggedTensor.from_lists([[1.0]]), "Distinct takes integers, got torch.float32"),
        (RaggedTensor.from_strings(["a"]), "Distinct takes integers, not the bytes of strings"),
    ):
        with pytest.raises(TypeError, match=message):
            engine({"x": bad})


def cross_id(x: int, y: int) -> int:
    return hashes.murmur(b"".join(one.to_bytes(8, "little", signed=True) for one in (x, y)))  # type: ignore[no-any-return]


@given(st.lists(st.tuples(st.lists(ids, max_size=4), st.lists(ids, max_size=4)), max_size=4))
def test_a_distinct_cross_drops_duplicates_like_recis(pairs: list[tuple[list[int], list[int]]]) -> None:
    """Pairs of distinct ids, with the products of the weights of their first occurrences."""
    x, y = ([pair[which] for pair in pairs] for which in (0, 1))
    weights = [[[1.5 + place for place in range(len(row))] for row in rows] for rows in (x, y)]
    result = apply(Cross(distinct=True), ragged(x, weights[0]), ragged(y, weights[1]))
    assert result.to_lists() == [[cross_id(a, b) for a in dict.fromkeys(p) for b in dict.fromkeys(q)] for p, q in pairs]
    assert result.weights.tolist() == [
        (1.5 + p.index(a)) * (1.5 + q.index(b)) for p, q in pairs for a in dict.fromkeys(p) for b in dict.fromkeys(q)
    ]
    repeated = apply(Cross(), ragged(x), ragged(y))
    assert repeated.to_lists() == [[cross_id(a, b) for a in p for b in q] for p, q in pairs]


def test_a_distinct_cross_of_other_columns() -> None:
    user, items = torch.tensor([1, 2]), ragged([[7, 7], [8]])
    assert plain(apply(Cross(distinct=True), user, items)) == [[cross_id(1, 7)], [cross_id(2, 8)]]
    assert plain(apply(Cross(distinct=True), user, user)) == [cross_id(1, 1), cross_id(2, 2)]
    three = apply(Cross(distinct=True), user, items, ragged([[4, 4], []]))
    assert plain(three) == [[cross_id(cross_id(1, 7), 4)], []]
    with pytest.raises(ValueError, match="row 0 has more pairs than limit="):
        apply(Cross(limit=1), items, ragged([[1], [1]]))
    assert plain(apply(Cross(limit=1, distinct=True), items, ragged([[1, 1], [1]]))) == [
        [cross_id(7, 1)],
        [cross_id(8, 1)],
    ]
    kernel = Cross(distinct=True).kernel()
    assert kernel(Column.of(user), Column.of(items)).values.tolist() == [cross_id(1, 7), cross_id(2, 8)]
    for bad in (Cross(limit=True), Cross(distinct=1)):  # type: ignore[arg-type]
        assert bad.fault() is not None


@given(rows_of_ids)
def test_lengths(rows: list[list[int]]) -> None:
    assert plain(apply(Length(), ragged(rows))) == [len(row) for row in rows]
    real = apply([Length(ignore=[0, 2**63 - 1])], ragged(rows))
    assert plain(real) == [sum(one not in (0, 2**63 - 1) for one in row) for row in rows]
    assert real.dtype == torch.int64


@on_devices
def test_lengths_of_every_form(device: str) -> None:
    def lengths(op: Any, column: Any) -> Any:
        engine = FeatureEngine([Feature("result", ops=[op], source="x")])
        return plain(engine({"x": column.to(device)})["result"])

    nested = RaggedTensor.from_lists([[[1, 0], []], [], [[3]]])
    assert lengths(Length(), nested) == [2, 0, 1]
    assert lengths(Length(level=2), nested) == [[2, 0], [], [1]]
    assert lengths(Length(level=2, ignore=[0]), nested) == [[1, 0], [], [1]]
    words = RaggedTensor.from_strings([["a", "", "0"], [], ["bb", "0"]])
    assert lengths(Length(), words) == [3, 0, 2]
    assert lengths(Length(ignore=["", "0"]), words) == [1, 0, 1]
    assert lengths(Length(level=2), words) == [[1, 0, 1], [], [2, 1]]
    assert lengths(Length(), RaggedTensor.from_strings(["abc", ""])) == [3, 0]
    assert lengths(Length(ignore=[0]), torch.tensor([[1, 0, 2], [0, 0, 0]])) == [2, 0]
    assert lengths(Length(ignore=[-1.5]), RaggedTensor.from_lists([[-1.5, 2.5], []])) == [1, 0]
    assert lengths(Length(), RaggedTensor.from_lists([])) == []
    for op, column, message in (
        (
            Length(),
            torch.zeros(2, 3),
            "Length takes ragged columns, got a dense one; pass its padding value as ignore=",
        ),
        (Length(level=2), ragged([[1]]), "Length: level must be 1 to 1 for this column, got 2"),
        (Length(ignore=["a"]), ragged([[1]]), "Mask has strings, and the column has torch.int64"),
        (Length(ignore=[1]), torch.tensor([1]), "Length takes rows of values or strings, or dense"),
    ):
        with pytest.raises(TypeError, match=message):
            lengths(op, column)


@given(st.lists(ids, min_size=1, max_size=20), st.lists(ids, min_size=1, max_size=4))
def test_masks_of_ids(values: list[int], masked: list[int]) -> None:
    result = apply(Mask(masked), torch.tensor(values))
    assert result.dtype == torch.float32
    assert result.tolist() == [float(value not in masked) for value in values]


@given(st.lists(st.lists(st.sampled_from(["", "0", "a", "é", "a" * 20]), max_size=3), max_size=4))
def test_masks_of_strings(rows: list[list[str]]) -> None:
    masked = ["", "é", b"0"]
    assert plain(apply(Mask(masked), RaggedTensor.from_strings(rows) if rows else RaggedTensor.from_strings([]))) == [
        [float(word not in ("", "é", "0")) for word in row] for row in rows
    ]


def test_masks_of_other_columns() -> None:
    floats = torch.tensor([[0.5, -0.0], [float("nan"), 7.0]])
    assert plain(apply(Mask([0, 0.5]), floats)) == [[0, 0], [1, 1]]
    # None of these is an int64.
    assert plain(apply(Mask([0.5, 2**70, float("inf")]), torch.tensor([0, 2**63 - 1]))) == [1, 1]
    assert plain(apply(Mask([3.0, 0.5]), torch.tensor([3, 0], dtype=torch.int8))) == [0, 1]
    assert plain(apply(Mask(["b"]), RaggedTensor.from_strings(["a", "b"]))) == [1, 0]
    assert plain(apply([Mask([7]), Cast(torch.int64)], ragged([[7, 8], []], [[1, 2], []]))) == [[0, 1], []]
    for bad, message in (
        (Mask([]), "at least one value"),
        (Mask("a"), "values must be a list"),
        (Mask([1, "a"]), "got b'a' at 1"),
        (Mask([True]), "got True at 0"),
        (Mask([float("nan")]), "got NaN at 0"),
        (Mask(5), "got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            Feature("x", ops=[bad])
    for length in (Length(level=3), Length(level=True), Length(ignore=[True]), Length(ignore=5)):  # type: ignore[arg-type]
        assert length.fault() is not None


@given(st.lists(st.one_of(ids, st.integers(-(2**63), 2**63 - 1)), max_size=20))
@example([-(2**63), 2**63 - 1, 0, -1, 9, 10, -10])
def test_decimal_strings_match_python(values: list[int]) -> None:
    column = torch.tensor(values, dtype=torch.int64)
    assert plain(apply(DecimalString(), column)) == [str(value).encode() for value in values]
    assert plain(apply(DecimalString(unsigned=True), column)) == [str(value % 2**64).encode() for value in values]
    hashed = apply([DecimalString(), Hash("murmur")], column)
    assert plain(hashed) == [hashes.murmur(str(value).encode()) for value in values]


@on_devices
def test_decimal_strings_in_rows(device: str) -> None:
    rows = RaggedTensor.from_lists([[7, -12], [], [345]], weights=[[1, 2], [], [3]]).to(device)
    engine = FeatureEngine(
        [
            Feature("strings", ops=[DecimalString()], source="x"),
            Feature("hashed", ops=[Truncate(1), DecimalString(), Hash("farm")], source="x"),
            Feature("place", ops=[DecimalString(), Vocabulary(["7", "345"], unknown=9)], source="x"),
            Feature("multi", ops=[DecimalString(), StringMultiHash([100, 100], ["djb2", "sdbm"])], source="x"),
        ]
    )
    result: Any = engine({"x": rows})
    assert result["strings"].to_strings(decode=False) == [[b"7", b"-12"], [], [b"345"]]
    assert result["strings"].weights.tolist() == [1, 2, 3]
    assert result["hashed"].to_lists() == [[hashes.farm(b"7")], [], [hashes.farm(b"345")]]
    assert result["hashed"].weights.tolist()[:2] == [1, 3]
    assert result["place"].to_lists() == [[0, 9], [], [1]]
    words = FeatureEngine([Feature("multi", ops=[StringMultiHash([100, 100], ["djb2", "sdbm"])], source="x")])
    want: Any = words({"x": RaggedTensor.from_strings([["7", "-12"], [], ["345"]])})
    assert result["multi_0"].to_lists() == want["multi_0"].to_lists()
    narrow = torch.tensor([-128, 127], dtype=torch.int8, device=device)
    assert engine.features[0].ops[0].fault() is None
    assert FeatureEngine([Feature("x", ops=[DecimalString()])])({"x": narrow})["x"].to_strings(decode=False) == [
        b"-128",
        b"127",
    ]  # type: ignore[union-attr]
    with pytest.raises(TypeError, match="DecimalString takes one id for each row .* got values of 2 dimensions"):
        engine({"x": torch.zeros(2, 2, dtype=torch.int64, device=device)})
    assert DecimalString(unsigned=1).fault() is not None  # type: ignore[arg-type]


def test_rows_compile() -> None:
    engine = FeatureEngine(
        [
            Feature("pair", ops=[Cross(distinct=True)], source=["x", "y"]),
            Feature("real", ops=[Length(ignore=[0])], source="x"),
            Feature("text", ops=[DecimalString(), Hash()], source="y"),
        ]
    )
    batch: Any = {"x": ragged([[1, 1, 0], []]), "y": torch.tensor([5, 6])}
    result, want = torch.compile(engine, fullgraph=True, backend="eager")(batch), engine(batch)
    assert {name: plain(column) for name, column in result.items()} == {
        name: plain(column) for name, column in want.items()
    }
