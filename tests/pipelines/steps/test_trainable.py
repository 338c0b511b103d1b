"""Every parameter and table of a step's model must have exactly one optimizer or be frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, dense_parameters
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import Evaluate, Objective, TorchStep, Train, Trainer, UncertaintyWeights, evaluate
from recis_hybrid.pipelines.steps.gradient_sync import GradientSync
from recis_hybrid.ragged import Batch
from tests.support.small import bce, make_batches


class TwoTables(nn.Module):
    """A tower of two layers, and two tables, which are not merged because their widths differ."""

    def __init__(self, **other_config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.engine = EmbeddingEngine(
            {"id": EmbeddingConfig(dim=4), "other_id": EmbeddingConfig(dim=2, **other_config)},
            optimizer=optim.Adam,
        )
        self.body, self.head = nn.Linear(6, 3), nn.Linear(3, 1)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(self.body(torch.cat(list(self.engine(batch).values()), 1)))[:, 0]  # type: ignore[no-any-return]


def batches(number: int = 2) -> list[Batch]:
    return [{**batch, "other_id": batch["user"]} for batch in make_batches(number)]


def dense(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(dense_parameters(model), lr=lr)


def sparse(model: TwoTables) -> torch.optim.Optimizer:
    return optim.Adam(model.engine.parameters(), lr=0.1)


@contextmanager
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def step_of(model: nn.Module, *optimizers: torch.optim.Optimizer, **options: Any) -> TorchStep:
    return TorchStep(model, bce, list(optimizers), **options)


def test_a_missing_optimizer_names_the_parameters_that_need_one() -> None:
    model = TwoTables()
    with pytest.raises(
        ValueError, match=r"no optimizer has the tables \['id', 'other_id'\]; add an optimizer with .*opt"
    ):
        step_of(model, dense(model))
    names = r"\['body.weight', 'body.bias', 'head.weight', 'head.bias'\]"
    with pytest.raises(ValueError, match=rf"no optimizer has the parameters {names}; .*Adam\(embed"):
        step_of(model, sparse(model))
    one = optim.Adam([model.engine.tables[0].anchor])
    with pytest.raises(
        ValueError, match=r"the tables \['other_id'\] and the parameters \['head.weight', 'head.bias'\]"
    ):
        step_of(model, one, torch.optim.SGD(model.body.parameters()))
    many = nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)), model)
    with pytest.raises(ValueError, match=r"'2.bias'\] and 8 more"):
        step_of(many, sparse(model))


def test_names_of_parameters_omit_wrappers() -> None:
    model = TwoTables()
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"the parameters \['body.weight', 'body.bias', 'head"):
        step_of(compiled, sparse(model))
    with one_rank():
        model.body = DistributedDataParallel(model.body)  # type: ignore[assignment]
        tower = DistributedDataParallel(nn.Linear(1, 1))
        with pytest.raises(ValueError, match=r"the parameters \['weight', 'bias'\]"):
            step_of(tower, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
        step_of(model, sparse(model), dense(model))


def test_frozen_parameters_need_no_optimizer() -> None:
    model = TwoTables(trainable=False)
    model.head.requires_grad_(False)
    before = model.head.weight.clone()
    step = step_of(model, torch.optim.SGD(model.body.parameters(), lr=0.1), optim.Adam([model.engine.tables[0].anchor]))
    for batch in batches():
        step(batch)
    assert torch.equal(model.head.weight, before)

    model = TwoTables()
    model.engine.requires_grad_(False)
    step = step_of(model, dense(model))
    for batch in batches():
        step(batch)
    assert all(not table.pending for table in model.engine.tables)


def test_steps_that_share_a_model_train_separate_parts() -> None:
    model = TwoTables()
    first = step_of(model, torch.optim.SGD(model.body.parameters(), lr=0.1), freeze=[model.engine, model.head])
    second = step_of(model, sparse(model), torch.optim.SGD(model.head.parameters(), lr=0.1), freeze=[model.body])

    def state() -> list[Tensor]:
        rows = [table.export(0)["embedding"] for table in model.engine.tables]
        return [model.body.weight.detach().clone(), model.head.weight.detach().clone(), *rows]

    (batch,) = batches(1)
    second(batch)
    for step, moves in ((first, [True, False, False, False]), (second, [False, True, True, True])):
        before = state()
        step(batch)
        assert [not torch.equal(a, b) for a, b in zip(before, state(), strict=True)] == moves
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(not table.pending for table in model.engine.tables)
    # Gradients left behind by the other step do not count in the clipped norm.
    norm = step_of(
        model, torch.optim.SGD(model.body.parameters(), lr=0.0), freeze=[model.engine, model.head], clip_grad_norm=1e9
    )(batch)["grad_norm"]
    model.head.weight.grad = torch.full_like(model.head.weight, 1e3)
    again = step_of(
        model, torch.optim.SGD(model.body.parameters(), lr=0.0), freeze=[model.engine, model.head], clip_grad_norm=1e9
    )(batch)["grad_norm"]
    assert torch.equal(norm, again)
    trainer = Trainer({"first": first, "second": second}, batches(2), batches(1), metrics={"auc": AUC()})
    trainer.fit([Train(step="first"), Train(step="second"), Evaluate()])
    with pytest.raises(
        ValueError, match=r"both freeze and an optimizer have the parameters \['body.weight', 'body.bias'\]; remove"
    ):
        step_of(model, sparse(model), dense(model), freeze=[model.body])


def test_a_parameter_of_two_optimizers_is_rejected() -> None:
    model = TwoTables()
    rest = [p for p in dense_parameters(model) if p is not model.head.bias]
    with pytest.raises(ValueError, match=r"more than one optimizer has the parameters \['head.bias'\]"):
        step_of(model, sparse(model), dense(model), torch.optim.SGD([model.head.bias]))
    with pytest.raises(ValueError, match=r"more than one optimizer has the tables \['id', 'other_id'\]"):
        step_of(model, sparse(model), sparse(model), dense(model))
    both = dense(model)
    with pytest.raises(ValueError, match="an optimizer occurs twice among"):
        step_of(model, sparse(model), both, both)
    step_of(model, sparse(model), torch.optim.SGD(rest), torch.optim.SGD([model.head.bias]))


def test_optimizers_of_another_model_are_rejected() -> None:
    model, other = TwoTables(), TwoTables()
    with pytest.raises(ValueError, match=r"no optimizer has .* outside the model, 'optimizer1' has 4; build each"):
        step_of(model, sparse(model), dense(other))
    temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"'optimizer1' has 1 parameters outside the model, .* not saved"):
        step_of(model, sparse(model), torch.optim.SGD([*dense_parameters(model), temperature], lr=0.1))

    class Outside(nn.Module):
        """A tower whose tables belong to another module."""

        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Linear(6, 1)

        def forward(self, batch: Batch) -> Tensor:
            return self.tower(torch.cat(list(model.engine(batch).values()), 1))[:, 0]  # type: ignore[no-any-return]

    outside = Outside()
    with pytest.raises(ValueError, match=r"'optimizer0' has the tables \['id', 'other_id'\] outside the model"):
        step_of(outside, sparse(model), dense(outside))


class ScaledLoss(nn.Module):
    """A loss with a trainable parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return bce(outputs * self.scale, labels)


