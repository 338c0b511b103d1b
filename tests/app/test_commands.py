from __future__ import annotations

import gc
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from recis_hybrid.app import cli
from recis_hybrid.app.build import METRICS, SPARSE, trainer_of
from recis_hybrid.app.config import Config, ConfigError, load_config
from recis_hybrid.app.config.parse import parse
from recis_hybrid.pipelines import Trainer
from recis_hybrid.saver import Saver


@pytest.fixture
def config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert cli.main(["init", str(tmp_path / "first")]) == 0
    capsys.readouterr()
    return tmp_path / "first" / "config.yaml"


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_the_starter_is_commented_runs_and_learns(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [line for line in config.read_text().splitlines() if ":" in line and not line.lstrip().startswith("#")]
    assert sum("#" in line for line in settings) > 15
    assert cli.main(["train", str(config), "--quiet", "train.epochs=1", "train.checkpoint_steps=15"]) == 0
    figures = last(capsys)
    assert figures["steps"] == 40
    assert figures["eval/auc"] > 0.7
    assert set(figures) >= {"eval/gauc", "eval/logloss", "eval/calibration"}
    run = config.parent / "run"
    assert sorted(path.name for path in run.glob("step_*")) == ["step_000030", "step_000040"]
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["epochs"] == 1
    # Training again is refused, resuming is a no-op, and resuming with more epochs continues.
    assert cli.main(["train", str(config), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "has checkpoints of the steps [30, 40]; continue from them with --resume, or set another folder" in error
    assert cli.main(["train", str(config), "--resume", "train.epochs=1", "--quiet"]) == 0
    assert last(capsys) == figures
    gc.collect()  # releases the saver's lock, like the end of a process
    assert cli.main(["train", str(config), "train.epochs=2", "--quiet", "--resume"]) == 0
    longer = last(capsys)
    assert longer["steps"] == 80
    # A configuration with fewer epochs does not undo training: the figures are the latest.
    gc.collect()
    assert cli.main(["train", str(config), "train.epochs=1", "--quiet", "--resume"]) == 0
    assert last(capsys) == longer
    assert cli.main(["init", str(config.parent)]) == 1
    assert "already exists; name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.kind=mlp", "train.precision=bfloat16", "optimizer.sparse=rowwise_adagrad", "train.patience=null"],
        ["optimizer.sparse=adagrad", "train.accumulate=2", "model.batch_norm=true", "train.evict_unused=10"],
        [
            "optimizer.sparse=sgd",
            "features.user.evict_unused=10",
            "data.groups=null",
            "train.metrics=[logloss, mse, binned_auc]",
            "data.evaluate=null",
        ],
    ],
)
def test_other_settings_train(config: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(config), "--quiet", "train.epochs=1", "model.hidden=[8]", *overrides]
    assert cli.main(arguments) == 0
    assert last(capsys)["samples"] == 10_000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown key train.epoch; did you mean train.epochs\? Valid keys are \['accumulate'"),
        ("train.epochs=many", "train.epochs must be an integer, got 'many'"),
        ("train.epochs=true", "train.epochs must be an integer, got True"),
        ("data.shuffle=1", "data.shuffle must be true or false, got 1"),
        ("optimizer.dense_lr=fast", "optimizer.dense_lr must be a number, got 'fast'"),
        ("optimizer.sparse=adamax", r"optimizer.sparse must be one of \['adam', .*\], got 'adamax'"),
        ("model.hidden=64", "model.hidden must be a list, got 64"),
        ("model.hidden=[64, x]", r"model.hidden\[1\] must be an integer, got 'x'"),
        ("features.user.dims=3", r"unknown key features.user.dims; did you mean features.user.dim\?"),
        ("features.user=3", "features.user must be a mapping of keys, got 3"),
        ("data=3", "data must be a mapping of keys, got 3"),
        ("run.x=3", "run is .*, which has no keys"),
        ("run", "must be KEY=VALUE, such as train.epochs=3"),
        ("train.metrics=[auc, ndcg]", r"train.metrics\[1\] must be one of .*, got 'ndcg'"),
        ("features.site.ops=[{hesh: {}}]", r"features.site.ops\[0\]: make_op: unknown operation 'hesh'"),
        ("features.site.ops=[{hash: {speed: 3}}]", r"features.site.ops\[0\]: make_op: 'hash' takes no 'speed'"),
        ("train.device=tpux", "train.device must be a torch device, got 'tpux'"),
        ("train.epochs=0", "train.epochs must be at least 1, got 0"),
        ("train.patience=-1", "train.patience must be at least 1, got -1"),
        ("model.dropout=1", "model.dropout must be at least 0 and less than 1, got 1"),
        ("model.hidden=[64, 0]", r"model.hidden\[1\] must be at least 1, got 0"),
        ("optimizer.sparse_lr=-1e-3", "optimizer.sparse_lr must be at least 0, got -0.001"),
        ("optimizer.dense_lr=nan", "optimizer.dense_lr must be a number, got 'nan'"),
        ("features.user.dim=0", "features.user.dim must be at least 1, got 0"),
        ("data.groups=null", "train.metrics has gauc, which needs groups; name their column in data.groups"),
        ("features.user.dim=4", "model.kind deepfm needs one dim of at least 2 for all features"),
    ],
)
def test_invalid_keys_and_values_are_named(
    config: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(load_config(config, [override]))
    if "=" in override:
        assert cli.main(["train", str(config), override]) == 2
        error = capsys.readouterr().err
        assert error.startswith("recis-hybrid: ")
        assert "Traceback" not in error


def test_settings_that_do_not_fit_the_data_are_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override, message in (
        ("data.label=click", "has no column 'click'"),
        ("features.site.ops=[]", "feature 'site': ids must be int64 or int32, got torch.uint8; hash it first"),
        ("optimizer.dense_lr=1e30", "the loss is nan at step 2: its batch is finite; lower the learning rate"),
    ):
        assert cli.main(["train", str(config), "--quiet", override, f"run={config.parent / override[:6]}"]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"here: the keys \['run', 'features'\] are required"):
        parse(Config, {"data": {"train": "x"}}, "here")
    with pytest.raises(ConfigError, match=r"data.train'\] are required"):
        parse(Config, {"run": "x", "features": {}, "data": {}}, "here")
    with pytest.raises(ConfigError, match="none.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="must be a mapping of keys, got a list"):
        load_config(tmp_path / "list.yaml")


def test_every_choice_in_the_schema_is_implemented() -> None:
    from typing import get_args, get_type_hints

    from recis_hybrid.app.config import OptimizerConfig, TrainConfig

    assert set(get_args(get_type_hints(OptimizerConfig)["sparse"])) == set(SPARSE)
    assert set(get_args(get_args(get_type_hints(TrainConfig)["metrics"])[0])) == set(METRICS)


def test_a_missing_gpu_is_reported(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(ConfigError, match="train.device is 'cuda', but torch .* finds no GPU; use cpu"):
        trainer_of(load_config(config, ["train.device=cuda"]))


def test_interrupted_training_explains_how_to_resume(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupted)
    assert cli.main(["train", str(config), "--quiet"]) == 130
    assert "`train --resume` continues" in capsys.readouterr().err


COMMANDS = (
    "init",
    "train",
    "evaluate",
    "predict",
    "report",
    "plan",
    "inspect",
    "verify",
    "diff",
    "compact",
    "export",
    "import-recis",
    "serve",
)


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"], ["help"], []):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert shown.count("usage:") == 1
        assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == list(COMMANDS)
        assert max(map(len, shown.splitlines())) < 90


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_own_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([command, "--help"], ["help", command]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: recis-hybrid {command} [-h]")
        assert shown.count("usage:") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "c.yaml"], "unknown command 'trian'; did you mean `recis-hybrid train`? Commands are: init, train"),
        (["import"], "did you mean `recis-hybrid import-recis`?"),
        (["zzz"], "unknown command 'zzz'. Commands are: init, train"),
        (["--verson"], "unknown option '--verson'; did you mean `recis-hybrid --version`?"),
        (["--train"], "did you mean `recis-hybrid train`?"),
        (
            ["train", "c.yaml", "--fast"],
            "unrecognized arguments: --fast. Options are --help, --resume, --check, --quiet",
        ),
        (["train", "c.yaml", "--resum"], "unrecognized arguments: --resum; did you mean --resume?"),
        (["train", "c.yaml", "--epochs", "5"], "--epochs 5; set keys as train.epochs=VALUE"),
        (["train", "c.yaml", "--train.epochs=5"], "set keys as train.epochs=VALUE"),
        (["train", "c.yaml", "--batch-size=5"], "set keys as data.batch_size=VALUE"),
        (["train"], "the following arguments are required: config; `recis-hybrid init` writes a starter configuration"),
        (["predict", "run", "d.csv"], "the following arguments are required: --out"),
        (["evaluate", "run", "--stp", "3"], "did you mean --step? Options are --help, --step, --device"),
        (["diff", "a", "b", "--al"], "did you mean --all? Options are --help, --json, --all"),
        (["inspect"], "the following arguments are required: path"),
        (["evaluate", "run", "--step", "x"], "argument --step: invalid int value: 'x'"),
    ],
)
def test_invalid_arguments_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert message in " ".join(output.err.split())
    assert output.out == ""


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("--version", "-V", "version"):
        assert cli.main([argument]) == 0
        assert capsys.readouterr().out.startswith(f"recis-hybrid {version('recis_hybrid')} (Python 3")


