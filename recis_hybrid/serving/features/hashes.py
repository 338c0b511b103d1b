"""Hashes of ids and of strings, vectorized. Letters: M strings, N bytes.

Strings are grouped by the branch that their length takes; each group is hashed by a few array operations.

References:
    FarmHash Fingerprint64 (Pike, 2014), MurmurHash64A (Appleby, 2008), XXH64 (Collet, 2012).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
_U = np.uint64
_K0, _K1, _K2 = _U(0xC3A5C85C97CB3127), _U(0xB492B66FBE98F273), _U(0x9AE16A3B2F90404F)
_MURMUR = _U(0xC6A4A7935BD1E995)
_X1, _X2, _X3 = _U(0x9E3779B185EBCA87), _U(0xC2B2AE3D27D4EB4F), _U(0x165667B19E3779F9)
_X4, _X5 = _U(0x85EBCA77C2B2AE63), _U(0x27D4EB2F165667C5)


class Bytes:
    """Strings in one buffer, whose words can be read at any address.

    Args:
        values: uint8 ``[N]``.
        offsets: int64 ``[M + 1]``.
    """

    def __init__(self, values: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> None:
        self.begin, self.sizes = offsets[:-1], np.diff(offsets)
        self._bytes = np.zeros(len(values) + 8, np.uint8)
        self._bytes[: len(values)] = values
        count = len(values) + 1
        # Overlapping words with a stride of one byte.
        self._words = np.ndarray((count,), "<u8", self._bytes, 0, (1,))

    def word(self, at: Any) -> Words:
        """Return the eight bytes from each address, as uint64; those after the buffer are zeros."""
        words: Words = self._words[at]
        return words

    def half(self, at: Any) -> Words:
        """Return the four bytes from each address."""
        return self.word(at) & _U(0xFFFFFFFF)

    def byte(self, at: Any) -> Words:
        """Return the byte at each address."""
        found: Words = self._bytes[at].astype(np.uint64)
        return found


def hash_strings(kind: str, values: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the hash of each string.

    Args:
        kind: ``farm``, ``murmur``, ``xxh64``, ``djb2`` or ``sdbm``.
        values: uint8 ``[N]``, the bytes of all strings.
        offsets: int64 ``[M + 1]``.

    Returns:
        int64 ``[M]``.
    """
    data = Bytes(values, offsets)
    if len(data.sizes) == 0:
        return np.empty(0, np.int64)
    return _STRINGS[kind](data).view(np.int64)


