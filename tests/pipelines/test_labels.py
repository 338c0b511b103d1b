"""Labels of any dtype and shape, and model outputs of any structure, in training and evaluation."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recis_hybrid import metrics as every_metric, optim
from recis_hybrid.app.build import stages_of, trainer_of
from recis_hybrid.app.config import load_config
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, dense_parameters
from recis_hybrid.metrics import AUC, GAUC, MSE, LogLoss
from recis_hybrid.pipelines import (
    Evaluate,
    NonFiniteLossError,
    Objective,
    TorchStep,
    Train,
    Trainer,
    evaluate,
)
from recis_hybrid.pipelines.steps.model_outputs import aligned, main_output, own_loss
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.near import assert_near
from tests.support.small import bce

ROWS = 32
KINDS = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


class Model(nn.Module):
    """Logits ``[B, width]`` of an embedding, converted by ``shape``."""

    def __init__(self, width: int = 1, shape: Callable[[Tensor, Batch], Any] = lambda logits, batch: logits[:, 0]):
        super().__init__()
        torch.manual_seed(0)
        self.engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4)})
        self.tower = nn.Linear(4, width)
        self.shape = shape

    def forward(self, batch: Batch) -> Any:
        return self.shape(self.tower(self.engine(batch)["id"]), batch)


def column(logits: Tensor, batch: Batch) -> Tensor:
    return logits


def batch_of(labels: Tensor | None = None, **columns: Tensor) -> Batch:
    ids = torch.arange(ROWS) % 7
    return {"id": ids, "user": ids // 2, "label": ids % 2 if labels is None else labels, **columns}


def step_of(model: Model, loss: Any = bce, **options: Any) -> TorchStep:
    optimizers = [torch.optim.SGD(dense_parameters(model), lr=0.5), optim.SGD(model.engine.parameters(), lr=0.5)]
    return TorchStep(model, loss, optimizers, **options)


def losses(model: Model, batch: Batch, loss: Any = bce, **options: Any) -> list[float]:
    step = step_of(model, loss, **options)
    return [float(step(batch)["loss"]) for _ in range(3)]


def binary(dtype: torch.dtype, shape: tuple[int, ...] = (ROWS,)) -> Tensor:
    return ((torch.arange(ROWS) % 7) % 2).to(dtype).reshape(shape)


EXPECTED: list[float] = []


def expected() -> list[float]:
    """Return the losses for float32 labels and outputs [B], computed with torch only."""
    if not EXPECTED:
        model = Model()
        both = [torch.optim.SGD(dense_parameters(model), lr=0.5), optim.SGD(model.engine.parameters(), lr=0.5)]
        for _ in range(3):
            for optimizer in both:
                optimizer.zero_grad()
            loss = bce(model(batch_of()), binary(torch.float32))
            loss.backward()
            for optimizer in both:
                optimizer.step()
            EXPECTED.append(float(loss.detach()))
    return EXPECTED


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_training_and_evaluation_accept_binary_labels_of_any_dtype_and_shape(dtype: torch.dtype) -> None:
    reference = None
    for shape in ((ROWS,), (ROWS, 1)):
        for form in (lambda logits, batch: logits[:, 0], column):
            model, batch = Model(shape=form), batch_of(binary(dtype, shape))
            step = step_of(model, groups="user")
            trainer = Trainer(step, [batch], [batch], metrics={"auc": AUC(), "logloss": LogLoss(), "gauc": GAUC()})
            figures = trainer.fit([Train(epochs=2), Evaluate()])["eval"]
            reference = reference or figures
            assert figures == pytest.approx(reference)
            assert losses(Model(shape=form), batch) == pytest.approx(expected(), rel=1e-6)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_every_metric_accepts_labels_of_any_dtype(dtype: torch.dtype) -> None:
    scores, groups = torch.linspace(0.1, 0.9, ROWS), torch.arange(ROWS) % 3
    makers: list[Callable[[], Any]] = [
        AUC,
        every_metric.BinnedAUC,
        GAUC,
        LogLoss,
        every_metric.NormalizedEntropy,
        every_metric.Calibration,
        MSE,
        *(partial(getattr(every_metric, name), 2) for name in ("PrecisionAtK", "RecallAtK", "NDCGAtK", "HitRateAtK")),
    ]
    for make in makers:
        values = []
        for labels in (binary(torch.float32), binary(dtype)):
            metric = make()
            metric.update(scores, labels, *([groups] if metric.takes_groups else []))
            values.append(metric.compute())
        assert values[0] == pytest.approx(values[1])


def test_labels_and_outputs_are_not_broadcast() -> None:
    # This loss would broadcast [B, 1] and [B] to [B, B].
    shapes: list[tuple[torch.Size, torch.Size]] = []

    def custom_loss(outputs: Tensor, labels: Tensor) -> Tensor:
        shapes.append((outputs.shape, labels.shape))
        return (outputs - labels).square().mean()

    for form in (lambda logits, batch: logits[:, 0], column):
        for shape in ((ROWS,), (ROWS, 1)):
            step_of(Model(shape=form), custom_loss)(batch_of(binary(torch.int64, shape)))
    assert all(outputs == labels for outputs, labels in shapes)
    assert [len(outputs) for outputs, _ in shapes] == [1, 1, 2, 2]


def test_labels_get_the_shape_and_dtype_of_the_outputs() -> None:
    f32, i64 = torch.float32, torch.int64
    b, b1, bk = torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 2)
    for outputs, labels, shape, dtype in (
        (b, torch.zeros(3, dtype=i64), (3,), f32),
        (b, torch.zeros(3, 1, dtype=torch.bool), (3,), f32),
        (b1, torch.zeros(3, dtype=torch.float64), (3, 1), f32),
        (bk, torch.zeros(3, 2, dtype=torch.uint8), (3, 2), f32),
        (bk, torch.zeros(3, dtype=torch.int32), (3,), i64),
        (bk, torch.zeros(3, 1, dtype=torch.bool), (3,), i64),
        (bk, torch.zeros(3, dtype=torch.float64), (3,), f32),  # only a custom loss can use these
        (bk, torch.zeros(3, 1), (3, 1), f32),
        (b, torch.zeros(3, 2, dtype=i64), (3, 2), i64),
        (torch.zeros(3, 4, 5), torch.zeros(3, 4, dtype=torch.int32), (3, 4), i64),
        (torch.zeros(3, 3), torch.full((3,), 2**40 + 1), (3,), i64),  # classes beyond the precision of float32
        ((bk, b), torch.zeros(3, dtype=i64), (3,), i64),
        ({"a": b, "b": b}, torch.zeros(3, dtype=i64), (3,), f32),
        ({"logits": bk, "b": b}, torch.zeros(3, dtype=i64), (3,), i64),
    ):
        result = aligned(outputs, labels)
        assert (tuple(result.shape), result.dtype) == (shape, dtype), (outputs, labels)
    assert aligned(torch.zeros(3, 3), torch.full((3,), 2**40 + 1)).tolist() == [2**40 + 1] * 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1)])
def test_classes_stay_integers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    classes = (torch.arange(ROWS) % 7) % 3
    reference = F.cross_entropy(Model(3, column)(batch_of()), classes)
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(), partial(F.cross_entropy, label_smoothing=0.0)):
        values = losses(Model(3, column), batch_of(classes.to(dtype).reshape(shape)), loss)
        assert values[0] == pytest.approx(float(reference.detach()), rel=1e-6)
        assert values[2] < values[0]
    # A link computes the score of one class for metrics.
    objective = Objective(loss=lambda o, y: F.cross_entropy(o, y), link=lambda o: o.softmax(1)[:, 1])
    batch = batch_of(binary(dtype, shape))
    trainer = Trainer(step_of(Model(3, column), objective), [batch], [batch], metrics={"auc": AUC()})
    assert trainer.fit([Train(epochs=20), Evaluate()])["eval"]["auc"] == 1.0


def test_several_labels_per_row() -> None:
    labels = torch.stack([binary(torch.int64), 1 - binary(torch.int64)], 1)
    for dtype in (torch.int64, torch.bool, torch.float64):
        assert losses(Model(2, column), batch_of(labels.to(dtype)))[0] == pytest.approx(
            float(bce(Model(2, column)(batch_of()), labels.float()).detach()), rel=1e-6
        )
    # Metrics need one label per row. The error is raised in the first step, not in the first evaluation.
    trainer = Trainer(step_of(Model(2, column)), [batch_of(labels)], metrics={"auc": AUC()})
    message = r"the metric 'auc' cannot take scores \[32, 2\] and labels \[32, 2\]: .* one objective per column"
    with pytest.raises(ValueError, match=message):
        trainer.fit([Train()])
    assert trainer.steps_done == 0
    Trainer(step_of(Model(2, column)), [batch_of(labels)]).fit([Train()])


def test_unsuitable_labels_are_rejected() -> None:
    step = step_of(Model())
    step(batch_of())
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 0 to 2"):
        step(batch_of(torch.arange(ROWS) % 3))
    with pytest.raises(
        ValueError, match=r"the labels 'label' of binary_cross_entropy_with_logits .*got 0 to 2; map them"
    ):
        step_of(Model())(batch_of(torch.arange(ROWS) % 3))
    with pytest.raises(ValueError, match=r"the labels 'label' of BCEWithLogitsLoss must be in \[0, 1\], got -1 to 1"):
        step_of(Model(), nn.BCEWithLogitsLoss())(batch_of(binary(torch.int64) * 2 - 1))
    # torch would silently broadcast [B] and [B, B].
    square = Model(ROWS, column)
    with pytest.raises(ValueError, match=r"outputs \[32, 32\] and labels 'label' .* would be broadcast by mse_loss"):
        step_of(square, F.mse_loss)(batch_of(binary(torch.float32)))
    with pytest.raises(ValueError, match=r"outputs \[32, 3\] .*broadcast by MSELoss.*integers"):
        step_of(Model(3, column), nn.MSELoss())(batch_of(binary(torch.int64)))
    with pytest.raises(IndexError) as caught:
        step_of(Model(3, column), F.cross_entropy)(batch_of(torch.arange(ROWS) % 7))
    assert caught.value.__notes__ == [
        "TorchStep: arguments of the loss: outputs torch.float32 [32, 3]; labels 'label' torch.int64 [32]"
    ]
    with pytest.raises(
        ValueError, match=r"the loss of the labels 'label' must be a scalar, got shape \[32\]; take its"
    ):
        step_of(Model(), partial(bce, reduction="none"))(batch_of())
    with pytest.raises(TypeError, match="the loss must be a scalar tensor, got 0.5"):
        step_of(Model(), lambda outputs, labels: 0.5)(batch_of())


def test_evaluation_metrics_are_tried_on_the_first_batch_of_the_only_step() -> None:
    # With several steps, the trainer does not know which ones are evaluated. One without labels may never be.
    unlabelled = step_of(Model(), lambda outputs: outputs.square().mean(), label=None)
    steps = {"click": step_of(Model()), "other": unlabelled}
    trainer = Trainer(steps, [batch_of()], [batch_of()], metrics={"auc": AUC()})
    assert "auc" in trainer.fit([Train(step="other"), Train(step="click"), Evaluate(step="click")])["eval"]
    # Each trainer tries its own metrics and does not modify them.
    step, metric = step_of(Model(2, column), nn.BCEWithLogitsLoss()), AUC()
    both = batch_of(torch.stack([binary(torch.int64)] * 2, 1))
    Trainer(step, [both]).fit([Train()])
    with pytest.raises(ValueError, match="the metric 'auc' cannot take"):
        Trainer(step, [both], metrics={"auc": metric}).fit([Train()])
    Trainer(step_of(Model()), [batch_of()], metrics={"auc": metric}).fit([Train()])
    with pytest.raises(ValueError, match="nothing to compute"):
        metric.compute()


def test_invalid_label_columns_are_named() -> None:
    labels = binary(torch.float32)
    labels[3] = math.nan
    with pytest.raises(NonFiniteLossError, match=r"columns 'label' \(1 of 32 values\) of its batch are not finite"):
        Trainer(step_of(Model()), [batch_of(labels)]).fit([Train()])
    with pytest.raises(KeyError, match="the label column 'clicked' must be a dense column of the batch"):
        step_of(Model(), label="clicked")(batch_of())
    lists = RaggedTensor(torch.ones(ROWS, dtype=torch.int64), torch.arange(ROWS + 1))
    with pytest.raises(
        TypeError, match=r"'label' must be a dense column of numbers, got a torch.int64 RaggedTensor; read it as"
    ):
        step_of(Model())({**batch_of(), "label": lists})


@pytest.mark.jax
def test_labels_may_be_numpy_and_jax_arrays() -> None:
    import jax.numpy as jnp

    for make in (np.asarray, jnp.asarray):
        labels: Any = make(binary(torch.int32).numpy())
        assert losses(Model(), batch_of(labels)) == pytest.approx(expected(), rel=1e-6)


def test_scores_of_regression_losses_and_probabilities_are_the_outputs() -> None:
    batch = batch_of((torch.arange(ROWS) % 7) * 10)
    for loss in (F.mse_loss, nn.L1Loss(), partial(F.smooth_l1_loss, beta=2.0)):
        step = step_of(Model(), loss)
        error = (step.model.eval()(batch) - batch["label"]).square().mean()
        assert evaluate(step, [batch], {"mse": MSE()})["mse"] == pytest.approx(float(error.detach()), rel=1e-6)
    step = step_of(Model(shape=lambda logits, batch: logits[:, 0].sigmoid()), F.binary_cross_entropy)
    assert torch.equal(step.predict(batch_of())[""].scores, step.model(batch_of()))


class Named(NamedTuple):
    scores: Tensor
    hidden: Tensor


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """Like the outputs of transformers: a dataclass, and a dictionary of the fields that are not None."""

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        self.update({name: value for name, value in vars(self).items() if value is not None})


def with_loss(form: str) -> Callable[[Tensor, Batch], Any]:
    def returned(logits: Tensor, batch: Batch) -> Any:
        loss = bce(logits[:, 0], batch["label"].float())  # type: ignore[union-attr]
        forms: dict[str, Callable[[], Any]] = {
            "alone": lambda: loss,
            "tuple": lambda: (loss, logits),
            "dict": lambda: {"loss": loss, "logits": logits, "hidden": batch["id"]},
            "one more": lambda: {"loss": loss, "scores": logits[:, 0]},
            "object": lambda: Output(loss, logits),
            "hugging face": lambda: ModelOutput(loss, logits),
            "namespace": lambda: SimpleNamespace(loss=loss, logits=logits[:, 0]),
        }
        return forms[form]()

    return returned


@pytest.mark.parametrize("form", ["alone", "tuple", "dict", "one more", "object", "hugging face", "namespace"])
def test_models_that_return_their_own_loss(form: str) -> None:
    model, batch = Model(shape=with_loss(form)), batch_of()
    assert losses(model, batch, None) == pytest.approx(expected(), rel=1e-6)
    step = step_of(Model(shape=with_loss(form)), None)
    trainer = Trainer(step, [batch], [batch], metrics={"auc": AUC()})
    if form == "alone":
        with pytest.raises(TypeError, match="the model must return outputs to be evaluated, got only a loss"):
            trainer.fit([Train(), Evaluate()])
        Trainer(step, [batch]).fit([Train()])
    else:
        assert trainer.fit([Train(epochs=20), Evaluate()])["eval"]["auc"] == 1.0


def test_a_model_without_a_loss_is_rejected() -> None:
    for returned, got in (
        ({"logits": torch.zeros(3)}, r"a dict of \['logits'\]"),
        ({"loss": None, "logits": torch.zeros(3)}, r"a dict of \['loss', 'logits'\]"),
        ((), "a tuple of 0"),
        (SimpleNamespace(loss=None), "a SimpleNamespace"),
        ((0.5, torch.zeros(3)), "a tuple of 2 with 0.5 as the loss"),
    ):
        with pytest.raises(TypeError, match=f"must return its loss: loss, .*, got {got}"):
            own_loss(returned)
    with pytest.raises(ValueError, match=r"the loss must be a scalar, got shape \[32\]"):
        step_of(Model(), None)(batch_of())
    with pytest.raises(ValueError, match="the objective 'a' must have a loss, got None"):
        step_of(Model(), {"a": Objective(loss=None)})


def test_a_loss_receives_any_output_of_the_model() -> None:
    def pair(logits: Tensor, batch: Batch) -> Any:
        return logits[:, 0], logits.square().mean()

    def named(logits: Tensor, batch: Batch) -> Any:
        return {"logits": logits[:, 0], "hidden": logits}

    def one(logits: Tensor, batch: Batch) -> Any:
        return {"click": logits}

    def several(logits: Tensor, batch: Batch) -> Any:
        return Named(logits[:, 0], logits)

    def object_of(logits: Tensor, batch: Batch) -> Any:
        return Output(None, logits[:, 0])

    def hugging_face(logits: Tensor, batch: Batch) -> Any:
        return ModelOutput(logits=logits[:, 0])

    mask = torch.arange(ROWS) < 20
    for form, loss in (
        (pair, lambda outputs, labels: bce(outputs[0], labels)),
        (named, lambda outputs, labels: bce(outputs["logits"], labels)),
        (one, lambda outputs, labels: bce(outputs["click"], labels)),
        (several, lambda outputs, labels: bce(outputs.scores, labels)),
        (object_of, lambda outputs, labels: bce(outputs.logits, labels)),
        (hugging_face, lambda outputs, labels: bce(outputs.logits, labels)),
    ):
        batch = batch_of()
        assert losses(Model(shape=form), batch, loss) == pytest.approx(expected(), rel=1e-6)
        trainer = Trainer(step_of(Model(shape=form), loss), [batch], [batch], metrics={"auc": AUC()})
        assert trainer.fit([Train(epochs=20), Evaluate()])["eval"]["auc"] == 1.0
        # Padding rows do not count.
        padded, cut = {**batch, "mask": mask}, {name: values[:20] for name, values in batch.items()}
        first, second = (step_of(Model(shape=form), loss) for _ in range(2))
        assert_near(first(padded)["loss"], second(cut)["loss"])
        assert len(first.predict(padded)[""].scores) == 20
        # A loss receives float32 in lower precision too.
        assert losses(Model(shape=form), batch, loss, precision="bfloat16") == pytest.approx(expected(), rel=0.02)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        step_of(Model(shape=pair))(batch_of())
    assert "arguments of the loss: outputs a tuple of 2" in caught.value.__notes__[0]

    def ambiguous(logits: Tensor, batch: Batch) -> Any:
        return {"a": logits[:, 0], "b": logits[:, 0]}

    step = step_of(Model(shape=ambiguous), lambda o, y: bce(o["a"], y))
    trainer = Trainer(step, [batch_of()], metrics={"auc": AUC()})
    with pytest.raises(TypeError, match=r"metrics need one output, but the model returns a dict of \['a', 'b'\]; name"):
        trainer.fit([Train()])
    linked = Objective(loss=lambda o, y: bce(o["a"], y), link=lambda o: o["a"].sigmoid())
    trainer = Trainer(step_of(Model(shape=ambiguous), linked), [batch_of()], [batch_of()], metrics={"auc": AUC()})
    assert trainer.fit([Train(epochs=20), Evaluate()])["eval"]["auc"] == 1.0
    assert main_output([1, torch.ones(2)]) is not None


def test_a_step_without_labels() -> None:
    step = step_of(Model(), lambda outputs: outputs.square().mean(), label=None)
    batch = {"id": torch.arange(ROWS)}
    first, *_, last = (float(step(batch)["loss"]) for _ in range(5))
    assert last < first
    scored = step.predict(batch)[""]
    assert scored.labels is None
    assert scored.scores.shape == (ROWS,)
    with pytest.raises(ValueError, match=r"the metric 'auc' needs labels; set TorchStep\(label=\) to their column"):
        evaluate(step, [batch], {"auc": AUC()})  # type: ignore[list-item]
    trainer = Trainer(step_of(Model(), lambda outputs: outputs.mean(), label=None), [batch], metrics={"auc": AUC()})  # type: ignore[list-item]
    with pytest.raises(ValueError, match="the metric 'auc' needs labels"):
        trainer.fit([Train()])


def test_objectives_groups_and_masks_with_labels_of_different_dtypes() -> None:
    def heads(logits: Tensor, batch: Batch) -> Any:
        return {"click": logits[:, :1], "buy": logits[:, 1]}

    objectives = {
        "click": Objective(loss=bce, groups="group"),
        "buy": Objective(loss=nn.BCEWithLogitsLoss(), label="bought", groups="group"),
    }
    bought = (torch.arange(ROWS) % 7 > 2).reshape(ROWS, 1)
    group = (torch.arange(ROWS, dtype=torch.int32) % 3).reshape(ROWS, 1)
    mask = (torch.arange(ROWS) < 28).reshape(ROWS, 1)
    batch = batch_of(binary(torch.int32), bought=bought, group=group, mask=mask)
    cut: Batch = {name: values[:28] for name, values in batch.items() if name != "mask"}
    figures = []
    for data in (batch, cut):
        step = step_of(Model(2, heads), objectives, metrics={"auc": AUC()})
        trainer = Trainer(step, [data], [data], metrics={"auc": AUC(), "gauc": GAUC()})
        figures.append(trainer.fit([Train(epochs=3), Evaluate()])["eval"])
        assert set(figures[0]) == {"click.auc", "click.gauc", "buy.auc", "buy.gauc"}
    assert figures[0] == pytest.approx(figures[1])
    # A user's feature called mask is not a row mask.
    lists = {**batch, "mask": torch.ones(ROWS, 5, dtype=torch.bool)}
    assert float(step_of(Model(2, heads), objectives)(lists)["loss"]) > 0


def test_a_batch_of_one_row_that_the_model_squeezes() -> None:
    model = Model(shape=lambda logits, batch: logits.squeeze())
    one: Batch = {name: values[:1] for name, values in batch_of().items()}
    step = step_of(model)
    assert float(step(one)["loss"]) > 0
    assert step.predict(one)[""].scores.shape == (1,)


def test_labels_from_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,label\n" + "".join(f"{n % 7},{'true' if n % 7 % 2 else 'false'}\n" for n in range(ROWS)))
    data = ColumnDataset(path, ["id", "label"], ROWS)
    (batch,) = data
    assert batch["label"].dtype is torch.bool
    trainer = Trainer(step_of(Model()), data, data, metrics={"auc": AUC()})
    assert trainer.fit([Train(epochs=20), Evaluate()])["eval"]["auc"] == 1.0


@pytest.mark.parametrize("words", [("false", "true"), ("0", "1"), ("0.0", "1.0")])
def test_labels_in_a_configuration(tmp_path: Path, words: tuple[str, str]) -> None:
    rows = "".join(f"{n % 7},{words[n % 7 % 2]}\n" for n in range(ROWS))
    (tmp_path / "rows.csv").write_text("id,clicked\n" + rows)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{train: {tmp_path}/rows.csv, evaluate: {tmp_path}/rows.csv, label: clicked, batch_size: 16}}\n"
        f"features: {{id: {{dim: 4}}}}\noptimizer: {{sparse_lr: 0.1, dense_lr: 0.1}}\n"
        f"train: {{epochs: 5, metrics: [auc]}}\nrun: {tmp_path}/run\n"
    )
    loaded = load_config(config)
    assert trainer_of(loaded, quiet=True).fit(stages_of(loaded))["eval"]["auc"] == 1.0


def test_a_custom_step_may_return_labels_in_a_column() -> None:
    class CustomStep(TorchStep):
        def predict(self, batch: Batch) -> Any:
            scored = super().predict(batch)[""]
            return {"": SimpleNamespace(scores=scored.scores[:, None], labels=batch["label"], groups=batch["user"])}

    model = Model()
    step = CustomStep(model, bce, [])
    batch = batch_of(binary(torch.int64, (ROWS, 1)))
    reference = evaluate(TorchStep(model, bce, [], groups="user"), [batch], {"auc": AUC(), "gauc": GAUC()})
    assert evaluate(step, [batch], {"auc": AUC(), "gauc": GAUC()}) == reference


def test_an_accumulated_batch_without_rows_changes_nothing() -> None:
    batch: Batch = {"id": torch.arange(6), "label": torch.arange(6) % 2}
    empty: Batch = {name: column[:0] for name, column in batch.items()}  # type: ignore[misc]
    results = []
    for batches in ([batch, batch], [batch, empty, batch]):
        model = Model(shape=lambda logits, batch: (bce(logits[:, 0], batch["label"].float()), logits[:, 0]))  # type: ignore[union-attr]
        dense = torch.optim.SGD(dense_parameters(model), lr=0.5)
        step = TorchStep(model, None, [dense, optim.SGD(model.engine.parameters(), lr=0.5)])
        model.engine.register_forward_hook(lambda module, args, out, step=step: step.log("mean", out["id"].mean()))
        figures = step(*batches)
        tensors = [figures["loss"], figures["mean"], *(p.detach() for p in dense_parameters(model))]
        results.append([*tensors, step.score(batch)[""]])
    assert all(bool(value.isfinite().all()) for value in results[1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_step_without_rows_has_zero_loss_and_no_gradient() -> None:
    empty: Batch = {"id": torch.arange(0), "label": torch.zeros(0)}
    for with_own_loss in (True, False):
        model = Model(shape=with_loss("tuple")) if with_own_loss else Model()
        before = [parameter.detach().clone() for parameter in dense_parameters(model)]
        dense = torch.optim.SGD(dense_parameters(model), lr=0.5)
        optimizers = [dense, optim.SGD(model.engine.parameters(), lr=0.5)]
        step = TorchStep(model, None if with_own_loss else bce, optimizers)
        assert float(step(empty)["loss"]) == 0
        assert all(torch.equal(p, q) for p, q in zip(dense_parameters(model), before, strict=True))


def test_lists_of_numbers_are_accepted_as_columns_and_scalars_rejected() -> None:
    losses = []
    for ids, label in ((torch.arange(4), torch.tensor([0, 1, 1, 0])), ([0, 1, 2, 3], [0, 1, 1, 0])):
        model = Model()
        step = TorchStep(
            model, bce, [torch.optim.SGD(dense_parameters(model)), optim.SGD(model.engine.parameters(), lr=0.1)]
        )
        losses.append(float(step({"id": ids, "label": label})["loss"]))  # type: ignore[dict-item]
    assert losses[0] == losses[1]
    with pytest.raises(TypeError, match="'label' must have a value or a list for each row"):
        step({"id": torch.arange(4), "label": torch.tensor(1)})
    with pytest.raises(TypeError, match="'label' must hold real numbers, got torch.complex64"):
        step({"id": torch.arange(4), "label": torch.zeros(4, dtype=torch.complex64)})
