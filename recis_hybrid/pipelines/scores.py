"""write_scores: scores of a data set as a folder of Parquet files, written by all ranks and resumed after a kill.

Files are named ``rows-FIRST-END.RANK-of-RANKS.parquet``. Together, those of all ranks hold the scores of the rows FIRST
to END of the data. A rank writes a file under a temporary name, syncs it and renames it. Scoring continues after the
ranges of which all files exist. ``_scores.json`` describes what is scored, and whether it is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from recis_hybrid import distributed
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.pipelines.predict import arrow_batch
from recis_hybrid.ragged import Batch
from recis_hybrid.validation import check_integer

ROWS_PER_FILE = 1_000_000
"""Rows of a range, about; by default."""
RECORD = "_scores.json"
"""Name of the file that describes what is scored; readers of Parquet folders ignore names with an underscore."""

_NAME = re.compile(r"rows-(\d+)-(\d+)\.(\d+)-of-(\d+)\.parquet")
_PARTIAL, _LOCK = ".partial", ".lock"


class _Range(NamedTuple):
    """Rows that the ranks score between two renames of files."""

    first: int
    end: int
    ranks: int

    def file(self, rank: int) -> str:
        """Return the name of a rank's file."""
        return f"rows-{self.first:012}-{self.end:012}.{rank:05}-of-{self.ranks:05}.parquet"


def write_scores(
    folder: str | os.PathLike[str],
    data: ColumnDataset,
    score: Callable[[Iterable[Batch]], Iterable[Batch]],
    *,
    source: Mapping[str, Any],
    types: Mapping[str, Any] | None = None,
    rows_per_file: int = ROWS_PER_FILE,
    quiet: bool = True,
) -> int:
    """Write the scores of a data set into a folder; collective.

    If the folder has a part of these scores, scoring continues there, also with another number of ranks.

    Args:
        folder: A folder that all ranks share; created if it does not exist.
        data: The data, in the order of its files.
        score: Returns columns and scores, batch by batch, e.g. ``lambda batches: predict(step, batches)``.
        source: Description of model and data in JSON types; scores of another source are not continued.
        types: As in :func:`write_predictions`.
        rows_per_file: Number of rows after which all ranks begin new files, rounded to whole batches.
        quiet: False to show the progress on stderr.

    Returns:
        The number of rows of the data.

    Raises:
        BlockingIOError: Another process is writing into the folder.
        FileExistsError: The folder has other files, or scores of another source.
        FileNotFoundError: The parent of the folder does not exist.
        NotADirectoryError: The path is a file.
        ValueError: The data is shuffled.
    """
    check_integer("write_scores", "rows_per_file", rows_per_file, 1)
    state = data.state_dict()
    if "seed" in state["order"]:
        raise ValueError("write_scores: the data must be in the order of its files; open it with shuffle=False")
    out, ranks, rank = Path(folder), distributed.world_size(), distributed.rank()
    record: dict[str, Any] = {"source": {**source, "order": state["order"]}, "rows": data.num_rows}
    record = json.loads(json.dumps(record))
    with ExitStack() as held:
        first = int(_on_rank_0(lambda: _begin(out, record, ranks, held)))
        if first == data.num_rows:
            return first
        data.load_state_dict({**state, "row": first})
        bar = tqdm(desc="score", total=data.num_rows, initial=first, unit="row", disable=quiet or rank > 0)
        with bar:
            for rows in _write_ranges(out, data, score(data), types or {}, first, rows_per_file):
                bar.update(rows)
        distributed.exchange(None)  # all ranks have renamed their files
        _on_rank_0(lambda: _write_record(out, {**record, "complete": True}))
    return data.num_rows


