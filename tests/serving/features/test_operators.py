"""Every operator in NumPy, bit for bit equal to the native one, over edge values; both refuse the same columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from recis_hybrid.features import (
    Age,
    Bucketize,
    Cast,
    Clip,
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
from recis_hybrid.features.op import Column as TorchColumn
from recis_hybrid.features.ops.times import PARTS
from recis_hybrid.publish.features import _OPERATORS, PublishError, program_of
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.serving.columns import Column
from recis_hybrid.serving.errors import InputError, ServingError
from recis_hybrid.serving.features.program import OPERATORS, Program

Maker = Callable[[np.random.Generator], "torch.Tensor | RaggedTensor"]
EDGES = [0, 1, -1, 2, 7, -7, 3600, 86_399, 86_400, -86_401, 2**31 - 1, 2**31, -(2**31) - 1, 2**52, 2**53 + 1]
EDGES += [2**63 - 1, -(2**63), 2**62, 951_782_400, 951_868_800, -62_135_596_800, 1_709_164_800_000]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 0.7, 1e-45, 1e-30, 3e38, -3e38, 1e300, 2.0**62, 2.0**63, -(2.0**63), 2.0**53 + 1]
FLOATS += [float("inf"), float("-inf"), float("nan")]


def ids(random: np.random.Generator, count: int) -> torch.Tensor:
    drawn = np.where(
        random.random(count) < 0.6,
        random.choice(np.array(EDGES), count),
        random.integers(-(2**63), 2**63 - 1, count, endpoint=True),
    )
    return torch.from_numpy(drawn.astype(np.int64))


def small(random: np.random.Generator, count: int) -> torch.Tensor:
    return torch.from_numpy(random.integers(-1 if random.random() < 0.2 else 0, 5, count))


def floats(dtype: torch.dtype) -> Callable[[np.random.Generator, int], torch.Tensor]:
    def values(random: np.random.Generator, count: int) -> torch.Tensor:
        edges = np.array(FLOATS if random.random() < 0.5 else [0.0, 0.7, 1.5, 2.0])
        drawn = np.where(random.random(count) < 0.5, random.choice(edges, count), random.gamma(1.0, 3.0, count))
        return torch.from_numpy(drawn).to(dtype)

    return values


Values = Callable[[np.random.Generator, int], torch.Tensor]


def narrow(random: np.random.Generator, count: int) -> torch.Tensor:
    return ids(random, count).to(torch.int32)


def dense(values: Values, width: int | None = None) -> Maker:
    def make(random: np.random.Generator) -> torch.Tensor:
        rows = int(random.integers(0, 9))
        return values(random, rows) if width is None else values(random, rows * width).view(rows, width)

    return make


def offsets(random: np.random.Generator, rows: int, most: int) -> torch.Tensor:
    lengths = random.integers(0, most + 1, rows)
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))


def ragged(values: Values, *, levels: int = 1, weighted: bool = False, most: int = 5) -> Maker:
    def make(random: np.random.Generator) -> RaggedTensor:
        count = int(random.integers(0, 9))
        outer: list[torch.Tensor] = []
        for _ in range(levels):
            outer.append(offsets(random, count, most))
            count = int(outer[-1][-1])
        weights = None
        if weighted:
            drawn = random.choice(np.array([0.0, -0.0, 1.0, 0.5, 0.3, -2.0, 1e30]), count)
            weights = torch.from_numpy(drawn.astype(np.float32))
        return RaggedTensor(values(random, count), outer[-1], weights, tuple(outer[:-1]))

    return make


WORDS = [b"rome", b"oslo", b"", b"\xff\xfe", "é".encode(), b"7", b"12345678", b"paris"]


def strings(*, levels: int = 0, weighted: bool = False) -> Maker:
    def make(random: np.random.Generator) -> RaggedTensor:
        count = int(random.integers(0, 9))
        outer: list[torch.Tensor] = []
        for _ in range(levels):
            outer.append(offsets(random, count, 3))
            count = int(outer[-1][-1])
        words = [
            WORDS[random.integers(len(WORDS))] if random.random() < 0.5 else random.bytes(int(random.integers(0, 200)))
            for _ in range(count)
        ]
        encoded = RaggedTensor.from_strings(words)
        weights = torch.from_numpy(random.random(count).astype(np.float32)) if weighted else None
        return RaggedTensor(encoded.values, encoded.offsets, weights, tuple(outer))

    return make


def same_rows(one: Maker, other: Maker) -> Callable[[np.random.Generator], Sequence[Any]]:
    """Return a maker of two columns of equal numbers of rows."""

    def make(random: np.random.Generator) -> Sequence[Any]:
        while True:
            x, y = one(random), other(random)
            rows = [c.batch_size if isinstance(c, RaggedTensor) else len(c) for c in (x, y)]
            if rows[0] == rows[1]:
                return [x, y]

    return make


INTEGERS = [dense(ids), dense(narrow), dense(ids, 3), ragged(ids), ragged(ids, weighted=True), ragged(ids, levels=2)]
NUMBERS = [
    *INTEGERS,
    *[
        form
        for d in (torch.float32, torch.float64)
        for form in (dense(floats(d)), dense(floats(d), 2), ragged(floats(d)))
    ],
]
STRINGS = [strings(), strings(levels=1), strings(levels=1, weighted=True), strings(levels=2)]
LISTS = [ragged(ids), ragged(floats(torch.float32), weighted=True), ragged(ids, levels=2), *STRINGS[:3]]
LISTS += [ragged(ids, levels=2, weighted=True)]
ONE_LEVEL = [ragged(ids), ragged(ids, weighted=True), ragged(floats(torch.float64))]
PAIRS = [
    same_rows(dense(ids), dense(narrow)),
    same_rows(ragged(ids), dense(ids)),
    same_rows(dense(ids), ragged(ids, weighted=True)),
    same_rows(ragged(ids, weighted=True), ragged(ids)),
    same_rows(ragged(ids, weighted=True), ragged(ids, weighted=True)),
]
KINDS = ("farm", "murmur", "xxh64", "djb2", "sdbm")
CASES: list[tuple[list[Any], Sequence[Any]]] = [
    *[([Hash(kind)], [*INTEGERS, *STRINGS]) for kind in KINDS],
    *[([Mod(n)], INTEGERS) for n in (1, 7, 2**52, 2**63, 2**64 - 1)],
    ([MultiHash([1000, 7, 1, 10**6])], INTEGERS),
    ([StringMultiHash([100, None, 5, 9])], STRINGS),
    *[([DecimalString(unsigned)], [INTEGERS[0], INTEGERS[1], *INTEGERS[3:]]) for unsigned in (False, True)],
    ([DecimalString(), Hash("farm")], [dense(ids), ragged(ids, weighted=True)]),
    *[([Bucketize([0.7, 1.5, 1.5, 2**53 + 1], right=right)], NUMBERS) for right in (True, False)],
    ([Bucketize([float("-inf"), -(2**63), 0.5, 2.0**63, float("inf")])], NUMBERS),
    ([Log()], NUMBERS),
    ([Log(plus=1.5)], NUMBERS),
    ([Clip(-5, 2**60)], NUMBERS),
    ([Clip(float("-inf"), 1e39)], NUMBERS[6:]),
    ([Normalize(3.25, 0.7)], NUMBERS),
    ([FillNull(0.1)], NUMBERS[6:]),
    ([FillNull(4)], [ragged(ids), ragged(ids, weighted=True), *NUMBERS[6:]]),
    *[([Cast(dtype)], NUMBERS) for dtype in (torch.int32, torch.int64, torch.float32, torch.float64)],
    ([Cast(torch.float32)], [lambda random: torch.from_numpy(random.random(4) < 0.5)]),
    *[
        ([DatePart(part, unit, missing=missing)], INTEGERS)  # type: ignore[arg-type]
        for part in PARTS
        for unit, missing in (("s", None), ("ms", -1))
    ],
    ([DatePart("hour", utc_offset="-05:30")], INTEGERS),
    *[([DatePart(part, "d")], INTEGERS) for part in ("day_of_week", "day_of_year", "year")],  # type: ignore[arg-type]
    *[([Age(until, unit, missing=7)], INTEGERS) for until in (0, 2**63 - 1, -(2**63)) for unit in ("d", "s", "ns")],
    ([Age("2024-02-29", "ms")], INTEGERS),
    *[([Age(unit=unit, missing=missing)], PAIRS) for unit in ("d", "ms") for missing in (None, -1)],  # type: ignore[arg-type]
    ([Vocabulary(["rome", b"\xff\xfe", ""], unknown=9)], STRINGS),
    ([Vocabulary(["rome", "oslo", "", "7", "é", "paris", "12345678", b"\xff\xfe"])], STRINGS),
    ([Vocabulary([7, -1, 2**63 - 1, 0], unknown=0)], INTEGERS),
    ([Vocabulary([0, 1, 2, 3, 4])], [dense(small), ragged(small)]),
    ([Mask([0, -1, 2**62, 0.5])], NUMBERS),
    ([Mask(["rome", b"\xff\xfe"])], STRINGS),
    *[([Truncate(n, side=side)], LISTS) for n in (0, 2) for side in ("left", "right")],
    ([Truncate(1, level=2)], [LISTS[2], LISTS[6], LISTS[4], LISTS[5]]),
    *[([Pad(3, 1, side=side)], LISTS) for side in ("left", "right")],
    ([Pad(3, 65, level=2)], [LISTS[2], LISTS[6], LISTS[4], LISTS[5]]),
    *[([ToDense(4, 7, side=side)], [ragged(ids, most=4), ragged(ids), STRINGS[0]]) for side in ("left", "right")],
    ([TopK(2)], [ragged(ids, weighted=True), ragged(floats(torch.float64), weighted=True)]),
    ([Distinct()], [dense(ids), ragged(small), ragged(ids, weighted=True), ragged(small, weighted=True)]),
    ([Length()], [*ONE_LEVEL, *STRINGS, ragged(ids, levels=2)]),
    ([Length(level=2)], [ragged(ids, levels=2), *STRINGS[1:]]),
    ([Length(ignore=[0, 7])], [dense(ids, 3), *ONE_LEVEL, ragged(ids, levels=2)]),
    ([Length(ignore=["rome", ""])], STRINGS[1:]),
    ([MultiHot(5)], [dense(small), dense(small, 3), ragged(small), ragged(small, weighted=True)]),
    ([OneHot(5)], [dense(small)]),
    ([Tile(3)], [dense(ids), dense(ids, 2), ragged(ids, weighted=True), STRINGS[0]]),
    ([Cross()], PAIRS),
    ([Cross(limit=6)], PAIRS),
    ([Cross(distinct=True)], PAIRS),
    ([Hash("murmur"), Cross(), Mod(1000)], [same_rows(STRINGS[1], STRINGS[0])]),
    ([Concat()], [*PAIRS, same_rows(dense(ids, 2), dense(ids)), same_rows(ragged(ids), dense(ids, 2))]),
    ([Concat()], [same_rows(dense(floats(torch.float32)), ragged(floats(torch.float32)))]),
]


def served(column: torch.Tensor | RaggedTensor) -> Column:
    """Return a column of a batch as serving has it."""
    parts = TorchColumn.of(column)
    offsets, weights = (None if part is None else part.numpy() for part in (parts.offsets, parts.weights))
    return Column(parts.values.numpy(), offsets, weights, tuple(part.numpy() for part in parts.outer))


def assert_equal(found: Column, expected: Column) -> None:
    assert len(found.outer) == len(expected.outer)
    for mine, theirs in zip((*found[:3], *found.outer), (*expected[:3], *expected.outer), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.dtype == theirs.dtype
            assert mine.shape == theirs.shape
            numbers = mine.dtype.kind == "f"
            assert np.array_equal(np.isnan(mine), np.isnan(theirs)) if numbers else True
            kept = ~np.isnan(mine) if numbers else slice(None)
            assert mine[kept].tobytes() == theirs[kept].tobytes()


@pytest.mark.parametrize(("ops", "makers"), CASES, ids=[",".join(map(str, ops))[:40] for ops, _ in CASES])
def test_the_operator_equals_the_native_one(ops: list[Any], makers: Sequence[Any]) -> None:
    engines: dict[int, tuple[FeatureEngine, Program]] = {}

    @settings(max_examples=60)
    @given(seed=st.integers(0, 2**32 - 1), which=st.integers(0, len(makers) - 1))
    def check(seed: int, which: int) -> None:
        made = makers[which](np.random.default_rng(seed))
        columns = {f"c{n}": column for n, column in enumerate(made if isinstance(made, list) else [made])}
        if len(columns) not in engines:
            engine = FeatureEngine([Feature("f", ops=ops, source=list(columns))], parallel=False)
            engines[len(columns)] = engine, Program("bundle", program_of(engine))
        engine, program = engines[len(columns)]
        given_columns = {name: served(column) for name, column in columns.items()}
        try:
            expected = engine(columns)
        except ValueError:
            with pytest.raises(InputError, match=r"^feature 'f'.*; (send|put)"):
                program.run(given_columns)
            return
        found = program.run(given_columns)
        assert list(found) == list(expected)
        for name, column in expected.items():
            assert_equal(found[name], served(column))

    check()


def test_all_operators_are_covered() -> None:
    covered: set[str] = set()
    for ops, _ in CASES:
        for width in (1, 2):
            try:
                engine = FeatureEngine([Feature("f", ops=ops, source=["c0", "c1"][:width])])
            except ValueError:
                continue
            covered |= {step["op"] for step in program_of(engine)["steps"]}  # type: ignore[index, union-attr, call-overload]
    assert covered == set(OPERATORS) == {name for name, _ in _OPERATORS.values()}


def test_operators_share_registers_and_columns_pass_through() -> None:
    features = [
        Feature("a", ops=[Hash("farm"), Mod(10)], source="x"),
        Feature("b", ops=[Hash("farm"), Mod(7)], source="x"),
        Feature("raw", source="y"),
    ]
    document = program_of(FeatureEngine(features), ["a", "b", "raw", "z"])
    assert document["columns"] == ["x", "y", "z"]
    assert [step["op"] for step in document["steps"]] == ["hash", "mod", "mod"]  # type: ignore[union-attr, index, call-overload]
    assert document["outputs"] == {"a": 4, "b": 5, "raw": 1, "z": 2}
    columns = {name: Column(np.arange(3)) for name in "xyz"}
    found = Program("bundle", document).run(columns)
    assert found["z"] is columns["z"]
    batch = {name: torch.arange(3) for name in "xyz"}
    for name, column in FeatureEngine(features)(batch).items():
        assert_equal(found[name], served(column))


JOINED = [Hash("farm"), Mod(5), Log(plus=0.5), Bucketize([0.5, 2]), Vocabulary(["rome", "oslo"], unknown=2)]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_equal_operators_of_several_columns_run_as_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    makers = [*INTEGERS, *NUMBERS[6:], *STRINGS]
    chosen = [makers[random.integers(len(makers))] for _ in range(6)]
    features, columns = [], {}
    for number, maker in enumerate(chosen):
        column = maker(np.random.default_rng(seed + number))
        rows = column.batch_size if isinstance(column, RaggedTensor) else len(column)
        text = isinstance(column, RaggedTensor) and column.dtype == torch.uint8
        real = not text and column.dtype.is_floating_point
        first = Log(plus=0.5) if real else JOINED[random.choice([0, 4])] if text else JOINED[random.choice([0, 1])]
        if rows == 4 or number == 0:
            columns[f"c{number}"] = column
            features.append(Feature(f"f{number}", ops=[first, Bucketize([0.5, 2])], source=f"c{number}"))
    rows = {column.batch_size if isinstance(column, RaggedTensor) else len(column) for column in columns.values()}
    if len(rows) > 1:
        columns, features = {"c0": columns["c0"]}, features[:1]
    # Each column twice, so that equal operators have several columns of equal dtypes.
    columns |= {f"{name}_again": column for name, column in columns.items()}
    features += [Feature(f"{one.name}_again", ops=one.ops, source=f"{one.source}_again") for one in features]
    engine = FeatureEngine(features, parallel=False)
    program = Program("bundle", program_of(engine))
    served_columns = {name: served(column) for name, column in columns.items()}
    try:
        expected = engine(columns)
    except ValueError:
        with pytest.raises(InputError, match=r"^feature 'f\d"):
            program.run(served_columns)
        return
    found = program.run(served_columns)
    for name, column in expected.items():
        assert_equal(found[name], served(column))


def test_a_refused_value_of_joined_columns_names_its_feature() -> None:
    engine = FeatureEngine([Feature(name, ops=[Log()]) for name in ("a", "b", "c")])
    columns = {name: Column(np.array([1.0, 2.0])) for name in "abc"} | {"b": Column(np.array([1.0, -2.0]))}
    with pytest.raises(InputError, match=r"^feature 'b', column 'b', log: row 1: has no logarithm, got -2.0; put Clip"):
        Program("bundle", program_of(engine)).run(columns)


@dataclass(frozen=True)
class Add:
    n: int

    def fault(self) -> str | None:
        return None

    def kernel(self) -> Any:
        return lambda column: column._replace(values=column.values + self.n)


@dataclass(frozen=True)
class OtherHash(Hash):
    pass


@pytest.mark.parametrize("op", [Add(3), OtherHash()], ids=str)
def test_operators_of_users_are_refused(op: Any) -> None:
    engine = FeatureEngine([Feature("age", ops=[op])])
    with pytest.raises(PublishError, match=r"feature 'age'.*cannot be in a bundle.*Compute it before the request"):
        program_of(engine)


def test_invalid_programs_are_refused() -> None:
    good = {"op": "mod", "inputs": [0], "feature": "f", "n": 5}
    base = {"columns": ["x"], "steps": [good], "outputs": {"f": 1}}
    assert Program("bundle", base).run({"x": Column(np.array([7]))})["f"].values.tolist() == [2]
    for step, message in (
        ({**good, "op": "fold"}, "unknown operator 'fold'. The bundle was written by a newer version"),
        ({**good, "inputs": [1]}, "inputs must be registers from 0 to 0"),
        ({**good, "inputs": []}, "inputs must be registers"),
        ({**good, "k": 5}, "step 0, mod: .*unexpected keyword argument 'k'"),
    ):
        with pytest.raises(ServingError, match=message):
            Program("bundle", {**base, "steps": [step]})
    with pytest.raises(ServingError, match="outputs must be registers from 0 to 1"):
        Program("bundle", {**base, "outputs": {"f": 2}})
