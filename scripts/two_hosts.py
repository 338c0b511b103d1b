"""A dress rehearsal of two hosts on one machine: two network namespaces, of which one is cut off in mid-run.

    sudo python scripts/two_hosts.py [--ranks 1] [--timeout 6]

Each "host" is a namespace with a loopback and one end of a virtual cable, and with an address of its own; the other's
processes can be reached in no other way. A torchrun on each meets the other by its c10d rendezvous, and their ranks
train tables that they share. Then the cable's end at the second host is taken down, which closes no connection, as when
a switch fails: the ranks of the first host must end with an ExchangeError within the timeout of their process group,
and their torchrun with a failure.

The last line is JSON: steps done before the cut, seconds from it to the error and to the end of torchrun, what was
said. It exits with 0 if all was as it must be, 1 if not, and 77 where the machine cannot make namespaces.
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
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.254.77.1", "10.254.77.2")
PORT = 29577
SKIPPED = 77
STEPS_BEFORE = 20
SLACK_S = 5.0
"""Beside the timeout: until processes notice, and Python has ended."""


class Refused(Exception):
    """The machine lacks what the rehearsal needs."""


def ip(*arguments: str) -> None:
    """Run `ip`; a failure is a Refused."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Refused(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")


class Hosts:
    """Two namespaces and the cable between them, as long as the context lasts."""

    def __init__(self) -> None:
        self.names = [f"recis-host{number}-{os.getpid()}" for number in range(2)]

    def __enter__(self) -> Hosts:
        if os.geteuid() != 0:
            raise Refused("it needs root, to make network namespaces; run it by sudo")
        if shutil.which("ip") is None:
            raise Refused("it needs the command `ip`; install iproute2")
        try:
            for name in self.names:
                ip("netns", "add", name)
            first, second = self.names
            ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "cable", "up")
        except Refused:
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
        """Start torchrun on a host."""
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
            "--rank-of",
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


def rank_of(timeout_s: float) -> None:
    """What each rank runs: trains, until that fails."""
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


def rehearse(ranks: int, timeout_s: float) -> int:
    """Does it, prints the line, and returns the status to exit with."""
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
            said = next(line for line in first.read_text().splitlines() if "ExchangeError: " in line)
        finally:
            for run in runs:
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGKILL)
                    run.wait()
    good = status != 0 and seconds <= timeout_s + SLACK_S and "another rank has died" in said
    print(
        json.dumps(
            {
                "hosts": 2,
                "ranks": 2 * ranks,
                "steps": int(said.split("after step ")[1].split(":")[0]),
                "timeout_s": timeout_s,
                "error_after_s": round(seconds, 1),
                "torchrun_ended_after_s": round(ended, 1),
                "said": said,
                "as_it_must_be": good,
            }
        )
    )
    return 0 if good else 1


def wait_for(happened, runs: list[subprocess.Popen[bytes]], logs: list[Path], seconds: float) -> None:  # type: ignore[no-untyped-def]
    """Wait until something is in the logs.

    Raises:
        SystemExit: With the logs, if it is not there in time.
    """
    begin = time.monotonic()
    while not happened():
        late = time.monotonic() - begin > seconds
        if late or (any(run.poll() is not None for run in runs) and not happened()):
            ends = "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in logs)
            sys.exit(f"two_hosts: {f'nothing in {seconds:.0f} s' if late else 'torchrun ended'}\n{ends}")
        time.sleep(0.05)


def main() -> int:
    """The command; returns the status to exit with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="of each host (1)")
    parser.add_argument("--timeout", type=float, default=6.0, help="of the ranks' process group, seconds (6)")
    parser.add_argument("--rank-of", type=float, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of is not None:
        rank_of(args.rank_of)
        return 0
    try:
        return rehearse(args.ranks, args.timeout)
    except Refused as refusal:
        print(f"scripts/two_hosts.py: left out: {refusal}")
        return SKIPPED


if __name__ == "__main__":
    sys.exit(main())
