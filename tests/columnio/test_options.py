"""Validation of ReadOptions and ShardOptions; CsvOptions are tested with the CSV format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from recis_hybrid.columnio import CsvOptions, ReadOptions, ShardOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ({"prefetch": -1}, "prefetch must be at least 0, got -1"),
        ({"decoded_rows": 0}, "decoded_rows must be at least 1, got 0"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1, got 0"),
        ({"on_bad_file": "sometimes"}, "on_bad_file must be one of 'raise', 'skip', got 'sometimes'"),
    ],
)
def test_read_options_out_of_range_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ReadOptions: {message}"):
        ReadOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_threads": True}, "num_threads must be an integer, got True"),
        ({"prefetch": 1.5}, "prefetch must be an integer, got 1.5"),
        ({"pin_memory": 1}, "pin_memory must be True or False, got 1"),
        ({"csv": {"delimiter": ";"}}, "csv must be a CsvOptions, got {'delimiter': ';'}"),
    ],
)
def test_read_options_of_wrong_types_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"ReadOptions: {message}"):
        ReadOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0, "world_size": 0}, "world_size must be at least 1, got 0"),
        ({"rank": -1, "world_size": 2}, "rank must be at least 0, got -1"),
        ({"rank": 2, "world_size": 2}, "rank must be less than world_size, got 2 of 2; ranks count from 0"),
        ({"rank": 1}, "rank and world_size must be given together, got 1 and None; omit both"),
        ({"uneven": "sometimes"}, "uneven must be one of None, 'wrap', 'drop', 'pad', got 'sometimes'"),
    ],
)
def test_shard_options_out_of_range_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ShardOptions: {message}"):
        ShardOptions(**options)


def test_numpy_integers_are_accepted() -> None:
    assert ReadOptions(num_threads=np.int64(2)).num_threads == 2  # type: ignore[arg-type]
    assert ShardOptions(rank=np.int64(0), world_size=np.int64(2)).world_size == 2  # type: ignore[arg-type]


def test_options_are_compared_by_value() -> None:
    assert ReadOptions(csv=CsvOptions(delimiter=";")) == ReadOptions(csv=CsvOptions(delimiter=";")) != ReadOptions()
