"""Tables with optimizers of their own, beside tables with the engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal, OptimizerSpec
from recis_hybrid.pipelines import LrSchedule, TorchStep
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import CheckpointMismatch, Saver
from tests.support.near import OF_ADAM, assert_near

OWN: dict[str, Any] = {
    "common": None,
    "too": None,
    "adagrad": optim.Adagrad.spec(lr=0.1, initial_accumulator_value=0.1),
    "rowwise": optim.RowwiseAdagrad,
    "momentum": optim.SGD.spec(momentum=0.9, lr=0.05),
    "adamw": optim.AdamW.spec(lr=0.02),
}
IDS = torch.arange(1, 6)


def engine_of(own: dict[str, Any] = OWN, default: Any = optim.Adam, **more: Any) -> EmbeddingEngine:
    normal = Normal(0, 1)
    configs = {name: EmbeddingConfig(dim=4, initializer=normal, optimizer=each) for name, each in own.items()}
    return EmbeddingEngine(configs, optimizer=default, seed=3, **more)


def batch_of(engine: EmbeddingEngine) -> Batch:
    return dict.fromkeys(engine.configs, IDS)


def loss_of(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([(value.sin() ** 2).sum() for value in values.values()]).sum()


def train(engine: EmbeddingEngine, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(engine(batch_of(engine))).backward()
        optimizer.step()


def rows_of(engine: EmbeddingEngine) -> dict[str, dict[str, torch.Tensor]]:
    found = {m.name: table.export(number) for table in engine.tables for number, m in enumerate(table.members)}
    return {name: {column: v[rows["ids"].argsort()] for column, v in rows.items()} for name, rows in found.items()}


def assert_same(ours: EmbeddingEngine, theirs: EmbeddingEngine) -> None:
    """Compare all columns of the tables of ``theirs``, bit by bit."""
    mine = rows_of(ours)
    for name, columns in rows_of(theirs).items():
        assert mine[name].keys() == columns.keys()
        for column, values in columns.items():
            assert torch.equal(mine[name][column], values), (name, column)


def groups_by_table(optimizer: Any) -> dict[str, dict[str, Any]]:
    return {m.name: g for g in optimizer.param_groups for anchor in g["params"] for m in anchor.table.members}


@pytest.mark.parametrize("functional", [False, True])
def test_each_table_has_the_rule_of_its_config(functional: bool) -> None:
    engine = engine_of()
    optimizer = engine.make_optimizer(lr=0.01)
    assert type(optimizer) is optim.Adam
    references = {
        "common": lambda p: torch.optim.Adam(p, lr=0.01),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    }
    with torch.no_grad():
        dense = {name: torch.nn.Parameter(v.clone()) for name, v in engine(batch_of(engine)).items()}
    for _ in range(5):
        if functional:
            values, ctx = engine.lookup(batch_of(engine))
            leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
            gradients = torch.autograd.grad(loss_of(leaves), list(leaves.values()))
            engine.apply_gradients(ctx, dict(zip(leaves, gradients, strict=True)), optimizer)
        else:
            train(engine, optimizer, 1)
    for name, make in references.items():
        reference = make([dense[name]])
        for _ in range(5):
            reference.zero_grad()
            loss_of({name: dense[name]}).backward()
            reference.step()
        assert_near(rows_of(engine)[name]["embedding"], dense[name], OF_ADAM, where=name)
    # And to the bit, state included, as in engines with one optimizer each.
    for name, own in OWN.items():
        alone = engine_of({name: None}, own or optim.Adam)
        train(alone, alone.make_optimizer(**({} if own else {"lr": 0.01})), 5)
        alone(batch_of(alone))
        engine(batch_of(engine))
        assert {c: v.tolist() for c, v in rows_of(alone)[name].items() if c not in ("seen_step", "frequency")} == {
            c: v.tolist() for c, v in rows_of(engine)[name].items() if c not in ("seen_step", "frequency")
        }


def test_tables_of_different_optimizers_are_kept_apart() -> None:
    def members(**own: Any) -> list[list[str]]:
        return [[member.name for member in table.members] for table in engine_of(own).tables]

    assert members(a=None, b=optim.Adagrad, c=None, d=optim.Adagrad.spec()) == [["a", "c"], ["b", "d"]]
    assert members(a=optim.Adam, b=optim.AdamW, c=None) == [["a"], ["b"], ["c"]]  # all have the same state
    assert members(a=optim.Adam.spec(lr=0.1), b=optim.Adam.spec(lr=0.2)) == [["a"], ["b"]]
    assert members(a=optim.Adam.spec(betas=[0.5, 0.9]), b=optim.Adam.spec(betas=(0.5, 0.9))) == [["a", "b"]]
    frozen = [EmbeddingConfig(dim=4, optimizer=own, trainable=False) for own in (None, optim.Adagrad)]
    assert len(EmbeddingEngine({"a": frozen[0], "b": frozen[1]}, optimizer=optim.Adam).tables) == 1
    configs = [EmbeddingConfig(dim=4, table="t", optimizer=own) for own in (optim.Adagrad, optim.Adagrad.spec())]
    EmbeddingEngine(dict(zip("ab", configs, strict=True)))
    with pytest.raises(ValueError, match="'a' and 'b' share the table 't' but have different settings: optimizer="):
        EmbeddingEngine({"a": configs[0], "b": EmbeddingConfig(dim=4, table="t")})


def test_hyperparameters_are_the_specs_and_overrides_take_precedence() -> None:
    configs = {
        "a": EmbeddingConfig(dim=4),
        "b": EmbeddingConfig(dim=4, optimizer=optim.Adagrad.spec(lr=0.3), optimizer_overrides={"eps": 1e-3}),
        "c": EmbeddingConfig(dim=4, optimizer=optim.Adagrad),
    }
    engine = EmbeddingEngine(configs, optimizer=optim.Adam)
    found = groups_by_table(engine.make_optimizer(lr=0.5))
    settings = {name: {k: v for k, v in group.items() if k != "params"} for name, group in found.items()}
    rest = {"lr_decay": 0.0, "weight_decay": 0.0, "exact": False}
    assert settings == {
        "a": {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "exact": False},
        "b": {"optimizer": "Adagrad", "lr": 0.3, "eps": 1e-3, **rest},
        "c": {"optimizer": "Adagrad", "lr": 1e-2, "eps": 1e-10, **rest},
    }
    anchors = {member.name: table.anchor for table in engine.tables for member in table.members}
    groups = [{"params": [anchors["a"]], "betas": (0.5, 0.9)}, {"params": [anchors["b"], anchors["c"]], "lr": 0.2}]
    found = groups_by_table(optim.Adam(groups))
    assert (found["a"]["betas"], found["b"]["lr"], found["c"]["lr"]) == ((0.5, 0.9), 0.3, 0.2)
    with pytest.raises(ValueError, match=r"table b has the optimizer Adagrad, which has no hyperparameter \['betas'\]"):
        optim.Adam([{"params": engine.parameters(), "betas": (0.5, 0.9)}])


def test_bad_optimizers_of_a_table_are_refused() -> None:
    with pytest.raises(TypeError, match="EmbeddingConfig: optimizer must be an optimizer class of recis_hybrid.optim"):
        EmbeddingConfig(dim=4, optimizer=torch.optim.Adam)
    spec = OptimizerSpec(torch.optim.Adam)
    with pytest.raises(TypeError, match=r"table a: EmbeddingConfig\(optimizer=\) must be an optimizer of recis_hybrid"):
        engine_of({"a": spec, "b": None}).make_optimizer()
    config = EmbeddingConfig(dim=4, optimizer=optim.Adagrad, optimizer_overrides={"betas": (0.5, 0.9)})
    with pytest.raises(ValueError, match=r"Adagrad has no hyperparameter \['betas'\], which the config of the table a"):
        EmbeddingEngine({"a": config}, optimizer=optim.Adam).make_optimizer()
    with pytest.raises(ValueError, match="Adagrad: lr must not be negative, got -1"):
        engine_of({"a": optim.Adagrad.spec(lr=-1)}).make_optimizer()
    config = EmbeddingConfig(dim=4, optimizer=optim.SGD, optimizer_overrides={"momentum": 0.9})
    with pytest.raises(ValueError, match=r"EmbeddingConfig\(..., optimizer=optim.SGD.spec\(momentum=0.9\)\)"):
        EmbeddingEngine({"a": config}, optimizer=optim.Adam).make_optimizer()


def test_an_engine_without_a_common_optimizer() -> None:
    engine = engine_of({"a": optim.Adagrad, "b": optim.Adam}, None)
    train(engine, engine.make_optimizer(), 1)
    assert sorted(rows_of(engine)["b"])[1:3] == ["exp_avg", "exp_avg_sq"]
    with pytest.raises(TypeError, match=r"make_optimizer: \['lr'\] would apply to no table, because every trained"):
        engine.make_optimizer(lr=0.1)
    with pytest.raises(RuntimeError, match="make_optimizer: the engine was built without an optimizer"):
        engine_of({"a": optim.Adagrad, "b": None}, None).make_optimizer()


def test_schedules_scale_the_learning_rate_of_every_table() -> None:
    optimizer = engine_of().make_optimizer(lr=0.1)
    before = {name: group["lr"] for name, group in groups_by_table(optimizer).items()}
    optimizer.step()
    lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert {name: group["lr"] for name, group in groups_by_table(optimizer).items()} == {
        name: rate * 0.5 for name, rate in before.items()
    }
    optimizer = engine_of().make_optimizer(lr=0.1)
    LrSchedule(optimizer, lambda step: 0.2)
    found = {name: group["lr"] for name, group in groups_by_table(optimizer).items()}
    assert found == pytest.approx({name: rate * 2 for name, rate in before.items()})
    for _ in range(2):  # also after load_state_dict, which makes new groups
        with pytest.raises(KeyError, match="Adagrad, the optimizer of the table adagrad, has no 'betas'"):
            lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)
        optimizer.load_state_dict(optimizer.state_dict())


def test_clipping_and_scaling_reach_every_table() -> None:
    engine, other = engine_of(), engine_of()
    optimizer, plain = engine.make_optimizer(lr=0.01), other.make_optimizer(lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(engine(batch_of(engine)))).backward()
    loss_of(other(batch_of(other))).backward()
    scaler.unscale_(optimizer)
    norms = [torch.nn.utils.clip_grad_norm_(each.parameters(), 0.01) for each in (engine, other)]
    assert torch.equal(*norms)
    scaler.step(optimizer)
    plain.step()
    assert_same(engine, other)
    scaler.update()
    optimizer.zero_grad()
    before = rows_of(engine)
    scaler.scale(loss_of(engine(batch_of(engine))) * torch.inf).backward()
    scaler.step(optimizer)  # skipped for all tables
    assert all(torch.equal(rows_of(engine)[name]["embedding"], rows["embedding"]) for name, rows in before.items())


class Model(torch.nn.Module):
    def __init__(self, engine: EmbeddingEngine) -> None:
        super().__init__()
        self.engine, self.tower = engine, torch.nn.Linear(4 * len(engine.configs), 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        values = self.engine({name: column for name, column in batch.items() if name != "label"})
        logits: torch.Tensor = self.tower(torch.cat(list(values.values()), 1))
        return logits[:, 0]


def test_a_step_of_a_trainer_trains_and_saves_all_tables(tmp_path: Path) -> None:
    def step_of() -> TorchStep:
        model = Model(engine_of())
        torch.nn.init.constant_(model.tower.weight, 0.5), torch.nn.init.zeros_(model.tower.bias)
        optimizers = {"dense": torch.optim.SGD(model.tower.parameters(), 0.1), "sparse": model.engine.make_optimizer()}
        return TorchStep(model, torch.nn.functional.binary_cross_entropy_with_logits, optimizers)

    step, plain = step_of(), step_of()
    batch = {**batch_of(step.engines[0]), "label": (IDS % 2).float()}
    for number in range(4):
        step(batch)
        if number == 1:
            Saver(tmp_path).save(1, step.parts())
        loss = plain.objectives[""].loss
        assert loss is not None
        loss(plain.model(batch), batch["label"]).backward()
        for optimizer in plain.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    assert_same(step.engines[0], plain.engines[0])
    again = step_of()
    Saver(tmp_path).load(again.parts())
    again(batch), again(batch)
    assert_same(again.engines[0], step.engines[0])


def test_checkpoints_follow_the_tables_and_refuse_other_optimizers(tmp_path: Path) -> None:
    engine = engine_of()
    optimizer = engine.make_optimizer(lr=0.01)
    train(engine, optimizer, 2)
    groups_by_table(optimizer)["rowwise"]["lr"] = 0.7
    saver = Saver(tmp_path)
    saver.save(1, {"engine": engine, "sparse": optimizer}, delta=True)
    train(engine, optimizer, 1)
    saver.save(2, {"engine": engine, "sparse": optimizer}, delta=True)
    other = engine_of(dict(reversed(OWN.items())), coalesce=False)
    sparse = other.make_optimizer()
    assert saver.load({"engine": other, "sparse": sparse}) == 2
    assert_same(engine, other)
    assert groups_by_table(sparse)["rowwise"]["lr"] == 0.7
    train(engine, optimizer, 2), train(other, sparse, 2)
    assert_same(engine, other)
    for own, default, message in (
        ({**OWN, "adamw": optim.Adam}, optim.Adam, "table 'adamw', optimizer: checkpoint AdamW, live object Adam"),
        ({**OWN, "adagrad": None}, optim.Adam, "table 'adagrad', optimizer: checkpoint Adagrad, live object Adam"),
        (OWN, optim.AdamW, "table 'common', optimizer: checkpoint Adam, live object AdamW"),
    ):
        wrong = engine_of(own, default)
        made = wrong.make_optimizer()
        with pytest.raises(CheckpointMismatch, match=message):
            saver.load({"sparse": made})
        with pytest.raises(ValueError, match=message):
            made.load_checkpoint_state(optimizer.checkpoint_state())
    # The classes of tables count, not which of them is the engine's.
    swapped = engine_of({**{name: own or optim.Adam for name, own in OWN.items()}, "adamw": None}, optim.AdamW)
    saver.load({"engine": swapped, "sparse": swapped.make_optimizer()})
    # Rows alone are loaded into tables of another optimizer, with a warning.
    wrong = engine_of({**OWN, "adagrad": None})
    with pytest.warns(UserWarning, match="table 'adagrad', column 'sum' is in the checkpoint only"):
        saver.load({"engine": wrong})


def test_a_state_dict_keeps_the_groups_and_refuses_other_optimizers() -> None:
    engine = engine_of()
    optimizer = engine.make_optimizer(lr=0.01)
    train(engine, optimizer, 3)
    other = engine_of().make_optimizer()
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert [state["step"] for state in other.state.values()] == [3] * 5
    wrong = engine_of({**OWN, "rowwise": optim.Adagrad}).make_optimizer()
    with pytest.raises(ValueError, match=r"parameter group 2 has the optimizer Adagrad, the state_dict has Rowwise"):
        wrong.load_state_dict(optimizer.state_dict())
    assert not wrong.state
