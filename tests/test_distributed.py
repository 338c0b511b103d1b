"""Programs written for one process, under a launcher: they train correctly, or are refused consistently."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from recis_hybrid import distributed
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.pipelines import Trainer
from tests.support.programs import Program, on_two_ranks


def build_engine(folder: Path) -> object:
    return EmbeddingEngine({"id": EmbeddingConfig(dim=4)})


def open_dataset(folder: Path) -> object:
    pq.write_table(pa.table({"id": [1, 2]}), folder / "rows.parquet")
    return ColumnDataset(folder / "rows.parquet", ["id"], 1)


def make_trainer(folder: Path) -> object:
    return Trainer({})


WHO: dict[str, Callable[[Path], object]] = {
    "EmbeddingEngine": build_engine,
    "ColumnDataset": open_dataset,
    "Trainer": make_trainer,
}


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize(
    ("environment", "available", "error", "said"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            True,
            RuntimeError,
            r"process 0 of 2.* MASTER_ADDR and MASTER_PORT must be set; start the ranks with torchrun, or call "
            r"torch.distributed.init_process_group",
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, True, RuntimeError, "missing: MASTER_PORT must be"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, False, RuntimeError, "this build of torch has no torch.distributed"),
        ({"RANK": "2"}, True, ValueError, "must be integers, .*, got RANK=2 and WORLD_SIZE=None"),
        ({"WORLD_SIZE": "2"}, True, ValueError, "must be integers, .*, got RANK=None and WORLD_SIZE=2"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, True, ValueError, "RANK from 0 to WORLD_SIZE - 1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, True, ValueError, "WORLD_SIZE=two"),
    ],
)
def test_invalid_launcher_variables_are_refused_consistently(
    who: str,
    environment: dict[str, str],
    available: bool,
    error: type[Exception],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not available:
        monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(error, match=f"^{who}: .*{said}"):
        WHO[who](tmp_path)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_a_single_process_initializes_nothing(
    who: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    WHO[who](tmp_path)
    assert (distributed.is_initialized(), distributed.rank(), distributed.world_size()) == (False, 0, 1)


def page(root: Path) -> str:
    """Return the README's page of code."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (root / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return code  # type: ignore[no-any-return]


# Appended to the code: each rank prints its figures and a digest of its weights.
REPORT = """
from hashlib import sha256
from recis_hybrid.distributed import rank
tensors = {**{n: p for n, p in model.named_parameters() if n.split(".")[0] != "engine"}, **dict(model.named_buffers())}
digest = sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors.values())).hexdigest()
rows = sum(len(table) for table in model.engine.tables)
auc = trainer.figures["eval"]["auc"]
print("REPORT", rank(), trainer.steps_done, trainer.samples, rows, digest, auc, flush=True)
"""


@pytest.mark.jax
def test_the_code_in_the_readme_runs_on_two_ranks_unchanged(tmp_path: Path, root: Path) -> None:
    draw, batch = np.random.default_rng(0), 64
    written = {"train": 7 * batch + 1, "test": 3 * batch + 1}  # uneven: 8 batches and 4, the last ones of one row
    for split, rows in written.items():
        (tmp_path / "clicks" / split).mkdir(parents=True)
        users, sites = draw.integers(0, 40, rows), draw.integers(0, 5, rows)
        columns = {
            "user": users,
            "site": [f"site{n}" for n in sites],
            "age": draw.uniform(10, 80, rows).astype(np.float32),
            "label": (users % 2).astype(np.float32),
        }
        pq.write_table(pa.table(columns), tmp_path / "clicks" / split / "part.parquet")
    code = page(root)
    assert "4096" in code
    program = f"import os\nos.chdir({str(tmp_path)!r})\n" + code.replace("4096", str(batch)) + REPORT
    (tmp_path / "alone.py").write_text(program.replace('"checkpoints"', '"alone"'))
    started = Program(tmp_path / "alone.py", folder=tmp_path, path=[root])
    together, alone = on_two_ranks(program, tmp_path), started.finish()
    assert (alone.returncode, together.returncode) == (0, 0), alone.stderr + together.stderr

    def reports(output: str) -> list[list[Any]]:
        return sorted(line.split()[1:] for line in output.splitlines() if line.startswith("REPORT"))

    ((_, steps, samples, rows_alone, _, _),) = reports(alone.stdout)
    assert (int(steps), int(samples)) == (2 * 8, 2 * written["train"])
    first, second = reports(together.stdout)
    # Each row is trained on once per epoch, tables hold each id once, and towers and figures are equal on both ranks.
    assert [int(each[1]) for each in (first, second)] == [2 * 4] * 2
    assert int(first[2]) + int(second[2]) == 2 * written["train"]
    assert int(first[3]) + int(second[3]) == int(rows_alone)
    assert first[4:] == second[4:]
    assert float(first[5]) > 0.5