def hash_ids(kind: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the hash of the eight little-endian bytes of each id.

    Args:
        kind: As for :func:`hash_strings`.
        ids: int64, any shape.

    Returns:
        int64, in the shape of the ids.
    """
    return _IDS[kind](np.ascontiguousarray(ids).view(np.uint64)).view(np.int64)


def cross_ids(x: npt.NDArray[np.int64], y: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return MurmurHash64A of the sixteen bytes of each pair of ids."""
    state = _murmur_word(_U(16 * int(_MURMUR) % 2**64), np.ascontiguousarray(x).view(np.uint64))
    return _murmur_end(_murmur_word(state, np.ascontiguousarray(y).view(np.uint64))).view(np.int64)


def _right(x: Words, by: int) -> Words:
    return x >> _U(by) | x << _U(64 - by)


def _left(x: Words, by: int) -> Words:
    return x << _U(by) | x >> _U(64 - by)


def _mix(x: Words) -> Words:
    return x ^ (x >> _U(47))


def _join(u: Words, v: Words, multiplier: Words) -> Words:
    a = _mix((u ^ v) * multiplier)
    return _mix((v ^ a) * multiplier) * multiplier


def _by_groups(data: Bytes, groups: list[tuple[int, int, Callable[[Bytes, Any, Words], Words]]]) -> Words:
    """Return hashes: each group is a range of lengths and the function of its strings' addresses and lengths."""
    out = np.empty(len(data.sizes), np.uint64)
    lowest, highest = int(data.sizes.min()), int(data.sizes.max())
    for low, high, function in groups:
        if highest < low or lowest > high:
            continue
        if low <= lowest and highest <= high:
            return function(data, data.begin, data.sizes.astype(np.uint64))
        chosen = np.flatnonzero((data.sizes >= low) & (data.sizes <= high))
        if len(chosen):
            out[chosen] = function(data, data.begin[chosen], data.sizes[chosen].astype(np.uint64))
    return out


def _farm_empty(data: Bytes, at: Any, size: Words) -> Words:
    return np.full(len(size), _K2)


def _farm_to_3(data: Bytes, at: Any, size: Words) -> Words:
    length = size.astype(np.int64)
    y = data.byte(at) + (data.byte(at + (length >> 1)) << _U(8))
    z = size + (data.byte(at + length - 1) << _U(2))
    return _mix(y * _K2 ^ z * _K0) * _K2


def _farm_to_7(data: Bytes, at: Any, size: Words) -> Words:
    length = size.astype(np.int64)
    return _join(size + (data.half(at) << _U(3)), data.half(at + length - 4), _K2 + size * _U(2))


def _farm_8(first: Words, last: Words, size: Words) -> Words:
    multiplier = _K2 + size * _U(2)
    a = first + _K2
    return _join(_right(last, 37) * multiplier + a, (_right(a, 25) + last) * multiplier, multiplier)


def _farm_to_16(data: Bytes, at: Any, size: Words) -> Words:
    return _farm_8(data.word(at), data.word(at + size.astype(np.int64) - 8), size)


def _farm_to_64(data: Bytes, at: Any, size: Words, *, small: bool) -> Words:
    multiplier = _K2 + size * _U(2)
    end = at + size.astype(np.int64)
    a = data.word(at) * (_K1 if small else _K2)
    b = data.word(at + 8)
    c = data.word(end - 8) * multiplier
    d = data.word(end - 16) * _K2
    y = _right(a + b, 43) + _right(c, 30) + d
    z = _join(y, a + _right(b + _K2, 18) + c, multiplier)
    if small:
        return z
    e = data.word(at + 16) * multiplier
    f = data.word(at + 24)
    g = (y + data.word(end - 32)) * multiplier
    h = (z + data.word(end - 24)) * multiplier
    return _join(_right(e + f, 43) + _right(g, 30) + h, e + _right(f + a, 18) + g, multiplier)


def _farm_to_32(data: Bytes, at: Any, size: Words) -> Words:
    return _farm_to_64(data, at, size, small=True)


def _farm_33_to_64(data: Bytes, at: Any, size: Words) -> Words:
    return _farm_to_64(data, at, size, small=False)


def _stir(data: Bytes, at: Any, a: Words, b: Words) -> tuple[Words, Words]:
    a = a + data.word(at)
    last = data.word(at + 24)
    b = _right(b + a + last, 21)
    before = a
    a = a + data.word(at + 8) + data.word(at + 16)
    return a + last, b + _right(a, 44) + before


class _Farm:
    """The state of long strings, an array of each word."""

    def __init__(self, data: Bytes, at: Any) -> None:
        count = len(at)
        self.x = np.full(count, 81 * int(_K2) % 2**64, np.uint64) + data.word(at)
        self.y = np.full(count, (81 * int(_K1) + 113) % 2**64, np.uint64)
        self.z = _mix(self.y * _K2 + _U(113)) * _K2
        self.v, self.w = (np.zeros(count, np.uint64),) * 2, (np.zeros(count, np.uint64),) * 2

    def round(self, data: Bytes, at: Any, multiplier: Any, weight: Any) -> None:
        x = _right(self.x + self.y + self.v[0] + data.word(at + 8), 37) * multiplier
        y = _right(self.y + self.v[1] + data.word(at + 48), 42) * multiplier
        x ^= self.w[1] * weight
        y += self.v[0] * weight + data.word(at + 40)
        z = _right(self.z + self.w[0], 33) * multiplier
        self.v = _stir(data, at, self.v[1] * multiplier, x + self.w[0])
        self.w = _stir(data, at + 32, z + self.w[1], y + data.word(at + 16))
        self.x, self.y, self.z = z, y, x


def _farm_above_64(data: Bytes, at: Any, size: Words) -> Words:
    length = size.astype(np.int64)
    # By descending length, so that the strings with another block are always the first ones.
    order = np.argsort(-length, kind="stable")
    at, length = at[order], length[order]
    rounds = (length - 1) // 64
    state = _Farm(data, at)
    for number in range(int(rounds[0])):
        active = int(np.count_nonzero(rounds > number))
        part = _first(state, active)
        part.round(data, at[:active] + 64 * number, _K1, _U(1))
        _put(state, part, active)
    rest = ((length - 1) & 63).astype(np.uint64)
    multiplier = _K1 + ((state.z & _U(0xFF)) << _U(1))
    w = state.w[0] + rest
    v = state.v[0] + w
    state.v, state.w = (v, state.v[1]), (w + v, state.w[1])
    state.round(data, at + length - 64, multiplier, _U(9))
    hashes = _join(
        _join(state.v[0], state.w[0], multiplier) + _mix(state.y) * _K0 + state.z,
        _join(state.v[1], state.w[1], multiplier) + state.x,
        multiplier,
    )
    out = np.empty_like(hashes)
    out[order] = hashes
    return out


def _first(state: _Farm, count: int) -> _Farm:
    part = object.__new__(_Farm)
    part.x, part.y, part.z = state.x[:count], state.y[:count], state.z[:count]
    part.v = (state.v[0][:count], state.v[1][:count])
    part.w = (state.w[0][:count], state.w[1][:count])
    return part


def _put(state: _Farm, part: _Farm, count: int) -> None:
    def joined(new: Words, old: Words) -> Words:
        return new if count == len(old) else np.concatenate([new, old[count:]])

    state.x, state.y, state.z = joined(part.x, state.x), joined(part.y, state.y), joined(part.z, state.z)
    state.v = (joined(part.v[0], state.v[0]), joined(part.v[1], state.v[1]))
    state.w = (joined(part.w[0], state.w[0]), joined(part.w[1], state.w[1]))


_FARM: list[tuple[int, int, Callable[[Bytes, Any, Words], Words]]] = [
    (0, 0, _farm_empty),
    (1, 3, _farm_to_3),
    (4, 7, _farm_to_7),
    (8, 16, _farm_to_16),
    (17, 32, _farm_to_32),
    (33, 64, _farm_33_to_64),
    (65, 2**62, _farm_above_64),
]


def _farm_strings(data: Bytes) -> Words:
    return _by_groups(data, _FARM)


def _murmur_word(state: Any, word: Words) -> Words:
    mixed: Words = (state ^ _mix(word * _MURMUR) * _MURMUR) * _MURMUR
    return mixed


def _murmur_end(state: Words) -> Words:
    return _mix(_mix(state) * _MURMUR)


def _murmur_strings(data: Bytes) -> Words:
    state = data.sizes.astype(np.uint64) * _MURMUR
    blocks = data.sizes >> 3
    for number in range(int(blocks.max())):
        active = np.flatnonzero(blocks > number)
        state[active] = _murmur_word(state[active], data.word(data.begin[active] + 8 * number))
    rest = data.sizes & 7
    active = np.flatnonzero(rest)
    if len(active):
        bits = (rest[active] * 8).astype(np.uint64)
        tail = data.word(data.begin[active] + 8 * blocks[active]) & ((_U(1) << bits) - _U(1))
        state[active] = (state[active] ^ tail) * _MURMUR
    return _murmur_end(state)


def _xxh_round(lane: Any, word: Words) -> Words:
    return _left(lane + word * _X2, 31) * _X1


def _xxh_end(state: Words) -> Words:
    state = (state ^ (state >> _U(33))) * _X2
    state = (state ^ (state >> _U(29))) * _X3
    return state ^ (state >> _U(32))


def _xxh_word(state: Words, word: Words) -> Words:
    return _left(state ^ _xxh_round(_U(0), word), 27) * _X1 + _X4


def _xxh_strings(data: Bytes) -> Words:
    state = np.full(len(data.sizes), _X5)
    at = data.begin.copy()
    long = np.flatnonzero(data.sizes >= 32)
    if len(long):
        state[long] = _xxh_long(data, at, long)
    state += data.sizes.astype(np.uint64)
    end = data.begin + data.sizes
    while len(active := np.flatnonzero(at + 8 <= end)):
        state[active] = _xxh_word(state[active], data.word(at[active]))
        at[active] += 8
    if len(active := np.flatnonzero(at + 4 <= end)):
        state[active] = _left(state[active] ^ data.half(at[active]) * _X1, 23) * _X2 + _X3
        at[active] += 4
    while len(active := np.flatnonzero(at < end)):
        state[active] = _left(state[active] ^ data.byte(at[active]) * _X5, 11) * _X1
        at[active] += 1
    return _xxh_end(state)


def _xxh_long(data: Bytes, at: Any, long: Any) -> Words:
    """Return the state after the blocks of 32 bytes of long strings, and advance their addresses."""
    lanes = [np.full(len(long), word % 2**64, np.uint64) for word in (int(_X1) + int(_X2), int(_X2), 0, -int(_X1))]
    blocks = data.sizes[long] >> 5
    for number in range(int(blocks.max())):
        active = np.flatnonzero(blocks > number)
        place = data.begin[long[active]] + 32 * number
        for lane, words in enumerate(lanes):
            words[active] = _xxh_round(words[active], data.word(place + 8 * lane))
    at[long] += 32 * blocks
    a, b, c, d = lanes
    state = _left(a, 1) + _left(b, 7) + _left(c, 12) + _left(d, 18)
    for lane_words in lanes:
        state = (state ^ _xxh_round(_U(0), lane_words)) * _X1 + _X4
    return state


def _bytewise(first: int, multiplier: int) -> Callable[[Bytes], Words]:
    def strings(data: Bytes) -> Words:
        state = np.full(len(data.sizes), first, np.uint64)
        for place in range(int(data.sizes.max())):
            active = np.flatnonzero(data.sizes > place)
            state[active] = state[active] * _U(multiplier) + data.byte(data.begin[active] + place)
        return state

    return strings


def _bytewise_ids(first: int, multiplier: int) -> Callable[[Words], Words]:
    def ids(words: Words) -> Words:
        state = np.full(words.shape, first, np.uint64)
        for place in range(8):
            state = state * _U(multiplier) + (words >> _U(8 * place) & _U(0xFF))
        return state

    return ids


_STRINGS: dict[str, Callable[[Bytes], Words]] = {
    "farm": _farm_strings,
    "murmur": _murmur_strings,
    "xxh64": _xxh_strings,
    "djb2": _bytewise(5381, 33),
    "sdbm": _bytewise(0, 65599),
}
_IDS: dict[str, Callable[[Words], Words]] = {
    "farm": lambda words: _farm_8(words, words, np.full(words.shape, 8, np.uint64)),
    "murmur": lambda words: _murmur_end(_murmur_word(np.full(words.shape, 8 * int(_MURMUR) % 2**64, np.uint64), words)),
    "xxh64": lambda words: _xxh_end(_xxh_word(np.full(words.shape, (int(_X5) + 8) % 2**64, np.uint64), words)),
    "djb2": _bytewise_ids(5381, 33),
    "sdbm": _bytewise_ids(0, 65599),
}
KINDS = tuple(_STRINGS)
"""The hashes."""
