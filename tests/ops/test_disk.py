"""Operators of records on disk, beside a dictionary of records."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding import IdMap
from recis_hybrid.ops.blocks import Blocks, StateArgs
from recis_hybrid.ops.disk import DiskFigures

RECORD, META = 48, 32
"""Bytes of a record, and of what precedes its metadata."""
SEGMENT = 4096


class Records:
    """Records on disk, and what they should be: four numbers and the three of the metadata, by row."""

    def __init__(self, path: Path, *, frames: int = 40, rows: int = 300, ring: bool = True) -> None:
        self.disk = ops.disk.open_disk(
            "user", str(path), record_bytes=RECORD, meta_offset=META, frames=frames, segment_bytes=SEGMENT, ring=ring
        )
        self.locations = torch.zeros(rows, dtype=torch.int64)
        self.values = np.zeros((rows, 4), np.float64)
        self.steps = np.zeros(rows, np.int64)

    @property
    def blocks(self) -> Blocks:
        """All frames, as one block."""
        return Blocks(self.disk, 40, META, RECORD)

    @property
    def figures(self) -> DiskFigures:
        return ops.disk.figures(self.disk)

    def write(self, rows: list[int], values: np.ndarray, step: int, *, counts: bool = False) -> None:
        at = torch.tensor(rows)
        frames = ops.disk.fetch(self.disk, self.locations, at, writes=True, counts=counts)
        ops.blocks.write(self.blocks, frames, 0, torch.from_numpy(values).view(torch.float32))
        ops.blocks.write_meta(self.blocks, frames, torch.tensor([[0] * len(rows), [step] * len(rows), rows]))
        self.values[rows], self.steps[rows] = values, step

    def fetched(self, rows: list[int]) -> np.ndarray:
        """Return the values of rows through frames, 8 floats of 4 bytes as 4 of 8."""
        at = torch.tensor(rows)
        frames = ops.disk.fetch(self.disk, self.locations, at)
        found = torch.empty(len(rows), 8)
        ops.blocks.read(self.blocks, frames, 0, found)
        return found.view(torch.float64).numpy()

    def read(self, rows: list[int]) -> np.ndarray:
        """Return the values of rows from copies of the records."""
        records = torch.empty(len(rows), RECORD, dtype=torch.uint8)
        ops.disk.read(self.disk, self.locations, torch.tensor(rows), records)
        return records[:, :META].contiguous().view(torch.float64).numpy()

    def file(self) -> int:
        """Return the descriptor of the file of the records, which must be the only one without a name."""
        links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)}
        (found,) = (fd for fd, target in links.items() if target.endswith(" (deleted)") and "recis" in target)
        return int(found)


def _is_link(fd: str) -> bool:
    try:
        os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return False
    return True


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "recis"
    path.mkdir()
    yield path
    assert list(path.iterdir()) == []  # the files have no names


def filled(path: Path, rows: int = 200, **options: int) -> Records:
    """Return records of which most are on disk."""
    records = Records(path, **options)
    random = np.random.default_rng(0)
    for first in range(0, rows, 20):
        records.write(list(range(first, first + 20)), random.standard_normal((20, 4)), first)
    return records


@pytest.mark.parametrize("ring", [True, False])
def test_records_are_current_through_eviction_staging_and_compaction(folder: Path, ring: bool) -> None:
    records, random = Records(folder, ring=ring), np.random.default_rng(1)
    known: set[int] = set()
    pins: list[tuple[int, Tensor, np.ndarray, list[int]]] = []
    for step in range(400):
        rows = np.unique(random.zipf(1.2, 30) % 300).tolist()
        if step % 3 == 0:
            ops.disk.stage(records.disk, records.locations, torch.tensor([*rows, -1, *rows]))
        if step % 5 == 1:
            some = sorted(known & set(rows))
            assert np.array_equal(records.fetched(some), records.values[some])
        records.write(rows, random.standard_normal((len(rows), 4)), step, counts=True)
        known |= set(rows)
        if step % 50 == 20:
            everything = random.permutation(sorted(known)).tolist()
            assert np.array_equal(records.read(everything), records.values[everything])
            marks = ops.disk.touched(records.disk, records.locations, step - 7).numpy()
            assert np.array_equal(marks == 1, (records.steps > step - 7) & np.isin(np.arange(300), everything))
            slots, number = ops.disk.pin(records.disk, records.locations)
            pins.append((number, slots, records.values.copy(), everything))
        if step % 100 == 60:
            gone = everything[::3]
            ops.disk.forget(records.disk, records.locations, torch.tensor([*gone, -1, gone[0]]))
            known -= set(gone)
            records.values[gone] = 0  # what a row without a record gets
            assert np.array_equal(records.fetched(gone[:20]), np.zeros((20, 4)))
            ops.disk.forget(records.disk, records.locations, torch.tensor(gone))
        if step % 100 == 99:
            for number, slots, values, rows in pins:
                copies = torch.empty(len(rows), RECORD, dtype=torch.uint8)
                at = torch.tensor(rows)
                ops.disk.read_pinned(records.disk, at, slots[at], copies)
                assert np.array_equal(copies[:, :META].contiguous().view(torch.float64).numpy(), values[rows])
                ops.disk.unpin(records.disk, number)
            pins.clear()
    figures = records.figures
    assert min(figures.hits, figures.misses, figures.prefetched, figures.written_back, figures.moved) > 0
    assert figures.io_uring <= ring
    # The log holds at most half more than the records, some whole segments, and those that are kept for later writes.
    assert figures.log_bytes <= 1.5 * 300 * (RECORD + 8) + 16 * SEGMENT


def test_the_log_does_not_outgrow_its_bound_if_a_call_writes_several_segments(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops.disk, "SEGMENT_BYTES", SEGMENT)
    rows, calls = 2000, 400
    records, random = Records(folder, frames=450, rows=rows), np.random.default_rng(4)
    for step in range(60):
        some = np.unique(random.integers(0, rows, calls)).tolist()
        records.write(some, random.standard_normal((len(some), 4)), step)
        assert records.figures.log_bytes <= ops.disk.most_log_bytes(rows, RECORD, calls)
    assert records.figures.moved > 0
    assert ops.disk.most_log_bytes(rows, RECORD, calls) < 2 * rows * RECORD + 32 * SEGMENT
    written = np.flatnonzero(records.locations).tolist()
    assert np.array_equal(records.read(written), records.values[written])


def test_reads_by_copying_memory_take_the_bytes_of_the_records_alone() -> None:
    shared = Path("/dev/shm")
    if not any(line.split()[1:3] == [str(shared), "tmpfs"] for line in Path("/proc/mounts").read_text().splitlines()):
        pytest.skip("/dev/shm is not a tmpfs")
    records = Records(shared, rows=4000)
    values = np.random.default_rng(3).standard_normal((4000, 4))
    for first in range(0, 4000, 20):
        rows = list(range(first, first + 20))
        records.write(rows, values[rows], 1)
    ops.disk.pin(records.disk, records.locations)  # so that no segment is in a buffer
    before = records.figures.memory_bytes
    some = list(range(0, 3600, 100))  # more than a page apart
    ops.disk.stage(records.disk, records.locations, torch.tensor(some))
    assert records.figures.memory_bytes - before == 4096  # of 36 records with 56 bytes each
    assert np.array_equal(records.fetched(some), values[some])


def test_calls_with_many_missing_rows(folder: Path) -> None:
    records, random = Records(folder, frames=700, rows=4000), np.random.default_rng(5)
    known = np.zeros(4000, bool)
    for step in range(30):
        rows = random.choice(4000, 600, replace=False).tolist()
        if step % 2:
            ops.disk.stage(records.disk, records.locations, torch.tensor(rows * 2))
        again = random.choice(rows, 900).tolist()  # rows without a record are among them, several times
        assert np.array_equal(records.fetched(again), np.where(known[again, None], records.values[again], 0))
        records.write(rows, random.standard_normal((600, 4)), step, counts=True)
        known[rows] = True
    assert records.figures.prefetched > 0
    everything = random.permutation(np.flatnonzero(known)).tolist()
    assert np.array_equal(records.read(everything), records.values[everything])


def test_what_is_looked_up_often_stays_in_memory(folder: Path) -> None:
    records, random = filled(folder, frames=50), np.random.default_rng(2)
    often = list(range(10))
    for step in range(60):
        rows = [*often, *random.choice(np.arange(10, 200), 20, replace=False).tolist()]
        records.write(rows, random.standard_normal((30, 4)), step, counts=True)
    before = records.figures.misses
    ops.disk.fetch(records.disk, records.locations, torch.tensor(often), counts=True)
    assert records.figures.misses == before


def test_more_rows_than_frames_are_refused(folder: Path) -> None:
    records = filled(folder)
    with pytest.raises(RuntimeError, match=r"table user: a call uses 41 rows at once, but the cache holds 40 rec"):
        records.fetched(list(range(41)))
    assert np.array_equal(records.fetched([*range(40), 3, 3]), records.values[[*range(40), 3, 3]])


def test_a_missing_folder_and_one_without_permission_are_refused(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"table user: cannot create .* in .*/absent: No such file"):
        Records(folder / "absent")
    with pytest.raises(RuntimeError, match=r"table user: cannot create .* in /proc/self: .*must be an existing folder"):
        Records(Path("/proc/self"))


def test_a_short_file_and_one_with_other_records_are_refused(folder: Path) -> None:
    records = filled(folder)
    everything = list(range(200))
    ops.disk.pin(records.disk, records.locations)
    file = f"/proc/self/fd/{records.file()}"
    content = Path(file).read_bytes()
    with open(file, "r+b") as short:
        short.truncate(SEGMENT)
    with pytest.raises(RuntimeError, match=r"table user: the file .* is shorter than it was written; load"):
        records.read(everything)
    with open(file, "r+b") as other:
        other.write(content[SEGMENT:] + content[:SEGMENT])
    with pytest.raises(RuntimeError, match=r"table user: the file .* does not hold row \d+ where it was written"):
        records.read(everything)
    with open(file, "r+b") as same:
        same.write(content)
    assert np.array_equal(records.read(everything), records.values[:200])


def test_a_segment_that_compaction_cannot_read_is_reported_once_and_the_table_stays_usable(folder: Path) -> None:
    records, rows = Records(folder, rows=2000), 2000
    random = np.random.default_rng(5)
    for first in range(0, rows, 20):
        records.write(list(range(first, first + 20)), random.standard_normal((20, 4)), first)
    _, number = ops.disk.pin(records.disk, records.locations)
    ops.disk.unpin(records.disk, number)
    segments = records.figures.log_bytes // SEGMENT
    kept = [*range(0, rows - 40, 4), *range(rows - 40, rows)]
    ops.disk.forget(records.disk, records.locations, torch.tensor(sorted({*range(rows)} - {*kept})))
    file = f"/proc/self/fd/{records.file()}"
    content = Path(file).read_bytes()
    os.truncate(file, 0)
    errors: list[str] = []
    for _ in range(4 * segments):
        try:
            assert np.array_equal(records.fetched([rows - 1]), records.values[[rows - 1]])
        except RuntimeError as error:
            errors.append(str(error))
            if len(errors) == segments // 2:
                break
        time.sleep(0.001)  # for the reads of the compaction
    with open(file, "r+b") as same:
        same.write(content)
    # Each segment is tried once, and the first one that can be read ends the errors.
    assert len(errors) == segments // 2
    cut = r"is shorter than it was written|lacks \d+ records"  # by where the new end of the file is
    assert all(re.match(rf"table user: the file of its records in {folder} ({cut}); load", each) for each in errors)
    for first in range(0, len(kept), 20):
        assert np.array_equal(records.fetched(kept[first : first + 20]), records.values[kept[first : first + 20]])
    for first in range(0, rows, 20):
        records.write(list(range(first, first + 20)), random.standard_normal((20, 4)), first)
    assert records.figures.moved > 0
    assert np.array_equal(records.read(list(range(rows))), records.values)


def test_a_full_disk_is_refused_before_anything_changes(folder: Path) -> None:
    limit = 64 * SEGMENT
    records = Records(folder, rows=9000)
    first = 0

    def fill() -> None:
        nonlocal first
        for first in range(0, 9000, 20):
            records.write(list(range(first, first + 20)), np.full((20, 4), float(first)), 1)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(RuntimeError, match="table user: no space for 4096 more bytes .*: File too large; free"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 0.9 * limit < first * (RECORD + 8) < limit + 40 * (RECORD + 8)
    assert np.array_equal(records.read(list(range(first))), records.values[:first])
    assert np.array_equal(records.fetched([1, 2, 3]), records.values[[1, 2, 3]])
    records.write(list(range(first, first + 20)), np.full((20, 4), 7.0), 1)
    assert np.array_equal(records.read(list(range(first + 20))), records.values[: first + 20])


def test_a_copy_of_the_handle_is_refused(folder: Path) -> None:
    records = Records(folder)
    with pytest.raises(RuntimeError, match="disk must be the address of a tensor that disk_open returned"):
        ops.disk.figures(records.disk.clone())


def test_operators(folder: Path) -> None:
    records = filled(folder)
    disk, locations, rows = records.disk.data_ptr(), records.locations, torch.tensor([3, -1, 150])
    count, copies = torch.tensor([2]), torch.empty(2, RECORD, dtype=torch.uint8)
    # The checks call each operator several times with copies of the locations, so the calls must change none.
    ops.disk.fetch(records.disk, locations, rows)
    check = torch.library.opcheck
    check(
        torch.ops.recis.disk_open, ("t", str(folder), RECORD, META, 8, SEGMENT, False), test_utils=("test_faketensor",)
    )
    check(torch.ops.recis.disk_fetch, (disk, locations, rows, count, False, True, torch.empty_like(rows)))
    id_map = IdMap(torch.device("cpu"))
    ids, (n, bags) = [torch.tensor([5, 9, 5])], (3, ops.gather.Bags.single([3]))
    initializers, state = torch.zeros(1, 5, dtype=torch.int64), StateArgs([], [], [], [])
    slots = (id_map.slots.header, id_map.counters, id_map.free_rows)
    ops.disk.insert_grouped(records.disk, locations, *slots, 0, 8, initializers, state, ids, [0], bags)
    groups = ops.gather.parts_of_groups(ops.gather.room_for_groups(n, bags, ids[0].device))
    found = torch.empty(3, n, dtype=torch.int64)
    check(
        torch.ops.recis.disk_insert_grouped,
        (disk, locations, *slots, 0, 8, initializers, [], [], [], [], ids, [0], *bags, found[0], *groups, *found[1:]),
    )
    check(torch.ops.recis.disk_stage, (disk, locations, rows))
    check(torch.ops.recis.disk_read, (disk, locations, rows[::2].contiguous(), copies))
    marks = torch.empty(300, dtype=torch.uint8)
    check(torch.ops.recis.disk_touched, (disk, locations, 3, marks))
    slots, pin = ops.disk.pin(records.disk, locations)
    check(torch.ops.recis.disk_pin, (disk, locations, torch.empty_like(slots), torch.zeros(1, dtype=torch.int64)))
    number = torch.tensor([3, 150])
    check(torch.ops.recis.disk_read_pinned, (disk, number, slots[number], copies))
    check(torch.ops.recis.disk_unpin, (disk, pin))
    check(torch.ops.recis.disk_figures, (disk, torch.empty(9, dtype=torch.int64)))
    check(torch.ops.recis.disk_forget, (disk, locations, torch.tensor([-1])))
