"""Faults that checkpoints must survive, each at many random moments; prints a table of tried and survived.

    python -m tests.saver.faults [--times 20] [--seed 0] [--only kill_in_save] [--json]

A small training run (tables, Adam, a tower, a reading position) saves every other step, in full or incrementally. It is
disturbed and resumed from the latest checkpoint, and must end bitwise identical to an undisturbed run. Each run is
forked from this process, which never uses threads, so that torch is imported only once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from recis_hybrid import optim
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, Placement, Unused, dense_parameters
from recis_hybrid.saver import CheckpointError, Saver
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.storage.lease import LEASE
from tests.saver.fakes import edit_manifest

STEPS, BATCH, EVERY = 16, 64, 2
PATIENCE_S = 120


class Run(nn.Module):
    """Objects of a training program."""

    def __init__(self, data: Path, *, on_disk: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        # A cache for a third of the rows, and a little more than those of a batch.
        disk = Placement(blocks="disk", path=data.parent, cache_bytes=26_000) if on_disk else None
        configs = {
            "user": EmbeddingConfig(dim=8, placement=disk),
            "item": EmbeddingConfig(dim=8, admission=MinFrequency(2)),
        }
        self.engine = EmbeddingEngine(configs, optimizer=optim.Adam)
        self.tower = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.sparse = optim.Adam(self.engine.parameters(), lr=0.01)
        self.dense = torch.optim.Adam(dense_parameters(self), lr=0.01)
        self.data = ColumnDataset(str(data), ["user", "item", "label"], BATCH, shuffle=True, seed=3)

    def train_step(self, batch: dict[str, Any], step: int) -> None:
        vectors = self.engine({name: batch[name] for name in ("user", "item")})
        scores = self.tower(torch.cat([vectors["user"], vectors["item"]], 1))[:, 0]
        for optimizer in (self.sparse, self.dense):
            optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(scores, batch["label"]).backward()
        for optimizer in (self.sparse, self.dense):
            optimizer.step()
        if step % 5 == 0:
            self.engine.evict(Unused(4))

    def parts(self) -> dict[str, object]:
        return {"engine": self.engine, "model": self, "sparse": self.sparse, "dense": self.dense, "data": self.data}


def train(
    root: Path,
    data: Path,
    end: Path,
    tell: Callable[[str], object],
    *,
    asynchronous: bool = False,
    latest: int | None = None,
    on_disk: bool = True,
) -> None:
    """Resume from the latest checkpoint (or ``latest``), and save the final state to ``end``."""
    run, saver = Run(data, on_disk=on_disk), Saver(root, keep=4, async_save=asynchronous)
    tell("l")
    wanted = saver.latest() if latest is None else latest
    step = 0 if wanted is None else saver.load(run.parts(), wanted)
    tell("L")
    for batch in run.data:
        step += 1
        run.train_step(batch, step)
        if step % EVERY == 0:
            tell("s")
            saver.save(step, run.parts(), delta=step % 8 != 2)
            tell("e")
    saver.wait()
    Saver(end).save(step, run.parts())


def write_data(path: Path) -> None:
    draw, n = np.random.default_rng(0), STEPS * BATCH
    columns = {name: draw.integers(-300, 300, n) for name in ("user", "item")}
    pq.write_table(pa.table({**columns, "label": draw.integers(0, 2, n).astype(np.float32)}), path)


class Child:
    """A forked process, whose events arrive by a pipe."""

    def __init__(self, work: Callable[[Callable[[str], object]], object]) -> None:
        read, write = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(read)
                work(lambda event: os.write(write, event.encode()))
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        os.close(write)
        self._read = read
        self.events: list[tuple[str, float]] = []

    def wait_for(self, event: str, count: int = 1) -> bool:
        """Return whether an event occurred that often before the process ended."""
        while sum(e == event for e, _ in self.events) < count:
            if not select.select([self._read], [], [], PATIENCE_S)[0]:
                self.kill()
                raise AssertionError(f"no event {event!r}, and none at all for {PATIENCE_S} s, only {self.events}")
            raw = os.read(self._read, 1)
            if not raw:
                return False
            self.events.append((raw.decode(), time.monotonic()))
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.ended()

    def ended(self) -> int:
        """Wait for the end. Returns the exit status, below 0 for a signal."""
        while self.wait_for("no such event"):
            pass
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._read)
        return status


class Trial:
    """One disturbance, with its folder and its random generator."""

    def __init__(self, folder: Path, data: Path, expected: Path, times: dict[str, float], seed: str) -> None:
        self.root, self.end = folder / "run", folder / "end"
        self.folder, self.data, self.expected, self.times = folder, data, expected, times
        self.draw = random.Random(seed)

    def child(self, **options: Any) -> Child:
        return Child(lambda tell: train(self.root, self.data, self.end, tell, **options))

    def kill(self, event: str, within: str, count: int, **options: Any) -> None:
        """Kill a run a random time after an event."""
        child = self.child(**options)
        if child.wait_for(event, count):
            time.sleep(self.draw.uniform(0, 1.3 * self.times[within]))
        child.kill()
        self.sound()
        shutil.rmtree(self.end, ignore_errors=True)  # of a run that ended before the kill

    def sound(self) -> None:
        """Verify every listed checkpoint."""
        for step in Saver(self.root).steps():
            checkpoint = StoredCheckpoint(self.root, step)
            for part in checkpoint.manifest.parts:
                checkpoint.verify(part)

    def finish(self, **options: Any) -> None:
        """Resume undisturbed, and check that the run ends bitwise identical to the undisturbed run."""
        assert self.child(**options).ended() == 0, "the resumed run failed"
        assert contents(self.end) == contents(self.expected), "the final state differs"
        # The next save removes what a run killed after its last save left behind.
        assert Child(lambda _: Saver(self.root, keep=None).save(10**6, {"note": 1})).ended() == 0, (
            "nothing can be saved"
        )
        assert {e.name for e in self.root.iterdir() if e.name != LEASE} == {
            f"step_{step:06d}" for step in Saver(self.root).steps()
        }


def refusal(call: Callable[[], object]) -> str | None:
    """Return the saver's error for a call, or None."""
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return None


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.safetensors"))}


