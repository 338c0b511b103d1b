from __future__ import annotations

import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid import features, ops
from recis_hybrid.features import Bucketize, Column, Cross, Feature, FeatureEngine, Hash, Log, Mod, Op, Truncate
from recis_hybrid.features.program import lowering as link
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support import hashes
from tests.support.devices import on_devices
from tests.support.features import assert_same, fused_or_not, plain


@pytest.fixture
def batch() -> Batch:
    return {
        "user": torch.tensor([5, -1, 5]),
        "name": RaggedTensor.from_strings(["ann", "", "bob"]),
        "clicks": RaggedTensor.from_lists([[7, 8], [], [9]], weights=[[0.5, 1], [], [2]]),
        "age": torch.tensor([17.0, 18.0, 70.0]),
        "label": torch.tensor([0.0, 1.0, 1.0]),
    }


def native_calls(engine: FeatureEngine) -> list[object]:
    """Return the native calls of an engine that has run."""
    return [call for name in engine._segments.values() for call in getattr(engine, name).calls]


@on_devices
def test_features_of_every_kind_of_column(device: str, batch: Batch) -> None:
    batch = {name: column.to(device) for name, column in batch.items()}
    result = FeatureEngine(
        [
            Feature("name", ops=[Hash("murmur")]),
            Feature("clicks", ops=[Hash(), Mod(100)]),
            Feature("user", ops=[Mod(3)]),
            Feature("age_group", ops=[Bucketize([18, 65])], source="age"),
        ]
    )(batch)
    assert list(result) == ["name", "clicks", "user", "age_group", "label"]
    name, clicks, user, group = (result[key] for key in list(result)[:4])
    assert isinstance(name, torch.Tensor)
    assert name.tolist() == [hashes.murmur(s) for s in (b"ann", b"", b"bob")]
    assert isinstance(clicks, RaggedTensor)
    flat = [hashes.farm(i.to_bytes(8, "little")) % 2**64 % 100 for i in (7, 8, 9)]
    assert clicks.to_lists() == [flat[:2], [], flat[2:]]
    assert clicks.weights is batch["clicks"].weights  # type: ignore[union-attr]
    assert isinstance(user, torch.Tensor)
    assert user.tolist() == [2, (2**64 - 1) % 3, 2]
    assert isinstance(group, torch.Tensor)
    assert group.tolist() == [0, 1, 2]
    assert all(column.device.type == device for column in result.values())


def test_columns_that_no_feature_reads_pass_through_unchanged(batch: Batch) -> None:
    before = dict(batch)
    result = FeatureEngine([Feature("user_small", ops=[Mod(2)], source="user")])(batch)
    assert list(result) == ["user_small", "name", "clicks", "age", "label"]
    assert all(result[name] is batch[name] for name in ("name", "clicks", "age", "label"))
    assert batch == before


def test_a_column_may_be_kept_along_with_its_features(batch: Batch) -> None:
    result = FeatureEngine([Feature("age"), Feature("adult", ops=[Bucketize([18])], source="age")])(batch)
    assert result["age"] is batch["age"]
    assert result["adult"].tolist() == [0, 1, 1]  # type: ignore[union-attr]


def test_a_feature_may_be_named_like_a_column_that_is_read(batch: Batch) -> None:
    result = FeatureEngine([Feature("user", source="age"), Feature("age", source="user")])(batch)
    assert result["user"] is batch["age"]
    assert result["age"] is batch["user"]


def test_an_engine_without_features_changes_nothing(batch: Batch) -> None:
    assert FeatureEngine([])(batch) == batch


def test_batches_without_rows() -> None:
    result = FeatureEngine([Feature("a", ops=[Hash(), Mod(3)]), Feature("b", ops=[Bucketize([1])])])(
        {"a": RaggedTensor.from_strings([]), "b": torch.empty(0)}
    )
    assert [result[name].shape for name in "ab"] == [(0,), (0,)]  # type: ignore[union-attr]


def test_features_and_columns_of_an_engine() -> None:
    declarations = [Feature("b", source="x"), Feature("a", ops=[Mod(3)])]
    engine = FeatureEngine(declarations)
    assert engine.features == tuple(declarations)
    assert engine.columns == ("x", "a")


def test_repr_lists_features_with_their_operations() -> None:
    pair = Feature("pair", ops=[Hash(), Cross()], source=["user", "item"], optional=True)
    declarations = [Feature("age"), pair, Feature("clicks", ops=[Truncate(3)])]
    assert repr(FeatureEngine(declarations)).splitlines() == [
        "FeatureEngine(features=3, operations=4, fused=3",
        "  age: 'age'",
        "  pair: ('user' -> hash[farm], 'item' -> hash[farm]) -> cross",
        "  clicks: 'clicks' -> truncate[3, right]",
        ")",
    ]
    assert repr(FeatureEngine(declarations, fuse=False)).startswith("FeatureEngine(features=3, operations=4, fused=0\n")
    assert repr(FeatureEngine(declarations).plan) == "Plan(features=3, columns=4, operations=4, shared=0)"


