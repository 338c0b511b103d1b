from __future__ import annotations

from typing import Any

import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import (
    Constant,
    EmbeddingConfig,
    EmbeddingEngine,
    MinFrequency,
    Normal,
    Placement,
    Uniform,
    dense_parameters,
)
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.devices import EDGE_IDS, on_devices


def batch_on(device: str) -> Batch:
    return {
        "user": torch.tensor([1, 2, 1, -1], device=device),
        "item": RaggedTensor(
            torch.tensor([5, 6, 5, 7, 2**63 - 1], device=device), torch.tensor([0, 2, 2, 3, 5], device=device)
        ),
        "pair": torch.tensor([[1, 2], [3, 4], [1, 1], [9, 9]], device=device),
        "label": torch.zeros(4, device=device),
    }


CONFIGS = {
    "user": EmbeddingConfig(dim=8, initializer=Normal(0, 0.1)),
    "item": EmbeddingConfig(dim=8, combiner="mean", initializer=Uniform(-1, 1)),
    "pair": EmbeddingConfig(dim=3, initializer=Normal(0, 0.1)),
}


def train(engine: EmbeddingEngine, optimizer: torch.optim.Optimizer, batch: Batch, steps: int = 3) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(((value - 0.5) ** 2).sum() for value in engine(batch).values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@on_devices
@pytest.mark.parametrize(
    "more",
    [
        {"combiner": "mean"},
        {"combiner": "max"},
        {"combiner": None},
        {"combiner": "tile", "max_length": 2},
        {"combiner": "sum", "max_length": 1},
        {"admission": MinFrequency(2)},
    ],
    ids=str,
)
def test_values_beyond_the_last_list_are_ignored(device: str, more: dict[str, Any]) -> None:
    # Shortening lists on a GPU does not change the number of values; only the first ones are valid.
    offsets = torch.tensor([0, 2, 2, 3], device=device)
    exact = RaggedTensor(torch.tensor([5, 6, 5], device=device), offsets)
    bound = RaggedTensor.unchecked(torch.tensor([5, 6, 5, 0, 0, 8], device=device), offsets)
    engines = []
    for column in (exact, bound):
        engine = EmbeddingEngine(
            {"item": EmbeddingConfig(dim=4, initializer=Normal(0, 0.1), **more)},
            optimizer=optim.Adagrad,
            device=device,
        )
        optimizer = optim.Adagrad(engine.parameters(), lr=0.1)
        for _ in range(3):
            (engine({"item": column})["item"][:3] ** 2).sum().backward()
            optimizer.step()
        engines.append(engine)
    expected, got = (engine.tables[0].export(0) for engine in engines)
    assert expected["ids"].tolist() == ([5] if more.get("max_length") == 1 else [5, 6])
    assert expected.keys() == got.keys()
    for name, values in expected.items():
        assert torch.equal(got[name], values), name


@on_devices
def test_outputs_are_aligned_float32_vectors_in_the_order_of_the_configs(device: str) -> None:
    outputs = EmbeddingEngine(CONFIGS, device=device)(batch_on(device))
    assert list(outputs) == ["user", "item", "pair"]
    for name, value in outputs.items():
        assert value.shape == (4, CONFIGS[name].dim)
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        assert value.data_ptr() % 64 == 0
    assert torch.equal(outputs["item"][1], torch.zeros(8, device=device))


@on_devices
def test_training_lowers_the_loss(device: str) -> None:
    engine = EmbeddingEngine(CONFIGS, optimizer=optim.Adam, device=device)
    losses = train(engine, optim.Adam(engine.parameters(), lr=0.05), batch_on(device), steps=60)
    assert losses[-1] < 0.1 * losses[0]


@on_devices
def test_ids_of_any_value_train(device: str) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4, initializer=Constant(0.0))}, device=device)
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    ids = torch.tensor(EDGE_IDS, device=device)
    target = torch.arange(len(EDGE_IDS), device=device, dtype=torch.float32)
    (engine({"id": ids})["id"] * -target[:, None]).sum().backward()
    optimizer.step()
    assert torch.equal(engine({"id": ids})["id"], target[:, None].expand(-1, 4))


