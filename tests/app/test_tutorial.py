"""The tutorial and docs/install.md run in order, and print what they say."""

from __future__ import annotations

import contextlib
import gc
import http.client
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from recis_hybrid.app import cli

PAGES = ("csv", "train", "report", "resume", "predict", "serve")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def blocks(path: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def assert_printed(expected: str, output: str) -> None:
    """Check that every line was printed: its words and integers exactly, decimal numbers within 5 %.

    Training accumulates the different rounding of processors.
    """
    for line in expected.splitlines():
        candidates = [other for other in output.splitlines() if NUMBER.sub("#", other) == NUMBER.sub("#", line)]
        assert any(_near(line, other) for other in candidates), f"{line!r} is not in\n{output}"


def _near(line: str, other: str) -> bool:
    pairs = zip(NUMBER.findall(line), NUMBER.findall(other), strict=True)
    return all(a == b or ("." in a and float(a) == pytest.approx(float(b), rel=0.05)) for a, b in pairs)


def run(shell: str) -> str:
    """Run the commands of a block in this process; return what they print."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        for line in shell.splitlines():
            gc.collect()  # release the lease on the folder that the last training holds
            program, *arguments = shlex.split(line, comments=True)
            assert program == "recis-hybrid"
            try:
                status = cli.main(arguments)
            except SystemExit as end:
                status = 2 if isinstance(end.code, str) else int(end.code or 0)
                print(end.code if isinstance(end.code, str) else "")
            assert (status != 0) == ("# fails" in line), output.getvalue()
    return output.getvalue().replace("\r", "\n")


def test_the_tutorial(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "tutorial"}
    output = ""
    for page in PAGES[:-1]:
        for language, text in blocks(root / "docs" / "tutorial" / f"{page}.md"):
            if language == "python":
                exec(compile(text, f"docs/tutorial/{page}.md", "exec"), names)
                output = Path("train.csv").read_text()
            elif language == "yaml":
                Path(text.splitlines()[0].removeprefix("# ")).write_text(text)
            elif language == "bash":
                output = run(text)
            else:
                assert language == "text"
                assert_printed(text, output)
    assert Path("run/report.html").stat().st_size > 10_000
    assert names["log"][-1]["event"]
    assert names["batch"]["score"].shape == (256,)

    serve = blocks(root / "docs" / "tutorial" / "serve.md")
    assert [language for language, _ in serve] == ["bash", "text", "bash", "text"]
    (_, shell), (_, greeting), (_, request), (_, answer) = serve
    export, command = shell.splitlines()
    run(export)
    line = [sys.executable, "-m", "recis_hybrid.app.cli", *shlex.split(command)[1:], "--port", "0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            first = process.stdout.readline()
            port = re.search(r"127\.0\.0\.1:(\d+)", first)
            assert port is not None
            expected = greeting.replace("8000", port[1]).replace("DIGEST", r"\w+").replace("(step", r"\(step")
            assert re.fullmatch(expected.replace(r"\w+)", r"\w+\)"), first)
            curl, url, flag, body = shlex.split(request)
            assert (curl, url, flag) == ("curl", "http://127.0.0.1:8000/predict", "-d")
            with contextlib.closing(http.client.HTTPConnection(f"127.0.0.1:{port[1]}", timeout=60)) as connection:
                connection.request("POST", "/predict", body)
                found = json.load(connection.getresponse())
        finally:
            process.kill()
    shown = json.loads(answer)
    assert found["step"] == shown["step"]
    assert found["outputs"]["score"] == pytest.approx(shown["outputs"]["score"], abs=0.1)


def test_the_check_of_the_installation(root: Path) -> None:
    output = io.StringIO()
    (program,) = [text for language, text in blocks(root / "docs" / "install.md") if language == "python"]
    with contextlib.redirect_stdout(output):
        exec(compile(program, "docs/install.md", "exec"), {"__name__": "install"})
    assert output.getvalue() == "torch.Size([3, 4])\n"


def test_every_extra_is_listed(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    text = (root / "docs" / "install.md").read_text()
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)))
    assert sorted(listed) == sorted(set(project["optional-dependencies"]) - {"test", "docs"})