def test_equal_operations_run_once(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    hash_ids = ops.hash.hash_ids

    def counting_hash(ids: torch.Tensor, kind: ops.hash.HashKind) -> torch.Tensor:
        calls.append(kind)
        return hash_ids(ids, kind)

    monkeypatch.setattr(ops.hash, "hash_ids", counting_hash)
    declarations = [Feature(f"user{n}", ops=[Hash(), Mod(n)], source="user") for n in range(1, 6)]
    FeatureEngine(declarations, fuse=False)(batch)
    assert calls == ["farm"]
    fused = FeatureEngine(declarations)
    fused(batch)
    (program,) = native_calls(fused)
    assert isinstance(program, link.ProgramCall)
    assert [node.label for node in program.nodes].count("feature 'user1', hash[farm]") == 1


operation = st.one_of(
    st.sampled_from([Hash("farm"), Hash("murmur")]),
    st.builds(Mod, st.integers(1, 2**64 - 1)),
    st.builds(Bucketize, st.lists(st.integers(-100, 100), min_size=1, max_size=4).map(sorted), right=st.booleans()),
)


def one_by_one(op: Op, value: int) -> int:
    if isinstance(op, Hash):
        return getattr(hashes, op.kind)(value.to_bytes(8, "little", signed=True))  # type: ignore[no-any-return]
    if isinstance(op, Mod):
        return (value % 2**64 % op.n + 2**63) % 2**64 - 2**63
    assert isinstance(op, Bucketize)
    return sum(b <= value if op.right else b < value for b in op.boundaries)


@given(
    chains=st.lists(st.tuples(st.sampled_from("xy"), st.lists(operation, max_size=4)), max_size=6),
    values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5),
)
def test_features_match_their_operations_applied_one_by_one(
    chains: list[tuple[str, list[Op]]], values: list[int]
) -> None:
    declarations = [Feature(f"f{i}", ops=chain, source=column) for i, (column, chain) in enumerate(chains)]
    columns = {"x": values, "y": [v // 2**58 for v in values]}
    result = FeatureEngine(declarations)({name: torch.tensor(column) for name, column in columns.items()})
    for one in declarations:
        want = columns[one.columns[0]]
        for op in one.ops:
            want = [one_by_one(op, value) for value in want]
        assert result[one.name].tolist() == want  # type: ignore[union-attr]


def test_a_custom_operation(batch: Batch) -> None:
    @dataclass(frozen=True)
    class Add:
        n: int

        def fault(self) -> str | None:
            return None if self.n else "n must not be 0"

        def kernel(self) -> features.Kernel:
            return lambda column: column._replace(values=column.values + self.n)

    result = FeatureEngine([Feature("user", ops=[Add(6), Mod(4)])])(batch)
    assert result["user"].tolist() == [3, 1, 3]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="Feature 'user': Add: n must not be 0"):
        Feature("user", ops=[Add(0)])


def test_errors_name_the_missing_column(batch: Batch) -> None:
    engine = FeatureEngine([Feature("first", source="usr"), Feature("second", source="usr")])
    with pytest.raises(
        ValueError, match=r"feature 'first': the batch has no column 'usr' \(did you mean 'user'\?\)"
    ) as e:
        engine(batch)
    assert "it has ['age', 'clicks', 'label', 'name', 'user']" in str(e.value)
    assert "set source=" in str(e.value)
    with pytest.raises(ValueError, match="feature 'q': the batch has no column 'q'; it has"):
        FeatureEngine([Feature("q")])(batch)


def test_columns_of_other_classes_are_refused() -> None:
    for column, message in ((None, "NoneType"), ({1}, "set"), (len, "builtin_function_or_method")):
        with pytest.raises(
            TypeError,
            match=f"feature 'a': column 'a' must be a Tensor or a RaggedTensor, or .* got {message}; .*from_l",
        ):
            FeatureEngine([Feature("a")])({"a": column})  # type: ignore[dict-item]


def test_columns_of_a_batch_must_have_the_same_number_of_rows() -> None:
    engine = FeatureEngine([Feature("a", ops=[Mod(5)]), Feature("b", ops=[Hash()]), Feature("c")])
    batch = {"a": torch.tensor([1, 2]), "b": RaggedTensor.from_strings([["x"], []]), "c": torch.ones(2, 3)}
    engine(batch)
    for name, column in (("b", RaggedTensor.from_strings([["x"]])), ("c", torch.ones(3, 2))):
        with pytest.raises(
            ValueError, match=f"^feature '{name}', column '{name}': it has . rows and column 'a' has 2 rows"
        ):
            engine({**batch, name: column})


def test_a_column_that_requires_a_gradient_is_refused() -> None:
    price = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="^feature 'log', column 'price': the column requires a gradient"):
        FeatureEngine([Feature("log", source="price", ops=[Log()])])({"price": price})
    with torch.no_grad():
        FeatureEngine([Feature("log", source="price", ops=[Log()])])({"price": price})
    assert FeatureEngine([Feature("price")])({"price": price})["price"] is price