REFUSED = """
import os, sys, warnings
import torch
from recis_hybrid import distributed, optim
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine

def say(what, error):
    print(f"SAID {distributed.rank()} {what}: {type(error).__name__}: {error}\\n", flush=True)

def training():
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, optimizer=optim.SGD)
    return engine, optim.SGD(engine.parameters(), lr=1.0)

def step(engine, optimizer):
    engine({"id": torch.tensor([1, 2])})["id"].sum().backward()
    optimizer.step()

# Built before torch.distributed is initialized, without the launcher's variables.
size = os.environ.pop("WORLD_SIZE")
own_rank = os.environ.pop("RANK")
early, early_data = training(), ColumnDataset(sys.argv[0].replace("program.py", "rows.parquet"), ["id"], 4)
os.environ |= {"WORLD_SIZE": size, "RANK": own_rank}
loop = training()  # joins
for name, (engine, optimizer) in {"loop": loop, "early": early}.items():
    try:
        if name == "early":
            distributed.mark_gradients_averaged()
        step(engine, optimizer)
    except RuntimeError as error:
        say(name, error)
    if name == "loop":
        data = ColumnDataset(sys.argv[0].replace("program.py", "rows.parquet"), ["id"], 4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            next(iter(data))
            assert not caught
            rows = [row for batch in data for row in batch["id"].tolist()]
        say("data", caught[0].message)
        print("SAID rows", len(rows), flush=True)
try:
    iter(early_data)
except RuntimeError as error:
    say("early data", error)
"""


def test_a_loop_written_for_one_process_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": range(11)}), tmp_path / "rows.parquet")
    done = on_two_ranks(REFUSED, tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        for said in (
            "loop: RuntimeError: SGD: 2 processes were started together, but this loop does not average the gradients",
            "early: RuntimeError: SGD: the table id was built before torch.distributed was initialized",
            f"data: RuntimeWarning: ColumnDataset: rank {rank} of 2 read its share of the rows",
            f"early data: RuntimeError: ColumnDataset: opened as rank 0 of 1, before torch.distributed was "
            f"initialized, but this is rank {rank} of 2",
        ):
            assert f"SAID {rank} {said}" in done.stdout, done.stdout
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("SAID rows")) == [
        "SAID rows 5",
        "SAID rows 6",
    ]


TOGETHER = """
import torch
import torch.distributed as dist
from recis_hybrid import distributed

distributed.join("program")
rank = distributed.rank()
own = dist.new_group([1], backend="gloo")
assert distributed.exchange({"rank": rank, "text": "\u00e9" * (3 * rank)}) == [
    {"rank": 0, "text": ""},
    {"rank": 1, "text": "\u00e9\u00e9\u00e9"},
]
values = torch.tensor([1.0, rank])
assert distributed.sum_over_ranks(values).tolist() == [2.0, 1.0]
assert values.tolist() == [1.0, rank]
assert distributed.all_succeed_or_raise(None, rank) == [0, 1]
if rank == 1:
    assert (distributed.rank(own), distributed.world_size(own)) == (0, 1)
    assert distributed.all_succeed_or_raise(None, "alone", own) == ["alone"]
try:
    distributed.all_succeed_or_raise(KeyError("lost") if rank == 0 else None)
except (KeyError, distributed.OtherRankError) as error:
    print("RAISED", rank, repr(error), getattr(error, "rank", None), getattr(error, "kind", None), flush=True)
"""


def test_ranks_exchange_values_and_fail_together(tmp_path: Path) -> None:
    done = on_two_ranks(TOGETHER, tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("RAISED")) == [
        "RAISED 0 KeyError('lost') None None",
        "RAISED 1 OtherRankError(\"rank 0 of 2 failed: 'lost'\") 0 KeyError",
    ]


def test_a_single_process_represents_all_ranks() -> None:
    assert distributed.exchange(float("inf")) == [float("inf")]
    assert distributed.all_succeed_or_raise(None, 3) == [3]
    with pytest.raises(OSError, match="disk is full"):
        distributed.all_succeed_or_raise(OSError("disk is full"))
