from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid.ragged import (
    RaggedTensor,
    from_arrow,
    from_jagged,
    from_keyed_jagged,
    to_arrow,
    to_jagged,
    to_keyed_jagged,
)
from tests.support.devices import on_accelerators, on_devices

ROWS = [[1, 2, 3], [], [4]]
NESTED = [[[1, 2], []], [], [[3]]]


def test_lists_of_lists() -> None:
    nested = RaggedTensor.from_lists(NESTED, weights=[[[0.5, 1], []], [], [[2]]])
    assert (nested.levels, nested.batch_size, len(nested)) == (2, 3, 3)
    assert nested.to_lists() == NESTED
    assert nested.lengths().tolist() == [2, 0, 1]
    assert nested.weights is not None
    assert nested.weights.tolist() == [0.5, 1, 2]
    assert repr(nested) == "RaggedTensor(batch_size=3, levels=2, values=int64[3], weights=float32[3], device=cpu)"
    assert nested.validate() is nested
    with pytest.raises(ValueError, match="must have the same depth, got 1 and a list"):
        RaggedTensor.from_lists([[[1], 1]])
    words = RaggedTensor.from_strings([["a", "é"], [], [b""]])
    assert words.to_strings() == [["a", "é"], [], [""]]
    with pytest.raises(ValueError, match="must have the same depth, got 'b' and a list"):
        RaggedTensor.from_strings([["a"], "b"])


@pytest.mark.parametrize(
    ("outer", "error", "message"),
    [
        (
            [torch.tensor([0, 1])],
            ValueError,
            r"outer\[0\] must end with the number of lists of the next level, 2, got 1",
        ),
        ([torch.tensor([0, 2, 1, 2])], ValueError, r"outer\[0\] must not decrease, got 2 and then 1 at row 1"),
        ([torch.tensor([1, 2])], ValueError, r"outer\[0\] must start with 0, got 1"),
        ([torch.tensor([0, 2], dtype=torch.int32)], TypeError, r"outer\[0\] must be int64"),
        ([[0, 2]], TypeError, r"outer\[0\] must be a torch.Tensor, got list"),
        ([torch.tensor([0, 2]).to("meta")], ValueError, r"outer\[0\] and values must be on one device"),
    ],
)
def test_wrong_levels_are_rejected(outer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RaggedTensor(torch.arange(3), torch.tensor([0, 1, 3]), None, outer)


def test_lists_of_strings_have_a_weight_for_each_string() -> None:
    words = RaggedTensor.from_strings([["ab", "c"], ["d"]])
    assert RaggedTensor(words.values, words.offsets, torch.ones(3), words.outer).weights is not None
    with pytest.raises(ValueError, match=r"\[M\], one for each string, M = 3, got float32\[4\]"):
        RaggedTensor(words.values, words.offsets, torch.ones(4), words.outer)


@on_devices
def test_padded(device: str) -> None:
    rows = RaggedTensor.from_lists(ROWS).to(device)
    assert rows.to_padded(padding=-1).tolist() == [[1, 2, 3], [-1, -1, -1], [4, -1, -1]]
    assert rows.to_padded(4, side="left").tolist() == [[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 4]]
    back = RaggedTensor.from_padded(rows.to_padded(), torch.tensor([3, 0, 1]))
    assert back.to_lists() == ROWS
    assert RaggedTensor.from_padded(rows.to_padded(padding=-1), padding=-1).to_lists() == ROWS
    vectors = RaggedTensor(torch.arange(4.0).view(2, 2), torch.tensor([0, 0, 2]))
    assert RaggedTensor.from_padded(vectors.to_padded(), torch.tensor([0, 2])).to_lists() == vectors.to_lists()


def test_padding_never_drops_values() -> None:
    rows = RaggedTensor.from_lists(ROWS)
    with pytest.raises(ValueError, match=r"longest row, got 2; shorten the rows first"):
        rows.to_padded(2)
    with pytest.raises(ValueError, match="side must be"):
        rows.to_padded(side="top")
    with pytest.raises(ValueError, match=r"rows must hold values, got lists \(2 levels\)"):
        RaggedTensor.from_lists(NESTED).to_padded()
    with pytest.raises(ValueError, match="either lengths or padding"):
        RaggedTensor.from_padded(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"lengths must be \[B\] from 0 to 2, got int64\[2\] from 1 to 3"):
        RaggedTensor.from_padded(torch.ones(2, 2), torch.tensor([1, 3]))


def test_nested_tensors_share_memory() -> None:
    rows = RaggedTensor.from_lists(ROWS, dtype=torch.float32)
    nested = rows.to_nested()
    assert [part.tolist() for part in nested.unbind()] == ROWS
    back = RaggedTensor.from_nested(nested)
    assert back.to_lists() == ROWS
    assert back.values.data_ptr() == rows.values.data_ptr()
    holes = torch.nested.nested_tensor_from_jagged(torch.arange(6.0), torch.tensor([0, 3, 6]), torch.tensor([2, 1]))
    assert RaggedTensor.from_nested(holes).to_lists() == [[0, 1], [3]]
    with pytest.raises(TypeError, match="jagged layout"):
        RaggedTensor.from_nested(torch.ones(2))
    with pytest.raises(ValueError, match="cannot hold weights"):
        RaggedTensor.from_lists([[1]], weights=[[1]]).to_nested()


@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), max_size=4))
def test_arrow_of_any_rows(rows: list[list[int]]) -> None:
    array = to_arrow(RaggedTensor.from_lists(rows, dtype=torch.int64))
    assert array.to_pylist() == rows
    assert from_arrow(array).to_lists() == rows
    assert from_arrow(pa.array([[0], *rows], pa.list_(pa.int64())).slice(1)).to_lists() == rows