def kill_in_save(t: Trial) -> None:
    for _ in range(t.draw.randint(1, 3)):
        t.kill("s", "save", t.draw.randint(1, 4))
    t.finish()


def kill_in_async_save(t: Trial) -> None:
    for _ in range(t.draw.randint(1, 3)):
        t.kill("e", "async", t.draw.randint(1, 4), asynchronous=True)
    t.finish(asynchronous=True)


def kill_in_load(t: Trial) -> None:
    t.kill("e", "save", 3)
    for _ in range(2):
        t.kill("l", "load", 1)
    t.finish()


def kill_between_base_and_delta(t: Trial) -> None:
    child = t.child()
    assert child.wait_for("e", 1)  # step 2 is full, and step 4 would build on it
    child.kill()
    assert StoredCheckpoint(t.root, 2).manifest.previous is None
    t.sound()
    child = t.child()
    assert child.wait_for("e", 1)
    child.kill()
    t.finish()


def disk_full(t: Trial) -> None:
    """Check that a run whose disk fills up at a random save fails there, with earlier checkpoints whole."""
    t.root.mkdir()
    limit = t.draw.randrange(60_000, 400_000)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", str(t.root)], capture_output=True, check=False
    )

    def limited(tell: Callable[[str], object]) -> None:
        if mounted.returncode != 0:  # limit the size of files, which is also a write error
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            limit = t.draw.randrange(1000, 20_000)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        # The limit would be one of the records on disk, too.
        text = refusal(lambda: train(t.root, t.data, t.folder / "unused", tell, on_disk=mounted.returncode == 0))
        assert "could not be written" in (text or "could not be written"), text
        os._exit(0 if text is None else 7)

    try:
        status = Child(limited).ended()
        assert status in (0, 7), f"exit status {status}"
        t.sound()
        if mounted.returncode == 0:  # continue with more space
            again = t.folder / "copied"
            shutil.copytree(t.root, again)
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(t.root)], check=True)
    if mounted.returncode == 0:
        t.root.rmdir()
        again.rename(t.root)
    t.finish()


