"""What the lines of the log say."""

from recis_hybrid.embedding import Unused
from recis_hybrid.pipelines import (
    Evict,
    Train,
    Trainer,
)
from tests.support.small import Records, make_batches, make_step


def test_eviction_and_admissions_are_counted() -> None:
    step, seen = make_step(), Records()
    first, second = make_batches(2), make_batches(2, seed=1)
    for batch in second:
        batch["id"] = batch["id"] + 100  # type: ignore[operator]
    trainer = Trainer(step, callbacks=[seen], log_every=2)
    trainer.fit([Train(data=first), Train(data=second), Evict(Unused(steps=2), compact=True), Train(data=second)])
    rows = [record["rows/id"] for record in seen.of("train")]
    assert rows == [20, 40, 20]
    assert [record["admitted"] for record in seen.of("train")] == [20, 20, 0]
    assert [record["evicted"] for record in seen.of("train")] == [0, 0, 20]
    assert seen.of("evict")[0]["evicted"] == 20
    (tables,) = seen.of("tables")
    assert tables["tables"]["id"]["rows"] == sum(tables["tables"]["id"]["frequency"]) == 20


def test_a_line_of_the_log() -> None:
    seen = Records()
    trainer = Trainer(
        make_step(clip_grad_norm=1.0), make_batches(5), callbacks=[seen], log_every=2, transform=lambda batch: batch
    )
    trainer.fit([Train()])
    lines = seen.of("train")
    assert [line["step"] for line in lines] == [2, 4, 5]
    expected = {
        "event", "step", "name", "loss", "grad_norm", "samples", "samples_per_s", "seconds", "time/data", "admitted",
        "evicted", "rows/id", "lr/dense", "lr/sparse", "memory/tables", "memory/process",
    }  # fmt: skip
    phases = {"time/features", "time/lookup", "time/towers", "time/update"}
    assert set(lines[0]) == expected | phases
    assert set(lines[2]) == expected  # the stage's end, which was not a step to be logged
    assert all(line["samples_per_s"] > 0 for line in lines)
