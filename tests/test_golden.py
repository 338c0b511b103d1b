"""Checkpoints, exports and configurations of earlier versions load exactly with the current code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recis_hybrid import optim, serving
from recis_hybrid.app.cli import main
from recis_hybrid.app.config import load_config
from recis_hybrid.app.loaded_run import load_run
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, Normal
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.saver import Saver

GOLDEN = Path(__file__).parent / "golden"
COLUMNS = ["user", "item", "site"]
STEPS = (3, 6)


@pytest.fixture(scope="module")
def expected() -> Any:
    return json.loads((GOLDEN / "expected.json").read_text())


class Run:
    """The objects of ``golden/write_golden.py.txt``, built by the current code."""

    def __init__(self, *, coalesce: bool = True) -> None:
        torch.manual_seed(99)
        configs = {
            "user": EmbeddingConfig(dim=4, initializer=Normal(0.0, 0.1), admission=MinFrequency(2)),
            "item": EmbeddingConfig(dim=4, initializer=Normal(0.0, 0.1), admission=MinFrequency(2)),
            "site": EmbeddingConfig(dim=8, dtype=torch.bfloat16, optimizer_overrides={"lr": 0.05}),
        }
        self.engine = EmbeddingEngine(configs, optimizer=optim.Adam, seed=11, coalesce=coalesce)
        self.sparse = optim.Adam(self.engine.parameters(), lr=0.7)
        self.tower = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        self.dense = torch.optim.AdamW(self.tower.parameters(), lr=0.7)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.dense, [2, 4])
        self.generator = torch.Generator()
        self.reader = ColumnDataset(GOLDEN / "data", COLUMNS, 16, shuffle=True, seed=3)

    def parts(self) -> dict[str, Any]:
        names = ("engine", "sparse", "tower", "dense", "schedule", "generator", "reader")
        return {name: getattr(self, name) for name in names}


def numbers(value: Tensor) -> Any:
    return value.detach().double().tolist() if value.is_floating_point() else value.tolist()


def loaded(step: int, **options: Any) -> Run:
    run = Run(**options)
    assert Saver(GOLDEN / "checkpoint").load(run.parts(), step) == step
    return run


@pytest.mark.parametrize("coalesce", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_rows_and_admission_counts_are_restored(expected: Any, step: int, coalesce: bool) -> None:
    tables = loaded(step, coalesce=coalesce).engine.checkpoint_state().tables
    assert tables.keys() == expected[str(step)]["tables"].keys()
    for name, columns in expected[str(step)]["tables"].items():
        order = tables[name].columns["ids"].argsort()
        assert {column: numbers(values[order]) for column, values in tables[name].columns.items()} == columns


@pytest.mark.parametrize("step", STEPS)
def test_towers_and_optimizers_are_restored(expected: Any, step: int) -> None:
    run, was = loaded(step), expected[str(step)]
    assert {name: numbers(tensor) for name, tensor in run.tower.state_dict().items()} == was["tower"]
    state = run.dense.state_dict()
    for group, old in zip(state["param_groups"], was["dense"]["groups"], strict=True):
        assert {key: list(group[key]) if key == "betas" else group[key] for key in old} == old
    assert [{k: numbers(v) for k, v in each.items()} for each in state["state"].values()] == was["dense"]["state"]
    sparse = [{"lr": group["lr"], "betas": list(group["betas"])} for group in run.sparse.param_groups]
    assert sparse == was["sparse"]
    assert [int(each["step"]) for each in run.sparse.state.values()] == was["sparse_steps"]
    assert {"last_epoch": run.schedule.last_epoch, "lr": run.schedule.get_last_lr()} == was["schedule"]
    assert Saver(GOLDEN / "checkpoint").read_json("note", step) == was["note"]


def test_the_run_continues_unchanged(expected: Any) -> None:
    run, after = loaded(6), expected["after_6"]
    assert numbers(torch.rand(4, generator=run.generator)) == after["generator"]
    for batch, was in zip(run.reader, after["batches"], strict=False):
        assert {name: numbers(flat(batch[name])) for name in COLUMNS} == was
    run.engine.eval()
    vectors = run.engine({name: torch.tensor(ids) for name, ids in after["ids"].items()})
    for name, was in after["vectors"].items():
        # Initial values of unknown ids are exact to 2 ulp on another machine.
        torch.testing.assert_close(vectors[name].double(), torch.tensor(was, dtype=torch.float64), rtol=1e-6, atol=0)


def flat(value: Tensor | RaggedTensor) -> Tensor:
    return value if isinstance(value, Tensor) else value.values


def test_serving_reads_the_export(expected: Any) -> None:
    reader = serving.Reader(GOLDEN / "export", verify=True)
    assert (reader.step, reader.tables) == (6, ["item", "site", "user"])
    for name in reader.tables:
        columns = expected["6"]["tables"][name]
        ids = torch.tensor(columns["ids"]).numpy()
        assert reader.lookup(name, ids).tolist() == columns["embedding"]
    tower = {name: values.tolist() for name, values in reader.dense("tower").items()}
    assert tower == expected["6"]["tower"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A copy of the configuration's folder."""
    return Path(shutil.copytree(GOLDEN / "config", tmp_path / "config"))


def overrides(folder: Path) -> list[str]:
    # Paths are relative to the file; when it was written, they were relative to the working directory.
    return [f"run={folder}/run", f"data.train={folder}/clicks/train.csv", f"data.evaluate={folder}/clicks/eval.csv"]


def test_the_configuration_loads(config: Path) -> None:
    found = load_config(config / "config.yaml", overrides(config))
    assert (found.seed, found.train.epochs, found.train.keep, found.model.hidden) == (0, 3, 2, [64, 32])
    assert found.features["item"].min_frequency == 2
    assert found.features["price_level"].ops == [{"bucketize": {"boundaries": [0.5, 1, 2, 4]}}]
    ran = load_config(config / "run" / "config.yaml", overrides(config))
    assert (ran.train.epochs, ran.model.hidden, ran.data.batch_size) == (1, [8], 100)


def test_the_trained_model_predicts_the_same(config: Path) -> None:
    run = load_run(config / "run")
    assert run.step == 5
    events = [json.loads(line) for line in (config / "run" / "log.jsonl").read_text().splitlines()]
    was = next(event for event in events if event["event"] == "eval")
    found = run.evaluate(config / "clicks" / "eval.csv")
    for name in ("auc", "gauc", "logloss", "calibration"):
        assert found[name] == pytest.approx(was[f"eval/{name}"], rel=1e-5), name


def test_the_training_resumes_and_reports(config: Path) -> None:
    path = shutil.copy(config / "run" / "config.yaml", config / "again.yaml")
    assert main(["train", str(path), "--resume", "--quiet", *overrides(config), "train.epochs=2"]) == 0
    assert Saver(config / "run").latest() == 10
    assert main(["report", str(config / "run")]) == 0
