from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from recis_hybrid import optim
from recis_hybrid.embedding import Anchor, Unused, dense_parameters
from recis_hybrid.pipelines import LrSchedule, Objective, TorchStep, UncertaintyWeights
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Saver
from tests.support.near import assert_near
from tests.support.small import Model, assert_same, bce, make_batches, make_step, state_of


def train(step: TorchStep, batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
    return [step(batch) for batch in batches]


def test_a_step_is_zero_grad_forward_backward_clip_step() -> None:
    step = make_step(clip_grad_norm=0.1)
    twin = make_step()
    for batch in make_batches():
        torch.manual_seed(1)
        figures = step(batch)
        torch.manual_seed(1)
        for optimizer in twin.optimizers.values():
            optimizer.zero_grad()
        loss = bce(twin.model(batch), batch["label"])  # type: ignore[arg-type]
        loss.backward()
        norm = clip_grad_norm_(twin.model.parameters(), 0.1)
        for optimizer in twin.optimizers.values():
            optimizer.step()
        assert torch.equal(figures["loss"], loss.detach())
        assert torch.equal(figures["grad_norm"], norm)
    assert_same(state_of(step), state_of(twin))
    assert step.updates == 8


def test_clipping_bounds_the_gradients_of_towers_and_tables_together() -> None:
    model = Model()
    optimizers = [torch.optim.SGD(dense_parameters(model), lr=1.0), optim.SGD(model.engine.parameters(), lr=1.0)]
    step = TorchStep(model, lambda logits, labels: 1e3 * logits.sum(), optimizers, clip_grad_norm=0.5)
    table, (batch,) = model.engine.tables[0], make_batches(1)
    model.engine(batch)  # inserts the rows
    before = [parameter.detach().clone() for parameter in dense_parameters(model)]
    first = table.export(0)["embedding"]
    step(batch)
    towers = [(b - p.detach()).square().sum() for b, p in zip(before, dense_parameters(model), strict=True)]
    rows = (table.export(0)["embedding"] - first).square().sum()
    assert float(rows) > 0
    assert float(sum(towers) + rows) ** 0.5 == pytest.approx(0.5, rel=1e-3)


def test_accumulated_batches_have_the_gradient_of_one_large_batch() -> None:
    (whole,) = make_batches(1, rows=50)
    parts: list[Batch] = [{name: column[a:b] for name, column in whole.items()} for a, b in ((0, 30), (30, 50))]
    results = []
    for batches in ([whole], parts):
        torch.manual_seed(0)
        model = Model()
        model.tower = nn.Sequential(nn.Linear(4, 1))  # without batch norm, which depends on the batch
        torch.nn.init.ones_(model.tower[0].weight)
        torch.nn.init.zeros_(model.tower[0].bias)
        optimizers = [torch.optim.SGD(dense_parameters(model), lr=0.1), optim.Adam(model.engine.parameters())]
        step = TorchStep(model, bce, optimizers)
        loss = step(*batches)["loss"]
        results.append({"loss": loss, **state_of(step)})
        assert step.updates == 1
    for name, value in results[0].items():
        if name not in ("table.seen_step", "table.frequency"):
            assert_near(results[1][name], value, where=name)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast_learns(precision: Any) -> None:
    step = make_step(precision=precision, loss_scale=1024.0, clip_grad_norm=10.0)
    first = float(step(make_batches(1)[0])["loss"])
    losses = [float(figures["loss"]) for figures in train(step, make_batches() * 8)]
    assert losses[-1] < 0.3 < first
    parts = step.parts()
    assert ("scaler" in parts) == (precision == "float16")
    with torch.autocast("cpu", torch.bfloat16 if precision == "bfloat16" else torch.float16):
        assert step.model(make_batches(1)[0]).dtype is not torch.float32


def test_an_overflow_in_row_gradients_skips_their_update_and_lowers_the_scale() -> None:
    step = make_step(precision="float16", loss_scale=2.0**10)
    train(step, make_batches(2))
    before, scale = state_of(step), step._scaler.get_scale()

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return torch.full_like(gradients[0], math.inf)

    assert isinstance(step.model, Model)
    forward = step.model.engine.forward
    step.model.engine.forward = lambda batch: {"id": Overflow.apply(forward(batch)["id"])}  # type: ignore[method-assign,no-untyped-call]
    train(step, make_batches(1))
    after = state_of(step)
    assert torch.equal(after["table.embedding"], before["table.embedding"])
    assert not torch.equal(after["tower.2.weight"], before["tower.2.weight"])
    assert step._scaler.get_scale() == scale / 2
    assert step.engines[0].evict(Unused(steps=100)) == 0  # no row gradients are pending
    step.model.engine.forward = forward  # type: ignore[method-assign]
    train(step, make_batches(1))
    assert not torch.equal(state_of(step)["table.embedding"], before["table.embedding"])


@pytest.mark.parametrize("clip", [None, 1.0])
def test_float16_trains_if_an_optimizer_has_no_gradients(clip: float | None) -> None:
    step = make_step(precision="float16", loss_scale=1024.0, clip_grad_norm=clip)
    assert isinstance(step.model, Model)
    step.model.tower.requires_grad_(False)
    before = [parameter.clone() for parameter in step.model.tower.parameters()]
    train(step, make_batches(2))
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.tower.parameters(), strict=True))
    assert int(step.engines[0].tables[0].export(0)["updated_step"].max()) == 2
    # The same if no optimizer has gradients, with an objective that is constant.
    step.objectives = {"": Objective(loss=lambda outputs, labels: torch.zeros((), requires_grad=True))}
    train(step, make_batches(1))
    assert step._scaler.get_scale() == 1024.0


