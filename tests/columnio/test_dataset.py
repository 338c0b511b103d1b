"""The order of rows, resuming, zero-copy, threads, and real data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st

from recis_hybrid.columnio import ColumnDataset, Dense, Ragged, ReadOptions, ShardOptions, Text
from recis_hybrid.columnio.files.file_set import FileSet, Piece
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.columns import dense

ROWS = 47


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 0 to 46 in four files (one empty) with row groups of 5; lists and strings are made of the row number."""
    path = tmp_path_factory.mktemp("data")
    for number, (first, stop) in enumerate([(0, 13), (13, 13), (13, 20), (20, ROWS)]):
        rows = range(first, stop)
        columns = {
            "row": pa.array(rows, pa.int64()),
            "list": pa.array([[row] * (row % 4) for row in rows], pa.list_(pa.int64())),
            "text": pa.array(["é" * (row % 3) + str(row) for row in rows], pa.string()),
            "label": pa.array([row % 2 for row in rows], pa.float32()),
        }
        pq.write_table(pa.table(columns), path / f"part-{number}.parquet", row_group_size=5)
    return path


def ragged(batch: Batch, name: str) -> RaggedTensor:
    column = batch[name]
    assert isinstance(column, RaggedTensor)
    return column


def rows_of(batches: Iterator[Batch] | ColumnDataset) -> list[list[int]]:
    return [dense(batch).tolist() for batch in batches]


def open_rows(folder: Path, batch_size: int = 6, **options: Any) -> ColumnDataset:
    return ColumnDataset(folder, ["row"], batch_size, **options)


def no_reader_is_left() -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(thread.name.startswith("recis-columnio") for thread in threading.enumerate()):
            return True
        time.sleep(0.01)
    return False


# Batches


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("shuffle", [False, True])
def test_all_columns_of_a_row_stay_together(folder: Path, shuffle: bool, prefetch: int) -> None:
    data = ColumnDataset(
        folder, ["label", "text", "row", "list"], 6, shuffle=shuffle, read=ReadOptions(prefetch=prefetch)
    )
    seen: list[int] = []
    for batch in data:
        assert list(batch) == ["label", "text", "row", "list"]
        rows = dense(batch).tolist()
        assert torch.equal(dense(batch, "label"), torch.tensor([float(row % 2) for row in rows]))
        assert ragged(batch, "list").validate().to_lists() == [[row] * (row % 4) for row in rows]
        assert ragged(batch, "text").validate().to_strings(decode=False) == [
            ("é" * (row % 3) + str(row)).encode() for row in rows
        ]
        assert ragged(batch, "text").dtype == torch.uint8
        seen += rows
    assert sorted(seen) == list(range(ROWS))
    assert (seen == list(range(ROWS))) == (not shuffle)


def test_sizes(folder: Path) -> None:
    data = open_rows(folder)
    assert (len(data), data.num_rows, [len(rows) for rows in rows_of(data)]) == (8, ROWS, [6] * 7 + [5])
    data = open_rows(folder, drop_remainder=True)
    assert (len(data), [len(rows) for rows in rows_of(data)]) == (7, [6] * 7)
    assert rows_of(open_rows(folder, 1000)) == [list(range(ROWS))]


def test_columns_show_specs_with_dtypes(folder: Path) -> None:
    data = ColumnDataset(folder, {"row": Dense(torch.int32), "list": None, "text": None}, 6)
    assert data.columns == {"row": Dense(torch.int32), "list": Ragged(torch.int64), "text": Text()}
    assert dense(next(iter(data))).dtype == torch.int32


def test_transforms_run_in_a_reader_thread(folder: Path) -> None:
    threads: set[str] = set()

    def double(batch: Batch) -> Batch:
        threads.add(threading.current_thread().name.split("_")[0])
        return {"twice": dense(batch) * 2}

    got = [dense(batch, "twice").tolist() for batch in open_rows(folder, transforms=double)]
    assert list(chain.from_iterable(got)) == list(range(0, 2 * ROWS, 2))
    assert threads == {"recis-columnio"}


# Zero-copy