@on_devices
@pytest.mark.parametrize("rule", ["SGD", "Adagrad", "Adam"])
def test_coalescing_changes_no_bit(device: str, rule: str) -> None:
    optimizer = getattr(optim, rule)
    outputs = []
    for coalesce in (True, False):
        engine = EmbeddingEngine(CONFIGS, optimizer=optimizer, device=device, coalesce=coalesce)
        assert len(engine.tables) == (2 if coalesce else 3)
        train(engine, optimizer(engine.parameters(), lr=0.1), batch_on(device))
        outputs.append(engine(batch_on(device)))
    for name in CONFIGS:
        assert torch.equal(outputs[0][name], outputs[1][name])


@on_devices
def test_features_of_one_table_share_rows(device: str) -> None:
    shared = EmbeddingConfig(dim=4, table="item")
    engine = EmbeddingEngine({"clicked": shared, "shown": shared}, device=device)
    ids = torch.tensor([3, 4], device=device)
    outputs = engine({"clicked": ids, "shown": ids})
    assert torch.equal(outputs["clicked"], outputs["shown"])
    sum(value.sum() for value in outputs.values()).backward()  # type: ignore[union-attr]
    optim.SGD(engine.parameters(), lr=0.25).step()
    assert torch.equal(engine({"clicked": ids, "shown": ids})["shown"], outputs["shown"].detach() - 0.5)
    assert len(engine.tables[0]) == 2


@on_devices
def test_evaluation_never_inserts(device: str) -> None:
    engine = EmbeddingEngine(CONFIGS, device=device)
    known = engine(batch_on(device))
    sizes = [len(table) for table in engine.tables]
    engine.eval()
    assert all(torch.equal(value, known[name]) for name, value in engine(batch_on(device)).items())
    fresh = {**batch_on(device), "user": torch.tensor([70, 71, 72, 73], device=device)}
    unknown = engine(fresh)["user"]
    assert [len(table) for table in engine.tables] == sizes
    assert not unknown.requires_grad
    engine.train()
    assert torch.equal(engine(fresh)["user"], unknown)


@on_devices
def test_functional_core_agrees_with_autograd(device: str) -> None:
    batch = batch_on(device)
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(4, c.dim, generator=generator).to(device) for name, c in CONFIGS.items()}
    results = []
    for functional in (True, False):
        engine = EmbeddingEngine(CONFIGS, optimizer=optim.Adam, device=device)
        optimizer = optim.Adam(engine.parameters(), lr=0.1)
        for _ in range(3):
            if functional:
                _, ctx = engine.lookup(batch)
                engine.apply_gradients(ctx, gradients, optimizer)
            else:
                outputs = engine(batch)
                torch.autograd.backward([outputs[name] for name in CONFIGS], [gradients[name] for name in CONFIGS])
                optimizer.step()
        results.append(engine(batch))
    assert all(torch.equal(results[0][name], results[1][name]) for name in CONFIGS)


def test_gradients_accumulate_until_a_step_or_zero_grad() -> None:
    ids = {"id": torch.tensor([1, 2, 1])}
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, initializer=Constant(0.0))})
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    engine(ids)["id"].sum().backward()
    optimizer.zero_grad()
    for _ in range(2):
        engine(ids)["id"].sum().backward()
    optimizer.step()
    optimizer.step()
    assert engine(ids)["id"].tolist() == [[-4.0, -4.0], [-2.0, -2.0], [-4.0, -4.0]]