def test_arrow_of_other_kinds() -> None:
    nested = RaggedTensor.from_lists(NESTED)
    assert to_arrow(nested).to_pylist() == NESTED
    assert from_arrow(to_arrow(nested)).to_lists() == NESTED
    words = pa.array([["a", "é"], [], [""]])
    assert from_arrow(words).to_strings(decode=False) == [[b"a", "é".encode()], [], [b""]]
    assert from_arrow(pa.array(["x", "", "yz"]).slice(1)).to_strings(decode=False) == [b"", b"yz"]
    assert to_arrow(RaggedTensor.from_strings(["x", "yz"])).to_pylist() == [b"x", b"yz"]
    assert from_arrow(pa.chunked_array([pa.array([[1]]), pa.array([[2, 3]])])).to_lists() == [[1], [2, 3]]
    for strings in (pa.array(["x", "yz"], pa.string_view()), pa.array(["x", "yz"]).dictionary_encode()):
        assert from_arrow(strings).to_strings(decode=False) == [b"x", b"yz"]
    assert from_arrow(pa.array([b"ab", b"cd"], pa.binary(2))).to_strings(decode=False) == [b"ab", b"cd"]
    fixed = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64(), 2))
    assert from_arrow(fixed[1:]).to_lists() == [[3, 4], [5, 6]]
    values = RaggedTensor.from_lists(ROWS)
    assert to_arrow(values).values.buffers()[1].address == values.values.data_ptr()


def test_arrow_rejects_nulls_and_weights() -> None:
    with pytest.raises(ValueError, match="must have no nulls, got 1 among 2"):
        from_arrow(pa.array([[1], None]))
    with pytest.raises(TypeError, match="must hold lists of numbers, strings, or lists of these, got int64"):
        from_arrow(pa.array([1]))
    with pytest.raises(ValueError, match="cannot hold weights"):
        to_arrow(RaggedTensor.from_lists([[1]], weights=[[1]]))
    with pytest.raises(ValueError, match=r"values must be \[N\]"):
        to_arrow(RaggedTensor(torch.ones(2, 2), torch.tensor([0, 2])))


class FakeJagged:
    """The part of TorchRec's classes that conversions use."""

    def __init__(self, **parts: Any) -> None:
        self.parts = parts

    def values(self) -> torch.Tensor:
        return self.parts["values"]  # type: ignore[no-any-return]

    def offsets(self) -> torch.Tensor:
        return self.parts["offsets"].to(torch.int32)  # type: ignore[no-any-return]

    def weights_or_none(self) -> torch.Tensor | None:
        return self.parts.get("weights")

    def to_dict(self) -> dict[str, FakeJagged]:
        lengths = self.parts["lengths"].view(len(self.parts["keys"]), -1)
        found, begin = {}, 0
        for key, key_lengths in zip(self.parts["keys"], lengths, strict=True):
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), key_lengths.cumsum(0)])
            found[key] = FakeJagged(values=self.values()[begin : begin + int(offsets[-1])], offsets=offsets)
            begin += int(offsets[-1])
        return found


def test_torchrec_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(JaggedTensor=FakeJagged, KeyedJaggedTensor=FakeJagged)
    monkeypatch.setitem(__import__("sys").modules, "torchrec", SimpleNamespace())
    monkeypatch.setitem(__import__("sys").modules, "torchrec.sparse", SimpleNamespace(jagged_tensor=module))
    monkeypatch.setitem(__import__("sys").modules, "torchrec.sparse.jagged_tensor", module)
    rows = RaggedTensor.from_lists(ROWS, weights=[[0.5, 1, 2], [], [3]])
    back = from_jagged(to_jagged(rows))
    assert (back.to_lists(), back.weights.tolist()) == (ROWS, [0.5, 1, 2, 3])  # type: ignore[union-attr]
    columns = {"a": RaggedTensor.from_lists(ROWS), "b": RaggedTensor.from_lists([[9], [8, 7], []])}
    found = from_keyed_jagged(to_keyed_jagged(columns))
    assert {name: column.to_lists() for name, column in found.items()} == {"a": ROWS, "b": [[9], [8, 7], []]}
    longer = RaggedTensor.unchecked(torch.tensor([1, 2, 7, 7]), torch.tensor([0, 1, 2]))  # as a GPU may leave it
    found = from_keyed_jagged(to_keyed_jagged({"a": longer, "b": longer}))
    assert [column.to_lists() for column in found.values()] == [[[1], [2]]] * 2
    with pytest.raises(ValueError, match="all weights or none"):
        to_keyed_jagged({"a": rows, "b": RaggedTensor.from_lists(ROWS)})
    with pytest.raises(ValueError, match="at least one column"):
        to_keyed_jagged({})