def test_parameters_of_the_loss_and_of_weights_are_trained_and_saved() -> None:
    model, loss = TwoTables(), ScaledLoss()
    with pytest.raises(ValueError, match=r"no optimizer has the parameters \['loss.scale'\]"):
        TorchStep(model, loss, [sparse(model), dense(model)])
    optimizers = [sparse(model), torch.optim.SGD([*dense_parameters(model), loss.scale], lr=1.0)]
    step = TorchStep(model, loss, optimizers)
    step(batches(1)[0])
    assert float(loss.scale.detach()) != 1.0
    assert step.parts()["loss"] is loss

    class Heads(TwoTables):
        def forward(self, batch: Batch) -> Any:
            return {"a": (outputs := super().forward(batch)), "b": outputs}

    heads, weights = Heads(), UncertaintyWeights(["a", "b"])
    named = {name: Objective(loss=bce) for name in ("a", "b")}
    with pytest.raises(ValueError, match=r"no optimizer has the parameters of weighting; add weighting.parameters\(\)"):
        TorchStep(heads, named, [sparse(heads), dense(heads)], weighting=weights)


@pytest.mark.parametrize("name", ["model", "engine", "updates", "schedule0"])
def test_an_optimizer_must_not_have_the_name_of_another_part(name: str) -> None:
    model = TwoTables()
    optimizers = {name: sparse(model), "dense": (tower_optimizer := dense(model))}
    schedules = [torch.optim.lr_scheduler.ExponentialLR(tower_optimizer, 0.9)]
    with pytest.raises(ValueError, match=rf"checkpoints use the names \['{name}'\] for other parts; rename the optim"):
        TorchStep(model, bce, optimizers, schedules=schedules)


def test_a_step_without_optimizers_only_predicts() -> None:
    model = TwoTables()
    step = TorchStep(model, bce, [])
    assert 0 <= evaluate(step, batches(1), {"auc": AUC()})["auc"] <= 1
    with pytest.raises(ValueError, match="a step without optimizers only predicts; pass optimizers"):
        step(batches(1)[0])


