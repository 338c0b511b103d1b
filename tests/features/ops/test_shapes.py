"""Operations on numbers and rows against plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid.features import (
    Cast,
    Clip,
    Column,
    Concat,
    Cross,
    Feature,
    FeatureEngine,
    FillNull,
    Hash,
    Log,
    MultiHot,
    Normalize,
    OneHot,
    Pad,
    Tile,
    ToDense,
    TopK,
    Truncate,
    Vocabulary,
)
from recis_hybrid.features.ops import joins, resize, rows
from recis_hybrid.ragged import RaggedTensor
from tests.support import emulated, hashes
from tests.support.devices import on_devices
from tests.support.features import fused_or_not, run
from tests.support.near import assert_near

rows_of_ids = st.lists(st.lists(st.integers(-9, 9), max_size=6), min_size=1, max_size=6)


def dense(ops: list[Any], values: Any, fuse: bool = True) -> list[Any]:
    return run(ops, fuse, values).tolist()  # type: ignore[no-any-return]


@fused_or_not
@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_of_floats_match_numpy(device: str, dtype: torch.dtype, fuse: bool) -> None:
    values = torch.linspace(-2, 5, 1001, dtype=dtype, device=device)
    x = values.cpu().numpy()
    logs = run([Log(3.0)], fuse, values)
    assert logs.dtype == dtype
    assert_near(logs, np.log((x + x.dtype.type(3)).astype(np.float64)), 3)
    assert np.array_equal(run([Clip(-1, 2.5)], fuse, values).cpu().numpy(), np.clip(x, -1, 2.5))
    want = (x - x.dtype.type(0.7)) / x.dtype.type(1.3)
    assert np.array_equal(run([Normalize(0.7, 1.3)], fuse, values).cpu().numpy(), want)


@fused_or_not
def test_bounds_beyond_the_range_of_a_dtype_are_clamped(fuse: bool) -> None:
    most = torch.finfo(torch.float32).max
    values = torch.tensor([-1.0, 5.0])
    assert run([Clip(0, 1e300)], fuse, values).tolist() == [0.0, 5.0]
    assert run([Clip(1e300, 1e301)], fuse, values).tolist() == [most, most]
    assert run([Clip(-math.inf, 2)], fuse, torch.tensor([-math.inf, 5.0])).tolist() == [-math.inf, 2.0]


@fused_or_not
def test_integers_become_float32_for_logarithms(fuse: bool) -> None:
    result = run([Log(1)], fuse, torch.tensor([0, 1], dtype=torch.int16))
    assert result.dtype == torch.float32
    assert_near(result, torch.tensor([0.0, math.log(2)]), 1)


@fused_or_not
def test_clip_of_integers_is_exact(fuse: bool) -> None:
    ids = [2**53 + 1, -(2**63), 2**63 - 1, 0]
    assert dense([Clip(-(2**62), 2**53 + 1)], torch.tensor(ids), fuse) == [2**53 + 1, -(2**62), 2**53 + 1, 0]
    assert dense([Clip(-math.inf, math.inf)], torch.tensor(ids), fuse) == ids


@fused_or_not
def test_casts(fuse: bool) -> None:
    assert dense([Cast(torch.int64)], torch.tensor([1.9, -1.9, -0.0]), fuse) == [1, -1, 0]
    assert dense([Cast(torch.int32)], torch.tensor([2**32 + 5, -1]), fuse) == [5, -1]
    assert dense([Cast(torch.int64)], torch.tensor([True, False]), fuse) == [1, 0]
    assert dense([Cast(torch.float64)], torch.tensor([7], dtype=torch.uint8), fuse) == [7.0]
    narrow = run([Cast(torch.int64)], fuse, torch.tensor([-3], dtype=torch.int8))
    assert (narrow.dtype, narrow.tolist()) == (torch.int64, [-3])
    assert run([Cast(torch.int32)], fuse, torch.tensor([1.0])).dtype == torch.int32


@fused_or_not
def test_fill_null(fuse: bool) -> None:
    assert dense([FillNull(2.5)], torch.tensor([math.nan, 1.0]), fuse) == [2.5, 1.0]
    rows = RaggedTensor.from_lists([[1, 2], [], [3]], weights=[[0.5, 2], [], [4]])
    result = run([FillNull(9)], fuse, rows)
    assert result.to_lists() == [[1, 2], [9], [3]]
    assert result.weights.tolist() == [0.5, 2, 1, 4]
    floats = RaggedTensor.from_lists([[math.nan], []], dtype=torch.float32)
    assert run([FillNull(0.5)], fuse, floats).to_lists() == [[0.5], [0.5]]


@fused_or_not
@given(rows=rows_of_ids, length=st.integers(0, 7))
def test_truncate_and_pad(fuse: bool, rows: list[list[int]], length: int) -> None:
    column = RaggedTensor.from_lists(rows, dtype=torch.int64)
    assert run([Truncate(length)], fuse, column).to_lists() == [row[:length] for row in rows]
    assert run([Truncate(length, "left")], fuse, column).to_lists() == [
        row[max(0, len(row) - length) :] for row in rows
    ]
    fill = [[-5] * (length - len(row)) for row in rows]
    assert run([Pad(length, -5)], fuse, column).to_lists() == [row + more for row, more in zip(rows, fill, strict=True)]
    assert run([Pad(length, -5, "left")], fuse, column).to_lists() == [
        more + row for row, more in zip(rows, fill, strict=True)
    ]


@fused_or_not
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float32, torch.float64, torch.bool])
def test_rows_of_values_of_every_size(fuse: bool, dtype: torch.dtype) -> None:
    rows = [[k % 2 for k in range(n)] for n in (0, 1, 3, 8, 40)]
    column = RaggedTensor.from_lists(rows, dtype=dtype)
    assert run([Truncate(33), Pad(4, 1)], fuse, column).to_lists() == [
        [*row[:33], *[1] * max(0, 4 - len(row))] for row in rows
    ]


@fused_or_not
@on_devices
def test_lists_in_rows(device: str, fuse: bool) -> None:
    sessions = RaggedTensor.from_lists([[[1, 2, 3], [], [4]], [], [[5]]]).to(device)
    assert run([Truncate(2)], fuse, sessions).to_lists() == [[[1, 2, 3], []], [], [[5]]]
    assert run([Truncate(2, "left")], fuse, sessions).to_lists() == [[[], [4]], [], [[5]]]
    assert run([Truncate(1, level=2)], fuse, sessions).to_lists() == [[[1], [], [4]], [], [[5]]]
    assert run([Pad(2)], fuse, sessions).to_lists() == [[[1, 2, 3], [], [4]], [[], []], [[5], []]]
    assert run([Pad(2, 7, level=2)], fuse, sessions).to_lists() == [[[1, 2, 3], [7, 7], [4, 7]], [], [[5, 7]]]


@fused_or_not
def test_lists_keep_their_weights(fuse: bool) -> None:
    rows, weights = [[[1, 2], [3]], [[4]]], [[[0.5, 1], [2]], [[3]]]
    result = run([Truncate(1, "left")], fuse, RaggedTensor.from_lists(rows, weights=weights))
    assert (result.to_lists(), result.weights.tolist()) == ([[[3]], [[4]]], [2, 3])
    words = RaggedTensor.from_strings([["a", "b"], ["c"]])
    weighted = RaggedTensor(words.values, words.offsets, torch.tensor([1.0, 2.0, 3.0]), words.outer)
    result = run([Truncate(1, "left"), Hash()], fuse, weighted)
    assert result.to_lists() == [[hashes.farm(b"b")], [hashes.farm(b"c")]]
    assert result.weights.tolist() == [2, 3]


@fused_or_not
@on_devices
def test_cross_of_rows(device: str, fuse: bool) -> None:
    def pair(x: int, y: int) -> int:
        return hashes.murmur(x.to_bytes(8, "little", signed=True) + y.to_bytes(8, "little", signed=True))

    x = RaggedTensor.from_lists([[1, 2], [], [-3]], weights=[[0.5, 2], [], [3]]).to(device)
    y = RaggedTensor.from_lists([[7, 8, 9], [1], [4]]).to(device)
    result = run([Cross(limit=6)], fuse, x, y)
    assert result.to_lists() == [[pair(a, b) for a in (1, 2) for b in (7, 8, 9)], [], [pair(-3, 4)]]
    assert result.weights[:7].tolist() == [0.5] * 3 + [2] * 3 + [3]
    dense = torch.tensor([5, 6, 7], device=device)
    assert run([Cross()], fuse, dense, x).to_lists() == [[pair(5, 1), pair(5, 2)], [], [pair(7, -3)]]
    assert run([Cross()], fuse, x, dense).to_lists() == [[pair(1, 5), pair(2, 5)], [], [pair(-3, 7)]]
    assert run([Cross()], fuse, dense, dense, dense).tolist() == [pair(pair(n, n), n) for n in (5, 6, 7)]
    both_weighted = run([Cross(limit=6)], fuse, x, RaggedTensor(x.values, x.offsets, x.weights))
    assert both_weighted.weights[:5].tolist() == [0.25, 1, 1, 4, 9]


@fused_or_not
@given(
    rows=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, -1.0]), max_size=7), min_size=1, max_size=5),
    k=st.integers(1, 8),
)
def test_top_k(fuse: bool, rows: list[list[float]], k: int) -> None:
    values = [list(range(len(row))) for row in rows]
    result = run([TopK(k)], fuse, RaggedTensor.from_lists(values, dtype=torch.int64, weights=rows))
    want = [sorted(range(len(row)), key=lambda i: -row[i])[:k] for row in rows]
    assert result.to_lists() == want
    assert result.weights.tolist() == [row[i] for row, best in zip(rows, want, strict=True) for i in best]


@fused_or_not
@on_devices
def test_one_hot_and_multi_hot(device: str, fuse: bool) -> None:
    ids = torch.tensor([2, 0], device=device)
    assert dense([OneHot(3)], ids, fuse) == [[0, 0, 1], [1, 0, 0]]
    rows = RaggedTensor.from_lists([[0, 2, 0], []], weights=[[0.5, 2, 1], []]).to(device)
    assert run([MultiHot(3)], fuse, rows).tolist() == [[1.5, 0, 2], [0, 0, 0]]
    assert run([MultiHot(2)], fuse, torch.tensor([[1, 1], [0, 1]], device=device)).tolist() == [[0, 2], [1, 1]]


@fused_or_not
@on_devices
def test_concat(device: str, fuse: bool) -> None:
    a, b = torch.tensor([1, 2], device=device), torch.tensor([[3, 4], [5, 6]], device=device)
    assert run([Concat()], fuse, a, b).tolist() == [[1, 3, 4], [2, 5, 6]]
    rows = RaggedTensor.from_lists([[7], []], weights=[[0.5], []]).to(device)
    result = run([Concat()], fuse, rows, a, b)
    assert result.to_lists() == [[7, 1, 3, 4], [2, 5, 6]]
    assert result.weights.tolist() == [0.5, 1, 1, 1, 1, 1, 1]
    assert run([Concat()], fuse, torch.tensor([1.0]), torch.tensor([2.0])).tolist() == [[1, 2]]


@fused_or_not
@on_devices
def test_tile(device: str, fuse: bool) -> None:
    assert run([Tile(2)], fuse, torch.tensor([[1, 2], [3, 4]], device=device)).tolist() == [
        [1, 2],
        [1, 2],
        [3, 4],
        [3, 4],
    ]
    rows = RaggedTensor.from_lists([[1, 2], [], [3]], weights=[[0.5, 1], [], [2]]).to(device)
    result = run([Tile(3)], fuse, rows)
    assert result.to_lists() == [[1, 2]] * 3 + [[]] * 3 + [[3]] * 3
    assert result.weights.tolist() == [0.5, 1] * 3 + [2] * 3


@fused_or_not
def test_to_dense(fuse: bool) -> None:
    rows = RaggedTensor.from_lists([[1.5], [2.0, 3.0]])
    assert run([ToDense(3, -1, "left")], fuse, rows).tolist() == [[-1, -1, 1.5], [-1, 2, 3]]
    vectors = RaggedTensor(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 3]))
    assert run([ToDense(2)], fuse, vectors).tolist() == [[[0, 1], [0, 0]], [[2, 3], [4, 5]]]


@fused_or_not
def test_vocabulary(fuse: bool, tmp_path: Any) -> None:
    (tmp_path / "cities.txt").write_text("rome\noslo\n\nsão paulo\n")
    spec = Vocabulary(tmp_path / "cities.txt", unknown=4)
    assert spec.entries == (b"rome", b"oslo", b"", "são paulo".encode())
    words = RaggedTensor.from_strings(["oslo", "são paulo", "", "paris", "rome"])
    assert run([spec], fuse, words).tolist() == [1, 3, 2, 4, 0]
    assert run([Vocabulary([10, -7, 2**62], unknown=9)], fuse, torch.tensor([-7, 2**62, 3])).tolist() == [1, 2, 9]
    many = [f"entry {n}" for n in range(5000)]
    found = run([Vocabulary(many)], fuse, RaggedTensor.from_strings(many[::-1]))
    assert found.tolist() == list(range(4999, -1, -1))


def test_lines_of_a_vocabulary_end_only_at_line_feeds(tmp_path: Any) -> None:
    path = tmp_path / "names.txt"
    for content, entries in (
        ("a\u2028b\x0cc\r\nd", ["a\u2028b\x0cc", "d"]),
        ("\n", [""]),
        ("x\n\n", ["x", ""]),
    ):
        path.write_bytes(content.encode())
        assert Vocabulary(path).entries == tuple(entry.encode() for entry in entries)


@fused_or_not
def test_columns_without_rows(fuse: bool) -> None:
    empty = RaggedTensor.from_lists([])
    for op in (Truncate(2), Pad(2), FillNull(1), Tile(2)):
        assert run([op], fuse, empty).to_lists() == []
    assert run([ToDense(2)], fuse, empty).shape == (0, 2)
    assert run([MultiHot(3)], fuse, empty).shape == (0, 3)
    assert run([Concat()], fuse, empty, torch.empty(0, dtype=torch.int64)).to_lists() == []
    assert run([Cross()], fuse, empty, empty).to_lists() == []


def test_kernels_return_columns() -> None:
    result = Truncate(1).kernel()(Column.of(RaggedTensor.from_lists([[1, 2]])))
    assert result.values.tolist() == [1]


@fused_or_not
def test_strings_in_lists_keep_their_weights(fuse: bool) -> None:
    strings = RaggedTensor.from_strings([["abc", "de"], ["f"]])
    weighted = RaggedTensor(strings.values, strings.offsets, torch.tensor([1.0, 2.0, 3.0]), strings.outer)
    for op, want in (
        (Truncate(2, level=2), [[b"ab", b"de"], [b"f"]]),
        (Pad(2, 65, level=2), [[b"abc", b"de"], [b"fA"]]),
    ):
        result = run([op], fuse, weighted).validate()
        assert result.to_strings(decode=False) == want
        assert result.weights is weighted.weights
    first = run([Truncate(1)], fuse, weighted).validate()
    assert (first.to_strings(decode=False), first.weights.tolist()) == ([[b"abc"], [b"f"]], [1.0, 3.0])


@pytest.mark.parametrize("ops", [[Truncate(2)], [Pad(2)], [Truncate(2), Hash(), Truncate(1, level=2)]])
def test_lists_are_copied_once_if_results_have_a_bound(ops: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    column = RaggedTensor.from_lists([[[*range(100)], [1], []], []])
    want = run(ops, True, column).to_lists()
    for module in (resize, rows, joins):
        monkeypatch.setattr(module, "exact_on", lambda device: False)  # as on a GPU
    result = run(ops, True, column)
    assert result.offsets[-1] <= result.values.shape[0]
    assert result.to_lists() == want


@pytest.mark.emulated
@pytest.mark.parametrize(("limits", "waits"), [((None, None), 1), ((None, 8), 1), ((8, 8), 0)])
def test_crosses_without_a_limit_wait_once_for_all(limits: tuple[int | None, int | None], waits: int) -> None:
    x = RaggedTensor.from_lists([[1, 2, 3], [], [4], [5, 6]], weights=[[0.5, 2.0, 1.0], [], [3.0], [1.0, 4.0]])
    y = RaggedTensor.from_lists([[7, 8], [9], [], [1, 2, 3]])
    engine = FeatureEngine(
        [
            Feature(f"pair{n}", ops=[Cross(limit=limit)], source=["x", "y"][:: 1 - 2 * n])
            for n, limit in enumerate(limits)
        ]
    )
    expected = engine({"x": x, "y": y})
    batch = {"x": x.to("emulated"), "y": y.to("emulated")}
    engine(batch)
    results: list[Any] = []
    assert emulated.synchronizations(lambda: results.append(engine(batch))) == waits
    for name, column in expected.items():
        found = results[0][name].to("cpu")
        assert found.to_lists() == column.to_lists()
        assert torch.equal(found.weights, column.weights)
