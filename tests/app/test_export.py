"""The command ``export --bundle``: its arguments, and errors that name the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recis_hybrid.app import cli
from recis_hybrid.serving import Bundle
from tests.support.configs import small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    assert cli.main(["train", str(small_config(folder)), "--quiet"]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r", "out", "--bundle", "b"], "name one target: OUT, --bundle DIR or --index FILE"),
        (["r", "out", "--data", "d.csv"], "--data is for --bundle"),
        (["r"], "name one target: OUT, --bundle DIR or --index FILE"),
        (["r", "--bundel", "b"], "did you mean --bundle?"),
    ],
)
def test_invalid_arguments_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", *arguments])
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_missing_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(tmp_path / "none"), "--bundle", str(tmp_path / "b")]
    assert cli.main(arguments) == 1
    assert "there is no such folder; name the folder of a run" in capsys.readouterr().err
    assert cli.main([*arguments, "--json"]) == 1
    assert "there is no such folder" in json.loads(capsys.readouterr().out)["error"]


def test_moved_data_are_named_by_an_option(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = (run.parent / "train.csv").rename(tmp_path / "moved.csv")
    try:
        assert cli.main(["export", str(run), "--bundle", str(tmp_path / "b")]) == 1
        assert "Name files with the run's columns by --data" in capsys.readouterr().err
        arguments = ["export", str(run), "--bundle", str(tmp_path / "b"), "--data", str(moved), "--json"]
        assert cli.main(arguments) == 0
        path = json.loads(capsys.readouterr().out)["path"]
        assert Bundle(path).step == 4
        assert cli.main(arguments) == 1
        assert "exists" in json.loads(capsys.readouterr().out)["error"]
    finally:
        moved.rename(run.parent / "train.csv")
