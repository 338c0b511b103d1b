"""Handle to a peer that runs in its own interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from benchmarks.workload import Workload

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / "build" / "peers"
OWN = {"nn.EmbeddingBag": "embedding_bag", "dict": "dict"}
"""Peers that only need torch and therefore run in this environment."""


def installed(peer: str) -> bool:
    """Return whether a peer can run: ``make bench-peers`` installs those that need more than torch."""
    return peer in OWN or (ENVIRONMENTS / peer / "ready").exists()


class Worker:
    """A process that fills its tables in the background and then waits for requests on stdin.

    Args:
        cores: Cores that it may use, so that threads that are still busy after a step do not slow the other side.
        home: Name of its environment, if it differs from the peer's.
        variables: Further environment variables.
    """

    def __init__(
        self,
        peer: str,
        work: Workload,
        rule: str,
        *,
        lr: float,
        device: torch.device,
        threads: int,
        clock: str,
        cores: set[int] | None = None,
        home: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.peer = peer
        self._folder = tempfile.TemporaryDirectory(prefix="recis-bench-")
        data = Path(self._folder.name)
        np.save(data / "ids.npy", torch.stack(work.ids).cpu().numpy())
        np.save(data / "rows.npy", torch.stack([torch.stack(rows) for rows in work.rows]).cpu().numpy())
        np.save(data / "gradients.npy", torch.stack(work.gradients).cpu().numpy())
        python = sys.executable if peer in OWN else ENVIRONMENTS / (home or peer) / "bin" / "python"
        command = [python, "-W", "ignore", HERE / f"{OWN.get(peer, peer)}_worker.py"]
        command += ["--data", data, "--rule", rule, "--lr", lr, "--threads", threads, "--clock", clock]
        command += ["--device", device]
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
        if cores is not None:
            os.sched_setaffinity(self._process.pid, cores)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError(
                f"the worker of {self.peer} exited with status {self._process.wait()}; its messages are above"
            )
        return line

    def wait(self) -> None:
        """Wait until the worker's tables are warm."""
        self._answer()

    def ask(self) -> None:
        """Request one step without waiting for it."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")

    def answer(self) -> float:
        """Wait for the requested step and return the seconds that it took."""
        return float(self._answer())

    def step(self) -> float:
        """Run one step and return the seconds that it took."""
        self.ask()
        return self.answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        self._folder.cleanup()
