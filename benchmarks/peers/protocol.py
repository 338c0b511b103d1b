"""Protocol between a benchmark and a worker in the peer's own interpreter; imports neither torch nor tensorflow.

The parent writes the workload as .npy files. The worker prints ``ready`` once its tables are warm, and answers every
line ``step`` with the seconds of a step. It exits at the end of its input.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Task:
    """The task of a worker, from its command line: ids ``[features, n]``, rows ``[batches, features, samples]``."""

    def __init__(self) -> None:
        # Libraries may print to stdout, so answers use a separate stream.
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        parser = argparse.ArgumentParser()
        parser.add_argument("--data", type=Path, required=True)
        parser.add_argument("--rule", required=True)
        parser.add_argument("--lr", type=float, required=True)
        parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
        parser.add_argument("--threads", type=int, required=True)
        parser.add_argument("--clock", choices=list(CLOCKS), required=True)
        args = parser.parse_args()
        self.rule: str = args.rule
        self.lr: float = args.lr
        self.device: str = args.device
        self.threads: int = args.threads
        self.ids: np.ndarray = np.load(args.data / "ids.npy")
        self.rows: np.ndarray = np.load(args.data / "rows.npy")
        self.gradients: np.ndarray = np.load(args.data / "gradients.npy")  # [features, samples, dim]
        self._now = CLOCKS[args.clock]

    def serve(self, step: Callable[[int], object]) -> None:
        """Run ``step(batch)`` on each request, cycling through the batches."""
        print("ready", file=self._answers)
        for number, _ in enumerate(sys.stdin):
            begin = self._now()
            step(number % len(self.rows))
            print(self._now() - begin, file=self._answers)