def test_numbers_share_the_memory_of_arrow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, int]] = []
    read = FileSet.read

    def watched(self: FileSet, piece: Piece, *how: int) -> Iterator[Any]:
        for batch in read(self, piece, *how):
            decoded.append((batch.batch.column("row").buffers()[1].address, batch.num_rows * 8))
            yield batch

    monkeypatch.setattr(FileSet, "read", watched)
    # Row groups of 5 (and of 3 and 2 at the end of files): a batch of 1 never spans two of them.
    batches = list(open_rows(folder, 1))
    pointers = [dense(batch).data_ptr() for batch in batches]
    assert pointers == [first + at for first, length in decoded for at in range(0, length, 8)]
    assert [row for rows in rows_of(iter(batches)) for row in rows] == list(range(ROWS))


# Order


def test_the_order_depends_on_seed_and_epoch(folder: Path) -> None:
    def order(seed: int, epoch: int, **options: Any) -> list[int]:
        data = open_rows(folder, seed=seed, shuffle=True, **options)
        data.set_epoch(epoch)
        return list(chain.from_iterable(rows_of(data)))

    first = order(1, 0)
    assert first == order(1, 0, read=ReadOptions(prefetch=0))
    assert len({tuple(order(*path)) for path in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]}) == 5
    # A buffer smaller than the data shuffles row groups, and rows within blocks.
    small = order(1, 0, read=ReadOptions(shuffle_buffer=4))
    assert sorted(small) == list(range(ROWS))
    assert small not in (first, list(range(ROWS)))


def test_a_complete_pass_advances_to_the_next_epoch(folder: Path) -> None:
    data = open_rows(folder, shuffle=True)
    epochs = [rows_of(data) for _ in range(3)]
    assert data.epoch == 3
    assert epochs[0] != epochs[1] != epochs[2]
    data.set_epoch(1)
    assert rows_of(data) == epochs[1]
    # An interrupted pass does not.
    next(iter(data))
    assert (data.epoch, rows_of(data)) == (2, epochs[2])


def test_an_older_pass_does_not_advance_the_dataset(folder: Path) -> None:
    data = open_rows(folder)
    older = iter(data)
    next(older)
    newer = iter(data)
    next(newer)
    assert len(rows_of(older)) == 7
    assert (data.epoch, data.state_dict()["row"]) == (0, 6)