def test_parameters_added_later_are_found() -> None:
    class Lazy(TwoTables):
        """Creates a layer in its first forward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.late: nn.Module | None = None

        def forward(self, batch: Batch) -> Tensor:
            self.late = self.late or nn.Linear(1, 1)
            return self.late(super().forward(batch)[:, None])[:, 0]  # type: ignore[no-any-return]

    lazy = Lazy()
    step = step_of(lazy, sparse(lazy), dense(lazy))
    with pytest.raises(ValueError, match=r"no optimizer has the parameters \['late.weight', 'late.bias'\]"):
        step(batches(1)[0])

    model = TwoTables()
    model.head.requires_grad_(False)
    step = step_of(model, sparse(model), torch.optim.SGD(model.body.parameters(), lr=0.1))
    step(batches(1)[0])
    model.head.requires_grad_(True)  # without an optimizer
    with pytest.raises(ValueError, match=r"no optimizer has the parameters \['head.weight', 'head.bias'\]"):
        step(batches(1)[0])
    model.head.requires_grad_(False)
    step(batches(1)[0])
    step.predict(batches(1)[0])
    model.later = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"no optimizer has the parameters \['later.weight', 'later.bias'\]"):
        step(batches(1)[0])


def test_lazy_layers_are_trained() -> None:
    class Lazy(TwoTables):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.LazyLinear(1)

    lazy = Lazy()
    step = step_of(lazy, sparse(lazy), dense(lazy))
    step(batches(1)[0])
    assert lazy.head.weight.shape == (1, 3)


def test_a_stage_may_freeze_parameters_that_have_an_optimizer() -> None:
    model = TwoTables()
    trainer = Trainer(step_of(model, sparse(model), dense(model)), batches(2))
    before = model.head.weight.clone()
    trainer.fit([Train(freeze=[model.head, model.engine]), Train(freeze=[model.head])])
    assert torch.equal(model.head.weight, before)
    trainer.fit([Train()])
    assert not torch.equal(model.head.weight, before)


def test_a_stage_unfreezes_parameters() -> None:
    model = TwoTables(trainable=False)
    model.body.requires_grad_(False)
    trainer = Trainer(step_of(model, sparse(model), dense(model)), batches(2))
    frozen = {name: value.clone() for name, value in model.body.named_parameters()}

    def changed() -> list[str]:
        return [name for name, value in model.body.named_parameters() if not torch.equal(value, frozen[name])]

    trainer.fit([Train()])
    assert changed() == []
    # Unfreezing has priority over freezing, and read-only tables stay frozen.
    trainer.fit([Train(freeze=[model.body], unfreeze=[model.body.bias, model.engine])])
    assert changed() == ["bias"]
    assert [p.requires_grad for p in model.body.parameters()] == [False, False]
    trainer.fit([Train(unfreeze=[model.body])])
    assert changed() == ["weight", "bias"]


def test_unfrozen_parameters_need_an_optimizer() -> None:
    model = TwoTables()
    model.body.requires_grad_(False)
    trained = torch.optim.SGD(model.head.parameters(), lr=0.1)
    trainer = Trainer(step_of(model, sparse(model), trained), batches(2))
    with pytest.raises(
        ValueError, match=r"no optimizer has the parameters \['body.weight', 'body.bias'\]; .*unfreezes"
    ):
        trainer.fit([Train(unfreeze=[model.body])])
    assert not model.body.weight.requires_grad
    trained.add_param_group({"params": list(model.body.parameters())})
    trainer.fit([Train(unfreeze=[model.body])])


def test_parameters_unfrozen_within_ddp_are_refused() -> None:
    model = TwoTables()
    model.body.bias.requires_grad_(False)
    with one_rank():
        model.body = DistributedDataParallel(model.body)  # type: ignore[assignment]
        sync = GradientSync([model], [dense(model)])
        sync.add(1.0)
        model.body.requires_grad_(True)
        with pytest.raises(ValueError, match=r"1 parameters, such as 'bias', were unfrozen inside .* do not wrap"):
            sync.add(1.0)


def test_applying_gradients_names_the_table_without_an_optimizer() -> None:
    model = TwoTables()
    values, context = model.engine.lookup(batches(1)[0])
    gradients = {name: torch.ones_like(value) for name, value in values.items()}
    some = optim.Adam([model.engine.tables[0].anchor])
    rows = model.engine.tables[0].export(0)["embedding"]
    with pytest.raises(
        ValueError, match=r"Adam: the table 'other_id' is not among the optimizer's parameters; pass .*"
    ):
        model.engine.apply_gradients(context, gradients, some)
    for wrong in (torch.optim.Adam(dense_parameters(model)), optim.Adam):
        with pytest.raises(TypeError, match=r"apply_gradients: optimizer must be one of recis_hybrid.optim"):
            model.engine.apply_gradients(context, gradients, wrong)  # type: ignore[arg-type]
    assert torch.equal(model.engine.tables[0].export(0)["embedding"], rows)
    message = r"Adam needs .*exp_avg.* in every row of the table id, but the engine was built with \{\}"
    with pytest.raises(ValueError, match=message):
        optim.Adam(EmbeddingEngine({"id": EmbeddingConfig(dim=2)}).parameters())
