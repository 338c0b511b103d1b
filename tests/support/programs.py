"""Programs in new processes, forked from a server that has already imported what most of them import."""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = [
    "torch._dynamo",  # imported by the first optimizer
    "jax",
    "optax",
    "recis_hybrid.app.cli",
    "tests.support.sharded",
    "tests.support.sharded_saves",
]
"""Modules that the server imports. None of them starts a thread, JAX's backend included."""


def server() -> ForkServerContext:
    """Return the context of the server, which each process of the tests has one of."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def in_processes(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call ``function(number, *arguments)`` in that many processes, and wait for them.

    Raises:
        torch.multiprocessing.ProcessException: A process has failed.
    """
    server()
    torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")  # type: ignore[no-untyped-call]


def free_port() -> int:
    """Return the number of a port that is not in use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def redirect(output: Path, errors: Path) -> None:
    """Write the output of this process to files; that of a forked process would go where the server's goes."""
    for number, name in enumerate((output, errors), 1):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)


class Program:
    """A program that runs like ``python program arguments``.

    Args:
        program: The file; its output is stored beside it.
        arguments: Its arguments.
        folder: The working directory.
        path: Folders, besides the program's, of modules that are not installed.
        environment: More environment variables. ``OMP_NUM_THREADS`` also sets torch's number of threads, and variables
            that a module of ``PRELOADED`` reads when it is imported have no effect.
        number: Distinguishes the output of several processes.
    """

    def __init__(
        self,
        program: Path,
        arguments: Sequence[str] = (),
        *,
        folder: Path,
        path: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
        number: int = 0,
    ) -> None:
        self._arguments = [str(program), *arguments]
        self._outputs = [program.with_suffix(f".{number}.{kind}") for kind in ("out", "err")]
        everything = {**os.environ, **(environment or {})}
        arguments_of_main = (self._arguments, folder, path, everything, self._outputs)
        self.process = server().Process(target=_main, args=arguments_of_main)
        self.process.start()

    def finish(self, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for the end and return it.

        Raises:
            subprocess.TimeoutExpired: The program was killed after ``timeout_s`` seconds.
        """
        self.process.join(timeout_s)
        late = self.process.is_alive()
        self.process.kill()
        self.process.join()
        output, errors = (each.read_text() if each.exists() else "" for each in self._outputs)
        if late:
            raise subprocess.TimeoutExpired(self._arguments, timeout_s, output, errors)
        return subprocess.CompletedProcess(self._arguments, self.process.exitcode or 0, output, errors)


def run_code(code: str, *arguments: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Write a program, which may import ``tests``, to a folder, and run it in the root of the repository."""
    program = folder / "program.py"
    program.write_text(code)
    return Program(program, arguments, folder=ROOT, path=[ROOT], **options).finish()


def start_ranks(program: Path, arguments: Sequence[str] = (), ranks: int = 2) -> list[Program]:
    """Start a program, which may import ``tests``, on several ranks, with the variables that torchrun sets."""
    size = str(ranks)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    shared["OMP_NUM_THREADS"] = "1"
    return [
        Program(
            program,
            arguments,
            folder=ROOT,
            path=[ROOT],
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            number=rank,
        )
        for rank in range(ranks)
    ]


def on_two_ranks(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Write a program to a folder and run it on two ranks; end both as soon as one has failed.

    Return the process, with the output of rank 0 before that of rank 1.
    """
    program = folder / "program.py"
    program.write_text(code)
    ranks = start_ranks(program)
    running, end = ranks, time.monotonic() + 300
    while running and not any(rank.process.exitcode for rank in ranks) and time.monotonic() < end:
        wait([rank.process.sentinel for rank in running], max(0.0, end - time.monotonic()))
        running = [rank for rank in running if rank.process.is_alive()]
    failures = [code for rank in ranks if (code := rank.process.exitcode)]
    for rank in running if failures else ():
        rank.process.kill()
        rank.process.join()
    done = [rank.finish(0) for rank in ranks]
    output, errors = ("".join(texts) for texts in zip(*((each.stdout, each.stderr) for each in done), strict=True))
    return subprocess.CompletedProcess([str(program)], failures[0] if failures else 0, output, errors)


def _main(
    arguments: list[str], folder: Path, path: Sequence[Path], environment: dict[str, str], outputs: list[Path]
) -> None:
    """Run a program in this process, as Python would."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    redirect(*outputs)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if ROOT not in path:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        sys.path = [each for each in sys.path if Path(each or ".").resolve() != ROOT]
    sys.path[:0] = [str(Path(arguments[0]).parent), *map(str, path)]
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:  # as Python ends; a forked process leaves out the functions of atexit
        threading._shutdown()
        atexit._run_exitfuncs()
