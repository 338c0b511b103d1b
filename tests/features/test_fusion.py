"""Fused and unfused engines compute the same bits, in few native calls, compiled or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from recis_hybrid.features import (
    Age,
    Bucketize,
    Cast,
    Clip,
    Column,
    Concat,
    Cross,
    DatePart,
    DecimalString,
    Distinct,
    Feature,
    FeatureEngine,
    FillNull,
    Hash,
    Length,
    Log,
    Mask,
    Mod,
    MultiHash,
    MultiHot,
    Normalize,
    OneHot,
    Pad,
    StringMultiHash,
    Tile,
    ToDense,
    TopK,
    Truncate,
    Vocabulary,
)
from recis_hybrid.features.program import lowering as link
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.devices import no_synchronization, on_accelerators, on_devices
from tests.support.features import assert_same, moved_to, without_unused_values

KINDS = ["farm", "murmur", "xxh64", "djb2", "sdbm"]


ids_to_ids = st.one_of(
    st.sampled_from([Hash(kind) for kind in KINDS]),  # type: ignore[arg-type]
    st.builds(Mod, st.integers(1, 2**64 - 1)),
    st.builds(Bucketize, st.lists(st.integers(-100, 100), min_size=1, max_size=70).map(sorted), right=st.booleans()),
    st.builds(Clip, st.integers(-5, 0), st.integers(1, 9)),
    st.just(MultiHash([10, 20])),
    st.just(Cast(torch.int32)),
    st.just(Cast(torch.int64)),
    st.just(Vocabulary([1, 2, 3, -7], unknown=9)),
    st.builds(DatePart, st.sampled_from(["minute", "day_of_year", "year"]), st.sampled_from(["s", "ms"])),
    st.builds(Age, st.integers(-(2**63), 2**63 - 1), st.sampled_from(["d", "s", "us"])),
)
floats_to_floats = st.one_of(
    st.just(Clip(-3.5, 7.25)),
    st.builds(Normalize, st.floats(-5, 5), st.floats(0.1, 5)),
    st.just(FillNull(0.5)),
    st.just(Cast(torch.float64)),
    st.just(Cast(torch.float32)),
)
rows_to_rows = st.one_of(
    st.builds(Truncate, st.integers(0, 4), st.sampled_from(["left", "right"])),
    st.builds(Pad, st.integers(0, 4), st.integers(-3, 3), st.sampled_from(["left", "right"])),
    st.just(FillNull(3)),
    st.just(Distinct()),
    st.builds(Tile, st.integers(1, 1)),
)


@st.composite
def feature(draw: st.DrawFn, name: str) -> Feature:
    kind = draw(st.sampled_from(["ids", "floats", "rows", "strings", "words", "nested", "pair", "whole"]))
    ints = st.lists(ids_to_ids, max_size=4)
    if kind == "ids":
        return Feature(name, ops=draw(ints), source=draw(st.sampled_from(["a", "b", "narrow"])))
    if kind == "floats":
        chain: list[Any] = [FillNull(1.5), *draw(st.lists(floats_to_floats, max_size=4))]
        ends: list[list[Any]] = [
            [],
            [Bucketize([-1.5, 0, 2.25])],
            [Clip(0, 9), Cast(torch.int64), Mod(5)],
            [Clip(0, 9), Log(1)],
        ]
        return Feature(name, ops=[*chain, *draw(st.sampled_from(ends))], source=draw(st.sampled_from(["f", "g", "fr"])))
    if kind == "rows":
        mixed = st.lists(st.one_of(ids_to_ids, rows_to_rows), max_size=5)
        last: list[list[Any]] = [
            [],
            [Mod(6), MultiHot(6)],
            [Length()],
            [Length(ignore=[0, 3])],
            [Mask([2, 0])],
            [DecimalString(), Hash()],
            [Truncate(3), ToDense(3, -1, "left")],
        ]
        tops = [] if draw(st.booleans()) else [TopK(2)]
        weighted = draw(st.booleans())
        end = draw(st.sampled_from(last[:-1] if weighted else last))
        chain = [*(tops if weighted else []), *draw(mixed), *end]
        if any(isinstance(op, MultiHash) for op in chain[:-1]) and len(chain) > 8:
            chain = chain[:1]
        return Feature(name, ops=chain, source="w" if weighted else "r")
    if kind in ("strings", "words"):
        first = draw(
            st.sampled_from([Hash("farm"), Hash("xxh64"), StringMultiHash(), Vocabulary(["a", "bb", ""], unknown=3)])
        )
        more = draw(ints)
        return Feature(name, ops=[first, *more], source=kind)
    if kind == "nested":
        level = draw(st.sampled_from([1, 2]))
        return Feature(
            name, ops=draw(st.permutations([Truncate(2, level=level), Hash(), Pad(2, 5, level=level)])), source="nested"
        )
    pairs = draw(st.lists(st.sampled_from(["a", "b", "r", "w", "narrow"]), min_size=2, max_size=3))
    if kind == "pair":
        return Feature(
            name, ops=[Cross(), *draw(ints)], source=[*pairs[:2], *pairs[2:]][: draw(st.integers(2, len(pairs)))]
        )
    return Feature(name, ops=[Hash(), Concat(), Mod(1000)], source=pairs)


numbers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-9, 9))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    rows = draw(st.integers(0, 5))

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=rows, max_size=rows))

    lists = column(st.lists(numbers, max_size=5))
    weighted = column(st.lists(st.tuples(numbers, st.sampled_from([0.0, 0.5, 1.0, -2.0])), max_size=5))
    weights = [[weight for _, weight in row] for row in weighted]
    floats = st.one_of(st.floats(-1e6, 1e6, width=32), st.just(math.nan))
    narrow = draw(st.sampled_from([torch.int8, torch.int16, torch.int32]))
    words = column(st.lists(st.binary(max_size=20), min_size=1, max_size=3))
    nested = column(st.lists(st.lists(numbers, max_size=3), min_size=1, max_size=3))
    nothing = torch.tensor([0])
    return {
        "a": torch.tensor(column(numbers), dtype=torch.int64),
        "b": torch.tensor(column(numbers), dtype=torch.int64),
        "narrow": torch.tensor(column(st.integers(-128, 127)), dtype=narrow),
        "f": torch.tensor(column(floats), dtype=torch.float32),
        "g": torch.tensor(column(floats), dtype=torch.float64),
        "fr": RaggedTensor.from_lists(column(st.lists(floats, max_size=4)), dtype=torch.float32),
        "r": RaggedTensor.from_lists(lists, dtype=torch.int64),
        "w": RaggedTensor.from_lists(
            [[value for value, _ in row] for row in weighted], dtype=torch.int64, weights=weights
        ),
        "strings": RaggedTensor.from_strings(column(st.binary(max_size=20))),
        # Lists without rows have one level fewer.
        "words": RaggedTensor.from_strings(words)
        if rows
        else RaggedTensor(torch.empty(0, dtype=torch.uint8), nothing, None, (nothing,)),
        "nested": RaggedTensor.from_lists(nested, dtype=torch.int64)
        if rows
        else RaggedTensor(torch.empty(0, dtype=torch.int64), nothing, None, (nothing,)),
    }


@settings(max_examples=150)
@given(st.data())
def test_fused_and_unfused_results_are_bitwise_equal(data: st.DataObject) -> None:
    declarations = [data.draw(feature(f"x{number}")) for number in range(data.draw(st.integers(1, 6)))]
    batch = data.draw(batches())
    nested = batch["nested"]
    assert isinstance(nested, RaggedTensor)
    if not nested.outer:
        declarations = [one for one in declarations if one.columns != ("nested",)]
    outcomes: list[Any] = []
    for fuse in (True, False, "kind"):
        try:
            outcomes.append(FeatureEngine(declarations, fuse=fuse, parallel=fuse is True)(batch))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            outcomes.append(error)
    first = outcomes[0]
    for other in outcomes[1:]:
        if isinstance(first, Exception):
            assert type(first) is type(other), (first, other)
        else:
            assert not isinstance(other, Exception), other
            assert_same(first, other)


def large() -> tuple[list[Feature], Batch]:
    generator = torch.Generator().manual_seed(3)
    rows = 5_001
    lengths = torch.randint(0, 12, (rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    count = int(offsets[-1])
    batch: Batch = {
        "id": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        "price": torch.randn(rows, generator=generator),
        "clicks": RaggedTensor(
            torch.randint(0, 2**60, (count,), generator=generator), offsets, torch.rand(count, generator=generator)
        ),
        "name": RaggedTensor.from_strings([f"name {n * n}"[: n % 23] for n in range(rows)]),
    }
    features = [
        *[Feature(f"id{n}", ops=[Hash(), Mod(n)], source="id") for n in range(1, 30)],
        Feature("bucket", ops=[Bucketize([-1, 0, 1])], source="price"),
        Feature("buckets", ops=[Bucketize([k / 50 for k in range(-50, 50)])], source="price"),
        Feature("first", ops=[Truncate(5), Hash("murmur"), Mod(1000)], source="clicks"),
        Feature("best", ops=[TopK(3), Pad(3, -1)], source="clicks"),
        Feature("name", ops=[Hash(), Mod(1000)]),
        Feature("hashes", ops=[StringMultiHash()], source="name"),
        Feature("pair", ops=[Hash(), Cross()], source=["id", "name"]),
        Feature("pairs", ops=[Hash(), Cross()], source=["id", "clicks"]),
        Feature("one_hot", ops=[Mod(7), OneHot(7)], source="id"),
    ]
    return features, batch


def test_many_rows_on_many_threads() -> None:
    features, batch = large()
    assert_same(FeatureEngine(features)(batch), FeatureEngine(features, fuse=False)(batch))
    assert_same(FeatureEngine(features)(batch), FeatureEngine(features, parallel=False)(batch))


def test_number_of_native_calls() -> None:
    features, batch = large()
    engine = FeatureEngine(features)
    engine(batch)
    calls = [call for name in engine._segments.values() for call in getattr(engine, name).calls]
    kinds = [type(call).__name__ if isinstance(call, link.ProgramCall) else call.kind.__name__ for call in calls]
    # Operations on resized rows run after the resizing; all others are in the first program.
    assert sorted(kinds) == [
        "CrossCall",
        "MultiHotCall",
        "ProgramCall",
        "ProgramCall",
        "ResizeCall",
        "ResizeCall",
        "TopKCall",
    ]


def test_more_intermediate_results_than_scratch_tiles() -> None:
    # Crosses of hashes of one id; all hashes are needed until the end.
    sources = [Feature(f"h{n}", ops=[Mod(n + 1), Hash()], source="id") for n in range(20)]
    crosses = [
        Feature(f"c{n}", ops=[Cross()], source=[sources[n], sources[19 - n], sources[(n * 7) % 20]]) for n in range(20)
    ]
    batch: Batch = {"id": torch.arange(-500, 500)}
    assert_same(FeatureEngine(crosses)(batch), FeatureEngine(crosses, fuse=False)(batch))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_engines_compile_as_one_graph(backend: str) -> None:
    features, batch = large()
    features = [f for f in features if not f.name.startswith("id") or f.name == "id3"]
    engine = FeatureEngine(features)
    want = engine(batch)
    torch._dynamo.reset()
    compiled = torch.compile(engine.__call__, fullgraph=True, backend=backend)
    assert_same(compiled(batch), want)
    smaller: Batch = {name: column[:77] for name, column in batch.items()}  # type: ignore[misc]
    assert_same(compiled(smaller), engine(smaller))


def test_engines_compile_within_other_code() -> None:
    engine = FeatureEngine([Feature("id", ops=[Hash(), Mod(100)]), Feature("rows", ops=[Truncate(2)])])
    table = torch.randn(100, 4)

    def step(ids: torch.Tensor, rows: RaggedTensor) -> torch.Tensor:
        result = engine({"id": ids + 1, "rows": rows})
        assert isinstance(result["id"], torch.Tensor)
        return table[result["id"]].sum(1) + result["rows"].lengths()  # type: ignore[union-attr]

    rows = RaggedTensor.from_lists([[1, 2, 3], [], [4]])
    ids = torch.tensor([5, 6, 7])
    torch._dynamo.reset()
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(ids, rows), step(ids, rows))


def test_a_custom_operation_between_native_ones() -> None:
    class Reverse:
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Reverse)

        def __hash__(self) -> int:
            return 7

        def __str__(self) -> str:
            return "reverse"

        def fault(self) -> str | None:
            return None

        def kernel(self) -> Callable[[Column], Column]:
            return lambda column: Column(column.values.flip(0))

    def chain(*ops: Any) -> Sequence[Any]:
        return ops

    features = [
        Feature("a", ops=chain(Hash(), Reverse(), Mod(10), Reverse(), Bucketize([5])), source="x"),
        Feature("b", ops=chain(Hash(), Mod(3)), source="x"),
    ]
    batch: Batch = {"x": torch.arange(10)}
    assert_same(FeatureEngine(features)(batch), FeatureEngine(features, fuse=False)(batch))


def test_results_before_a_custom_operation_are_computed_once() -> None:
    class Same:
        def fault(self) -> None:
            return None

        def kernel(self) -> Callable[[Column], Column]:
            return lambda column: column

    own: Sequence[Any] = [Same(), Mod(5)]
    features = [
        Feature("a", ops=own, source="x"),
        Feature("b", ops=[Hash(), Mod(100), Hash("murmur"), Mod(7)], source="x"),
    ]
    engine = FeatureEngine(features)
    engine({"x": torch.arange(4)})
    calls = [call for name in engine._segments.values() for call in getattr(engine, name).calls]
    result = [node.label for call in calls if isinstance(call, link.ProgramCall) for node in call.nodes]
    assert len(result) == len(set(result)) == 5, result


def test_zeros_of_both_signs_are_filled_in() -> None:
    features = [Feature("a", ops=[FillNull(0.0)], source="x"), Feature("b", ops=[FillNull(-0.0)], source="x")]
    for column in (torch.tensor([math.nan]), RaggedTensor.from_lists([[]], dtype=torch.float32)):
        result = FeatureEngine(features)({"x": column})
        assert [Column.of(result[name]).values.signbit().tolist() for name in "ab"] == [[False], [True]]
        assert_same(result, FeatureEngine(features, fuse=False)({"x": column}))


def test_an_engine_keeps_the_calls_of_earlier_forms() -> None:
    engine = FeatureEngine([Feature("x", ops=[Mod(10)])])
    for column in (
        torch.arange(5),
        RaggedTensor.from_lists([[1, 22]]),
        torch.tensor([33], dtype=torch.int8),
        torch.arange(4).view(2, 2),
    ):
        assert_same(engine({"x": column}), FeatureEngine([Feature("x", ops=[Mod(10)])], fuse=False)({"x": column}))


@pytest.mark.parametrize("fuse", [True, False, "kind"])
def test_operations_that_change_nothing(fuse: Any) -> None:
    engine = FeatureEngine([Feature("x", source="ids", ops=[Cast(torch.int64)])], fuse=fuse)
    ids = torch.tensor([1, 2, 3])
    assert torch.equal(engine({"ids": ids})["x"], ids)


@on_devices
def test_devices_compute_the_same_bits(device: str) -> None:
    features, batch = large()
    engine = FeatureEngine(features)
    assert_same(without_unused_values(engine(moved_to(batch, device))), FeatureEngine(features, fuse=False)(batch))
    engine.check()


@on_accelerators
def test_a_fused_run_does_not_wait_for_the_gpu(device: str) -> None:
    features, batch = large()
    gpu_batch = moved_to(batch, device)
    engine = FeatureEngine(features)
    engine(gpu_batch)  # links the calls, uploads their programs, and allocates the memory that the next run reuses
    torch.accelerator.synchronize()
    if device == "cuda":
        torch.cuda._sleep(400_000_000)
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream())
    with no_synchronization(device):
        result = engine(gpu_batch)
    # The GPU has not reached the event, so native code did not wait either; the emulated device counts all waits.
    assert device == "emulated" or not event.query()
    engine.check()
    assert_same(without_unused_values(result), FeatureEngine(features)(batch))


def kernel_names(engine: FeatureEngine, batch: Batch) -> list[str]:
    """Return the names of the kernels of a run."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    engine(batch)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        engine(batch)
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_gpu if not name.startswith(("Memcpy", "Memset"))]


@pytest.mark.gpu
def test_fused_operations_are_one_launch_for_any_number_of_features() -> None:
    features, batch = large()
    few = [feature for feature in features if not feature.name.startswith("id") or feature.name == "id3"]
    counts = []
    for declarations in (few, features):
        engine = FeatureEngine(declarations)
        names = kernel_names(engine, moved_to(batch, "cuda"))
        calls = [call for name in engine._segments.values() for call in getattr(engine, name).calls]
        programs = sum(isinstance(call, link.ProgramCall) for call in calls)
        assert sum("RunProgram" in name for name in names) == programs == 2, names
        counts.append(len(names))
    assert counts[0] == counts[1]
