from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recis_hybrid.columnio import ColumnDataset, Windows


def write(folder: Path, value: int, complete: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"row": [value] * 3}), folder / "a.parquet")
    if complete:
        (folder / "_SUCCESS").touch()


def names(windows: Windows, count: int | None = None) -> list[str]:
    return [window.name for window in islice(windows, count)]


class Clock:
    """A clock that advances only while the stream waits, with an event at each wait."""

    def __init__(self, *events: Callable[[], None]) -> None:
        self.events, self.waits = list(events), 0

    def __call__(self, seconds: float) -> None:
        self.waits += 1
        if self.events:
            self.events.pop(0)()


def test_windows_are_yielded_once_they_are_complete(tmp_path: Path) -> None:
    source = tmp_path / "hours"
    clock = Clock(
        lambda: write(source / "02", 2, complete=False),
        lambda: write(source / "01", 1),
        lambda: None,
        lambda: (source / "02" / "_SUCCESS").touch(),
    )
    # The folder does not exist at first.
    windows = Windows(source, sleep=clock)
    got = []
    for window in islice(windows, 2):
        (batch,) = ColumnDataset(window.paths, ["row"], 10)
        assert isinstance(batch["row"], torch.Tensor)
        got.append((window.name, batch["row"].tolist()))
    assert got == [("01", [1, 1, 1]), ("02", [2, 2, 2])]
    assert clock.waits == 4


def test_a_late_window_is_yielded_late_and_none_twice(tmp_path: Path) -> None:
    for name in ("02", "03", "_tmp", ".x"):
        write(tmp_path / name, 0)
    windows = iter(Windows(tmp_path, idle_s=1, poll_s=1, sleep=Clock()))
    assert next(windows).name == "02"
    write(tmp_path / "01", 0)
    assert [window.name for window in windows] == ["01", "03"]


def test_another_marker_and_the_end_of_the_stream(tmp_path: Path) -> None:
    write(tmp_path / "a", 0)
    write(tmp_path / "b", 0, complete=False)
    (tmp_path / "b" / "done").touch()
    clock = Clock()
    assert names(Windows(tmp_path, marker="done", poll_s=2, idle_s=5, sleep=clock)) == ["b"]
    assert clock.waits == 3


def test_a_stream_is_resumed_at_the_unfinished_window(tmp_path: Path) -> None:
    for name in ("1", "2", "10"):
        write(tmp_path / name, 0)
    windows = Windows(tmp_path, idle_s=0)
    passing = iter(windows)
    # Names that are numbers sort by value.
    assert [next(passing).name, next(passing).name] == ["1", "2"]
    state = windows.state_dict()
    resumed = Windows(tmp_path, idle_s=0)
    resumed.load_state_dict(state)
    assert names(resumed) == ["2", "10"]
    assert resumed.state_dict()["done"] == ["1", "10", "2"]
    with pytest.raises(ValueError, match="this is not a state of Windows"):
        resumed.load_state_dict({"done": ["1"]})


def test_an_unreachable_source_repeats_no_window(tmp_path: Path) -> None:
    source = tmp_path / "hours"
    for name in ("1", "2"):
        write(source / name, 0)
    clock = Clock(
        lambda: source.rename(tmp_path / "away"),
        lambda: (tmp_path / "away").rename(source) and None,
        lambda: write(source / "3", 0),
    )
    assert names(Windows(source, poll_s=1, idle_s=4, sleep=clock)) == ["1", "2", "3"]


def test_a_removed_or_rewritten_window_is_not_yielded_again(tmp_path: Path) -> None:
    write(tmp_path / "1", 0)
    windows = Windows(tmp_path, idle_s=0)
    assert names(windows) == ["1"]
    (tmp_path / "1" / "_SUCCESS").unlink()
    assert names(windows) == []
    write(tmp_path / "1", 1)
    assert names(windows) == []
    resumed = Windows(tmp_path, idle_s=0)
    resumed.load_state_dict(windows.state_dict())
    assert names(resumed) == []


def test_an_explicit_list_ends() -> None:
    windows = Windows(["a.parquet", ["b.parquet", Path("c.parquet")]])
    assert [(window.name, window.paths) for window in windows] == [
        ("0", ["a.parquet"]),
        ("1", ["b.parquet", "c.parquet"]),
    ]
    assert names(windows) == []


def test_invalid_times_are_rejected() -> None:
    with pytest.raises(ValueError, match="poll_s must be positive and idle_s must not be negative, got 0 and None"):
        Windows("x", poll_s=0)
