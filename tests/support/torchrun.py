"""Programs on two ranks, launched with torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def on_two_ranks(program: str, folder: Path, repository: Path) -> subprocess.CompletedProcess[str]:
    """Write a program to a folder and run it; return the process, with the output of rank 0 before that of rank 1.

    Each rank writes to separate files, because lines would interleave in a shared pipe.
    """
    path, logs = folder / "program.py", folder / "logs"
    path.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--log-dir", str(logs), "--redirects", "3", str(path)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
    output = [
        "".join(log.read_text() for log in sorted(logs.glob(f"**/{rank}/{stream}.log")))
        for stream in ("stdout", "stderr")
        for rank in range(2)
    ]
    return subprocess.CompletedProcess(
        done.args, done.returncode, "".join(output[:2]), "".join(output[2:]) + done.stderr
    )