def damaged_file(t: Trial) -> None:
    """Check that a damaged file of a chain is refused by name, and that the run resumes from an intact step."""
    child = t.child()
    assert child.wait_for("e", t.draw.randint(4, 7))
    child.kill()
    steps = Saver(t.root).steps()
    latest = StoredCheckpoint(t.root, steps[-1])
    chain = [latest.directory]
    while latest.manifest.previous is not None:
        latest = latest.previous()
        chain.append(latest.directory)
    path = t.draw.choice(sorted(p for d in chain for p in d.rglob("*") if p.is_file()))
    data, harm = bytearray(path.read_bytes()), t.draw.choice(["truncated", "flipped", "missing", "foreign", "other"])
    if harm == "truncated":
        path.write_bytes(data[: t.draw.randrange(len(data))])
    elif harm == "flipped":
        data[t.draw.randrange(len(data))] ^= 1 << t.draw.randrange(8)
        path.write_bytes(data)
    elif harm == "missing":
        path.unlink()
    elif harm == "foreign":
        (path.parent / "notes.txt").write_text("mine")
    else:
        path.write_bytes(t.draw.randbytes(len(data)))
    table = path.parent.name if path.parent.parent.name == "engine" else None
    text = refusal(lambda: Saver(t.root).load(Run(t.data).parts(), steps[-1]))
    assert text is not None, f"{path} was {harm}, but loaded"
    # The error names the file and its table, or the broken link of the chain.
    link = f"step {int(path.parent.name[5:])}, which" if path.name == "manifest.json" else path.name
    manifest = chain[0] / "manifest.json"  # without it there is no checkpoint of that step
    assert any(name in text for name in (path.name, "notes.txt", link)) or path == manifest, text
    assert table is None or harm in ("foreign", "missing", "truncated") or f"table {table!r}" in text, text
    sound = next((s for s in reversed(steps) if readable(t.root, s)), None)
    assert sound is not None or path.is_relative_to(chain[-1]), "nothing is left"
    for step in steps:
        if sound is None or step > sound:
            shutil.rmtree(t.root / f"step_{step:06d}")
    t.finish()


def readable(root: Path, step: int) -> bool:
    try:
        checkpoint = StoredCheckpoint(root, step)
        for part in checkpoint.manifest.parts:
            checkpoint.verify(part)
    except (CheckpointError, OSError):
        return False
    return True


def malicious_manifest(t: Trial) -> None:
    """Check that false manifests with correct seals are refused without reading other files or allocating memory."""
    child = t.child()
    assert child.wait_for("e", 2)
    child.kill()
    directory = t.root / f"step_{max(Saver(t.root).steps()):06d}"
    outside = t.folder / "outside.safetensors"
    outside.write_bytes(b"secret")
    lies: list[Callable[[dict[str, Any]], object]] = [
        lambda d: of_table(d)["ranges"][0]["file"].update(path="../../outside.safetensors"),
        lambda d: of_table(d)["ranges"][0]["file"].update(path=str(outside)),
        lambda d: d["parts"]["model"]["file"].update(path="dense/../../../outside.safetensors"),
        lambda d: (of_table(d).update(rows=2**60), of_table(d)["ranges"][0].update(rows=2**60)),
        lambda d: of_table(d).update(rows=-1),
        lambda d: of_table(d)["ranges"][0]["file"].update(size=2**62),
        lambda d: of_table(d)["columns"][1].update(dtype="int64"),
        lambda d: of_table(d)["columns"][1].update(shape=[2**50]),
        lambda d: d["parts"]["engine"]["meta"].update(seed=float("nan")),
        lambda d: d.update(step=float("nan")),
        lambda d: d.update(previous={"step": 0, "sha256": "0" * 64}),
        lambda d: d.update(previous={"step": 10**9, "sha256": "0" * 64}),
    ]
    edit_manifest(directory, t.draw.choice(lies))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = Run(t.data)
    weights = run.tower[0].weight.detach().clone()
    text = refusal(lambda: Saver(t.root).load(run.parts()))
    assert text is not None, "a false manifest was loaded"
    assert "secret" not in text
    assert torch.equal(weights, run.tower[0].weight)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "memory was allocated"
    shutil.rmtree(directory)
    t.finish()


