"""Which tests `make test-quick` runs: a cross-section that new tests join by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar
from zlib import crc32

SHARE = 0.25
"""Of the test functions of a file that are not slow; at least one, whichever file."""

T = TypeVar("T")


def draw(name: str) -> float:
    """Return a number in [0, 1) that hangs on the name alone: what is drawn stays so as others come and go."""
    return crc32(name.encode()) / 2**32


def cross_section(tests: Iterable[T], name_of: Callable[[T], str], marks_of: Callable[[T], set[str]]) -> list[T]:
    """Return the tests of the cross-section, in their order.

    Of each file some functions, and of each of them one set of parameters, both drawn by name. Tests marked `slow` are
    left out, and those marked `quick` are in whatever is drawn: the mechanisms that no run should be without.

    Args:
        tests: All tests.
        name_of: Their names: ``file::function[parameters]``.
        marks_of: The names of their markers.
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
