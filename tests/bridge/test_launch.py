"""Settings that JAX reads when it starts its backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.jax
pytest.importorskip("jax")
from recis_hybrid.bridge import init, launch  # noqa: E402
from tests.support.programs import run_code  # noqa: E402


def test_init_configures_jax_once_and_warns_about_a_cpu_fallback(tmp_path: Path) -> None:
    code = """
import os, sys, warnings
import jax, torch
from recis_hybrid.bridge import init
os.environ["LOCAL_RANK"] = "3"
chosen = []
torch.cuda.is_available, torch.cuda.set_device = lambda: True, chosen.append
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    line = init(threads=1, memory_fraction=0.3, compilation_cache=sys.argv[1])
assert "on cpu" in line and "local rank 3" in line and "\\n" not in line, line
assert any("fell back to the CPU" in str(each.message) for each in caught)
assert chosen == [3] and jax.config._read("jax_cuda_visible_devices") == "3"
assert os.environ["NPROC"] == "1" and os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.3"
assert jax.config.jax_compilation_cache_dir == sys.argv[1]
jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(3))  # takes far less than a second to compile
assert any(name.endswith("-cache") for name in os.listdir(sys.argv[1])), os.listdir(sys.argv[1])
try:
    init()
except RuntimeError as error:
    print(error)
"""
    done = run_code(code, str(tmp_path), folder=tmp_path)
    assert "has started already" in done.stdout, done.stderr


def test_gpu_memory_is_preallocated_only_if_the_user_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import os, warnings
import jax, torch
from recis_hybrid.bridge import init
from tests.support.programs import run_code
torch.cuda.is_available, torch.cuda.set_device = lambda: True, lambda rank: None
seen = []
default_backend = jax.default_backend
jax.default_backend = lambda: seen.append(os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"]) or default_backend()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    init()
print(seen)
"""
    for given, expected in ((None, "false"), ("true", "true")):
        monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
        if given is not None:
            monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", given)
        done = run_code(code, folder=tmp_path)
        assert done.stdout.strip() == f"['{expected}']", done.stderr


def test_a_late_init_says_how_to_leave_memory_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "backend_has_started", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(RuntimeError, match="has started already.*XLA_PYTHON_CLIENT_PREALLOCATE=false"):
        init()


@pytest.mark.parametrize("rank", ["abc", "-1", "", "1.5"])
def test_a_local_rank_that_is_not_a_number_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(ValueError, match=f"LOCAL_RANK must be a non-negative integer, got '{rank}'"):
        init()


@pytest.mark.parametrize("options", [{"memory_fraction": 1.0}, {"memory_fraction": 0}, {"threads": 0}])
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"init: {next(iter(options))} must be .* got"):
        init(**options)
