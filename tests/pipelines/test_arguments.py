"""Arguments of the wrong type or out of range raise errors that name them and the rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

from recis_hybrid import optim
from recis_hybrid.columnio import Windows
from recis_hybrid.embedding import Unused, dense_parameters
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import (
    EarlyStop,
    Evaluate,
    Evict,
    JsonLog,
    LrSchedule,
    Mixture,
    Objective,
    PeriodicCheckpoint,
    PlateauSchedule,
    Profile,
    ProgressBar,
    SaveCheckpoint,
    TensorBoard,
    TorchStep,
    Train,
    Trainer,
    UncertaintyWeights,
    WindowStages,
    evaluate,
    seed_everything,
)
from recis_hybrid.saver import Saver
from tests.support.small import Model, Records, bce, make_batches, make_step

STEP, BATCHES = make_step(), make_batches(1)
MODEL: Any = STEP.model
DENSE, SPARSE = STEP.optimizers["dense"], STEP.optimizers["sparse"]
BOTH = [DENSE, SPARSE]
PLATEAU = ReduceLROnPlateau(DENSE)
OF_ANOTHER = torch.optim.SGD(dense_parameters(Model()), lr=0.1)

STEPS: list[tuple[Any, str]] = [
    (lambda: TorchStep(Model, bce, BOTH), "TorchStep: model must be a torch.nn.Module, .* got the class Model"),
    (lambda: TorchStep(MODEL, bce, DENSE), "optimizers must be a sequence or a mapping .* got an Adam; put it into a"),
    (lambda: TorchStep(MODEL, bce, SPARSE), "optimizers must be .* got an Adam; put it into a list"),
    (lambda: TorchStep(MODEL, DENSE, bce), "loss must be a function .* got an Adam"),
    (lambda: TorchStep(MODEL, BOTH, bce), "loss must be a function .* got a list"),
    (lambda: TorchStep(bce, MODEL, BOTH), "model must be a torch.nn.Module, .* got a function"),
    (
        lambda: TorchStep(nn.BCEWithLogitsLoss(), MODEL, BOTH),
        "model must not be a loss, got a BCEWithLogitsLoss; write TorchStep",
    ),
    (
        lambda: TorchStep(MODEL, nn.BCEWithLogitsLoss, BOTH),
        "loss must be .* got the class BCEWithLogitsLoss .an instanc",
    ),
    (lambda: TorchStep(MODEL, "bce", BOTH), "loss must be a function .* got 'bce'"),
    (lambda: TorchStep(MODEL, bce, [torch.optim.Adam, SPARSE]), "'optimizer0' must be an optimizer .* the class Adam"),
    (lambda: TorchStep(MODEL, bce, [DENSE, MODEL.engine]), "'optimizer1' must be an optimizer .* an EmbeddingEngine"),
    (lambda: TorchStep(MODEL, bce, {"dense": DENSE, "sparse": None}), "'sparse' must be an optimizer of .* got None"),
    (lambda: TorchStep(MODEL, bce, None), "optimizers must be a sequence or a mapping .* got None"),
    (lambda: TorchStep(MODEL, {"a": bce}, BOTH), r"loss\['a'\] must be an Objective, got a function"),
    (lambda: TorchStep(MODEL, [Objective(loss=bce)], BOTH), "an Objective, objectives by name, .* got a list"),
    (lambda: TorchStep(MODEL, bce, BOTH, label=["a"]), "label must be the name of a column, or None, got a list"),
    (lambda: TorchStep(MODEL, bce, BOTH, groups=3), "groups must be the name of a column, or None, got 3"),
    (lambda: TorchStep(MODEL, bce, BOTH, clip_grad_norm="1"), "clip_grad_norm must be a number, got '1'"),
    (lambda: TorchStep(MODEL, bce, BOTH, clip_grad_norm=True), "clip_grad_norm must be a number, got True"),
    (
        lambda: TorchStep(MODEL, bce, BOTH, schedules=ExponentialLR(DENSE, 0.9)),
        "schedules must be .* put it into a list",
    ),
    (
        lambda: TorchStep(MODEL, bce, BOTH, schedules=[lambda n: 0.1]),
        r"schedules\[0\] must be .* LrSchedule\(optimizer,",
    ),
    (
        lambda: TorchStep(MODEL, bce, BOTH, schedules=[ExponentialLR]),
        r"schedules\[0\] must be .* the class Exponential",
    ),
    (lambda: TorchStep(MODEL, bce, BOTH, schedules=[DENSE]), r"schedules\[0\] must be a torch schedule .* got an Adam"),
    (lambda: TorchStep(MODEL, bce, BOTH, weighting=["a"]), "weighting must be UncertaintyWeights .* got a list"),
    (
        lambda: TorchStep(MODEL, bce, BOTH, compile=MODEL.tower),
        "compile must be a sequence of modules, .* a Sequential",
    ),
    (lambda: TorchStep(MODEL, bce, BOTH, compile=True), "compile must be a sequence of modules, .* got True"),
    (lambda: TorchStep(MODEL, bce, BOTH, freeze=MODEL.tower), "freeze must be a sequence of modules and .* Sequential"),
    (lambda: TorchStep(MODEL, bce, BOTH, loss_scale="x"), "loss_scale must be a number, got 'x'"),
    (lambda: STEP("rows"), "TorchStep: a batch must be a dict of columns by name, got 'rows'"),
    (lambda: Objective(loss="bce"), "Objective: loss must be a function .* got 'bce'"),
    (lambda: Objective(loss=nn.BCEWithLogitsLoss), "Objective: loss must be .* got the class BCEWithLogitsLoss"),
    (lambda: Objective(loss=bce, label=1), "Objective: label must be the name of a column, or None, got 1"),
    (
        lambda: Objective(loss=bce, link="sigmoid"),
        "Objective: link must be a function of the outputs, .* got 'sigmoid'",
    ),
    (lambda: Objective(loss=bce, weight="1"), "Objective: weight must be a number, got '1'"),
    (lambda: UncertaintyWeights("click"), "UncertaintyWeights: names must be a sequence of names, got 'click'"),
    (lambda: LrSchedule(lambda n: 0.1, DENSE), "LrSchedule: optimizer must be an optimizer, got a function"),
    (lambda: LrSchedule(torch.optim.Adam, lambda n: 0.1), "LrSchedule: optimizer must be .* got the class Adam"),
    (lambda: LrSchedule(DENSE, 0.1), "LrSchedule: rate must be a function from completed updates .* got 0.1"),
]
TRAINERS: list[tuple[Any, str]] = [
    (
        lambda: Trainer(MODEL, BATCHES),
        r"Trainer: step must be a step, .* got a Model; wrap it: TorchStep\(model",
    ),
    (lambda: Trainer(TorchStep, BATCHES), "Trainer: step must be a step, .* got the class TorchStep"),
    (lambda: Trainer({"a": STEP, "b": MODEL}, BATCHES), "Trainer: the step 'b' must be a step, .* got a Model"),
    (
        lambda: Trainer(STEP, "rows.parquet"),
        "train_data must be a source of batches, .* the path 'rows.parquet'; read it",
    ),
    (lambda: Trainer(STEP, BATCHES[0]), "train_data must be a source .* got a dict; put a single batch into a list"),
    (lambda: Trainer(STEP, BATCHES, 3), "eval_data must be a source of batches, .* got 3"),
    (
        lambda: Trainer(STEP, sources={"ads": Path("a")}),
        "the source 'ads' must be a source of batches, .* the path 'a'",
    ),
    (lambda: Trainer(STEP, BATCHES, sources=[BATCHES]), "Trainer: sources must be a mapping by name, .* got a list"),
    (lambda: Trainer(STEP, BATCHES, parts=[MODEL]), "Trainer: parts must be a mapping by name, .* got a list"),
    (
        lambda: Trainer(STEP, BATCHES, metrics=AUC()),
        r"metrics must be a mapping .*\{'auc': AUC\(\)\}.* an AUC; name it",
    ),
    (
        lambda: Trainer(STEP, BATCHES, metrics=[AUC()]),
        "Trainer: metrics must be a mapping of metrics by name, .* a list",
    ),
    (lambda: Trainer(STEP, BATCHES, metrics={"auc": AUC}), "the metric 'auc' must be a metric, .* got the class AUC"),
    (lambda: Trainer(STEP, BATCHES, saver="run"), r"saver must be a Saver, such as Saver\('run'\), .* got 'run'"),
    (lambda: Trainer(STEP, BATCHES, saver=Saver), "Trainer: saver must be a Saver, .* got the class Saver"),
    (
        lambda: Trainer(STEP, BATCHES, callbacks=ProgressBar()),
        "callbacks must be a sequence .* ProgressBar; put it into",
    ),
    (
        lambda: Trainer(STEP, BATCHES, callbacks=[ProgressBar]),
        r"callbacks\[0\] must be a Callback, .* the class Progress",
    ),
    (lambda: Trainer(STEP, BATCHES, callbacks=[print]), r"callbacks\[0\] must be a Callback, .* got a builtin_func"),
    (lambda: Trainer(STEP, BATCHES, accumulate=2.0), "Trainer: accumulate must be an integer, got 2.0"),
    (lambda: Trainer(STEP, BATCHES, log_every="5"), "Trainer: log_every must be an integer, got '5'"),
    (lambda: Trainer(STEP, BATCHES, prefetch=True), "Trainer: prefetch must be an integer, got True"),
    (lambda: Trainer(STEP, BATCHES, seed="a"), "Trainer: seed must be an integer, got 'a'"),
    (lambda: Trainer(STEP, BATCHES, transform=[dict]), "Trainer: transform must be a function, or None, got a list"),
    (lambda: Trainer(STEP, BATCHES, open_window="x"), "Trainer: open_window must be a function, or None, got 'x'"),
    (
        lambda: Trainer(STEP, BATCHES).fit(Train()),
        r"fit: stages must be a sequence of stages, .* a Train; put it into a",
    ),
    (lambda: Trainer(STEP, BATCHES).fit([Train]), r"fit: stages\[0\] must be a stage, .* got the class Train"),
    (lambda: Trainer(STEP, BATCHES).fit([Train(), MODEL]), r"fit: stages\[1\] must be a stage, .* got a Model"),
    (lambda: Trainer(STEP, BATCHES).fit("train"), "fit: stages must be a sequence of stages, .* got 'train'"),
    (lambda: Trainer(STEP, BATCHES).fit([Train()], resume=True), 'resume must be "latest", the step of .* got True'),
    (lambda: Trainer(STEP, BATCHES).fit([Train()], resume="last"), "resume must be \"latest\", .* got 'last'"),
    (lambda: Trainer(STEP, [BATCHES]).fit([Train()]), "a batch must be a dict of columns by name, got a list"),
]
OTHERS: list[tuple[Any, str]] = [
    (lambda: Train(max_steps="3"), "Train: max_steps must be an integer, got '3'"),
    (lambda: Train(epochs=2.5), "Train: epochs must be an integer, got 2.5"),
    (lambda: Train(freeze=MODEL.tower), "Train: freeze must be a sequence of modules and .* got a Sequential"),
    (lambda: Train(unfreeze=MODEL.tower[2].weight), "Train: unfreeze must be a sequence of .* got a Parameter"),
    (lambda: Train(freeze=["tower"]), r"Train: freeze\[0\] must be a torch.nn.Module or .*Parameter, got 'tower'"),
    (lambda: Train(transform="x"), "Train: transform must be a function of a batch, or None, got 'x'"),
    (lambda: Train(step=STEP), "Train: step must be the name of one of Trainer's steps, or None, got a TorchStep"),
    (lambda: Train(window="a"), "Train: window must be a Window, or None, got 'a'"),
    (lambda: Train(data=BATCHES[0]), "Train: data must be a source of batches, .* got a dict"),
    (lambda: Evaluate(metrics=AUC()), "Evaluate: metrics must be a mapping of metrics by name, .* got an AUC; name it"),
    (lambda: Evaluate(step=STEP), "Evaluate: step must be the name of one of Trainer's steps, or None, got a Torch"),
    (lambda: Evaluate(data=Path("a")), "Evaluate: data must be a source of batches, .* got the path 'a'"),
    (
        lambda: Evict(3),
        r"rule must be a function of rows or have a method unwanted\(rows\), e.g. Unused\(steps=1000\), got 3",
    ),
    (lambda: Evict({"item": 3}), "Evict: rule of the table 'item' must be a function of rows .* got 3"),
    (lambda: Evict(Unused), "Evict: rule must be a function of rows .* got <class"),
    (
        lambda: SaveCheckpoint(Saver),
        "SaveCheckpoint: name must be a name; Trainer.* decides what is saved and where, got the class",
    ),
    (lambda: PeriodicCheckpoint(steps="3"), "PeriodicCheckpoint: steps must be an integer, got '3'"),
    (lambda: PeriodicCheckpoint(steps=2.5), "PeriodicCheckpoint: steps must be an integer, got 2.5"),
    (lambda: PeriodicCheckpoint(seconds="5"), "PeriodicCheckpoint: seconds must be a number, got '5'"),
    (lambda: EarlyStop(AUC()), "EarlyStop: metric must be STAGE/METRIC, such as 'eval/auc', got an AUC"),
    (lambda: EarlyStop("eval/auc", patience=1.5), "EarlyStop: patience must be an integer, got 1.5"),
    (lambda: EarlyStop("eval/auc", min_delta="x"), "EarlyStop: min_delta must be a number, got 'x'"),
    (
        lambda: PlateauSchedule("eval/auc", PLATEAU),
        "schedules must be a sequence of .* ReduceLROnPlateau; put it into a",
    ),
    (
        lambda: PlateauSchedule("eval/auc", [ExponentialLR(DENSE, 0.9)]),
        r"schedules\[0\] must be a .*ReduceLROnPlateau \(pass others",
    ),
    (lambda: PlateauSchedule(PLATEAU, "eval/auc"), "PlateauSchedule: metric must be STAGE/METRIC, .* got a ReduceLROn"),
    (lambda: JsonLog(None), "JsonLog: path must be a path, got None"),
    (lambda: TensorBoard(3), "TensorBoard: path must be a path, got 3"),
    (lambda: Profile(3), "Profile: path must be a path, got 3"),
    (lambda: Profile("x", first="a"), "Profile: first must be an integer, got 'a'"),
    (lambda: Mixture([BATCHES], {"a": 1}), "Mixture: sources must be a mapping by name, .* got a list"),
    (lambda: Mixture({"a": BATCHES}, [1]), "Mixture: proportions must be a mapping by name, .* got a list"),
    (lambda: Mixture({"a": BATCHES}, {"a": "1"}), "Mixture: the proportion of 'a' must be a number, got '1'"),
    (
        lambda: Mixture({"a": "rows"}, {"a": 1}),
        "Mixture: the source 'a' must be a source of batches, .* the path 'rows'",
    ),
    (lambda: WindowStages(["a"], lambda day: []), "WindowStages: windows must be Windows, .* got a list"),
    (
        lambda: WindowStages(Windows([["a"]]), [Train()]),
        "stages must be a function from a window to its stages, got a l",
    ),
    (lambda: seed_everything("3"), "seed_everything: seed must be an integer, got '3'"),
    (lambda: evaluate(MODEL, BATCHES, {"auc": AUC()}), "evaluate: step must be a step, .* got a Model; wrap it"),
    (lambda: evaluate(STEP, "rows", {"auc": AUC()}), "evaluate: data must be a source of batches, .* the path 'rows'"),
    (lambda: evaluate(STEP, BATCHES[0], {"auc": AUC()}), "evaluate: data must be a source of batches, .* got a dict"),
    (
        lambda: evaluate(STEP, [BATCHES], {"auc": AUC()}),
        "evaluate: a batch must be a dict of columns by name, got a list",
    ),
    (lambda: evaluate(STEP, BATCHES, AUC()), "evaluate: metrics must be a mapping of metrics by name, .* got an AUC"),
    (lambda: evaluate(STEP, BATCHES, {}, transforms=dict), "evaluate: transforms must be a sequence of functions"),
]


@pytest.mark.parametrize(("call", "message"), [*STEPS, *TRAINERS, *OTHERS])
def test_an_argument_of_the_wrong_type_is_named(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TorchStep(MODEL, {}, BOTH), "loss must have at least one objective, got an empty mapping"),
        (
            lambda: TorchStep(MODEL, bce, BOTH, label=""),
            "label must be the name of a column, or None, got an empty name",
        ),
        (lambda: TorchStep(MODEL, bce, BOTH, clip_grad_norm=-1.0), "clip_grad_norm must be above 0, got -1.0"),
        (
            lambda: TorchStep(MODEL, bce, BOTH, precision=torch.float16),
            "precision must be one of .*, got torch.float16",
        ),
        (
            lambda: TorchStep(MODEL, bce, BOTH, schedules=[PLATEAU]),
            r"ReduceLROnPlateau needs a metric.*PlateauSchedule\('eval/auc', ",
        ),
        (
            lambda: TorchStep(MODEL, bce, BOTH, schedules=[ExponentialLR(OF_ANOTHER, 0.9)]),
            r"schedules\[0\] must schedule an optimizer of this step",
        ),
        (lambda: UncertaintyWeights(["a", "a"]), "names must be at least one distinct name, got"),
        (lambda: Trainer(STEP, BATCHES, seed=-1), "Trainer: seed must be at least 0, got -1"),
        (lambda: seed_everything(-1), "seed_everything: seed must be at least 0, got -1"),
        (lambda: PeriodicCheckpoint(steps=0), "PeriodicCheckpoint: steps must be at least 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_generators_are_accepted_as_sequences() -> None:
    records = Records()
    trainer = Trainer(make_step(), make_batches(2), callbacks=(each for each in [records]))  # type: ignore[arg-type]
    trainer.fit([Train(freeze=(module for module in [MODEL.tower]))])  # type: ignore[arg-type]
    assert len(records.of("train")) == 1
    model = Model()
    both = (each for each in [torch.optim.Adam(dense_parameters(model)), optim.Adam(model.engine.parameters())])
    assert len(TorchStep(model, bce, both).optimizers) == 2  # type: ignore[arg-type]


@pytest.mark.jax
def test_an_optax_transformation_must_be_wrapped() -> None:
    import optax

    from recis_hybrid.bridge import OptaxOptimizer

    for wrong in (optax.adam(1e-3), [optax.adam(1e-3), SPARSE], {"dense": optax.adam(1e-3)}):
        with pytest.raises(TypeError, match="got an optax transformation; wrap it in recis_hybrid.bridge.OptaxOptimiz"):
            TorchStep(MODEL, bce, wrong)
    model = Model()
    dense = OptaxOptimizer(model.tower.named_parameters(), optax.adam(1e-2))
    step = TorchStep(model, bce, [dense, optim.Adam(model.engine.parameters())])
    Trainer(step, make_batches(4), log_every=1).fit([Train()])  # the log omits its learning rate
    with pytest.raises(ValueError, match="OptaxOptimizer has no learning rate; pass the schedule to the optax transf"):
        LrSchedule(dense, lambda n: 0.1)
