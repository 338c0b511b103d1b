"""A peer that runs in its own interpreter, seen from the benchmark."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from benchmarks.workload import Workload

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / "build" / "peers"


def installed(peer: str) -> bool:
    """Whether `make bench-peers` has made the peer's environment."""
    return (ENVIRONMENTS / peer / "ready").exists()


class Worker:
    """Starts at once and gets its tables ready while the parent does other things; waits on stdin between its steps."""

    def __init__(
        self, peer: str, work: Workload, rule: str, *, lr: float, threads: int, clock: str, home: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.peer = peer
        self._folder = tempfile.TemporaryDirectory(prefix="recis-bench-")
        data = Path(self._folder.name)
        np.save(data / "ids.npy", torch.stack(work.ids).numpy())
        np.save(data / "rows.npy", torch.stack([torch.stack(rows) for rows in work.rows]).numpy())
        np.save(data / "gradients.npy", torch.stack(work.gradients).numpy())
        command = [ENVIRONMENTS / (home or peer) / "bin" / "python", "-W", "ignore", HERE / f"{peer}_worker.py"]
        command += ["--data", data, "--rule", rule, "--lr", lr, "--threads", threads, "--clock", clock]
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment | limits | dict(variables or {}),
        )

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"the worker of {self.peer} ended with status {self._process.wait()}; see above")
        return line

    def wait(self) -> None:
        """Waits until the tables are warm."""
        self._answer()

    def ask(self) -> None:
        """Has the worker run one step, without waiting for it."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")

    def answer(self) -> float:
        """Waits for the step; returns the seconds that the worker took for it."""
        return float(self._answer())

    def step(self) -> float:
        """Has the worker run one step; returns the seconds that the worker took for it."""
        self.ask()
        return self.answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        self._folder.cleanup()