def of_table(document: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = document["parts"]["engine"]["tables"]["user"]
    return table


def two_jobs(t: Trial) -> None:
    """Check that a second job is refused while the first lives, and that a killed job leaves no lock."""
    first = t.child()
    assert first.wait_for("e", t.draw.randint(1, 2))
    os.kill(first.pid, signal.SIGSTOP)  # so that it does not end before the second job saves

    def second(_: Callable[[str], object]) -> None:
        assert "another saver saves here" in (refusal(lambda: Saver(t.root).save(1000, {"note": 1})) or "")
        os._exit(7)

    assert Child(second).ended() == 7
    first.kill()
    t.finish()


FAULTS = {
    fault.__name__: fault
    for fault in (
        *(kill_in_save, kill_in_async_save, kill_in_load, kill_between_base_and_delta),
        *(disk_full, damaged_file, malicious_manifest, two_jobs),
    )
}


def undisturbed(folder: Path, data: Path) -> dict[str, float]:
    """Run undisturbed to get the expected end. Returns the seconds of saves and loads, for random kills."""
    times = {}
    for name, asynchronous in (("save", False), ("async", True)):
        child = Child(
            lambda tell, a=asynchronous: train(folder / str(a), data, folder / f"end{a}", tell, asynchronous=a)  # type: ignore[misc]
        )
        assert child.ended() == 0
        at = {event: [when for e, when in child.events if e == event] for event in "sel"}
        spans = [e - s for s, e in zip(at["s"], at["e"], strict=True)]
        times[name] = sum(spans) / len(spans)
    times["async"] = times["save"]  # the background save continues for as long as a synchronous one
    assert contents(folder / "endFalse") == contents(folder / "endTrue")
    child = Child(lambda tell: train(folder / "False", data, folder / "again", tell))
    assert child.ended() == 0
    (_, begin), (_, end) = child.events[:2]
    times["load"] = end - begin
    return times


def main() -> int:
    """Run the faults. Returns 1 if one was not survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="trials of each fault")
    parser.add_argument("--seed", default="0", help="seed of the random moments")
    parser.add_argument("--only", choices=sorted(FAULTS), help="one fault")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder_name:
        base = Path(folder_name)
        data = base / "data.parquet"
        assert Child(lambda _: write_data(data)).ended() == 0
        times = undisturbed(base, data)
        for name, fault in FAULTS.items():
            if args.only not in (None, name):
                continue
            print(name, file=sys.stderr, flush=True)
            result = results[name] = {"tried": 0, "survived": 0, "failures": []}
            for number in range(args.times):
                folder = base / f"{name}{number}"
                folder.mkdir()
                result["tried"] += 1
                try:
                    fault(Trial(folder, data, base / "endFalse", times, f"{args.seed}.{name}.{number}"))
                    result["survived"] += 1
                except Exception as error:
                    result["failures"].append(f"trial {number}: {type(error).__name__}: {error}")
                    traceback.print_exc()
                shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(results))
    else:
        print(f"{'fault':30} {'tried':>6} {'survived':>9}")
        for name, result in results.items():
            print(f"{name:30} {result['tried']:6} {result['survived']:9}")
    return int(any(result["failures"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
