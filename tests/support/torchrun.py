"""Programs on two ranks, started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def on_two_ranks(program: str, folder: Path, repository: Path) -> subprocess.CompletedProcess[str]:
    """Write a program into a folder and run it; return the process with the output of both ranks."""
    path = folder / "program.py"
    path.write_text(program)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
