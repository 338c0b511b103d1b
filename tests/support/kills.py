"""Kill a program with SIGKILL at each call that changes the disk, with one fork per call.

Forking avoids importing torch repeatedly. A child counts the calls that change the disk and kills itself at one of
them: before the call, or halfway through a call that writes a file.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_left = -1


def _counted(owner: Any, name: str) -> None:
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        global _left
        _left -= 1
        if _left == -1:
            if name == "write_file":
                real(*args, **kwargs)
                os.truncate(args[0], os.path.getsize(args[0]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, call)


def kill_at_every_moment(work: Callable[[], object], root: str, base: str, calls: list[tuple[Any, str]]) -> None:
    """Run ``work`` repeatedly on a copy of ``base`` in ``root``, and print the exit status of each run.

    The folder after run n is copied to ``base``.n; the last run is not killed.

    Args:
        work: The function to kill.
        root: The folder that it works in.
        base: The initial contents of the folder.
        calls: Functions at which to kill it, as owner and name, in addition to those of the standard library;
            ``write_file`` leaves half of the file.
    """
    global _left
    for owner, name in [
        (os, "fsync"),
        (os, "unlink"),
        (os, "rmdir"),
        (pathlib.Path, "mkdir"),
        (pathlib.Path, "rename"),
        *calls,
    ]:
        _counted(owner, name)
    moment, ends = 0, list[int]()
    while not ends or os.WIFSIGNALED(ends[-1]):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root)
        child = os.fork()
        if child == 0:
            try:
                _left = moment
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        ends.append(os.waitpid(child, 0)[1])
        shutil.copytree(root, f"{base}.{moment}")
        moment += 1
    print(json.dumps(ends))


def killed(program: str, repository: Path, *arguments: str) -> int:
    """Run a program that calls ``kill_at_every_moment`` once, with these arguments.

    Returns:
        The number of runs; all but the last were killed, and the last succeeded.
    """
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    ends: list[int] = json.loads(done.stdout)
    assert all(os.WTERMSIG(end) == signal.SIGKILL for end in ends[:-1])
    assert ends[-1] == 0, done.stderr
    return len(ends)