def test_a_feature_without_gradient_is_not_updated() -> None:
    engine = EmbeddingEngine({"a": EmbeddingConfig(dim=2), "b": EmbeddingConfig(dim=2)}, optimizer=optim.Adam)
    optimizer = optim.Adam(engine.parameters(), lr=0.1)
    batch: Batch = {"a": torch.tensor([1]), "b": torch.tensor([1])}
    both = engine(batch)
    sum(value.sum() for value in both.values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    before = engine(batch)
    before["a"].sum().backward()
    optimizer.step()
    after = engine(batch)
    assert torch.equal(after["b"], before["b"])
    assert not torch.equal(after["a"], before["a"])


def test_a_lookup_from_before_clear_is_refused() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)})
    _, ctx = engine.lookup({"id": torch.tensor([1])})
    engine.tables[0].clear()
    with pytest.raises(
        RuntimeError, match="is from generation .* but the table is in generation .*look up the batch again"
    ):
        engine.apply_gradients(ctx, {"id": torch.zeros(1, 2)}, optim.SGD(engine.parameters()))


@on_devices
def test_another_engine_loads_the_state_exactly(device: str) -> None:
    batch = batch_on(device)
    first = EmbeddingEngine(CONFIGS, optimizer=optim.Adam, seed=5, device=device)
    train(first, optim.Adam(first.parameters(), lr=0.1), batch)
    state = first.checkpoint_state()
    assert set(state.tables) == set(CONFIGS)
    assert sorted(state.tables["item"].columns["ids"].tolist()) == [5, 6, 7, 2**63 - 1]
    second = EmbeddingEngine(CONFIGS, optimizer=optim.Adam, seed=6, device=device, coalesce=False)
    second(batch)
    second.load_checkpoint_state(state)
    again = second.checkpoint_state()
    for name, table in state.tables.items():
        for column, values in table.columns.items():
            assert torch.equal(values, again.tables[name].columns[column])
        assert torch.equal(table.buckets, again.tables[name].buckets)
    unknown = {**batch, "user": torch.tensor([100, 101, 102, 103], device=device)}
    assert torch.equal(first.eval()(unknown)["user"], second.eval()(unknown)["user"])


def test_state_of_another_engine_is_refused_and_changes_nothing() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)})
    engine({"id": torch.tensor([1])})
    with pytest.raises(ValueError, match="'id' is in the live object only .*'other' is in the checkpoint only"):
        engine.load_checkpoint_state(EmbeddingEngine({"other": EmbeddingConfig(dim=2)}).checkpoint_state())
    with pytest.raises(
        ValueError, match=r"table 'id', column 'embedding': checkpoint float32 \[3\], live object float32 \[2\]"
    ):
        engine.load_checkpoint_state(EmbeddingEngine({"id": EmbeddingConfig(dim=3)}).checkpoint_state())
    assert len(engine.tables[0]) == 1


def test_anchors_are_not_in_state_dicts_and_dense_parameters() -> None:
    model = torch.nn.ModuleDict({"engine": EmbeddingEngine(CONFIGS), "tower": torch.nn.Linear(2, 1)})
    assert list(model.state_dict()) == ["engine.tables", "tower.weight", "tower.bias"]
    model.load_state_dict(model.state_dict())
    assert [p.shape for p in dense_parameters(model)] == [p.shape for p in model["tower"].parameters()]
    with pytest.raises(TypeError, match="cannot be copied or pickled; save it with Saver"):
        __import__("copy").deepcopy(model)


def test_describe_names_tables_members_features_and_rows() -> None:
    engine = EmbeddingEngine({**CONFIGS, "seen": EmbeddingConfig(dim=8, table="user", initializer=Normal(0, 0.1))})
    engine({**batch_on("cpu"), "seen": torch.tensor([1, 2, 1, 3])})
    text = engine.describe()
    assert "user (user, seen), item (item)" in text
    assert len(text.splitlines()) == 3


def test_repr_describes_the_tables() -> None:
    pinned = Placement(id_map="cpu", blocks="cpu")
    engine = EmbeddingEngine({"user": EmbeddingConfig(dim=8, placement=pinned), "item": EmbeddingConfig(dim=2)})
    engine({"user": torch.tensor([1, 2, 3]), "item": torch.tensor([1])})
    name, head, user, item, _ = repr(engine).splitlines()
    assert (name, head.split()) == ("EmbeddingEngine(", engine.describe().splitlines()[0].split())
    assert user.split() == ["0", "8", "float32", "48", "B", "3", *user.split()[6:8], "cpu", "user", "(user)"]
    assert item.split()[-2:] == ["item", "(item)"]
    assert repr(engine.tables[0]) == "HashTable(user, dim=8, dtype=float32, rows=3)"
    assert repr(engine.tables[0].anchor) == "Anchor(HashTable(user, dim=8, dtype=float32, rows=3))"


