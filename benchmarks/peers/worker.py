"""A peer that runs in its own interpreter, seen from the benchmark."""

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
"""Peers that need nothing but torch, and so run in this environment."""


def installed(peer: str) -> bool:
    """Whether a peer can run; those that need more than torch do once `make bench-peers` has made their environment."""
    return peer in OWN or (ENVIRONMENTS / peer / "ready").exists()


class Worker:
    """Starts at once and gets its tables ready while the parent does other things; waits on stdin between its steps.

    Args:
        cores: Where it may run: what a library's threads do after a step shall not be taken from the other's time.
        home: The environment that it runs in, if that is not called as the peer.
        variables: Of its environment, beside this process's.
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
            raise RuntimeError(f"the worker of {self.peer} ended with status {self._process.wait()}; see above")
        return line

    def wait(self) -> None:
        """Wait until the tables are warm."""
        self._answer()

    def ask(self) -> None:
        """Has the worker run one step, without waiting for it."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")

    def answer(self) -> float:
        """Wait for the step; returns the seconds that the worker took for it."""
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