def test_errors_of_wrong_dtypes_name_the_feature(batch: Batch) -> None:
    with pytest.raises(
        TypeError, match=r"^feature 'rank', mod\[5\]: Mod takes integers, got torch.float32; put a Bucket"
    ):
        FeatureEngine([Feature("rank", ops=[Mod(5)], source="age")])(batch)
    with pytest.raises(TypeError, match=r"^feature 'name', mod\[5\]: .*put a Hash before it"):
        FeatureEngine([Feature("name", ops=[Mod(5)])])(batch)
    strings = RaggedTensor.from_strings(["ab"])
    weighted = RaggedTensor(strings.values, strings.offsets, torch.ones(2))
    with pytest.raises(ValueError, match=r"^feature 'a', hash\[farm\]: weights on a string column"):
        FeatureEngine([Feature("a", ops=[Hash()])])({"a": weighted})


@fused_or_not
def test_errors_of_bad_offsets_name_the_feature(fuse: bool) -> None:
    strings = RaggedTensor.from_strings(["ab", "cd"])
    strings.offsets[1] = 9  # after the RaggedTensor has checked them
    with pytest.raises(ValueError, match=r"^feature 'a', column 'a': .*must not decrease, got 9 and then 4 at row 1"):
        FeatureEngine([Feature("a", ops=[Hash()])], fuse=fuse)({"a": strings})


def test_a_feature_must_not_hide_a_column(batch: Batch) -> None:
    with pytest.raises(ValueError, match="feature 'label': the batch has a column of the same name.*rename"):
        FeatureEngine([Feature("label", source="age")])(batch)


def test_an_engine_can_be_pickled(batch: Batch) -> None:
    engine = FeatureEngine([Feature("age", ops=[Bucketize([18])]), Feature("user", ops=[Hash(), Mod(9)])])
    copy = pickle.loads(pickle.dumps(engine))
    want, got = engine(batch), copy(batch)
    assert all(torch.equal(want[name], got[name]) for name in ("age", "user"))  # type: ignore[arg-type]