@pytest.mark.parametrize(
    ("column", "error", "message"),
    [
        (None, KeyError, "feature 'user': the batch has no column 'user'; it has"),
        (torch.zeros(4), TypeError, "feature 'user': ids must be int64 or int32, got torch.float32; cast it"),
        (
            RaggedTensor(torch.zeros(4, dtype=torch.uint8), torch.tensor([0, 2, 4])),
            TypeError,
            "feature 'user': ids must be int64 or int32, got torch.uint8; hash it first",
        ),
        (torch.zeros((), dtype=torch.int64), ValueError, r"feature 'user': ids must be \[B\], \[B, L\]"),
    ],
)
def test_bad_columns_are_refused(column: object, error: type[Exception], message: str) -> None:
    batch = {**batch_on("cpu"), "user": column}
    if column is None:
        del batch["user"]
    with pytest.raises(error, match=message):
        EmbeddingEngine(CONFIGS)(batch)  # type: ignore[arg-type]


def test_bad_configs_are_refused() -> None:
    with pytest.raises(ValueError, match="configs must have at least one feature, got none"):
        EmbeddingEngine({})
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        EmbeddingConfig(dim=0)
    with pytest.raises(
        ValueError, match="combiner must be one of 'sum', 'mean', 'sqrtn', 'max', 'tile', None, got 'min'"
    ):
        EmbeddingConfig(dim=1, combiner="min")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'a' and 'b' share the table 't' but have different settings: dim=1.*dim=2"):
        EmbeddingEngine({"a": EmbeddingConfig(dim=1, table="t"), "b": EmbeddingConfig(dim=2, table="t")})
    with pytest.raises(ValueError, match="Uniform: low must not exceed high"):
        Uniform(1.0, 0.0)
    with pytest.raises(ValueError, match="values must be finite"):
        Normal(float("nan"), 1.0)


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda model: model.half(), torch.float16),
        (lambda model: model.bfloat16(), torch.bfloat16),
        (lambda model: model.double(), torch.float64),
        (lambda model: model.to(torch.bfloat16), torch.bfloat16),
        (lambda model: model.to("cpu", torch.float16), torch.float16),
        (lambda model: model.type(torch.float64), torch.float64),
    ],
)
def test_conversions_do_not_change_the_dtypes_of_tables(convert: Any, dtype: torch.dtype) -> None:
    model = torch.nn.ModuleDict({"engine": EmbeddingEngine(CONFIGS), "tower": torch.nn.Linear(2, 1)})
    engine, batch = model["engine"], batch_on("cpu")
    before = {name: value.detach() for name, value in engine(batch).items()}
    with pytest.warns(UserWarning, match=rf"tables keep the dtypes .* \(torch.float32\).* becomes {dtype}"):
        convert(model)
    convert(model)  # warns only once: a second warning would be an error
    assert model["tower"].weight.dtype == dtype
    assert {table.layout.dtype for table in engine.tables} == {torch.float32}
    for name, value in engine(batch).items():
        assert torch.equal(value, before[name])
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    engine(batch)["user"].sum().backward()
    optimizer.step()
    assert not torch.equal(engine(batch)["user"], before["user"])


def test_only_conversions_warn() -> None:
    engine = EmbeddingEngine({"a": EmbeddingConfig(dim=2, dtype=torch.bfloat16)})
    with pytest.warns(UserWarning, match=r"tables keep .* \(torch.bfloat16\)"):
        engine.float()
    plain = EmbeddingEngine(CONFIGS)
    for call in (plain.float, plain.cpu, lambda: plain.to("cpu"), lambda: plain.to(torch.float32), lambda: plain.to()):
        call()  # warnings are errors


