from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recis_hybrid.columnio import Window
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import (
    Callback,
    CallbackError,
    Evaluate,
    JsonLog,
    Mixture,
    NonFiniteLossError,
    PeriodicCheckpoint,
    SaveCheckpoint,
    Train,
    Trainer,
)
from recis_hybrid.ragged import Batch, RaggedTensor, batch_to
from recis_hybrid.saver import Saver
from tests.support.devices import on_devices
from tests.support.small import assert_same, make_batches, make_step, state_of


@on_devices
def test_a_non_finite_loss_names_the_step_and_the_columns(tmp_path: Path, device: str) -> None:
    batches = make_batches(6)
    batches[4]["label"] = torch.full((64,), math.nan)
    batches[4]["price"] = torch.tensor([1.0, math.inf, *[2.0] * 62])
    batches[4]["weights"] = RaggedTensor(torch.ones(64), torch.arange(65))
    batches = [batch_to(batch, device) for batch in batches]
    step, saver = make_step(device=device), Saver(tmp_path)
    trainer = Trainer(step, batches, saver=saver, callbacks=[PeriodicCheckpoint(steps=2)])
    message = (
        r"the loss is nan at step 5: .* columns 'label' \(64 of 64 values\), 'price' \(1 of 64 values\) of its batch "
        r"are not"
    )
    with pytest.raises(NonFiniteLossError, match=message) as caught:
        trainer.fit([Train(), SaveCheckpoint()])
    assert caught.value.__notes__ == ["the latest checkpoint is of step 4"]
    assert saver.steps() == [2, 4]


@on_devices
def test_a_nan_loss_of_a_finite_batch_is_distinguished(device: str) -> None:
    step = make_step(lambda logits, labels: logits.sum() * math.nan, device=device)
    trainer = Trainer(step, make_batches(1, device=device))
    with pytest.raises(NonFiniteLossError, match="at step 1: its batch is finite; lower the learning rate, or clip"):
        trainer.fit([Train()])


def test_infinite_stages_are_rejected() -> None:
    batches = make_batches(2)

    def stream() -> Iterator[Batch]:
        yield from batches

    for source, message in (
        (stream(), "generator has no length and may never end"),
        (itertools.cycle(batches), "cycle never ends"),
        (Mixture({"a": batches}, {"a": 1}), "Mixture never ends"),
    ):
        with pytest.raises(ValueError, match=rf"source {message}; set Train\(max_steps=\), or Train\(endless=True\)"):
            Trainer(make_step(), source).fit([Train()])
    with pytest.raises(ValueError, match="cycle never ends"):
        Trainer(make_step(), itertools.cycle(batches)).fit([Train(epochs=2)])
    trainer = Trainer(make_step(), stream())
    trainer.fit([Train(epochs=1)])
    assert trainer.steps_done == 2

    class StopAt7(Callback):
        def after_step(self, trainer: Trainer) -> None:
            if trainer.steps_done == 7:
                trainer.stop("it is enough")

    trainer = Trainer(make_step(), itertools.cycle(batches), batches, metrics={"auc": AUC()}, callbacks=[StopAt7()])
    trainer.fit([Train(endless=True), Evaluate()])
    assert (trainer.steps_done, trainer.stopped, trainer.figures) == (7, "it is enough", {})


def test_sources_without_batches_are_named() -> None:
    with pytest.raises(ValueError, match="the source list yielded no batch in pass 1"):
        Trainer(make_step(), []).fit([Train()])
    once = iter(make_batches(2))
    with pytest.raises(ValueError, match="yielded no batch in pass 2; use one that yields batches each time"):
        Trainer(make_step(), once).fit([Train(epochs=2)])
    with pytest.raises(ValueError, match="the data yielded no batch"):
        Trainer(make_step(), eval_data=[]).fit([Evaluate()])
    with pytest.raises(ValueError, match=r"Train: there is no source 'clicks', there are \['train'\]"):
        Trainer(make_step(), make_batches(1)).fit([Train(data="clicks")])
    with pytest.raises(ValueError, match=r"Train\(window=\) needs Trainer\(open_window=\)"):
        Trainer(make_step()).fit([Train(window=Window("a", ["a"]))])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Train(max_steps=0), "Train: max_steps must be at least 1, got 0"),
        (lambda: Train(epochs=-1), "Train: epochs must be at least 1, got -1"),
        (lambda: Trainer(make_step(), accumulate=0), "accumulate must be at least 1, got 0"),
        (lambda: Trainer(make_step()).fit([Train(step="x")]), "there is no source 'train'|there is no step 'x'"),
        (lambda: PeriodicCheckpoint(), "pass either steps or seconds, got steps=None, seconds=None"),
    ],
)
def test_arguments_out_of_range(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


HOOKS = [
    "before_fit",
    "before_stage",
    "before_step",
    "before_backward",
    "after_backward",
    "after_step",
    "on_log",
    "after_stage",
    "before_save",
    "after_save",
    "after_fit",
]


def broken_callback(hook: str, at: int) -> Callback:
    def fail(self: Callback, trainer: Trainer, *args: Any) -> None:
        if trainer.steps_done >= at:
            raise OSError("disk is gone")

    return type("Broken", (Callback,), {hook: fail})()  # type: ignore[no-any-return]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_raising_callback_is_named_and_the_state_saved(tmp_path: Path, hook: str) -> None:
    def run(callback: Callback | None, **options: Any) -> Trainer:
        step = make_step()
        callbacks = [JsonLog(tmp_path / f"{callback is None}.jsonl"), *([] if callback is None else [callback])]
        trainer = Trainer(step, make_batches(6), saver=Saver(tmp_path / hook), callbacks=callbacks, log_every=2, seed=1)
        try:
            trainer.fit([Train(), SaveCheckpoint(), Train()], **options)
        finally:
            trainer.saver = None
        return trainer

    message = rf"callback Broken raised in {hook} at step \d+: OSError: disk is gone; the state of step \d+ is saved"
    with pytest.raises(CallbackError, match=message) as caught:
        run(broken_callback(hook, 0 if hook == "before_fit" else 3))
    assert isinstance(caught.value.__cause__, OSError)
    resumed = run(None, resume="latest")
    step = make_step()
    Trainer(step, make_batches(6), seed=1).fit([Train(), Train()])
    assert resumed.steps_done == 12
    assert_same(state_of(step), state_of(resumed.steps[""]))  # type: ignore[arg-type]


def test_the_error_of_a_callback_says_that_there_is_no_saver() -> None:
    with pytest.raises(CallbackError, match="there is no saver, so nothing was saved"):
        Trainer(make_step(), make_batches(2), callbacks=[broken_callback("after_step", 1)]).fit([Train()])
