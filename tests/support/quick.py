"""Selection of the tests of ``make test-quick``: a stable sample that includes new tests automatically."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar
from zlib import crc32

SHARE = 0.25
"""Share of the test functions of a file that are sampled, excluding slow ones; at least one per file."""

T = TypeVar("T")


def draw(name: str) -> float:
    """Return a number in [0, 1) that depends only on the name, so that the sample is stable as tests are added."""
    return crc32(name.encode()) / 2**32


def cross_section(tests: Iterable[T], name_of: Callable[[T], str], marks_of: Callable[[T], set[str]]) -> list[T]:
    """Return a sample of the tests, in order.

    It contains some functions of each file, with one set of parameters each, selected by name. Tests marked ``slow``
    are excluded, and those marked ``quick``, which cover the essential mechanisms, are always included.

    Args:
        tests: All tests.
        name_of: Returns the name of a test: ``file::function[parameters]``.
        marks_of: Returns the names of its markers.
    """
    tests = list(tests)
    files: dict[str, dict[str, list[T]]] = {}
    for test in tests:
        function = name_of(test).partition("[")[0]
        if "slow" not in marks_of(test):
            files.setdefault(function.partition("::")[0], {}).setdefault(function, []).append(test)
    chosen = set()
    for functions in files.values():
        first = min(functions, key=draw)
        for function, cases in functions.items():
            if function == first or draw(function) < SHARE or "quick" in marks_of(cases[0]):
                chosen.add(min((name_of(case) for case in cases), key=draw))
    return [test for test in tests if name_of(test) in chosen]
