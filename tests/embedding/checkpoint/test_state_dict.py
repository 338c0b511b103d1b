"""Tables in the state_dict of a model: their rows on request, otherwise a placeholder key."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from recis_hybrid import optim
from recis_hybrid.embedding import (
    EmbeddingConfig,
    EmbeddingEngine,
    MinFrequency,
    dense_parameters,
    leave_out_of_ddp,
)
from recis_hybrid.ragged import Batch, batch_to
from tests.support import sharded
from tests.support.devices import on_devices
from tests.support.rank_processes import Ranks
from tests.support.sharded import rows_of

CONFIGS = {
    "user": EmbeddingConfig(dim=4),
    "item": EmbeddingConfig(dim=4, combiner="mean"),
    "rare": EmbeddingConfig(dim=4, admission=MinFrequency(3)),
    "wide": EmbeddingConfig(dim=20),
}


class Model(nn.Module):
    def __init__(self, *, seed: int = 1 << 90, configs: dict[str, EmbeddingConfig] = CONFIGS, **more: Any) -> None:
        super().__init__()
        self.engine = EmbeddingEngine(configs, optimizer=optim.Adam, seed=seed, **more)
        torch.manual_seed(0)
        self.tower = nn.Linear(sum(config.dim for config in configs.values()), 1).to(self.engine.device)

    def forward(self, batch: Batch) -> Tensor:
        return self.tower(torch.cat(list(self.engine(batch).values()), 1))[:, 0]  # type: ignore[no-any-return]


def batch_of(step: int) -> Batch:
    ids = torch.arange(6) % (2 + step)
    return {"user": ids + step, "item": ids[:, None] + torch.arange(3), "rare": ids, "wide": ids - 2**63}


def train(model: Model, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    device = optimizers[-1].param_groups[0]["params"][0].device
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(batch_to(batch_of(step), device)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def optimizers_of(model: Model) -> list[torch.optim.Optimizer]:
    return [optim.Adam(model.engine.parameters(), lr=0.1), torch.optim.Adam(dense_parameters(model), lr=0.1)]


def trained(steps: int = 3, **more: Any) -> tuple[Model, list[torch.optim.Optimizer]]:
    model = Model(**more)
    optimizers = optimizers_of(model)
    train(model, optimizers, range(steps))
    return model, optimizers


def everything(model: Model) -> dict[str, Tensor]:
    found = {f"{t}.{column}": v for t, columns in rows_of(model.engine).items() for column, v in columns.items()}
    for table in model.engine.tables:
        for number in range(len(table.members) if table.store.gate is not None else 0):
            state = table.store.gate.state_dict(number)  # type: ignore[union-attr]
            found["counts"] = torch.stack(list(state.values()))[:, state["ids"].argsort()]
    return found | {name: parameter.detach() for name, parameter in model.tower.named_parameters()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def through_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_without_rows_a_state_dict_warns_once_and_fresh_tables_refuse_it() -> None:
    model, _ = trained()
    with pytest.warns(UserWarning, match=r"rows .* are not in the state_dict; save them with recis_hybrid.saver.Saver"):
        state = model.state_dict()
    assert sorted(state) == ["engine.tables", "tower.bias", "tower.weight"]
    rows = sum(len(table) for table in model.engine.tables)
    assert state["engine.tables"].tolist()[:2] == [3, rows]
    assert (int(state["engine.tables"][2]) << 62) + int(state["engine.tables"][3]) == 1 << 90
    model.state_dict()  # a second warning would be an error
    fresh = Model()
    with pytest.raises(RuntimeError, match=rf"engine.tables \(its {rows} rows are not in .* load them with Saver"):
        fresh.load_state_dict(state)
    result = fresh.load_state_dict(state, strict=False)
    assert [key.split(" ")[0] for key in result.missing_keys] == ["engine.tables"]
    assert torch.equal(fresh.tower.weight, model.tower.weight)


def test_tables_at_the_same_step_accept_a_state_dict_without_rows() -> None:
    model, optimizers = trained()
    with pytest.warns(UserWarning, match="Saver"):
        state = copy.deepcopy(model.state_dict())
    restored = Model()
    restored.engine.load_checkpoint_state(model.engine.checkpoint_state())
    restored.load_state_dict(state)
    assert_equal(everything(restored), everything(model))
    train(model, optimizers, range(3, 5))
    with pytest.raises(RuntimeError, match="taken after step 3, without rows, and the tables are at step 5"):
        model.load_state_dict(state)  # would restore towers but not tables


def test_tables_without_rows_miss_no_keys() -> None:
    state = Model().state_dict()
    Model().load_state_dict(state)


@pytest.mark.parametrize("anchors", [False, True])
def test_state_dicts_without_the_key(anchors: bool) -> None:
    model, _ = trained()
    state: dict[str, Tensor] = {f"tower.{name}": p.detach() for name, p in model.tower.named_parameters()}
    if anchors:
        state |= {f"engine.{name}": torch.zeros(1) for name, _ in model.engine.named_parameters()}
    with pytest.raises(RuntimeError, match=r"engine.tables \(rows are not in the state_dict, and the tables are empty"):
        Model().load_state_dict(state)
    before = everything(model)
    model.load_state_dict(state)  # its tables were loaded separately
    assert_equal(everything(model), before)


@on_devices
def test_records_in_a_state_dict_resume_training_bitwise(device: str) -> None:
    model, optimizers = trained(rows_in_state_dict="record", device=device)
    saved = through_torch({"model": model.state_dict(), "optimizers": [each.state_dict() for each in optimizers]})
    restored = Model(seed=5, device=device)
    again = optimizers_of(restored)
    restored.load_state_dict(saved["model"])
    for optimizer, state in zip(again, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    assert_equal(everything(restored), everything(model))
    train(model, optimizers, range(3, 6))
    train(restored, again, range(3, 6))
    assert_equal(everything(restored), everything(model))
    assert [table.step for table in restored.engine.tables] == [6, 6, 6]


def test_embeddings_alone_predict_the_same_with_fresh_optimizer_state() -> None:
    model, _ = trained(rows_in_state_dict="embedding")
    state = model.state_dict()
    assert sorted(key.rpartition(".")[2] for key in state if key.startswith("engine.tables.wide")) == [
        "embedding",
        "ids",
        "step",
    ]
    restored = Model(coalesce=False)
    restored.load_state_dict(state)
    model.eval()
    restored.eval()
    assert torch.equal(model(batch_of(9)), restored(batch_of(9)))
    assert not rows_of(restored.engine)["wide"]["exp_avg"].any()
    restored.load_state_dict(state)  # replaces existing rows
    assert torch.equal(model(batch_of(9)), restored(batch_of(9)))


def test_a_mismatched_state_is_named_and_changes_no_row() -> None:
    model, _ = trained(rows_in_state_dict="record")
    good = model.state_dict()
    before = everything(model)

    def refused(text: str, change: dict[str, Any]) -> None:
        state = {key: value for key, value in {**good, **change}.items() if value is not None}
        with pytest.raises(RuntimeError, match=f"the rows of 'engine.tables' do not fit the tables: .*{text}"):
            model.load_state_dict(state)
        assert_equal(everything(model), before)

    ids = good["engine.tables.wide.ids"]
    refused("table 'wide' is in the live object only", {k: None for k in good if "tables.wide." in k})
    refused("ids must be int64", {"engine.tables.wide.ids": ids.float()})
    refused("ids must be distinct", {"engine.tables.wide.ids": torch.zeros_like(ids)})
    refused("columns must have one length", {"engine.tables.wide.embedding": torch.zeros(1, 20)})
    refused("column 'embedding': checkpoint float32", {"engine.tables.wide.embedding": torch.zeros(len(ids), 4)})
    refused("steps", {"engine.tables.wide.step": None})
    refused("frequency", {"engine.tables.wide.frequency": -torch.ones_like(ids)})
    with pytest.raises(RuntimeError, match="Unexpected.*engine.other"):
        model.load_state_dict({**good, "engine.other": ids})
    with pytest.raises(
        ValueError, match=r"rows_in_state_dict must be one of \[None, 'embedding', 'record'\], got 'all'"
    ):
        Model(rows_in_state_dict="all")


class Scaled(EmbeddingEngine):
    """An engine with its own parameter and module."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm1d(2)