def test_threads_may_link_forms_concurrently(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FeatureEngine([Feature("x", ops=[Mod(1000)])])
    both = threading.Barrier(2)
    original = FeatureEngine._segment

    def slowly(self: FeatureEngine, known: tuple[tuple[int, features.op.Form], ...]) -> link.Segment:
        segment = original(self, known)
        try:
            both.wait(timeout=0.2)
        except threading.BrokenBarrierError:
            pass  # the other thread waits for the lock
        return segment

    monkeypatch.setattr(FeatureEngine, "_segment", slowly)
    columns = [torch.arange(5), torch.arange(5, dtype=torch.int16)]
    threads = [threading.Thread(target=engine, args=({"x": column},)) for column in columns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(engine._segments.values())) == 2
    assert [engine({"x": column})["x"].tolist() for column in columns] == [[0, 1, 2, 3, 4]] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize("op", [Bucketize([2.0]), Mod(1000)])
def test_engines_that_have_seen_different_forms_compile(op: Op) -> None:
    wide, narrow = torch.float64, torch.float32
    if isinstance(op, Mod):
        wide, narrow = torch.int16, torch.int32
    engines = [FeatureEngine([Feature("x", ops=[op])]) for _ in range(2)]
    engines[1]({"x": torch.arange(6).to(wide)})

    def step(engine: FeatureEngine, x: torch.Tensor) -> torch.Tensor:
        result = engine({"x": x})["x"]
        assert isinstance(result, torch.Tensor)
        return result

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    x = torch.arange(6).to(narrow)
    for engine in engines:
        assert torch.equal(compiled(engine, x), step(FeatureEngine(engine.features), x))


def test_a_program_refuses_other_dtypes() -> None:
    engine = FeatureEngine([Feature("x", ops=[Bucketize([2.0])])])
    engine({"x": torch.arange(6.0)})
    (program,) = native_calls(engine)
    assert isinstance(program, link.ProgramCall)
    with pytest.raises(TypeError, match=r"^feature 'x', .*values must be torch.float32, got torch.float64"):
        program.run({0: Column(torch.arange(6.0).double())})


def test_a_kept_column_must_not_have_the_name_of_a_feature() -> None:
    with pytest.raises(ValueError, match="feature 'a': .*of the same name, which keep= keeps; .*remove it from keep="):
        FeatureEngine([Feature("a", ops=[Mod(3)])], keep=["a"])({"a": torch.tensor([1])})


def test_engines_compile_without_graph_breaks(batch: Batch) -> None:
    engine = FeatureEngine(
        [
            Feature("name", ops=[Hash(), Mod(10)]),
            Feature("clicks", ops=[Hash("murmur"), Mod(10)]),
            Feature("age", ops=[Bucketize([18, 65])]),
        ]
    )
    want = engine(batch)
    got = torch.compile(engine.__call__, fullgraph=True, backend="aot_eager")(batch)
    assert_same(got, want)


OPTIONAL = [
    Feature("user", ops=[Mod(10)]),
    Feature("pair", ops=[Cross()], source=["user", "item"], optional=True),
    Feature("town", ops=[Hash(), Mod(7)], source="city", optional=True),
    Feature("clicks", ops=[Truncate(1)], optional=True),
]


@fused_or_not
def test_optional_features_are_omitted_if_a_column_is_missing(fuse: bool) -> None:
    engine = FeatureEngine(OPTIONAL, fuse=fuse)
    whole: Batch = {
        "user": torch.tensor([11, 12]),
        "item": torch.tensor([5, 6]),
        "city": torch.tensor([1, 2]),
        "clicks": RaggedTensor.from_lists([[1, 2], []]),
        "label": torch.tensor([0.0, 1.0]),
    }
    result = engine(whole)
    assert list(result) == ["user", "pair", "town", "clicks", "label"]
    for missing in (["item"], ["city", "clicks"], ["item", "city", "clicks"]):
        batch = {name: column for name, column in whole.items() if name not in missing}
        got = engine(batch)
        feature_of = {"item": "pair", "city": "town"}
        assert list(got) == [name for name in result if name not in {feature_of.get(one, one) for one in missing}]
        assert all(plain(got[name]) == plain(result[name]) for name in got)
    # A column read only by an omitted feature is dropped; another feature reads ``user``.
    assert "item" not in FeatureEngine(OPTIONAL[1:2])({"item": torch.tensor([1]), "label": torch.tensor([1])})
    with pytest.raises(
        ValueError, match="feature 'user': the batch has no column 'user'.* or declare the feature optional"
    ):
        engine({"item": torch.tensor([1])})
    assert plain(engine(whole)["pair"]) == plain(result["pair"])


def test_optional_features_in_a_reader_in_a_pickle_and_compiled() -> None:
    @dataclass(frozen=True)
    class Custom:
        def fault(self) -> None:
            return None

        def kernel(self) -> features.Kernel:
            return lambda column: column

    engine = FeatureEngine([*OPTIONAL, Feature("own", ops=[Custom()], source="extra", optional=True)], keep=["city"])
    batch: Batch = {"user": torch.tensor([11, 12]), "item": torch.tensor([5, 6])}
    want = engine(batch)
    assert list(want) == ["user", "pair"]
    reading, remaining = engine.reading_part(), engine.remaining_part()
    for part in (reading, pickle.loads(pickle.dumps(FeatureEngine(reading.features, keep=[])))):
        assert list(remaining(part(batch))) == ["user", "pair"]
    with_extra = {**batch, "extra": torch.tensor([3, 4]), "city": torch.tensor([1, 2])}
    assert list(remaining(reading(with_extra))) == list(engine(with_extra)) == ["user", "pair", "town", "own", "city"]
    compiled = torch.compile(FeatureEngine(OPTIONAL), fullgraph=True, backend="eager")
    for one in (batch, with_extra, batch):
        result, expected = compiled(one), FeatureEngine(OPTIONAL)(one)
        assert result.keys() == expected.keys()
        assert all(plain(result[name]) == plain(expected[name]) for name in result)


def test_columns_in_keep_must_exist(batch: Batch) -> None:
    with pytest.raises(ValueError, match=r"keep lists 'usr', but the batch has no column 'usr' \(did you mean 'user'"):
        FeatureEngine([Feature("a", ops=[Mod(3)], source="user")], keep=["usr"])(batch)
    with pytest.raises(TypeError, match="keep must be a list of names of columns, got 'user'"):
        FeatureEngine([], keep="user")
    with pytest.raises(TypeError, match="Feature 'a': optional must be True or False, got 1"):
        Feature("a", optional=1)  # type: ignore[arg-type]