def test_unscaled_row_gradients_match_full_precision() -> None:
    norms = []
    for precision in ("float32", "float16"):
        step = make_step(precision=precision, clip_grad_norm=1e9)
        step.model.tower[1].p = 0.0  # type: ignore[union-attr,index]
        norms.append(float(step(make_batches(1)[0])["grad_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


@pytest.mark.jax
def test_torch_and_optax_schedules_step_after_each_update() -> None:
    import optax

    step = make_step()
    halving = torch.optim.lr_scheduler.ExponentialLR(step.optimizers["dense"], 0.5)
    warmup = LrSchedule(step.optimizers["sparse"], optax.linear_schedule(0.0, 0.05, 5))
    step.schedules = [halving, warmup]
    rates = []
    for batch in make_batches(6):
        rates.append([step.optimizers[name].param_groups[0]["lr"] for name in ("dense", "sparse")])
        step(batch)
    expected = [[0.05 * 0.5**n, 0.01 * min(n, 5)] for n in range(6)]
    assert rates == [pytest.approx(pair, rel=1e-6) for pair in expected]


def test_a_schedule_keeps_ratios_between_groups() -> None:
    first, second = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.1)
    schedule = LrSchedule(optimizer, lambda step: 0.1 / (1 + step))
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.05), pytest.approx(0.25)]
    again = LrSchedule(torch.optim.SGD([first], lr=0.1), lambda step: 0.1 / (1 + step))
    again.load_state_dict(schedule.state_dict())
    assert again.state_dict() == {"steps": 1}


HEADS = ("click", "buy")


def objectives(**weights: Any) -> dict[str, Objective]:
    return {
        "click": Objective(loss=bce, weight=weights.get("click", 1.0)),
        "buy": Objective(loss=bce, label="other", weight=weights.get("buy", 1.0)),
    }


def test_losses_are_summed_by_their_weights() -> None:
    step = make_step(objectives(click=2.0, buy=lambda n: 0.5 / (n + 1)), HEADS)
    for number, figures in enumerate(train(step, make_batches(3))):
        weight = 0.5 / (number + 1)
        assert float(figures["weight/buy"]) == pytest.approx(weight)
        assert "weight/click" not in figures
        total = 2.0 * figures["loss/click"] + weight * figures["loss/buy"]
        assert_near(figures["loss"], total)


def test_a_weight_of_zero_trains_only_the_other_objective() -> None:
    one, both = (make_step(objectives(click=1.0, buy=weight), HEADS) for weight in (0.0, 1.0))
    before = one.model.tower[2].weight.detach().clone()  # type: ignore[union-attr,index]
    for step in (one, both):
        step.model.tower[1].p = 0.0  # type: ignore[union-attr,index]
        train(step, make_batches(1))
    assert torch.equal(one.model.tower[2].weight[1], before[1])  # type: ignore[union-attr,index]
    assert not torch.equal(both.model.tower[2].weight[1], before[1])  # type: ignore[union-attr,index]