def test_a_subclass_keeps_its_own_state() -> None:
    engine = Scaled({"a": EmbeddingConfig(dim=2)})
    with torch.no_grad():
        engine.scale.fill_(3)
    state = engine.state_dict()
    assert {"scale", "norm.weight", "tables"} <= state.keys()
    other = Scaled({"a": EmbeddingConfig(dim=2)})
    other.load_state_dict(state)
    assert other.scale.item() == 3
    del state["scale"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "scale"'):
        other.load_state_dict(state)


def test_errors_of_copies_and_pickles_name_a_remedy() -> None:
    model = Model()
    for duplicate in (copy.deepcopy, pickle.dumps, AveragedModel, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(TypeError, match=r"rows_in_state_dict='record'.*AveragedModel\(model.tower\)"):
            duplicate(model)
    assert torch.equal(AveragedModel(model.tower).module.weight, model.tower.weight)


def on_ranks(group: dist.ProcessGroup, rows: Any, state: dict[str, Tensor] | None) -> dict[str, Any]:
    """Train, or load a state_dict; return the state_dict and this rank's rows."""
    configs = sharded.configs()
    engine = EmbeddingEngine(configs, optimizer=optim.Adam, group=group, rows_in_state_dict=rows, prefetch_depth=0)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    model = nn.Sequential(engine)
    leave_out_of_ddp(model)
    if state is None:
        optimizer = optim.Adam(engine.parameters(), lr=0.1)
        for step in range(2):
            cuts = sharded.shares(24, ranks, False)
            outputs = engine(sharded.part_of(sharded.global_batch(step), cuts[rank], cuts[rank + 1]))
            sum(value.square().sum() / 24 for value in outputs.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        model.load_state_dict(state)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        return {"state": model.state_dict(), "tables": rows_of(engine), "step": engine.tables[0].step}


def by_id(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return rows sorted by id, without the placeholder key of this process."""
    found = {}
    for key, value in state.items():
        ids = state.get(f"{key.rpartition('.')[0]}.ids")
        found[key] = value if ids is None or value.dim() == 0 else value[ids.argsort()]
    return {key: value for key, value in found.items() if key != "0.tables"}


def test_ranks_gather_all_rows_for_any_number_of_ranks(ranks: Ranks) -> None:
    first, second = ranks.run(2, on_ranks, "record", None)
    assert_equal(by_id(first["state"]), by_id(second["state"]))
    merged = sharded.merged([first, second])
    assert all(len(result["tables"]["user"]["ids"]) < len(merged["user"]["ids"]) for result in (first, second))
    for name, columns in merged.items():
        for column, values in columns.items():
            ids = first["state"][f"0.tables.{name}.ids"]
            assert torch.equal(first["state"][f"0.tables.{name}.{column}"][ids.argsort()], values), (name, column)
    for world in (1, 3):
        loaded = ranks.run(world, on_ranks, "record", first["state"])
        for result in loaded:
            assert_equal(by_id(result["state"]), by_id(first["state"]))
            assert result["step"] == 2
        assert sum(len(result["tables"]["user"]["ids"]) for result in loaded) == len(merged["user"]["ids"])


def wrapped_in_ddp(group: dist.ProcessGroup, compiled: bool) -> list[str]:
    model = Model(group=group, rows_in_state_dict="record", prefetch_depth=0)
    leave_out_of_ddp(model)
    inner: Any = torch.compile(model, backend="eager") if compiled else model
    ddp = DistributedDataParallel(inner, process_group=group)
    optimizers = optimizers_of(model)
    train(ddp, optimizers, range(2))  # type: ignore[arg-type]
    state = ddp.state_dict()
    before = everything(model)
    other = Model(group=group, seed=9, prefetch_depth=0)
    leave_out_of_ddp(other)
    inner = torch.compile(other, backend="eager") if compiled else other
    DistributedDataParallel(inner, process_group=group).load_state_dict(state)
    assert_equal(everything(other), before)
    return sorted(state)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_in_ddp(ranks: Ranks, compiled: bool) -> None:
    wrapper = "module._orig_mod" if compiled else "module"
    for keys in ranks.run(2, wrapped_in_ddp, compiled):
        assert {f"{wrapper}.{key}" for key in ("tower.weight", "engine.tables", "engine.tables.user.exp_avg")} <= set(
            keys
        )
