"""A bundle of a trained run behind the command ``recis-hybrid serve``, and the code blocks of docs/server.md."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recis_hybrid.app import cli
from recis_hybrid.serving import Bundle, Follower, Rows
from recis_hybrid.serving.server import Server, ServerOptions

ROW = {"user": [7, 7], "item": [3, 5], "site": ["s1", "s2"], "price": [2.5, None], "hour": [20, 21]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the bundle of a run of the starter configuration."""
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    folder = tmp_path_factory.mktemp("run")
    with contextlib.chdir(folder):
        assert cli.main(["init", "first"]) == 0
        assert cli.main(["train", "first/config.yaml", "--quiet", "data.batch_size=2048"]) == 0
        assert cli.main(["export", "first/run", "--bundle", "bundles/first"]) == 0
    return folder


@contextlib.contextmanager
def command(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command; yield the process and its first line."""
    line = [sys.executable, "-m", "recis_hybrid.app.cli", "serve", "bundles/first", "--port", "0", *arguments]
    with subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


def post(address: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    with contextlib.closing(http.client.HTTPConnection(address, timeout=60)) as connection:
        connection.request("POST", path, json.dumps(body))
        answer = connection.getresponse()
        return answer.status, json.load(answer)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_a_signal(folder: Path, number: signal.Signals) -> None:
    bundle = Bundle(folder / "bundles" / "first")
    with command(folder) as (process, line):
        match = re.fullmatch(
            r"recis-hybrid: serving first at http://(127\.0\.0\.1:\d+) \(step (\d+), digest (\w+)\)\n", line
        )
        assert match is not None
        assert (int(match[2]), match[3]) == (bundle.step, bundle.digest)
        status, answer = post(match[1], "/predict", {"columns": ROW})
        assert (status, answer["step"]) == (200, bundle.step)
        assert np.array_equal(np.float32(answer["outputs"]["score"]), bundle.predict(ROW)["score"])
        status, answer = post(match[1], "/predict", {"columns": {**ROW, "usr": [1, 2]}})
        assert (status, "column 'usr' is unknown; did you mean 'user'?" in answer["error"]) == (400, True)
        process.send_signal(number)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_sighup_looks_for_a_newer_bundle(folder: Path, tmp_path: Path) -> None:
    bundle = Bundle(folder / "bundles" / "first")
    place = tmp_path / "bundles" / "first"
    shutil.copytree(bundle.path.parent, place)
    with command(tmp_path, "--poll", "0") as (process, line):
        newer = place / f"step_{bundle.step + 1:06d}"
        shutil.copytree(bundle.path, newer)
        with open(newer / "manifest.json", "r+b") as manifest:
            manifest.truncate(1000)
        # An answer shows that signals are handled.
        address = line.split("http://")[1].split()[0]
        assert post(address, "/predict", {"columns": ROW})[0] == 200
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        said = process.stderr.readline()
        where = f"bundles/first/{newer.name}"
        assert f"cannot be loaded, step {bundle.step} stays in use: {where}" in said
        assert post(address, "/predict", {"columns": ROW})[0] == 200


def test_an_update_is_applied(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(folder, place)
    with contextlib.chdir(place):
        server = Server("bundles/first", ServerOptions(port=0, poll=0))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            address = server.url.removeprefix("http://")
            before = post(address, "/predict", {"columns": ROW})[1]
            changes = ["data.batch_size=2048", "train.epochs=4"]
            assert cli.main(["train", "first/config.yaml", "--quiet", "--resume", *changes]) == 0
            assert not server.live.poll()
            assert cli.main(["export", "first/run", "--bundle", "bundles/first", "--update"]) == 0
            assert server.live.poll()
            newest = Follower("bundles/first").bundle
            status, after = post(address, "/predict", {"columns": ROW})
        finally:
            server.stop()
            thread.join(60)
    assert (status, after["step"]) == (200, newest.step)
    assert newest.step > before["step"]
    assert np.array_equal(np.float32(after["outputs"]["score"]), newest.predict(ROW)["score"])
    assert after["outputs"] != before["outputs"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--timeout", "0"], 2, "--timeout must be a positive number of seconds, got 0.0"),
        (["--max-queue", "0"], 2, "--max-queue must be at least 1, got 0"),
        (["--prot", "1"], 2, "did you mean --port?"),
        (["--host", "256.1.1.1"], 1, "recis-hybrid: "),
    ],
)
def test_wrong_arguments(folder: Path, arguments: list[str], status: int, said: str) -> None:
    with command(folder, *arguments) as (process, line):
        assert line == ""
        assert process.wait(60) == status
        assert process.stderr is not None
        assert said in process.stderr.read()


def test_what_keeps_a_server_from_starting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = str(folder / "bundles" / "first")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", place, "--port", str(taken.getsockname()[1])]) == 1
    assert "in use" in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    shutil.copytree(place, damaged)
    file = next(damaged.rglob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cli.main(["serve", str(damaged), "--port", "0"]) == 1
    assert "the checksums differ" in capsys.readouterr().err
    assert cli.main(["serve", str(tmp_path / "none"), "--port", "0"]) == 1
    assert "none is not a directory" in capsys.readouterr().err
    for name in [name for name in sys.modules if name.startswith("recis_hybrid.serving.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", place, "--port", "0"]) == 1
    assert "pip install 'recis_hybrid[serve]'" in capsys.readouterr().err


def test_scores_of_a_batch_are_those_of_its_rows_within_rounding(folder: Path) -> None:
    """Matrix products of different heights may add in another order."""
    bundle = Bundle(folder / "bundles" / "first")
    generator = np.random.default_rng(0)
    parts = []
    for rows in (1, 1, 2, 5, 31, 1, 100):
        ids = {name: generator.integers(0, 200, rows) for name in ("user", "item", "hour")}
        sites = [f"s{number}" for number in generator.integers(0, 9, rows)]
        parts.append(bundle.check({**ids, "site": sites, "price": generator.random(rows) * 5}))
    together = bundle.run(Rows.concat(parts))["score"]
    alone = np.concatenate([bundle.run(part)["score"] for part in parts])
    # A score is a sigmoid of a sum of some 64 products, so a few ulps of 1 at most.
    np.testing.assert_allclose(together, alone, rtol=0, atol=8 * float(np.finfo(np.float32).eps))


def test_the_code_blocks_run(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    monkeypatch.chdir(folder)
    text = (root / "docs" / "server.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    # The commands are those of the fixture.
    for line in ("recis-hybrid init first", "recis-hybrid export first/run --bundle bundles/first"):
        assert line in text
    names: dict[str, Any] = {"__name__": "guide"}
    with command(folder) as (_, line):
        address = line.split("http://")[1].split()[0]
        sent = re.search(r"^curl http://127.0.0.1:8000/predict -d '(.*?)'$", text, re.MULTILINE | re.DOTALL)
        assert sent is not None
        status, answer = post(address, "/predict", json.loads(sent[1]))
        assert status == 200
        exec(compile(blocks[0].replace("127.0.0.1:8000", address), "docs/server.md", "exec"), names)
        names["client"].close()
    assert np.array_equal(names["scores"], np.float32(answer["outputs"]["score"]))
    exec(compile(blocks[1], "docs/server.md", "exec"), names)
    assert not names["thread"].is_alive()
