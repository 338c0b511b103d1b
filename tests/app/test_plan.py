"""``recis-hybrid plan``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recis_hybrid.app import cli
from recis_hybrid.app.build import step_of
from recis_hybrid.app.config import load_config
from recis_hybrid.app.template import write_starter


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_starter(tmp_path / "first")


def rows_of(config: Path, count: int) -> list[str]:
    features = load_config(config, []).features
    return [f"{feature.table or name}={count}" for name, feature in features.items() if feature.dim is not None]


def test_the_memory_is_that_of_the_engine_of_the_configuration(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (engine,) = step_of(load_config(config, [])).engines
    samples = load_config(config, []).data.batch_size
    rows = 4 * samples
    for number in [0, 0, 1, 1, 2, 2, 3, 3, 0]:  # twice, because some ids get a row at their second occurrence
        engine(dict.fromkeys(engine.configs, torch.arange(number * samples, (number + 1) * samples)))
    assert cli.main(["plan", str(config), "--rows", ",".join(rows_of(config, rows)), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert len(found["tables"]) == len(engine.tables) > 1
    assert found["wire"]["total"] == 0
    for estimate, table in zip(found["tables"], engine.tables, strict=True):
        assert estimate["members"] == [member.name for member in table.members]
        memory = {
            part: size for part, size in table.memory().items() if part not in ("admission", "free_rows", "total")
        }
        assert {part: estimate["memory"][part] for part in memory} == memory


def test_the_text_shows_each_part(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [option for each in rows_of(config, 0) for option in ("--rows", each.replace("=0", "=1.5M"))]
    assert cli.main(["plan", str(config), *options, "--ranks", "4", "data.batch_size=1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "each of the ranks 0, 1, 2, 3, batches of 1,000 samples"
    head = next(line for line in lines if line.startswith("memory of"))
    assert head.split()[2:] == "rows id map embedding state metadata padding spare admission total".split()
    sent = next(line for line in lines if line.startswith("sent in a step by"))
    assert sent.split()[5:] == "sharding sizes ids counts rows gradients total".split()
    totals = [line for line in lines if line.startswith("all tables")]
    assert len(totals) == 2
    tables = len(rows_of(config, 0))
    assert f"{tables * 375_000:,}" in totals[0]
    # Each rank sends three quarters of the distinct ids of its batch.
    assert totals[1].split()[4:6] == [f"{8 * 750 * tables / 1024:.1f}", "KiB"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "nothing=5"], "plan: rows has ['nothing'], but the tables are"),
        (["--rows", "user=5"], "plan: rows must have a number for every table, but ["),
        (["--rows", "user"], "plan: --rows must be NAME=NUMBER, such as item=50M, got 'user'"),
        (["--rows", "user=-5"], "got 'user=-5'"),
        (["--rows", "user=5", "--rows", "user=6"], "plan: --rows has 'user' twice"),
        (["--rows", "ALL", "--ids", "nothing=2"], "plan: ids has ['nothing'], but the features are"),
        (["--rows", "ALL", "--distinct", "2"], "plan: distinct must be above 0 and at most 1, got 2.0"),
        (["--rows", "ALL", "--ranks", "0"], "plan: ranks must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(
    config: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    everything = ",".join(rows_of(config, 10))
    assert cli.main(["plan", str(config), *(everything if each == "ALL" else each for each in options)]) == 2
    assert message in capsys.readouterr().err


def test_rows_are_required(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(config)])
    assert ended.value.code == 2
    assert "the following arguments are required: --rows" in capsys.readouterr().err
