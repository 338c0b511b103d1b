"""Output of ``make``: one line per package, and the duration of the tests."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path


def make(root: Path, *arguments: str, stdin: str = "") -> str:
    # The tests may run under a make, which passes its settings in these variables.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "PYTEST_ARGS")}
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=root,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pip_output_is_reduced_to_one_line_per_package(root: Path, tmp_path: Path) -> None:
    (tmp_path / "short.mk").write_text("include Makefile\nshort:\n\t@$(PIP_SHORT)\n")
    output = """\
Looking in links: /wheels
Collecting jaxlib==0.10.2 (from -c requirements/constraints.txt (line 38))
  Downloading jaxlib-0.10.2-cp311-cp311-manylinux_2_27_x86_64.whl (85.4 MB)
     ---------------------------------------- 85.4/85.4 MB 50.0 MB/s eta 0:00:00
Requirement already satisfied: torch==2.13.0 in ./.venv/lib (2.13.0)
  Using cached idna-3.20-py3-none-any.whl (70 kB)
Processing /some wheels/six-1.17.0-py2.py3-none-any.whl (from -r requirements/dev.txt (line 5))
Installing collected packages: six, idna, jaxlib
Successfully installed idna-3.20 jaxlib-0.10.2 six-1.17.0
"""
    assert make(root, "-f", str(tmp_path / "short.mk"), "short", stdin=output).splitlines() == [
        "  jaxlib-0.10.2-cp311-cp311-manylinux_2_27_x86_64.whl (85.4 MB)",
        "  idna-3.20-py3-none-any.whl (70 kB)",
        "  six-1.17.0-py2.py3-none-any.whl",
        "  installing all packages",
    ]


def test_a_run_of_all_tests_prints_its_duration_first(root: Path) -> None:
    full, partial = make(root, "--dry-run", "test"), make(root, "--dry-run", "test", "PYTEST_ARGS=tests/ops")
    duration = re.search(r"make test +Run the tests: (\d+ to \d+ minutes on two cores)", make(root, "help"))
    assert duration, "the help states no duration"
    assert f"all tests: {duration[1]}; `make test-quick` runs a sample" in full
    assert duration[1] not in partial
    assert f"take {duration[1]}" in (root / "CONTRIBUTING.md").read_text()
    assert re.search(r"-m pytest .*--dist=loadfile tests/ops$", partial, re.MULTILINE)
    assert re.search(r"-m pytest .*--quick", make(root, "--dry-run", "test-quick"))
