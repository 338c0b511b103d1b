"""Errors of tables and engines, raised before any change; each states the rule, the value and the remedy."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import (
    Constant,
    EmbeddingConfig,
    EmbeddingEngine,
    HashTable,
    Initializer,
    KaimingNormal,
    MemberTable,
    MinFrequency,
    Normal,
    OptimizerSpec,
    RecordLayout,
    Rows,
    StateField,
    TruncatedNormal,
    Uniform,
    Unused,
    XavierUniform,
    dense_parameters,
    leave_out_of_ddp,
    mean_over_samples,
)
from recis_hybrid.ragged import RaggedTensor
from tests.support.tables import make_table


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda thing: torch.save(thing, io.BytesIO())],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_a_table_can_neither_be_copied_nor_pickled(duplicate: Callable[[object], object]) -> None:
    # A copy would hold the addresses of the records, and so share their memory.
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)})
    table = engine.tables[0]
    things = [table, table.anchor, *([] if duplicate is copy.copy else [engine, torch.nn.Sequential(engine)])]
    for thing in things:
        with pytest.raises(TypeError, match="an embedding table cannot be copied or pickled; save it with Saver"):
            duplicate(thing)


def test_clearing_an_unknown_member_table_is_refused() -> None:
    table = make_table(members=2)
    table.insert(0, torch.arange(3))
    changes, generation = table.watch(), table.generation
    for member in (99, 2, -1, "t0", True, 0.0):
        for clear in (table.clear, table.discard):
            with pytest.raises(ValueError, match="clear: member must be 0 to 1, the number of a table, got "):
                clear(member)  # type: ignore[arg-type]
    assert (len(table), table.generation, changes.whole) == (3, generation, set())


def meta_columns(**given: Tensor) -> dict[str, Tensor]:
    return {"updated_step": torch.tensor([0]), "seen_step": torch.tensor([0]), "frequency": torch.tensor([0]), **given}


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (meta_columns(updated_step=torch.tensor([-1])), ValueError, r"updated_step must be 0 to 2\*\*40 - 1, got -1"),
        (meta_columns(updated_step=torch.tensor([2**40])), ValueError, r"updated_step must be .* got 1099511627776"),
        (meta_columns(seen_step=torch.tensor([2**63 - 1])), ValueError, r"seen_step must be 0 to 2\*\*40 - 1, got 9"),
        (meta_columns(frequency=torch.tensor([2**48])), ValueError, r"frequency must be 0 to 2\*\*48 - 1, got 2814"),
        (meta_columns(frequency=torch.tensor([1.7])), TypeError, "frequency must be integers, got torch.float32"),
        (meta_columns(seen_step=torch.tensor([True])), TypeError, "seen_step must be integers, got torch.bool"),
        ({"embedding": [[1.0] * 4]}, TypeError, "embedding must be a tensor, got a list"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: dict[str, Any], error: type[Exception], message: str) -> None:
    table = make_table(dim=4)
    with pytest.raises(error, match="table 't0': insert: " + message):
        table.insert(0, torch.tensor([5]), columns)
    assert len(table) == 0
    with pytest.raises(TypeError, match="table 't0': insert: ids must be a tensor, got a list"):
        table.insert(0, [5])  # type: ignore[arg-type]
    greatest = meta_columns(
        updated_step=torch.tensor([2**40 - 1]), seen_step=torch.tensor([2**40 - 1]), frequency=torch.tensor([2**48 - 1])
    )
    table.insert(0, torch.tensor([5]), greatest)
    assert all(torch.equal(table.export(0)[name], values) for name, values in greatest.items())


class CustomRule:
    """An eviction rule that returns the result of a function."""

    def __init__(self, function: Callable[[Rows], object]) -> None:
        self.function = function

    def unwanted(self, rows: Rows) -> Tensor:
        return self.function(rows)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (CustomRule(lambda rows: 1 * (rows.frequency < 2)), TypeError, "a bool tensor .* got torch.int64"),
        (CustomRule(lambda rows: rows.frequency.tolist()), TypeError, r"a bool tensor \[2\].* got a list"),
        (
            CustomRule(lambda rows: rows.ids[:1] > 0),
            ValueError,
            r"each of the 2 rows of the table 'x', bool \[2\], got bool \[1\]",
        ),
        (CustomRule(lambda rows: torch.ones(2, 1, dtype=torch.bool)), ValueError, r"got bool \[2, 1\]"),
        (
            None,
            TypeError,
            r"a rule must be a function of rows or have a method unwanted\(rows\), e.g. Unused\(steps=1000\), got None",
        ),
    ],
)
def test_bad_eviction_rules_evict_nothing(rule: Any, error: type[Exception], message: str) -> None:
    engine = EmbeddingEngine({"x": EmbeddingConfig(dim=2), "y": EmbeddingConfig(dim=3)})
    engine({"x": torch.tensor([1, 2]), "y": torch.tensor([1, 2])})
    before = [table.generation for table in engine.tables]
    for evict in (engine.evict, engine.tables[0].evict):
        with pytest.raises(error, match=message):
            evict(rule)
    assert [(len(table), table.generation) for table in engine.tables] == [(2, each) for each in before]


def test_pending_gradients_of_one_table_protect_all_tables() -> None:
    engine = EmbeddingEngine({"x": EmbeddingConfig(dim=2), "y": EmbeddingConfig(dim=3)})
    optimizer, both, one = optim.SGD(engine.parameters(), lr=1.0), torch.tensor([1, 2]), torch.tensor([1])
    engine({"x": both, "y": both})
    for _ in range(3):
        engine({"x": one, "y": one})
        optimizer.step()
    engine({"x": one, "y": one})["y"].sum().backward()
    before = [table.generation for table in engine.tables]
    for change in (lambda: engine.evict(Unused(2)), engine.compact):
        with pytest.raises(RuntimeError, match="table y: .* would detach pending gradients"):
            change()
    assert [(len(table), table.generation) for table in engine.tables] == [(2, each) for each in before]
    optimizer.step()
    assert engine.evict(Unused(2)) == 2


def test_each_table_is_evicted_by_its_own_rule() -> None:
    configs = {name: EmbeddingConfig(dim=dim) for name, dim in (("x", 2), ("y", 2), ("z", 2), ("w", 3))}
    engine = EmbeddingEngine({**configs, "f": EmbeddingConfig(dim=2, trainable=False)})
    assert [len(table.members) for table in engine.tables] == [3, 1, 1]
    for ids in ([1, 2, 3, 4], [1, 2], [1, 2, 3]):
        engine({name: torch.tensor(ids) for name in engine.configs})
        optim.SGD(engine.parameters()).step()

    def left() -> list[list[int]]:
        engine.tables[0].record_lookup()
        return [sorted(table.ids(n).tolist()) for table in engine.tables[:2] for n in range(len(table.members))]

    seen: list[list[int]] = []
    keep_two = CustomRule(lambda rows: seen.append(sorted(rows.ids.tolist())) or rows.ids > 2)  # type: ignore[func-returns-value]
    assert engine.evict({"x": Unused(2), "y": keep_two, "w": Unused(1)}) == 1 + 2 + 1
    assert seen == [[1, 2, 3, 4]]  # a rule for a table gets the rows of that table alone
    assert left() == [[1, 2, 3], [1, 2], [1, 2, 3, 4], [1, 2, 3]]
    assert engine.evict({}) == 0
    before = left()
    with pytest.raises(
        ValueError, match=r"evict: there are no tables \['v'\]; the tables are \['f', 'w', 'x', 'y', 'z'\]"
    ):
        engine.evict({"v": Unused(1), "x": Unused(1)})
    with pytest.raises(RuntimeError, match="table f: evict would change it, but it is read-only"):
        engine.evict({"x": Unused(1), "f": Unused(1)})
    wrong = CustomRule(lambda rows: torch.ones(1, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"must return one element for each of the 3 rows of the table 'w', bool \[3\], got bool \[1\]"
    ):
        engine.evict({"x": Unused(1), "w": wrong})
    assert left() == before


def test_a_rule_is_applied_to_all_tables_before_rows_are_erased() -> None:
    engine = EmbeddingEngine({"x": EmbeddingConfig(dim=2), "y": EmbeddingConfig(dim=3)})
    engine({"x": torch.tensor([1]), "y": torch.tensor([1, 2])})
    with pytest.raises(ValueError, match=r"got bool \[1\]"):
        engine.evict(CustomRule(lambda rows: torch.ones(1, dtype=torch.bool)))
    assert [len(table) for table in engine.tables] == [1, 2]


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        (
            RaggedTensor.from_lists([[1, 2], [3]]),
            RaggedTensor.from_lists([[1.0], [2.0, 3.0]]),
            "row 0 has 1 for 2 ids",
        ),
        (
            RaggedTensor.from_lists([[1, 2], [3], [4]]),
            RaggedTensor.from_lists([[1.0, 2.0], [], [3.0, 4.0]]),
            "row 1 has 0 for 1 ids",
        ),
        (
            RaggedTensor.from_lists([[1, 2], [3]]),
            RaggedTensor.from_lists([[1.0, 2.0, 3.0]]),
            "the weights have 1 rows and 1 levels, the ids 2 and 1",
        ),
        (
            RaggedTensor.from_lists([[1, 2], [3]]),
            RaggedTensor.from_lists([[[1.0, 2.0], [3.0]]]),
            "the weights have 1 rows and 2 levels, the ids 2 and 1",
        ),
        (
            torch.tensor([1, 2, 3]),
            RaggedTensor.from_lists([[1.0, 2.0], [3.0]]),
            r"'w' is ragged, but the ids are \[3\]; pass the weights in the ids' shape",
        ),
    ],
)
def test_weights_with_different_rows_are_refused(
    ids: Tensor | RaggedTensor, weights: RaggedTensor, message: str
) -> None:
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2, weights="w")})
    with pytest.raises(ValueError, match="feature 'item': .*" + message):
        engine({"item": ids, "w": weights})
    assert len(engine.tables[0]) == 0


@pytest.mark.parametrize("column", ["x", {1, 2}, None], ids=["str", "set", "None"])
def test_columns_that_are_not_tensors_are_refused(column: object) -> None:
    got = f"must be a Tensor or a RaggedTensor, or an array of numpy, pandas or JAX, got {type(column).__name__};"
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2, weights="w")})
    with pytest.raises(TypeError, match=f"feature 'item': column 'item' {got}"):
        engine({"item": column, "w": torch.ones(2)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=f"feature 'item': column 'w' {got}"):
        engine({"item": torch.tensor([1, 2]), "w": column})  # type: ignore[dict-item]


def test_an_insert_keeps_missing_columns() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, initializer=Constant(0.0))}, optimizer=optim.Adam)
    optimizer, table = optim.Adam(engine.parameters(), lr=0.1), engine.tables[0]
    engine({"id": torch.tensor([1])})["id"].sum().backward()
    optimizer.step()
    before: dict[str, Tensor] = table.export(0)
    table.insert(0, torch.tensor([1, 2]), {"embedding": torch.ones(2, 2)})
    after = table.export(0)
    assert after["embedding"].tolist() == [[1.0, 1.0]] * 2
    for name in ("exp_avg", "exp_avg_sq"):
        assert bool((before[name] != 0).all())
        assert torch.equal(after[name], torch.cat([before[name], torch.zeros(1, 2)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 2.5}, "dim must be an integer, got 2.5"),
        ({"dim": 8.0}, "dim must be an integer, got 8.0"),
        ({"dim": "8"}, "dim must be an integer, got '8'"),
        ({"dim": True}, "dim must be an integer, got True"),
        ({"max_length": 1.5}, "max_length must be an integer, got 1.5"),
        ({"expected_rows": 1e6}, "expected_rows must be an integer, got 1000000.0"),
        ({"initializer": 0.5}, "initializer must be an object with a method draw, such as Constant(0.5), got 0.5"),
        (
            {"initializer": Normal},
            "initializer must be an object with a method draw, such as Constant(0.5), got <class",
        ),
        ({"admission": 3}, "admission must be an object with a method gate, such as MinFrequency(3), got 3"),
        ({"trainable": "no"}, "trainable must be True or False, got 'no'"),
        ({"table": 5}, "table must be a name or None, got 5"),
        ({"weights": 5}, "weights must be a name or None, got 5"),
        ({"optimizer_overrides": 0.1}, "optimizer_overrides must be a mapping, e.g. {'lr': 0.1}, or None, got 0.1"),
        (
            {"placement": "cpu"},
            "placement must be a Placement, e.g. Placement(id_map='cpu', blocks='cpu'), or None, got",
        ),
    ],
    ids=str,
)
def test_settings_of_wrong_types_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match="^" + re.escape("EmbeddingConfig: " + message)):
        EmbeddingConfig(**{"dim": 2, **settings})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: EmbeddingEngine({"id": 8}),
            TypeError,  # type: ignore[dict-item]
            "feature 'id': it must have an EmbeddingConfig, e.g. EmbeddingConfig(dim=16), got 8",
        ),
        (
            lambda: EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, seed=1.5),
            TypeError,  # type: ignore[arg-type]
            "EmbeddingEngine: seed must be an integer, got 1.5",
        ),
        (
            lambda: StateField("sum", width=-5),
            ValueError,
            "StateField 'sum': width must be at least 1, got -5",
        ),
        (
            lambda: StateField("sum", width=1.0),
            TypeError,  # type: ignore[arg-type]
            "StateField 'sum': width must be an integer, got 1.0",
        ),
        (
            lambda: StateField("sum", first_value=float("inf")),
            ValueError,
            "StateField 'sum': first_value must be a finite number, got inf",
        ),
        (
            lambda: RecordLayout(2, (StateField("sum", first_value=1e39),)),
            ValueError,
            "RecordLayout: sum: first_value must fit torch.float32, at most 3.40282e+38, got 1e+39",
        ),
        (
            lambda: RecordLayout(2.0),
            TypeError,  # type: ignore[arg-type]
            "RecordLayout: dim must be an integer, got 2.0",
        ),
        (
            lambda: MinFrequency(1.5),
            TypeError,  # type: ignore[arg-type]
            "MinFrequency: count must be an integer, got 1.5",
        ),
        (lambda: MinFrequency(2**40), ValueError, "MinFrequency: count must be below 2**40, got"),
        (
            lambda: Unused(1.5),
            TypeError,  # type: ignore[arg-type]
            "Unused: steps must be an integer, got 1.5",
        ),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        make()


def test_numpy_integers_are_accepted() -> None:
    one, two = torch.tensor([1, 2]).numpy()
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=two, max_length=one, admission=MinFrequency(one))}, seed=one)
    assert engine({"id": torch.tensor([[1, 2]])})["id"].shape == (1, 2)
    assert json.loads(json.dumps(engine.checkpoint_state().meta))["seed"] == 1


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("initializer", "dtype", "greatest"),
    [
        (Constant(1e300), F32, "1e+300"),
        (Constant(3.4028236e38), F32, "3.40282e+38"),
        (Constant(1e6), F16, "1e+06"),
        (Constant(-65520.0), F16, "65520"),
        (Constant(3.4e38), BF16, "3.4e+38"),
        (Uniform(-3e38, 3e38), F32, "6e+38"),
        (Uniform(0.0, 1e5), F16, "100000"),
        (Normal(0.0, 1e39), F32, "5.7682e+39"),
        (Normal(0.0, 12_000.0), F16, "69218.4"),
        (TruncatedNormal(0.0, 2e38, -2.0, 2.0), F32, "4e+38"),
        (TruncatedNormal(3e38, 1e38, -4.0, -3.9), F32, "4e+38"),
        (XavierUniform(gain=1e39), F32, "1.22474e+39"),
        (KaimingNormal(gain=1e300), F32, "4.07873e+300"),
    ],
    ids=str,
)
def test_first_values_beyond_the_dtype_are_refused(initializer: Initializer, dtype: torch.dtype, greatest: str) -> None:
    message = re.escape(f"{initializer!r} draws numbers up to {greatest}, which exceed the range of torch.")
    with pytest.raises(ValueError, match="feature 'id': " + message):
        EmbeddingEngine({"id": EmbeddingConfig(dim=2, initializer=initializer, dtype=dtype)})
    with pytest.raises(ValueError, match="table 't': " + message):
        HashTable([MemberTable("t", initializer)], RecordLayout(2, dtype=dtype), torch.device("cpu"))


@pytest.mark.parametrize(
    ("initializer", "dtype"),
    [
        (Constant(3.4028235e38), F32),
        (Constant(65519.0), F16),
        (Constant(3.39e38), BF16),
        (Uniform(-1.7e38, 1.7e38), F32),
        (Normal(0.0, 5.8e37), F32),
        (Normal(0.0, 11_300.0), F16),
        (TruncatedNormal(0.0, 16_000.0, -4.0, 4.0), F16),
    ],
    ids=str,
)
def test_first_values_within_the_dtype_are_finite(initializer: Initializer, dtype: torch.dtype) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=64, initializer=initializer, dtype=dtype)})
    assert bool(engine({"id": torch.arange(20_000)})["id"].isfinite().all())


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_torch_optimizers_refuse_tables_before_anything_changes(make: type[torch.optim.Optimizer]) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)})
    model = torch.nn.ModuleDict({"engine": engine, "tower": torch.nn.Linear(2, 1)})
    optimizer = make(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    model["tower"](engine({"id": torch.tensor([1])})["id"]).sum().backward()
    before = [parameter.detach().clone() for parameter in dense_parameters(model)]
    name = re.escape(f"torch.optim.{make.__name__.lower()}.{make.__name__}")
    with pytest.raises(
        TypeError, match=name + " cannot update embedding tables.* optimizer of recis_hybrid.optim.*dense_parameters"
    ):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, dense_parameters(model), strict=True))
    assert not optimizer.state
    optim.SGD(engine.parameters(), lr=0.1).step()
    make(dense_parameters(model), lr=0.1).step()  # type: ignore[call-arg]
    assert engine.tables[0].step == 1
    assert not torch.equal(before[0], next(model["tower"].parameters()))


@pytest.mark.parametrize(
    ("table", "column", "value", "bits"),
    [
        ("id", "updated_step", -1, 40),
        ("id", "seen_step", 2**40, 40),
        ("id", "frequency", 2**48, 48),
        ("id.admission", "count", 2**40, 40),
    ],
)
def test_a_checkpoint_with_numbers_out_of_range_changes_nothing(table: str, column: str, value: int, bits: int) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, admission=MinFrequency(2))})
    engine({"id": torch.tensor([1, 1, 2])})
    state = engine.checkpoint_state()
    columns = dict(state.tables[table].columns)
    columns[column] = torch.full_like(columns[column], value)
    state.tables[table] = dataclasses.replace(state.tables[table], columns=columns)
    message = re.escape(f"table {table!r}: {column} must be 0 to 2**{bits} - 1, got {value}")
    for load in (engine.load_checkpoint_state, lambda state: engine.load_checkpoint_tables(state.tables)):
        with pytest.raises(ValueError, match=message):
            load(state)
    assert engine.tables[0].ids(0).tolist() == [1]


CONFIGS = {"id": EmbeddingConfig(dim=2)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmbeddingEngine(EmbeddingConfig(dim=2)), "configs must be a mapping .* got an EmbeddingConfig"),
        (lambda: EmbeddingEngine([EmbeddingConfig(dim=2)]), "configs must be a mapping from features .* got a list"),
        (lambda: EmbeddingEngine({1: EmbeddingConfig(dim=2)}), "the names of features must be strings, got 1"),
        (
            lambda: EmbeddingEngine(CONFIGS, optimizer=torch.optim.Adam),
            "optimizer must be an optimizer class of recis_hybrid.optim, .* got Adam",
        ),
        (
            lambda: EmbeddingEngine(CONFIGS, optimizer=optim.Adam.row_state()),
            "e.g. optim.Adam, .* or None, got a tuple",
        ),
        (lambda: EmbeddingEngine(CONFIGS, optimizer="adam"), "e.g. optim.Adam, .* or None, got 'adam'"),
        (
            lambda: EmbeddingEngine(CONFIGS, optimizer=optim.SGD(EmbeddingEngine(CONFIGS).parameters())),
            "optimizer must be an optimizer class .* got a SGD",
        ),
        (lambda: OptimizerSpec(optim.SGD, StateField("x")), "row_state must be a tuple .* got a StateField"),
        (lambda: OptimizerSpec(optim.SGD, ["exp_avg"]), "row_state must be a tuple of StateField, .* got a list"),
        (lambda: EmbeddingEngine(CONFIGS, optimizer_state=()), "unexpected keyword argument 'optimizer_state'"),
        (
            lambda: EmbeddingEngine(CONFIGS, device=3.5),
            "a device must be one of torch's, e.g. 'cpu' or 'cuda:0', got 3.5",
        ),
        (lambda: EmbeddingEngine(CONFIGS, group="world"), "group must be a process group, None for all .* got 'world'"),
        (
            lambda: EmbeddingEngine(CONFIGS, group=True),
            "group must be a process group, None for all ranks, .* got True",
        ),
        (lambda: EmbeddingEngine(CONFIGS, prefetch_depth="2"), "prefetch_depth must be an integer, got '2'"),
        (lambda: EmbeddingEngine(CONFIGS, coalesce="no"), "coalesce must be True or False, got 'no'"),
        (lambda: EmbeddingEngine(CONFIGS, deduplicate=None), "deduplicate must be True or False, got None"),
        (lambda: EmbeddingEngine(CONFIGS).evict(Unused), "a rule must be a function of rows or have a method unwanted"),
        (
            lambda: EmbeddingEngine(CONFIGS).evict({"id": Unused}),
            "a rule must be a function of rows or have a method unwanted",
        ),
        (lambda: Constant("a"), "Constant: values must be a number, got 'a'"),
        (lambda: Normal(0, None), "Normal: values must be a number, got None"),
        (lambda: Uniform(None, 1), "Uniform: values must be a number, got None"),
        (lambda: XavierUniform("a"), "XavierUniform: values must be a number, got 'a'"),
        (lambda: KaimingNormal(fan_in="a"), "KaimingNormal: a fan must be an integer, got 'a'"),
        (lambda: StateField(3), "StateField: name must be a string, e.g. 'exp_avg', got 3"),
        (lambda: StateField("x", dtype="float32"), "StateField 'x': dtype must be a torch.dtype, .* got 'float32'"),
        (lambda: RecordLayout(dim=4, state=StateField("x")), "RecordLayout: state must be .* got a StateField"),
        (lambda: dense_parameters([]), "dense_parameters: module must be a torch.nn.Module, got a list"),
        (lambda: leave_out_of_ddp([]), "leave_out_of_ddp: model must be a torch.nn.Module, got a list"),
        (lambda: mean_over_samples(torch.nn.Linear(1, 1), None), "engine must be an EmbeddingEngine, .* got a Linear"),
        (lambda: optim.SGD(EmbeddingEngine(CONFIGS)), r"params must be engine.parameters\(\), .* an EmbeddingEngine"),
        (lambda: optim.SGD(EmbeddingEngine(CONFIGS).parameters), "SGD: params must be engine.parameters.*got a method"),
        (lambda: optim.Adam({"params": []}), "Adam: params must be engine.parameters.* got a dict"),
        (lambda: optim.SGD(EmbeddingEngine(CONFIGS).parameters(), lr="0.1"), "SGD: lr must be a number, got '0.1'"),
        (
            lambda: optim.SGD(EmbeddingEngine(CONFIGS).parameters(), lr=torch.tensor(0.1)),
            "lr must be a number, got a T",
        ),
        (lambda: optim.SGD.row_state("a"), "SGD: momentum must be a number, got 'a'"),
        (lambda: optim.Adagrad.row_state("a"), "initial_accumulator_value must be a number, got 'a'"),
        (
            lambda: optim.clip_row_norm_(EmbeddingEngine(CONFIGS), 1.0),
            r"parameters must be engine.parameters\(\), got an",
        ),
        (
            lambda: optim.clip_row_norm_(EmbeddingEngine(CONFIGS).parameters(), "1"),
            "max_norm must be a number, got '1'",
        ),
    ],
)
def test_arguments_of_wrong_types_are_refused(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("betas", [0.9, (0.9,), ("a", 0.9)])
def test_betas_must_be_two_numbers(betas: Any) -> None:
    engine = EmbeddingEngine(CONFIGS, optimizer=optim.Adam)
    with pytest.raises(TypeError, match="Adam: betas must be two numbers, e.g."):
        optim.Adam(engine.parameters(), betas=betas)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefetch_depth": -1}, "prefetch_depth must be at least 0, got -1"),
        ({"staleness": 2}, "staleness must be one of 0, 1, got 2"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingEngine(CONFIGS, **settings)
    with pytest.raises(ValueError, match="a parameter group must have 'params'"):
        optim.SGD([{"lr": 1.0}])
