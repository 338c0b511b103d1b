"""Import of the bridge: under one name, with a clear error without JAX, and without starting a backend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)


def test_a_second_copy_is_refused(root: Path) -> None:
    done = run(root, "import bridge")
    assert done.returncode != 0
    assert "use `import recis_hybrid.bridge`" in done.stderr


def test_the_error_without_jax_says_what_to_install(root: Path) -> None:
    done = run(root, "import sys; sys.modules['jax'] = None\nimport recis_hybrid.bridge")
    assert done.returncode != 0
    assert "pip install recis_hybrid[jax]" in done.stderr


def test_importing_the_bridge_starts_no_backend(root: Path) -> None:
    code = "import recis_hybrid.bridge, jax; from jax._src import xla_bridge as b; print(b.backends_are_initialized())"
    assert run(root, code).stdout.strip() == "False"