def test_installed_torchrec() -> None:
    pytest.importorskip("torchrec", reason="TorchRec is not installed")
    rows = RaggedTensor.from_lists(ROWS)
    assert from_jagged(to_jagged(rows)).to_lists() == ROWS
    found = from_keyed_jagged(to_keyed_jagged({"a": rows, "b": rows}))
    assert found["b"].to_lists() == ROWS


def test_missing_torchrec_raises_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchrec", "torchrec.sparse"):  # the second may already be imported
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match="TorchRec cannot be imported .*pip install --no-deps torchrec"):
        to_jagged(RaggedTensor.from_lists(ROWS))


def test_rows_by_number_and_slice() -> None:
    rows = RaggedTensor.from_lists(ROWS, weights=[[0.5, 1, 2], [], [3]])
    assert rows[0].tolist() == [1, 2, 3]
    assert rows[-1].tolist() == [4]
    assert [row.tolist() for row in rows] == ROWS
    part = rows[1:]
    assert (part.to_lists(), part.weights.tolist()) == (ROWS[1:], [3])
    assert part.values.data_ptr() == rows.values[3:].data_ptr()
    assert rows[::-1].to_lists() == ROWS[::-1]
    assert rows[2:1].to_lists() == []
    selected = rows[torch.tensor([2, 0, 2])]
    assert (selected.to_lists(), selected.weights.tolist()) == ([[4], [1, 2, 3], [4]], [3, 0.5, 1, 2, 3])
    assert rows[[-1]].to_lists() == [[4]]
    assert rows[torch.tensor([True, False, True])].to_lists() == [[1, 2, 3], [4]]
    nested = RaggedTensor.from_lists(NESTED)
    assert nested[0].to_lists() == [[1, 2], []]
    assert nested[1:].to_lists() == NESTED[1:]
    assert nested[[2, 0]].to_lists() == [NESTED[2], NESTED[0]]
    words = RaggedTensor.from_strings([["ab", "c"], ["d"]])
    weighted = RaggedTensor(words.values, words.offsets, torch.tensor([1.0, 2, 3]), words.outer)
    assert weighted[1:].weights.tolist() == [3]
    assert weighted[[1, 0]].weights.tolist() == [3, 1, 2]
    assert weighted[[1, 0]].to_strings(decode=False) == [[b"d"], [b"ab", b"c"]]
    for which in (3, -4, [3], torch.tensor([True])):
        with pytest.raises(IndexError, match="RaggedTensor: "):
            rows[which]
    assert rows[[]].to_lists() == []
    with pytest.raises(TypeError, match=r"row numbers must be integers, got torch\.float32; convert them"):
        rows[[0.9]]


def test_concat() -> None:
    rows = RaggedTensor.from_lists(ROWS, weights=[[0.5, 1, 2], [], [3]])
    whole = RaggedTensor.concat([rows, rows[:1], rows[1:2]])
    assert whole.to_lists() == [*ROWS, ROWS[0], ROWS[1]]
    assert whole.weights is not None
    assert whole.weights.tolist() == [0.5, 1, 2, 3, 0.5, 1, 2]
    nested = RaggedTensor.from_lists(NESTED)
    assert RaggedTensor.concat([nested, nested]).to_lists() == NESTED * 2
    with pytest.raises(ValueError, match="at least one RaggedTensor"):
        RaggedTensor.concat([])
    with pytest.raises(ValueError, match="must agree in dtype"):
        RaggedTensor.concat([rows, nested])


def test_levels_move_together() -> None:
    nested = RaggedTensor.from_lists(NESTED)
    assert nested.to("cpu") is nested
    moved = nested.to("meta")
    assert moved.outer[0].device.type == "meta"
    assert not nested.is_pinned()


@on_accelerators
def test_pinned_memory(device: str) -> None:
    pinned = RaggedTensor.from_lists(NESTED).pin_memory()
    assert pinned.is_pinned()
    assert pinned.to(device, non_blocking=True).to("cpu").to_lists() == NESTED