def test_each_block_has_a_different_order(tmp_path: Path) -> None:
    pq.write_table(pa.table({"row": range(80)}), tmp_path / "part.parquet")
    blocks = rows_of(open_rows(tmp_path, 20, shuffle=True, read=ReadOptions(shuffle_buffer=20)))
    assert [sorted(block) for block in blocks] == [list(range(first, first + 20)) for first in range(0, 80, 20)]
    assert len({tuple(row % 20 for row in block) for block in blocks}) == 4


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 9, 60])
def test_ranks_take_batches_in_turn(folder: Path, shuffle: bool, world_size: int) -> None:
    alone = rows_of(open_rows(folder, 4, shuffle=shuffle))
    ranks = [
        open_rows(folder, 4, shuffle=shuffle, shard=ShardOptions(rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    got = [rows_of(data) for data in ranks]
    turns = ROWS // (4 * world_size)
    assert [batches[:turns] for batches in got] == [
        alone[rank : turns * world_size : world_size] for rank in range(world_size)
    ]
    # The rows of the last turn are divided evenly.
    rest = [batches[turns] for batches in got]
    assert [row for batch in rest for row in batch] == [row for batch in alone[turns * world_size :] for row in batch]
    sizes = [len(batch) for batch in rest]
    assert max(sizes) - min(sizes) <= 1
    assert [len(batches) for batches in got] == [len(data) for data in ranks] == [turns + 1] * world_size


def test_row_groups_of_other_ranks_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[Piece] = []
    read = FileSet.read

    def watched(self: FileSet, piece: Piece, *how: int) -> Iterator[Any]:
        pieces.append(piece)
        return read(self, piece, *how)

    monkeypatch.setattr(FileSet, "read", watched)
    # Two ranks get 24 and 23 rows: the first needs only the row groups that begin before row 24.
    assert rows_of(open_rows(folder, 24, shard=ShardOptions(rank=0, world_size=2))) == [list(range(24))]
    assert sum(piece.rows for piece in pieces) == 25


@pytest.mark.parametrize(
    ("prefetch", "num_threads", "arrow_threads"),
    [(2, 1, False), (2, 11, False), (2, 12, True), (0, 1, False), (0, 2, True)],
)
def test_arrow_threads_decode_if_pieces_are_fewer_than_threads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, prefetch: int, num_threads: int, arrow_threads: bool
) -> None:
    requested: set[bool] = set()
    read = FileSet.read

    def watched(self: FileSet, piece: Piece, rows: int, threads: bool) -> Iterator[Any]:
        requested.add(threads)
        return read(self, piece, rows, threads)

    monkeypatch.setattr(FileSet, "read", watched)
    # The files have 3, 0, 2 and 6 row groups.
    data = open_rows(folder, read=ReadOptions(num_threads=num_threads, prefetch=prefetch))
    assert [row for rows in rows_of(data) for row in rows] == list(range(ROWS))
    assert requested == {arrow_threads}


@pytest.mark.parametrize(("decoded_rows", "chunk_rows"), [(1, 6), (12, 12), (13, 18), (1000, 30)])
def test_decoded_rows_bound_the_memory_of_a_batch(tmp_path: Path, decoded_rows: int, chunk_rows: int) -> None:
    pq.write_table(pa.table({"row": pa.array(range(30), pa.int64())}), tmp_path / "part.parquet")
    data = open_rows(tmp_path, 6, read=ReadOptions(decoded_rows=decoded_rows, prefetch=0))
    files = data._reader.files
    chunks = [rows.num_rows for rows in files.read(files.pieces[0], data._reader.decoded_rows)]
    assert max(chunks) == chunk_rows
    assert rows_of(data) == [list(range(first, first + 6)) for first in range(0, 30, 6)]


# Resuming


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    before, now = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return {
        "order": {
            "shuffle": draw(st.booleans()),
            "seed": draw(st.integers(0, 5)),
        },
        "shuffle_buffer": draw(st.sampled_from([1, 4, 11, 1000])),
        "epoch": draw(st.integers(0, 3)),
        "turns": draw(st.integers(0, 12)),
        "filters": draw(st.sampled_from([None, [("label", "=", 1)], [("row", ">=", 18), ("row", "<", 31)]])),
        "before": draw(_reading()),
        "now": draw(_reading()),
        "world_sizes": (before, now),
    }


def _reading() -> st.SearchStrategy[dict[str, int]]:
    sizes, depths, threads = st.integers(1, 13), st.integers(0, 3), st.integers(1, 3)
    return st.fixed_dictionaries(
        {"batch_size": sizes, "prefetch": depths, "num_threads": threads, "decoded_rows": st.sampled_from([1, 4, 1000])}
    )


@settings(max_examples=80)
@given(plan=plans())
def test_a_resumed_pass_yields_exactly_the_remaining_rows(folder: Path, plan: dict[str, Any]) -> None:
    def ranks_of(when: str, world_size: int) -> list[ColumnDataset]:
        reading = dict(plan[when])
        batch_size = reading.pop("batch_size")
        read = ReadOptions(shuffle_buffer=plan["shuffle_buffer"], **reading)
        return [
            open_rows(
                folder, batch_size, read=read, shard=ShardOptions(rank=rank, world_size=world_size), **plan["order"]
            )
            for rank in range(world_size)
        ]

    plan["order"]["filters"] = plan["filters"]
    whole = open_rows(folder, read=ReadOptions(shuffle_buffer=plan["shuffle_buffer"]), **plan["order"])
    whole.set_epoch(plan["epoch"])
    expected = list(chain.from_iterable(rows_of(whole)))

    before, now = plan["world_sizes"]
    ranks = ranks_of("before", before)
    # All ranks stop after the same number of turns, as in a training job. In the last turn some ranks may get no rows.
    turns = min(plan["turns"], len(ranks[0]))
    seen: list[list[list[int]]] = []
    for data in ranks:
        data.set_epoch(plan["epoch"])
        seen.append(rows_of(islice(iter(data), turns)))
    state = json.loads(json.dumps(ranks[0].state_dict()))

    remaining: list[list[list[int]]] = []
    for data in ranks_of("now", now):
        data.load_state_dict(state)
        remaining.append(rows_of(iter(data)))
        assert data.epoch == plan["epoch"] + 1
    assert in_turns(seen) + in_turns(remaining) == expected


def in_turns(ranks: list[list[list[int]]]) -> list[int]:
    turns = range(max(map(len, ranks), default=0))
    return [row for turn in turns for rank in ranks if turn < len(rank) for row in rank[turn]]


def test_a_new_process_resumes_and_may_exit_early(folder: Path) -> None:
    data = open_rows(folder, shuffle=True, seed=3)
    data.set_epoch(2)
    whole = rows_of(data)
    data.set_epoch(2)
    passing = iter(data)
    assert rows_of(islice(passing, 3)) == whole[:3]
    program = (
        "import json, sys\nfrom recis_hybrid.columnio import ColumnDataset, ReadOptions\n"
        "data = ColumnDataset(sys.argv[1], ['row'], 6, shuffle=True, seed=3, read=ReadOptions(prefetch=4))\n"
        "data.load_state_dict(json.loads(sys.argv[2]))\n"
        "passing = iter(data)\nprint(json.dumps([next(passing)['row'].tolist() for _ in range(2)]))\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(folder), json.dumps(data.state_dict())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == whole[3:5]


def test_a_state_after_the_last_batch_continues_with_the_next_epoch(folder: Path) -> None:
    data, twin = open_rows(folder, shuffle=True), open_rows(folder, shuffle=True)
    states = [data.state_dict() for _ in data]
    twin.load_state_dict(states[-1])
    assert rows_of(twin) == []
    assert rows_of(twin) == rows_of(data)
    twin.load_state_dict(data.state_dict())
    assert rows_of(twin) == rows_of(data)


def test_a_loaded_state_applies_to_one_pass_of_its_epoch(folder: Path) -> None:
    data = open_rows(folder)
    for _ in islice(iter(data), 7):
        state = data.state_dict()
    data = open_rows(folder)
    data.load_state_dict(state)
    data.set_epoch(0)
    assert rows_of(data) == [list(range(42, 47))]
    assert len(rows_of(data)) == 8
    data.load_state_dict(state)
    data.set_epoch(1)
    assert len(rows_of(data)) == 8


def test_states_of_other_data_are_rejected(folder: Path) -> None:
    state = open_rows(folder, shuffle=True, seed=1).state_dict()
    with pytest.raises(ValueError, match=r"a different order than when the state was saved \(seed was 1 and is 2\)"):
        open_rows(folder, shuffle=True, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="shuffle_buffer was 262144 and is None"):
        open_rows(folder).load_state_dict(state)
    with pytest.raises(ValueError, match="rows was 47 and is 13.*open the dataset with the same files and options, or"):
        open_rows(folder / "part-0.parquet", shuffle=True, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="this is not a reading position"):
        open_rows(folder).load_state_dict({"step": 3})
    with pytest.raises(ValueError, match="there is no row 48 of epoch 0 in 47 rows"):
        open_rows(folder, shuffle=True, seed=1).load_state_dict(state | {"row": 48})


def test_a_state_depends_on_paths_relative_to_the_common_folder(tmp_path: Path) -> None:
    for name, first in (("day=1/a", 0), ("day=2/a", 10), ("x/day=1/a", 0), ("x/day=2/a", 10)):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"row": range(first, first + 10)}), path)
    one, two = tmp_path / "day=1", tmp_path / "day=2"
    state = ColumnDataset([one, two], ["row"], 5).state_dict()
    with pytest.raises(ValueError, match="a different order than when the state was saved .pieces was"):
        ColumnDataset([two, one], ["row"], 5).load_state_dict(state)
    # The location of the data does not matter.
    ColumnDataset(tmp_path / "x", ["row"], 5).load_state_dict(state)
    relative = [os.path.relpath(path) for path in (one, two)]
    ColumnDataset(relative, ["row"], 5).load_state_dict(state)
    state = ColumnDataset(one, ["row"], 5).state_dict()
    ColumnDataset(tmp_path / "x" / "day=1", ["row"], 5).load_state_dict(state)
    with pytest.raises(ValueError, match="pieces was"):
        ColumnDataset(two, ["row"], 5).load_state_dict(state)


