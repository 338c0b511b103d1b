from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recis_hybrid.saver import Saver
from recis_hybrid.saver.cli import main
from recis_hybrid.saver.inspect import summarized
from tests.support.toy import Toy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    toy = Toy()
    for step in (2, 4):
        toy.train_steps(2)
        Saver(tmp_path / "run").save(step, {**toy.parts(), "note": {"epoch": step}})
    return tmp_path / "run"


def test_inspect_lists_the_contents(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run)]) == 0
    text = capsys.readouterr().out
    assert "step 4, written by 1 process(es)" in text
    assert "table item: 64 rows" in text
    assert "exp_avg float32 [6]" in text
    assert main(["inspect", "--json", str(run / "step_000002")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 2
    assert found["parts"]["engine"]["tables"]["item"]["rows"] == 64
    files = sum(file.stat().st_size for file in (run / "step_000002").rglob("*.safetensors"))
    assert found["bytes"] == files == sum(part["bytes"] for part in found["parts"].values())


def test_verify_finds_a_changed_byte(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert "sound, 5 parts" in capsys.readouterr().out
    file = next((run / "step_000004" / "sparse" / "engine" / "item").iterdir())
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert main(["verify", str(run)]) == 1
    assert f"{file}" in capsys.readouterr().err
    assert main(["verify", "--json", str(run)]) == 1
    assert str(file) in json.loads(capsys.readouterr().out)["error"]
    assert main(["verify", str(run / "step_000002")]) == 0


def test_diff_compares_content(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(run), str(run / "step_000004")]) == 0
    assert "are equal" in capsys.readouterr().out
    toy = Toy(seed=5)
    Saver(run).load(toy.parts(), 2)
    Saver(tmp_path / "same").save(7, {**toy.parts(), "note": {"epoch": 2}})
    assert main(["diff", str(run / "step_000002"), str(tmp_path / "same")]) == 0
    table = toy.engine.tables[0]
    table.insert(table.members.index(next(m for m in table.members if m.name == "item")), torch.tensor([12345]))
    with torch.no_grad():
        toy.tower[0].weight[0, 0] += 1
    parts = toy.parts()
    del parts["dense"]
    Saver(tmp_path / "other").save(7, {**parts, "note": {"epoch": 3}})
    capsys.readouterr()
    assert main(["diff", "--json", str(run / "step_000002"), str(tmp_path / "other")]) == 1
    assert json.loads(capsys.readouterr().out)["differences"] == [
        "part 'dense' is in the first only",
        "part 'engine': table 'item': 1 ids are in the second only, such as [12345]",
        "part 'model': tensor 'tower.0.weight' differs",
        "part 'note': meta.value.epoch: 2 and 3",
    ]
    assert main(["diff", str(run / "step_000002"), str(run)]) == 1
    assert "embedding differs in" in capsys.readouterr().out


def test_missing_checkpoints_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert f"{tmp_path} holds no complete checkpoint" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "step_000003")]) == 1
    assert "is not a directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["mend", str(tmp_path)])


COMMANDS = ["inspect", "verify", "diff", "compact", "export", "import-recis"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("as_json", [False, True])
def test_errors_are_printed(command: str, as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path)] * (1 if command in ("inspect", "verify", "compact") else 2)
    assert main([command, *paths, *(["--json"] if as_json else [])]) == 1
    found = capsys.readouterr()
    text = json.loads(found.out)["error"] if as_json else found.err.removeprefix("recis-hybrid: ")
    assert text.startswith(str(tmp_path))


def test_an_error_ends_the_process_without_a_traceback(tmp_path: Path, root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recis_hybrid.saver.cli", "verify", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"recis-hybrid: {tmp_path} holds no complete checkpoint")


def test_a_step_is_selected_by_number(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run), "--step", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert main(["verify", str(run), "--step", "3"]) == 1
    assert "holds no complete checkpoint of step 3, only of [2, 4]" in capsys.readouterr().err
    assert main(["verify", str(run / "step_000002"), "--step", "4"]) == 1
    assert "is not the checkpoint of step 4" in capsys.readouterr().err


def test_differences_fit_a_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def save(name: str, shift: float) -> Path:
        tower = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(50))
        with torch.no_grad():
            for number, parameter in enumerate(tower.parameters()):
                parameter.fill_(number + shift * (number != 3))
        notes = {f"key {number}": number + shift for number in range(30)}
        Saver(tmp_path / name).save(1, {"model": tower, "note": {"deep": notes, "same": 1}, "other": [shift]})
        return tmp_path / name

    first, second = save("first", 0), save("second", 1)
    assert main(["diff", str(first), str(second), "--all"]) == 1
    whole = capsys.readouterr().out.splitlines()
    # 99 of 100 tensors, 30 keys, and the list.
    assert len(whole) == 99 + 30 + 1
    assert "part 'note': meta.value.deep.key 7: 7 and 8" in whole
    assert main(["diff", str(first), str(second)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 23
    assert max(map(len, shown)) < 80
    assert [line.partition("differ: ")[0] for line in shown] == [
        "part 'model': 99 tensors ",
        "part 'note': 30 values of meta ",
        "part 'other': meta.value: [0] and [1]",
        "--all shows all",
    ]
    # The fourth parameter, 1.bias, is the same.
    assert shown[0].startswith("part 'model': 99 tensors differ: '0.bias', '0.weight', '1.weight', ")
    assert main(["diff", str(first), str(second), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["differences"] == whole
    # No differences: nothing to shorten.
    few = save("few", 0)
    assert main(["diff", str(first), str(few)]) == 0


def test_long_differences_are_truncated() -> None:
    texts = [f"part {'x' * 200!r} is in the first only", "part '{}': meta.a: 1 and 2"]
    shown = summarized(texts)
    assert [len(line) for line in shown] == [79, 26, 15]
    assert shown[-1] == "--all shows all"
    assert summarized(texts[1:]) == texts[1:]
    many = [f"part '{{{n}}}' is in the first only" for n in range(25)]
    assert len(summarized(many)) == 20
    assert summarized(many)[-1] == "--all shows all, and 6 more"
