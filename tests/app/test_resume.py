from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recis_hybrid.app import cli, load_run
from recis_hybrid.app.build import trainer_of
from recis_hybrid.app.config import Config, ConfigError, load_config
from recis_hybrid.app.config.keys import describe_keys
from recis_hybrid.app.resume import allowed_changes
from recis_hybrid.embedding import EmbeddingEngine
from tests.support.configs import small_config, write_csv

# For every key, a value that differs from that of `small_config`, and whether a resumed run accepts it.
CHANGES: dict[str, tuple[Any, bool]] = {
    "run": ("elsewhere", True),
    "data.train": ("other.csv", True),  # the dataset checks that the rows are the same
    "data.evaluate": ("train.csv", True),
    "data.label": ("price", True),
    "data.groups": ("user", True),
    "data.columns.NAME.default": (0, True),
    "data.columns.NAME.length": (2, True),
    "data.columns.NAME.null_as_empty": (True, True),
    "data.columns.NAME.unit": ("ms", True),
    "data.columns.NAME.format": ("%Y", True),
    "data.columns.NAME.scale": (2, True),
    "data.csv.delimiter": (";", True),
    "data.csv.quote": (None, True),
    "data.csv.escape": ("\\", True),
    "data.csv.column_names": (["user", "site", "price", "label"], True),
    "data.csv.comment": ("#", True),
    "data.csv.encoding": ("latin-1", True),
    "data.csv.null_values": (["-"], True),
    "data.batch_size": (8, True),
    "data.shuffle": (False, False),
    "data.threads": (2, True),
    "data.partitions": (False, True),
    "features.NAME.source": ("site", False),
    "features.NAME.ops": ([{"mod": {"n": 5}}], False),
    "features.NAME.dim": (8, False),
    "features.NAME.table": ("shared", False),
    "features.NAME.combiner": ("mean", False),
    "features.NAME.min_frequency": (2, True),
    "features.NAME.evict_unused": (3, False),
    "features.NAME.optimizer": ("adagrad", False),
    "features.NAME.lr": (0.5, False),
    "features.NAME.std": (0.5, True),
    "features.NAME.disk": ("ssd", True),
    "features.NAME.cache_bytes": (1 << 40, True),
    "model.kind": ("deepfm", False),
    "model.hidden": ([8], False),
    "model.dropout": (0.5, True),
    "model.batch_norm": (True, False),
    "model.compile": (True, True),
    "optimizer.dense_lr": (0.5, True),
    "optimizer.sparse": ("adam", False),
    "optimizer.sparse_lr": (0.5, True),
    "optimizer.clip_grad_norm": (1.0, True),
    "train.epochs": (3, True),
    "train.accumulate": (2, True),
    "train.precision": ("bfloat16", True),
    "train.check_gradients": (True, True),
    "train.device": ("cuda", True),
    "train.checkpoint_steps": (1, True),
    "train.checkpoint_whole_every": (2, True),
    "train.keep": (7, True),
    "train.log_every": (7, True),
    "train.patience": (3, True),
    "train.evict_unused": (3, False),
    "train.metrics": (["mse"], True),
    "train.tensorboard": (True, True),
    "train.mlflow": ("clicks", True),
    "train.wandb": ("clicks", True),
    "seed": (5, False),
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return small_config(tmp_path)


def of(path: Path, **changes: Any) -> Config:
    return load_config(path, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def test_all_keys_are_covered() -> None:
    keys = [line.split(":")[0].strip() for line in describe_keys().splitlines() if line[:3].strip()]
    assert sorted(keys) == sorted(CHANGES)


@pytest.mark.parametrize("key", CHANGES)
def test_each_key_is_accepted_or_refused_by_name(config: Path, key: str) -> None:
    value, accepted = CHANGES[key]
    name = key.replace("data.columns.NAME", "data.columns.price").replace("NAME", "user")
    other = {name: value}
    if key == "train.checkpoint_whole_every":
        other["train.checkpoint_steps"] = 4
    if key in ("features.NAME.disk", "features.NAME.cache_bytes"):
        other = {"features.user.disk": "ssd", "features.user.cache_bytes": 1 << 40}
    if key == "data.label":
        other["features"] = {"user": {"dim": 4}}
        with pytest.raises(ConfigError, match="features.site.dim is 4 in the run, got null"):
            allowed_changes(of(config), of(config, **other))
        return
    before, after = of(config), of(config, **other)
    if not accepted:
        with pytest.raises(ConfigError, match=f"cannot resume .*{name} is .* in the run, got .*run=FOLDER"):
            allowed_changes(before, after)
        return
    changed = allowed_changes(before, after)
    ignored = key in ("run", "data.train")  # locations may change
    assert {each for each in changed if each == name} == (set() if ignored else {name})


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({}, {"data.evaluate": None}, "data.evaluate"),
        ({"data.evaluate": None}, {}, "data.evaluate"),
        ({}, {"model.dropout": 0}, "model.dropout"),
        ({"model.dropout": 0}, {}, "model.dropout"),
        ({}, {"train.precision": "float16"}, "train.precision"),
        ({"train.precision": "float16"}, {"train.precision": "bfloat16"}, "train.precision"),
        ({"train.patience": 1}, {"train.patience": 2, "train.metrics": ["logloss", "auc"]}, "train.metrics"),
        ({}, {"features.hour": {"dim": 4}}, "features.hour.dim"),
        ({"features.user.evict_unused": 5}, {}, "features.user.evict_unused"),
        ({"features.user.lr": 0.1}, {}, "features.user.lr"),
        ({}, {"features": {"user": {"dim": 4}}}, "features.site.dim"),
    ],
)
def test_changes_to_the_model_or_the_stages_are_refused(
    config: Path, before: dict[str, Any], after: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"{named} is .* in the run, got "):
        allowed_changes(of(config, **before), of(config, **after))