def test_overrides_may_be_anywhere(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--check", str(config), "train.epochs=2", "--quiet", "run=x"]) == 0
    assert f"{config}: no problems found" in capsys.readouterr().out


def test_training_works_from_any_directory(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, path in ((config.parent, "config.yaml"), (tmp_path, "first/config.yaml"), (Path("/"), str(config))):
        monkeypatch.chdir(folder)
        assert cli.main(["train", path, "--check"]) == 0
    monkeypatch.chdir(config.parent)
    settings = ["train.epochs=1", "data.train=clicks/eval.csv", "data.evaluate=null", "--quiet"]
    assert cli.main(["train", "config.yaml", *settings]) == 0
    assert (config.parent / "run" / "step_000008").is_dir()
    monkeypatch.chdir(tmp_path)
    settings[1] = "data.train=first/clicks/eval.csv"
    assert cli.main(["train", "first/config.yaml", "run=other", *settings]) == 0
    assert (tmp_path / "other" / "step_000008").is_dir()


def test_help_of_train_lists_every_key(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for line in (
        "  run: string\n        Folder or URL for checkpoints and log.jsonl.",
        "  train.epochs: integer, at least 1 (1)\n        Passes over the training rows,",
        "  optimizer.sparse: adam | adagrad | rowwise_adagrad | sgd | ",
        "  features.NAME.dim: integer, at least 1 | null (null)\n        Dimension of the embedding; null: a number",
        "  model.hidden: list of integer, at least 1 ([128, 64])\n",
    ):
        assert line in shown
    # Every key of the starter configuration is documented.
    tree = yaml.safe_load(config.read_text())
    keys = ["run", "seed", *(f"{part}.{key}" for part in ("data", "model", "optimizer", "train") for key in tree[part])]
    keys.remove("data.columns")
    assert [key for key in [*keys, "data.columns.NAME.default"] if f"\n  {key}: " not in shown] == []


def test_a_missing_run_is_named(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").write_text("")
    for path, message in (
        (tmp_path / "nowhere", "nowhere/log.jsonl: there is no folder"),
        (config.parent, "has no log: it is not a run, or its training has not started"),
        (config, "must be the folder of a run"),
        (tmp_path / "empty", "the log is empty; train first"),
        (tmp_path, "tmp has no log; did you mean".replace("tmp", str(tmp_path))),
    ):
        assert cli.main(["report", str(path)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("recis-hybrid: ")


def test_trackers_of_a_configuration(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    assert cli.main(["train", str(config), "--quiet", "train.epochs=1", "train.mlflow=clicks"]) == 0
    figures = last(capsys)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("clicks").experiment_id])
    assert run.data.metrics["eval/auc"] == figures["eval/auc"]
    assert run.data.params["optimizer.sparse"] == "adam"
    saver = Saver(config.parent / "run")
    assert run.data.tags["checkpoint.digest"] == saver.digest(figures["steps"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(["train", str(config), "--check", "train.wandb=clicks"]) == 1
    assert "pip install recis_hybrid[wandb]" in capsys.readouterr().err
