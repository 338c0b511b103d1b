import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from recis_hybrid import cli
from recis_hybrid.pipelines import Trainer
from recis_hybrid.pipelines.config import Config, ConfigError, load_config, parse
from recis_hybrid.pipelines.config_run import METRICS, SPARSE, trainer_of


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
    # Once more is refused, resumed is done already, and resumed for longer goes on.
    assert cli.main(["train", str(config), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "has checkpoints of the steps [30, 40] already; go on from them by --resume, or name another folder" in said
    assert cli.main(["train", str(config), "--resume", "train.epochs=1", "--quiet"]) == 0
    assert last(capsys) == figures
    gc.collect()  # as the end of a process does, this lets another saver save there
    assert cli.main(["train", str(config), "train.epochs=2", "--quiet", "--resume"]) == 0
    longer = last(capsys)
    assert longer["steps"] == 80
    # What was done is not undone by a configuration of less: the figures are the latest.
    gc.collect()
    assert cli.main(["train", str(config), "train.epochs=1", "--quiet", "--resume"]) == 0
    assert last(capsys) == longer
    assert cli.main(["init", str(config.parent)]) == 1
    assert "is there already; name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.kind=mlp", "train.precision=bfloat16", "optimizer.sparse=rowwise_adagrad", "train.patience=null"],
        ["optimizer.sparse=adagrad", "train.accumulate=2", "model.batch_norm=true", "train.evict_unused=10"],
        ["optimizer.sparse=sgd", "data.groups=null", "train.metrics=[logloss, mse, binned_auc]", "data.evaluate=null"],
    ],
)
def test_other_settings_train(config: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(config), "--quiet", "train.epochs=1", "model.hidden=[8]", *overrides]
    assert cli.main(arguments) == 0
    assert last(capsys)["samples"] == 10_000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown key train.epoch; did you mean train.epochs\? There are \['accumulate'"),
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
        ("run.x=3", "run is .*, which has no keys below it"),
        ("run", "must be KEY=VALUE, as train.epochs=3"),
        ("train.metrics=[auc, ndcg]", r"train.metrics\[1\] must be one of .*, got 'ndcg'"),
        ("features.site.ops=[{hesh: {}}]", r"features.site.ops\[0\]: make_op: there is no operation 'hesh'"),
        ("features.site.ops=[{hash: {speed: 3}}]", r"features.site.ops\[0\]: .*unexpected keyword argument 'speed'"),
        ("train.device=tpux", "train.device must be a device of torch's, got 'tpux'"),
        ("train.epochs=0", "train.epochs must be at least 1, got 0"),
        ("train.patience=-1", "train.patience must be at least 1, got -1"),
        ("model.dropout=1", "model.dropout must be at least 0 and less than 1, got 1"),
        ("model.hidden=[64, 0]", r"model.hidden\[1\] must be at least 1, got 0"),
        ("optimizer.sparse_lr=-1e-3", "optimizer.sparse_lr must be at least 0, got '-1e-3'"),
        ("optimizer.dense_lr=nan", "optimizer.dense_lr must be at least 0, got 'nan'"),
        ("features.user.dim=0", "features.user.dim must be at least 1, got 0"),
        ("data.groups=null", "train.metrics has gauc, which is by group; name the column of groups in data.groups"),
        ("features.user.dim=4", "model.kind deepfm needs one dim of at least 2 for all features"),
    ],
)
def test_a_wrong_key_or_value_is_named(
    config: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(load_config(config, [override]))
    if "=" in override:
        assert cli.main(["train", str(config), override]) == 2
        said = capsys.readouterr().err
        assert said.startswith("recis-hybrid: ")
        assert "Traceback" not in said


def test_what_data_does_not_fit_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override, message in (
        ("data.label=click", "has no column 'click'"),
        ("features.site.ops=[]", "feature 'site': ids must be int64 or int32, got torch.uint8; hash it first"),
        ("optimizer.dense_lr=1e30", "the loss is nan at step 2: its batch is finite; lower the learning rate"),
    ):
        assert cli.main(["train", str(config), "--quiet", override, f"run={config.parent / override[:6]}"]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"here: the keys \['run', 'features'\] must be given"):
        parse(Config, {"data": {"train": "x"}}, "here")
    with pytest.raises(ConfigError, match=r"data.train'\] must be given"):
        parse(Config, {"run": "x", "features": {}, "data": {}}, "here")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="must be a mapping of keys, got list"):
        load_config(tmp_path / "list.yaml")


def test_numbers_as_yaml_misreads_them(config: Path) -> None:
    assert load_config(config, ["optimizer.dense_lr=1e-3"]).optimizer.dense_lr == 0.001


def test_every_choice_of_the_schema_can_be_made() -> None:
    from typing import get_args, get_type_hints

    from recis_hybrid.pipelines.config import OptimizerConfig, TrainConfig

    assert set(get_args(get_type_hints(OptimizerConfig)["sparse"])) == set(SPARSE)
    assert set(get_args(get_args(get_type_hints(TrainConfig)["metrics"])[0])) == set(METRICS)


def test_a_gpu_that_is_not_there_is_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="train.device is 'cuda', and torch .* finds no GPU here; take cpu"):
        trainer_of(load_config(config, ["train.device=cuda"]))


def test_an_interrupted_training_says_how_to_go_on(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupted)
    assert cli.main(["train", str(config), "--quiet"]) == 130
    assert "`train --resume` goes on" in capsys.readouterr().err


def test_check_opens_the_data_and_trains_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(config), "--check"]) == 0
    assert "sound" in capsys.readouterr().out
    assert not (config.parent / "run").exists()
    assert cli.main(["train", str(config), "--check", "data.train=nowhere.csv"]) == 1
    assert "nowhere.csv" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], []):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert all(f"\n  {command} " in shown for command in ("init", "train", "report"))
        assert all(f"\n    {command} " in shown for command in ("inspect", "verify", "diff"))
    for command in ("init", "train", "report", "inspect"):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        assert "usage: recis-hybrid" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "config.yaml", "--fast"])
    assert caught.value.code == 2


def test_help_of_train_lists_every_key(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for line in (
        "  run: string\n        Folder for checkpoints and log.jsonl.",
        "  train.epochs: integer, at least 1 (1)\n        Passes over the training rows;",
        "  optimizer.sparse: adam | adagrad | rowwise_adagrad | sgd (adam)\n",
        "  features.NAME.dim: integer, at least 1 | null (null)\n        Elements of its embedding; null: a number",
        "  model.hidden: list of integer, at least 1 ([128, 64])\n",
    ):
        assert line in shown
    # Every key of the starter can be found.
    tree = yaml.safe_load(config.read_text())
    keys = ["run", "seed", *(f"{part}.{key}" for part in ("data", "model", "optimizer", "train") for key in tree[part])]
    assert [key for key in keys if f"\n  {key}: " not in shown] == []


def test_a_missing_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().err
    assert "nowhere/log.jsonl" in said
    assert said.startswith("recis-hybrid: ")