def test_eviction_may_move_between_tables(config: Path) -> None:
    before, after = {"features.user.evict_unused": 5}, {"train.evict_unused": 3, "features.site.evict_unused": 2}
    assert of(config, **after).evicted_tables() == {"user": 3, "site": 2}
    assert len(allowed_changes(of(config, **before), of(config, **after))) == 3
    with pytest.raises(ConfigError, match="features.site.evict_unused must be that of the other .* table user, 3, got"):
        of(config, **after, **{"features.site.table": "user"})


def test_several_refusals_are_reported_at_once(config: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model.hidden is \[4\] in the run, got \[8\] .*; seed is 0 in the run, got 1"
    ):
        allowed_changes(of(config), of(config, **{"seed": 1, "model.hidden": [8], "optimizer.dense_lr": 3}))


def test_spelling_is_not_a_change(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = of(config, **{"data.evaluate": str(tmp_path / "eval.csv"), "optimizer.sparse_lr": 1e-1})
    monkeypatch.chdir(tmp_path)
    assert allowed_changes(absolute, of(Path("config.yaml"))) == {}


def train(*arguments: object) -> int:
    gc.collect()  # releases the saver's lock, like the end of a process
    return cli.main(["train", *map(str, arguments), "--quiet"])


def figures(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def log(run: Path, event: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event]


def weights(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tower's parameters, and the rows of the user table in order of ids."""
    model = load_run(run).model
    engine = model.engine
    assert isinstance(engine, EmbeddingEngine)
    tower = torch.cat([p.flatten() for name, p in model.named_parameters() if name.startswith("tower")])
    rows = engine({"user": torch.arange(7), "site": torch.zeros(7, dtype=torch.int64)})["user"]
    return tower, rows.detach()


@pytest.fixture
def first_epoch(config: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Configuration of a run after one epoch."""
    assert train(config) == 0
    capsys.readouterr()
    return config


@pytest.mark.parametrize("frozen", ["dense", "sparse"])
def test_learning_rates_of_a_resumed_run_take_effect(first_epoch: Path, frozen: str) -> None:
    run = first_epoch.parent / "run"
    before = weights(run)
    assert train(first_epoch, "--resume", "train.epochs=2", f"optimizer.{frozen}_lr=0") == 0
    after = weights(run)
    # With a learning rate of 0, SGD and Adam leave parameters bitwise unchanged; the other half changes.
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == ([True, False] if frozen == "dense" else [False, True])
    assert {record[f"lr/{frozen}"] for record in log(run, "train") if record["step"] > 4} == {0.0}
    # The change is recorded with its step.
    recorded = load_config(run / "config.yaml")
    assert getattr(recorded.optimizer, f"{frozen}_lr") == 0
    old = 0.01 if frozen == "dense" else 0.1
    (record,) = log(run, "config")
    changes = {f"optimizer.{frozen}_lr": [old, 0.0], "train.epochs": [1, 2]}
    assert record == {"event": "config", "step": 4, "changes": changes}


def test_other_settings_of_a_resumed_run_take_effect(first_epoch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = first_epoch.parent / "run"
    changes = [
        "train.epochs=2",
        "data.batch_size=8",
        "train.accumulate=2",
        "train.checkpoint_steps=1",
        "train.keep=3",
        "train.metrics=[mse]",
        "optimizer.clip_grad_norm=0.5",
        "train.log_every=2",
        "data.evaluate=train.csv",
        "train.precision=bfloat16",
        "model.dropout=0.5",
        "data.threads=2",
        "data.groups=user",
    ]
    changes = [each.replace("train.csv", str(first_epoch.parent / "train.csv")) for each in changes]
    assert train(first_epoch, "--resume", *changes) == 0
    output = capsys.readouterr()
    assert "run continues from step 4 with " in output.err
    assert "data.batch_size from 16 to 8" in output.err
    last = json.loads(output.out.splitlines()[-1])
    # 64 rows in batches of 8, two batches per step: 4 more steps.
    assert (last["steps"], last["samples"]) == (8, 128)
    assert {key for key in last if key.startswith("eval/")} == {"eval/mse"}
    assert sorted(path.name for path in run.glob("step_*")) == [f"step_{step:06d}" for step in (6, 7, 8)]
    later = [record for record in log(run, "train") if record["step"] > 4]
    assert [record["step"] for record in later] == [6, 8]
    assert all("grad_norm" in record for record in later)
    gc.collect()
    assert cli.main(["evaluate", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)["eval/mse"] == last["eval/mse"]


def test_tables_have_their_own_optimizers_and_learning_rates(config: Path) -> None:
    own = ["features.user.optimizer=adagrad", "features.site.lr=0.2"]
    assert train(config, *own) == 0
    gc.collect()
    assert train(config, *own[:1], "features.site.lr=0.3", "optimizer.sparse_lr=0.4", "--resume", "train.epochs=2") == 0
    trainer = trainer_of(load_config(config.parent / "run" / "config.yaml"), quiet=True)
    gc.collect()
    trainer.fit([], resume="latest")
    sparse: Any = trainer.parts()["sparse"]
    found = {group["params"][0].table.name: (group.get("optimizer"), group["lr"]) for group in sparse.param_groups}
    assert found == {"user": ("Adagrad", 0.4), "site": (None, 0.3)}
    assert "sum" in trainer.engines[0].tables[0].export(0)


def test_a_refused_resume_leaves_the_run_unchanged(first_epoch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = first_epoch.parent / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(first_epoch, "--resume", "train.epochs=2", "model.hidden=[8]", "optimizer.sparse_lr=0.5") == 2
    assert "model.hidden is [4] in the run, got [8]" in capsys.readouterr().err
    write_csv(first_epoch.parent / "more.csv", rows=70)
    more = f"data.train={first_epoch.parent / 'more.csv'}"
    assert train(first_epoch, "--resume", "train.epochs=2", "optimizer.sparse_lr=0.5", more) == 1
    assert "the rows are in a different order than when the state was saved" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lease"} == {
        path: data for path, data in before.items() if path.name != ".lease"
    }


def test_resuming_a_finished_run_reports_it_and_records_nothing(
    first_epoch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = first_epoch.parent / "run"
    assert train(first_epoch, "--resume", "optimizer.sparse_lr=0.5") == 0
    output = capsys.readouterr()
    assert "complete at step 4: all 1 epoch(s) are done; to continue, increase train.epochs" in output.err
    assert json.loads(output.out)["steps"] == 4
    assert load_config(run / "config.yaml").optimizer.sparse_lr == 0.1
    assert log(run, "config") == []


def test_resuming_without_a_checkpoint_starts_at_step_0(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, "--resume") == 0
    assert "run has no checkpoint yet: training starts at step 0" in capsys.readouterr().err


def test_a_run_without_its_record_continues(first_epoch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first_epoch.parent / "run" / "config.yaml").unlink()
    assert train(first_epoch, "--resume", "train.epochs=2") == 0
    assert "has no config.yaml: changes to its configuration are unknown" in capsys.readouterr().err
    assert (first_epoch.parent / "run" / "config.yaml").is_file()


def test_the_record_of_a_moved_run_continues_it(first_epoch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = first_epoch.parent
    moved = folder / "archive" / "moved"
    moved.parent.mkdir()
    (folder / "run").rename(moved)
    assert (moved / "config.yaml").read_text().startswith("# Written by `recis-hybrid train`")
    assert train(moved / "config.yaml", "--resume", "train.epochs=2") == 0
    assert figures(capsys)["steps"] == 8


def test_a_handwritten_configuration_is_not_overwritten(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = config.read_text()
    assert train(config, f"run={config.parent}") == 2
    assert "which the run would overwrite with its own config.yaml; choose another folder" in capsys.readouterr().err
    assert config.read_text() == before
