"""Selection of the tests of ``make test-quick``: a cross-section that new tests join automatically."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar
from zlib import crc32

SHARE = 0.25
"""Share of a file's test functions that are drawn, slow ones excepted; at least one a file."""

T = TypeVar("T")


def draw(name: str) -> float:
    """Return a number in [0, 1) that depends only on the name, so that the draw is stable as tests are added."""
    return crc32(name.encode()) / 2**32


def cross_section(tests: Iterable[T], name_of: Callable[[T], str], marks_of: Callable[[T], set[str]]) -> list[T]:
    """Return the tests of the cross-section, in their order.

    It draws some functions of each file, and one set of parameters of each, by name. It leaves out tests marked
    ``slow`` and always contains those marked ``quick``, which cover the essential mechanisms.

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