def _write_ranges(
    out: Path, data: ColumnDataset, batches: Iterable[Batch], types: Mapping[str, Any], first: int, rows_per_file: int
) -> Iterator[int]:
    """Write this rank's files; yield the rows that all ranks have scored in each turn."""
    from pyarrow import parquet

    ranks, rank = distributed.world_size(), distributed.rank()
    partial = out / f".{rank:05}-of-{ranks:05}{_PARTIAL}"
    writer: Any = None
    begin = at = first
    try:
        for turn, batch in enumerate(batches, 1):
            table = arrow_batch(batch, types)
            if writer is None:
                writer = parquet.ParquetWriter(partial, table.schema)
            writer.write_batch(table)
            # The reader is ahead of the scores, so its position is computed.
            before, at = at, data.state_dict(batches=turn)["row"]
            if at - begin >= rows_per_file or at == data.num_rows:
                writer.close()
                writer = None
                _publish(partial, out / _Range(begin, at, ranks).file(rank))
                begin = at
            yield at - before
    finally:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> None:
    """Sync a file, and give it its name."""
    for target in (partial, partial.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if target is partial:
            os.replace(partial, path)


def _on_rank_0(function: Callable[[], Any]) -> Any:
    """Return what a function returns on rank 0, or raise on all ranks; collective."""
    value, failure = None, None
    if distributed.rank() == 0:
        try:
            value = function()
        except Exception as error:
            failure = error
    return distributed.all_succeed_or_raise(failure, value)[0]


def _begin(out: Path, record: dict[str, Any], ranks: int, held: ExitStack) -> int:
    """Create or check the folder, lock it, remove incomplete ranges, and return the first row to score."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; name a folder, or a file that does not exist yet")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; create it first")
    out.mkdir(exist_ok=True)
    _lock(out, held)
    found = {path.name for path in out.iterdir()}
    scores = {name for name in found if _NAME.fullmatch(name)}
    foreign = sorted(name for name in found - scores - {_LOCK, RECORD} if not name.endswith(_PARTIAL))
    if foreign or (scores and RECORD not in found):
        names = ", ".join((foreign or sorted(scores))[:3])
        raise FileExistsError(f"{out} has files that are not of these scores ({names}); choose an empty folder")
    if RECORD in found:
        _compare(out, record)
    position, kept = 0, list[_Range]()
    complete = {each.first: each for each in _complete_ranges(scores)}
    while position in complete:
        kept.append(complete[position])
        position = kept[-1].end
    while kept and 0 < record["rows"] - position < ranks:
        position = kept.pop().first  # a rank without a row could not take part
    whole = {each.file(rank) for each in kept for rank in range(each.ranks)}
    for name in found - whole - {_LOCK, RECORD}:
        (out / name).unlink()
    if RECORD not in found:
        _write_record(out, {**record, "complete": False})
    return position


def _lock(out: Path, held: ExitStack) -> None:
    """Lock the folder until ``held`` is closed."""
    file = held.enter_context((out / _LOCK).open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise BlockingIOError(f"{out}: another process is writing scores there; wait for it, or stop it") from error


def _compare(out: Path, record: dict[str, Any]) -> None:
    """Raise FileExistsError if the folder has scores of another source."""
    try:
        before = json.loads((out / RECORD).read_text())
        differences = _differences(before["source"], record["source"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileExistsError(f"{out / RECORD} is damaged; remove the folder, or choose another") from error
    if differences or before.get("rows") != record["rows"]:
        raise FileExistsError(
            f"{out} has other scores: {'; '.join(differences) or 'of other rows'}; remove the folder, or choose another"
        )


def _differences(before: Mapping[str, Any], now: Any) -> list[str]:
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _complete_ranges(names: Iterable[str]) -> Iterator[_Range]:
    """Yield the ranges of which the files of all ranks exist."""
    ranks_of = defaultdict[_Range, set[int]](set)
    for name in names:
        match = _NAME.fullmatch(name)
        assert match is not None
        first, end, rank, ranks = map(int, match.groups())
        ranks_of[_Range(first, end, ranks)].add(rank)
    yield from (each for each, found in ranks_of.items() if found == set(range(each.ranks)))


def _write_record(out: Path, record: Mapping[str, Any]) -> None:
    partial = out / f".record{_PARTIAL}"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    _publish(partial, out / RECORD)
