"""Simulate the loss of one of two hosts during training, with two network namespaces on one machine.

    sudo python scripts/two_hosts.py [--ranks 1] [--timeout 6]

Each "host" is a namespace with a loopback interface, its own address, and one end of a virtual cable, the only
connection between the two. A torchrun on each joins a c10d rendezvous, and their ranks train shared tables. Then the
second host's end of the cable is taken down without closing connections, as when a switch fails. The ranks of the first
host must raise ExchangeError within the timeout of their process group, and their torchrun must fail.

The last line is JSON: steps before the cut, seconds from the cut to the error and to the end of torchrun, the error
message. Exit status 0 if everything happened as expected, 1 if not, 77 if the machine cannot create namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.254.77.1", "10.254.77.2")
PORT = 29577
SKIPPED = 77
STEPS_BEFORE = 20
SLACK_S = 5.0
"""Time after the timeout for processes to notice the loss and for Python to exit."""


class Unsupported(Exception):
    """The machine cannot run the simulation."""


def ip(*arguments: str) -> None:
    """Run ``ip``.

    Raises:
        Unsupported: If it fails.
    """
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise Unsupported(f"`ip {' '.join(arguments)}` failed: {result.stderr.strip()}")


class Hosts:
    """Two namespaces and the cable between them; leaving the context removes them."""

    def __init__(self) -> None:
        self.names = [f"recis-host{number}-{os.getpid()}" for number in range(2)]

    def __enter__(self) -> Hosts:
        if os.geteuid() != 0:
            raise Unsupported("network namespaces require root; run it with sudo")
        if shutil.which("ip") is None:
            raise Unsupported("the command `ip` is required; install iproute2")
        try:
            for name in self.names:
                ip("netns", "add", name)
            first, second = self.names
            ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "cable", "up")
        except Unsupported:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def cut(self) -> None:
        """Take the second host off the network."""
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def start(self, number: int, ranks: int, timeout_s: float, log: Path) -> subprocess.Popen[bytes]:
        """Start torchrun on a host.

        Args:
            number: Index of the host, 0 or 1.
            ranks: Number of ranks on the host.
            timeout_s: Timeout of the process group in seconds.
            log: File for the output.
        """
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--nproc-per-node",
            str(ranks),
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"{ADDRESSES[0]}:{PORT}",
            "--rdzv-id",
            "rehearsal",
            "--rdzv-conf",
            f"is_host={int(number == 0)}",
            "--local-addr",
            ADDRESSES[number],
            str(Path(__file__).resolve()),
            "--train",
            str(timeout_s),
        ]
        variables = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
        with log.open("wb") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[number], *torchrun],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **variables},
                start_new_session=True,
            )


def train(timeout_s: float) -> None:
    """Train on one rank until an exchange fails."""
    import torch
    import torch.distributed as dist

    from recis_hybrid import optim
    from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, ExchangeError

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    rank = dist.get_rank()
    engine = EmbeddingEngine({"user": EmbeddingConfig(dim=16)}, optimizer=optim.Adam)
    optimizer = optim.Adam(engine.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(rank)
    step = 0
    try:
        while True:
            ids = torch.randint(0, 5000, (1000,), generator=generator)
            engine({"user": ids})["user"].square().mean().backward()
            optimizer.step()
            step += 1
            print(f"rank {rank} step {step}", flush=True)
    except ExchangeError as error:
        print(f"rank {rank} after step {step}: ExchangeError: {error}", flush=True)
        sys.exit(3)


def simulate(ranks: int, timeout_s: float) -> int:
    """Run the simulation, print the JSON line, and return the exit status."""
    with tempfile.TemporaryDirectory(prefix="recis-hosts-") as folder, Hosts() as hosts:
        logs = [Path(folder, f"host{number}") for number in range(2)]
        runs = [hosts.start(number, ranks, timeout_s, log) for number, log in enumerate(logs)]
        try:
            wait_for(lambda: all(f" step {STEPS_BEFORE}\n" in log.read_text() for log in logs), runs, logs, 120)
            hosts.cut()
            begin = time.monotonic()
            first = logs[0]
            wait_for(lambda: first.read_text().count("ExchangeError: ") == ranks, runs[:1], logs, timeout_s + SLACK_S)
            seconds = time.monotonic() - begin
            status = runs[0].wait(60)
            ended = time.monotonic() - begin
            message = next(line for line in first.read_text().splitlines() if "ExchangeError: " in line)
        finally:
            for run in runs:
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGKILL)
                    run.wait()
    passed = status != 0 and seconds <= timeout_s + SLACK_S and "another rank has died" in message
    print(
        json.dumps(
            {
                "hosts": 2,
                "ranks": 2 * ranks,
                "steps": int(message.split("after step ")[1].split(":")[0]),
                "timeout_s": timeout_s,
                "error_after_s": round(seconds, 1),
                "torchrun_ended_after_s": round(ended, 1),
                "message": message,
                "passed": passed,
            }
        )
    )
    return 0 if passed else 1


def wait_for(
    condition: Callable[[], bool], runs: list[subprocess.Popen[bytes]], logs: list[Path], seconds: float
) -> None:
    """Wait until a condition on the logs holds.

    Args:
        condition: The condition.
        runs: Processes that must not exit before it holds.
        logs: Logs to print if it does not hold in time.
        seconds: Maximum time to wait.

    Raises:
        SystemExit: If the time is over, or a process exits.
    """
    begin = time.monotonic()
    while not condition():
        late = time.monotonic() - begin > seconds
        if late or (any(run.poll() is not None for run in runs) and not condition()):
            ends = "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in logs)
            sys.exit(f"two_hosts: {f'no result within {seconds:.0f} s' if late else 'torchrun exited early'}\n{ends}")
        time.sleep(0.05)


def main() -> int:
    """Run the command and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="ranks on each host (1)")
    parser.add_argument("--timeout", type=float, default=6.0, help="timeout of the process group in seconds (6)")
    parser.add_argument("--train", type=float, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        train(args.train)
        return 0
    try:
        return simulate(args.ranks, args.timeout)
    except Unsupported as error:
        print(f"scripts/two_hosts.py: skipped: {error}")
        return SKIPPED


if __name__ == "__main__":
    sys.exit(main())
