"""The emulated device for tests: schedules, injected failures, and checks; see ``csrc/test/emulated/README.md``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from csrc.test.emulated.device import (
    LIBRARY as LIBRARY,
    clear_counts as clear_counts,
    configure as configure,
    counts as counts,
    functions,
    load as load,
    reason_to_skip as reason_to_skip,
)


def is_usable() -> bool:
    """Return whether the device can be used in this process."""
    return not reason_to_skip()


@contextmanager
def schedule(**settings: Any) -> Iterator[None]:
    """Run with other settings, as :func:`configure` takes them, and fail if freed memory was written."""
    configure(**settings)
    try:
        yield
    finally:
        configure()
        check()


def synchronizations(call: Callable[[], object]) -> int:
    """Return how often the host waits for the device in a call."""
    before = counts()["synchronizations"]
    call()
    return counts()["synchronizations"] - before


@contextmanager
def failing_allocation(number: int) -> Iterator[None]:
    """Let the allocation of that number, from 1, fail for lack of memory of the device."""
    functions().emulated_fail_allocation(ctypes.c_int64(number))
    try:
        yield
    finally:
        functions().emulated_fail_allocation(ctypes.c_int64(0))


def fail_launch(error: int) -> None:
    """Let the next launch of a kernel of csrc/cuda report an error, by its number in CUDA."""
    functions().emulated_fail_launch(ctypes.c_int64(error))


def check() -> None:
    """Raise if a kernel or copy has written to freed memory since the last call.

    Raises:
        AssertionError: It has.
    """
    text = ctypes.create_string_buffer(200)
    functions().emulated_fault(text, ctypes.c_int64(len(text)))
    assert not text.value, text.value.decode()