# Threads


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_in_a_transform_is_raised_unchanged(folder: Path, prefetch: int) -> None:
    error = LookupError("mine")

    def transform(batch: Batch) -> Batch:
        if 20 in dense(batch):
            raise error
        return batch

    seen: list[list[int]] = []

    def consume() -> None:
        for batch in open_rows(folder, transforms=transform, read=ReadOptions(prefetch=prefetch)):
            seen.append(dense(batch).tolist())

    with pytest.raises(LookupError) as caught:
        consume()
    assert caught.value is error
    assert seen == [list(range(first, first + 6)) for first in (0, 6, 12)]
    assert no_reader_is_left()


def test_a_transform_must_return_a_batch(folder: Path) -> None:
    wrong: Callable[[Batch], Any] = lambda batch: None  # noqa: E731
    with pytest.raises(TypeError, match="transforms must return a batch, got NoneType"):
        next(iter(open_rows(folder, transforms=wrong)))


def test_breaking_out_of_the_loop_ends_the_thread(folder: Path) -> None:
    data = open_rows(folder, 1)
    for _ in data:
        break
    assert no_reader_is_left()
    assert data.state_dict()["row"] == 1
    assert len(rows_of(data)) == ROWS


def test_repr_of_a_dataset_and_its_reader(folder: Path) -> None:
    data = open_rows(folder, shard=ShardOptions(rank=1, world_size=2))
    assert repr(data).startswith(f"ColumnDataset(3 files from {folder}")
    assert repr(data).endswith("; 47 rows; batch_size=6, rank 1 of 2; columns {row: Dense(torch.int64)})")
    assert repr(data._reader).startswith("Reader(3 files, 11 pieces, 47 rows, order of the files; batch_size=6, Read")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": -5}, "batch_size must be at least 1, got -5"),
        ({"seed": -1, "shuffle": True}, "seed must be at least 0, got -1"),
        ({"batch_size": 48, "drop_remainder": True}, "drop_remainder leaves no batch of 47 rows.*smaller batch_size"),
    ],
)
def test_arguments_out_of_range_are_rejected(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_rows(folder, **options)


def test_arguments_of_wrong_types_are_rejected(folder: Path) -> None:
    wrong: Any = 2.5
    with pytest.raises(TypeError, match=r"batch_size must be an integer, got 2\.5"):
        open_rows(folder, wrong)
    for wrong in (None, 3, [1, 2], [pa.array([1])], {1: None}):
        with pytest.raises(TypeError, match="ColumnDataset: columns must be names, or specs by name, got"):
            ColumnDataset.from_arrow({"row": [1]}, wrong, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"columns must be names, or specs by name, got a str; write \['row'\]"):
        ColumnDataset(folder, "row", 6)
    with pytest.raises(ValueError, match="columns must name at least one column, got none"):
        ColumnDataset(folder, [], 6)
    with pytest.raises(ValueError, match=r"columns must be unique, got \['row', 'row'\]"):
        ColumnDataset(folder, ["row", "row"], 6)
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        open_rows(folder).set_epoch(-1)


def test_a_missing_path_is_rejected(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_rows(folder / "nowhere")


# Real data


@pytest.mark.parametrize("kind", ["x1", "strings"])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_frappe_matches_pyarrow(data_dir: Path, kind: str, split: str) -> None:
    whole = pq.read_table(data_dir / "frappe" / kind / split)
    batches = list(ColumnDataset(data_dir / "frappe" / kind / split, whole.column_names, 4096))
    assert whole.num_rows == {"train": 202_027, "valid": 57_722, "test": 28_860}[split]
    for field in whole.schema:
        want = whole.column(field.name).to_pylist()
        if pa.types.is_string(field.type):
            got: list[Any] = [
                row.decode() for batch in batches for row in ragged(batch, field.name).to_strings(decode=False)
            ]
        else:
            tensor = torch.cat([dense(batch, field.name) for batch in batches])
            assert tensor.dtype == (torch.float32 if field.name == "label" else torch.int64)
            got = tensor.tolist()
        assert got == want, field.name
