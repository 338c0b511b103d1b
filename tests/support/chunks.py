"""IDMaps of tiny chunks, which grow in place from the first ids on; and ids that are crafted to collide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from recis_hybrid.embedding.table import slots

_MASK = 2**64 - 1
_SALT = 0x9E3779B97F4A7C15


@contextmanager
def tiny_chunks(chunk: int = 4, piece: int = 3, slack: int = 1 << 12) -> Iterator[None]:
    """Let new maps have chunks of ``chunk`` lines, and move ``piece`` at once, with ``slack`` full ones in a row."""
    pieces = {"cpu": piece, "other": piece}
    with mock.patch.multiple(slots, CHUNK_LINES=chunk, PIECE_LINES=pieces, SLACK_LINES=slack):
        yield


def hash_of(i: int, member: int = 0) -> int:
    """Return the hash by which slots are ordered of an id of a member table: SplitMix64."""
    x = i + (member + 1) * _SALT & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def id_with_hash(value: int, member: int = 0) -> int:
    """Return the id of a member table whose hash, by which slots are ordered, is ``value``: SplitMix64 backwards."""
    x = value ^ value >> 31 ^ value >> 62
    x = x * pow(0x94D049BB133111EB, -1, 2**64) & _MASK
    x ^= x >> 27 ^ x >> 54
    x = x * pow(0xBF58476D1CE4E5B9, -1, 2**64) & _MASK
    x ^= x >> 30 ^ x >> 60
    x = x - (member + 1) * _SALT & _MASK
    return x - 2**64 if x >= 2**63 else x