def test_uncertainty_weights_are_learned_and_saved() -> None:
    torch.manual_seed(0)
    model, weighting = Model(HEADS), UncertaintyWeights(HEADS)
    dense = torch.optim.SGD([*dense_parameters(model), *weighting.parameters()], lr=0.1)
    sparse = optim.SGD(model.engine.parameters(), lr=0.1)
    step = TorchStep(model, objectives(), [dense, sparse], weighting=weighting)
    figures = step(make_batches(1)[0])
    # At s = 0 the gradient of exp(-s) L + s / 2 is 1/2 - L.
    losses = torch.stack([figures["loss/click"], figures["loss/buy"]])
    assert_near(weighting.log_variances, -0.1 * (0.5 - losses))
    assert float(figures["weight/click"]) == 1.0
    assert step.parts()["weighting"] is weighting
    with pytest.raises(ValueError, match=r"no optimizer has the parameters of weighting; add weighting.parameters\(\)"):
        TorchStep(model, objectives(), [torch.optim.SGD(dense_parameters(model)), sparse], weighting=weighting)


def test_padding_rows_count_neither_in_losses_nor_in_predictions() -> None:
    (batch,) = make_batches(1, rows=10)
    mask = torch.arange(10) < 7
    padded, cut = {**batch, "mask": mask}, {name: column[:7] for name, column in batch.items()}
    torch.manual_seed(0)
    towers = nn.Linear(4, 1), nn.Linear(4, 1)
    towers[1].load_state_dict(towers[0].state_dict())
    first, second = (make_step(tower=tower, groups="user") for tower in towers)
    assert_near(first(padded)["loss"], second(cut)["loss"])  # type: ignore[arg-type]
    scored = first.predict(padded)[""]
    assert len(scored.scores) == len(scored.labels) == 7
    assert torch.equal(scored.groups, batch["user"][:7])  # type: ignore[arg-type]
    assert float(first({**batch, "mask": mask & False})["loss"]) == 0.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch, while inductor is imported
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # within dynamo
def test_a_compiled_tower_trains_like_an_eager_one() -> None:
    losses = []
    torch._dynamo.reset()
    for compiled in (False, True):
        torch.manual_seed(0)
        step = make_step(tower=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
        if compiled:
            step = TorchStep(step.model, bce, step.optimizers, compile=[step.model.tower])
            assert step.model.tower._compiled_call_impl is not None
        losses.append(torch.stack([figures["loss"] for figures in train(step, make_batches(4))]))
        names = [name for name, _ in step.model.tower.named_parameters()]
        assert names == [f"{n}.{part}" for n in (0, 2) for part in ("weight", "bias")]
    assert_near(losses[0], losses[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


class TwoEngines(nn.Module):
    def __init__(self, compiled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Model(), Model()
        if compiled:
            self.second = torch.compile(self.second, backend="eager")  # type: ignore[assignment]

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.first(batch) + self.second(batch)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # within dynamo
@pytest.mark.parametrize("engines", [1, 2])
def test_a_compiled_model_is_trained_and_saved_like_an_eager_one(engines: int, tmp_path: Path) -> None:
    steps = []
    torch._dynamo.reset()
    for compiled in (False, True):
        torch.manual_seed(0)
        own = Model() if engines == 1 else TwoEngines(compiled)
        model = torch.compile(own, backend="eager") if compiled else own
        sparse = optim.Adam([p for p in own.parameters() if isinstance(p, Anchor)])
        step = TorchStep(model, bce, {"dense": torch.optim.Adam(dense_parameters(model), lr=0.1), "sparse": sparse})
        losses = torch.stack([figures["loss"] for figures in train(step, make_batches(4))])
        steps.append((step, losses, step.predict(make_batches(1)[0])[""].scores))
    (eager, losses, scores), (compiled_step, again, others) = steps
    assert_near(again, losses)
    assert_near(others, scores)
    assert list(compiled_step.parts()) == list(eager.parts())
    saver = Saver(tmp_path)
    saver.save(1, eager.parts())
    saver.load(compiled_step.parts())
    assert torch.equal(compiled_step.predict(make_batches(1)[0])[""].scores, scores)
    saver.save(2, compiled_step.parts())
    saver.load(eager.parts(), 2)
    torch._dynamo.reset()


def test_wrong_arguments_and_outputs_are_named() -> None:
    with pytest.raises(ValueError, match="precision must be one of .*, got 'half'"):
        make_step(precision="half")
    with pytest.raises(KeyError, match=r"which has \['id'\]; name the column by `label=`"):
        make_step()({"id": torch.tensor([1, 2])})
    with pytest.raises(KeyError, match=r"must also return outputs for \['buy'\]"):
        make_step(objectives(), ("click",))(make_batches(1)[0])
    step = make_step({"click": Objective(loss=bce, weight=lambda n: math.nan)}, ("click",))
    with pytest.raises(ValueError, match="the weight of label 'label' must be finite, got nan at update 0"):
        step(make_batches(1)[0])