def test_unsupported_devices_are_refused() -> None:
    model = torch.nn.Sequential(EmbeddingEngine(CONFIGS))
    with pytest.raises(RuntimeError, match=r"tables cannot be on the meta device.* model.tower.to\('meta'\)"):
        model.to("meta")
    with pytest.raises(RuntimeError, match="tables cannot be on the meta device"):
        model.to_empty(device="meta")
    with pytest.raises(RuntimeError, match="tables cannot be shared with other processes"):
        model.share_memory()
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'meta'"):
        EmbeddingEngine(CONFIGS, device="meta")
    with torch.device("meta"):  # as for large models; tables are on the device of their engine
        engine = EmbeddingEngine(CONFIGS)
    assert engine(batch_on("cpu"))["user"].shape == (4, 8)


def test_a_batch_that_is_not_a_dict_is_refused() -> None:
    with pytest.raises(TypeError, match="feature 'user': a batch must be a dict of columns by name, got a list"):
        EmbeddingEngine(CONFIGS)([batch_on("cpu")])  # type: ignore[arg-type]


def test_optional_features_and_other_columns() -> None:
    """Missing optional features are not looked up, inserted or updated."""
    configs = {
        "user": EmbeddingConfig(dim=4),
        "item": EmbeddingConfig(dim=4, optional=True, combiner="mean", weights="w"),
        "tiled": EmbeddingConfig(dim=4, optional=True, combiner="tile", max_length=2),
        "each": EmbeddingConfig(dim=8, optional=True, combiner=None),
    }
    rows: dict[str, Any] = {
        "user": torch.tensor([1, 2]),
        "item": torch.tensor([[1, 2], [2, 3]]),
        "w": torch.tensor([[1.0, 2], [3, 4]]),
        "tiled": RaggedTensor.from_lists([[1], [2, 3]]),
        "each": torch.tensor([5, 6]),
        "label": torch.ones(2),
    }
    for coalesce in (True, False):
        engine = EmbeddingEngine(configs, coalesce=coalesce, pass_through=True)
        whole = engine(rows)
        assert list(whole) == ["user", "item", "tiled", "each", "label"]
        assert whole["label"] is rows["label"]
        for missing in (["item", "w"], ["tiled"], ["each", "tiled"], ["item", "w", "tiled", "each", "label"]):
            engine = EmbeddingEngine(configs, coalesce=coalesce, pass_through=True)
            batch = {name: column for name, column in rows.items() if name not in missing}
            outputs = engine(batch)
            assert list(outputs) == [name for name in whole if name not in missing]
            assert all(torch.equal(outputs[name], whole[name]) for name in outputs)
            sum(outputs[name].sum() for name in outputs if name in configs).backward()
            optim.SGD(engine.parameters(), lr=1.0).step()
            assert torch.equal(engine(batch)["user"], whole["user"] - 1)
            known = {m.name: len(t.ids(k)) for t in engine.tables for k, m in enumerate(t.members)}
            assert all(known[name] == 0 for name in missing if name in configs)
            values, found = engine.lookup(batch)
            assert list(values) == [name for name in outputs if name in configs]
            gradients = {name: torch.ones_like(value) for name, value in values.items()}
            engine.apply_gradients(found, gradients, optim.SGD(engine.parameters(), lr=1.0))
    with pytest.raises(KeyError, match="feature 'user': the batch has no column 'user'"):
        engine({"item": rows["item"], "w": rows["w"]})
    with pytest.raises(KeyError, match="feature 'item': the batch has no column 'w'"):
        engine({"user": rows["user"], "item": rows["item"]})
    assert "label" not in EmbeddingEngine(configs)(rows)
    with pytest.raises(TypeError, match="optional must be True or False, got 1"):
        EmbeddingConfig(dim=4, optional=1)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"got gradients for \['usr'\]"):
        engine.apply_gradients(found, {**gradients, "usr": torch.ones(2, 4)}, optim.SGD(engine.parameters(), lr=1.0))
