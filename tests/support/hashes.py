"""The hashes in plain Python, independent of the native code."""

from __future__ import annotations

MASK = 2**64 - 1
K0, K1, K2 = 0xC3A5C85C97CB3127, 0xB492B66FBE98F273, 0x9AE16A3B2F90404F
SPREAD = 0xC6A4A7935BD1E995


def signed(x: int) -> int:
    """Return 64 bits reinterpreted as an int64."""
    return x - 2**64 if x & 1 << 63 else x


def word(data: bytes, at: int, size: int = 8) -> int:
    return int.from_bytes(data[at : at + size], "little")


def murmur(data: bytes) -> int:
    """Return MurmurHash64A with seed 0, as an int64."""
    whole = len(data) // 8 * 8
    h = len(data) * SPREAD & MASK
    for at in range(0, whole, 8):
        k = word(data, at) * SPREAD & MASK
        k = (k ^ k >> 47) * SPREAD & MASK
        h = (h ^ k) * SPREAD & MASK
    if data[whole:]:
        h = (h ^ int.from_bytes(data[whole:], "little")) * SPREAD & MASK
    h = (h ^ h >> 47) * SPREAD & MASK
    return signed(h ^ h >> 47)


def turn(x: int, bits: int) -> int:
    x &= MASK
    return (x >> bits | x << (64 - bits)) & MASK


def shift_mix(x: int) -> int:
    x &= MASK
    return x ^ x >> 47


def len16(u: int, v: int, mul: int) -> int:
    a = shift_mix(((u ^ v) & MASK) * mul)
    b = shift_mix(((v ^ a) & MASK) * mul)
    return b * mul & MASK


def weak32(data: bytes, at: int, a: int, b: int) -> tuple[int, int]:
    w, x, y, z = (word(data, at + 8 * i) for i in range(4))
    a += w
    b = turn(b + a + z, 21)
    c = a
    a += x + y
    b += turn(a, 44)
    return (a + z) & MASK, (b + c) & MASK


def farm(data: bytes) -> int:
    """Return FarmHash Fingerprint64, as an int64."""
    n = len(data)
    mul = (K2 + 2 * n) & MASK
    if n == 0:
        return signed(K2)
    if n < 4:
        y = data[0] + (data[n >> 1] << 8)
        z = n + (data[n - 1] << 2)
        return signed(shift_mix(y * K2 & MASK ^ z * K0 & MASK) * K2 & MASK)
    if n < 8:
        return signed(len16(n + (word(data, 0, 4) << 3), word(data, n - 4, 4), mul))
    if n <= 16:
        a = word(data, 0) + K2
        b = word(data, n - 8)
        c = turn(b, 37) * mul + a
        d = (turn(a, 25) + b) * mul
        return signed(len16(c, d, mul))
    if n <= 32:
        a = word(data, 0) * K1
        b = word(data, 8)
        c = word(data, n - 8) * mul
        d = word(data, n - 16) * K2
        return signed(len16(turn(a + b, 43) + turn(c, 30) + d, a + turn(b + K2, 18) + c, mul))
    if n <= 64:
        a = word(data, 0) * K2
        b = word(data, 8)
        c = word(data, n - 8) * mul
        d = word(data, n - 16) * K2
        y = (turn(a + b, 43) + turn(c, 30) + d) & MASK
        z = len16(y, a + turn(b + K2, 18) + c, mul)
        e = word(data, 16) * mul
        f = word(data, 24)
        g = (y + word(data, n - 32)) * mul
        h = (z + word(data, n - 24)) * mul
        return signed(len16(turn(e + f, 43) + turn(g, 30) + h, e + turn(f + a, 18) + g, mul))
    return signed(_farm_long(data))


def _farm_long(data: bytes) -> int:
    n = len(data)
    x = (81 * K2 + word(data, 0)) & MASK
    y = (81 * K1 + 113) & MASK
    z = shift_mix(y * K2 + 113) * K2 & MASK
    v, w = (0, 0), (0, 0)
    end = (n - 1) // 64 * 64
    for s in range(0, end, 64):
        x = turn(x + y + v[0] + word(data, s + 8), 37) * K1
        y = turn(y + v[1] + word(data, s + 48), 42) * K1
        x = (x ^ w[1]) & MASK
        y = (y + v[0] + word(data, s + 40)) & MASK
        z = turn(z + w[0], 33) * K1 & MASK
        v = weak32(data, s, v[1] * K1, x + w[0])
        w = weak32(data, s + 32, z + w[1], y + word(data, s + 16))
        x, z = z, x
    mul = (K1 + ((z & 0xFF) << 1)) & MASK
    s = n - 64
    w = (w[0] + ((n - 1) & 63), w[1])
    v = (v[0] + w[0], v[1])
    w = (w[0] + v[0], w[1])
    x = turn(x + y + v[0] + word(data, s + 8), 37) * mul
    y = turn(y + v[1] + word(data, s + 48), 42) * mul
    x = (x ^ w[1] * 9) & MASK
    y = (y + v[0] * 9 + word(data, s + 40)) & MASK
    z = turn(z + w[0], 33) * mul & MASK
    v = weak32(data, s, v[1] * mul, x + w[0])
    w = weak32(data, s + 32, z + w[1], y + word(data, s + 16))
    x, z = z, x
    return len16(len16(v[0], w[0], mul) + shift_mix(y) * K0 + z, len16(v[1], w[1], mul) + x, mul)


def djb2(data: bytes) -> int:
    """Return djb2, hash * 33 + byte from 5381, as an int64."""
    h = 5381
    for byte in data:
        h = h * 33 + byte & MASK
    return signed(h)


def sdbm(data: bytes) -> int:
    """Return sdbm, byte + (hash << 6) + (hash << 16) - hash from 0, as an int64."""
    h = 0
    for byte in data:
        h = byte + (h << 6) + (h << 16) - h & MASK
    return signed(h)


def xxh64(data: bytes) -> int:
    """Return XXH64 with seed 0, computed by the xxhash package, as an int64."""
    import xxhash

    return signed(xxhash.xxh64_intdigest(data))


def bucket_hash(i: int) -> int:
    """Return the hash of an id by whose upper bits ranks own it, unsigned: the finalizer of SplitMix64 after a salt."""
    x = (i & MASK) ^ 0x5851F42D4C957F2D
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def id_with_bucket_hash(value: int) -> int:
    """Return the id whose :func:`bucket_hash` is ``value``."""
    x = value ^ value >> 31 ^ value >> 62
    x = x * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    x = (x ^ x >> 27 ^ x >> 54) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    return signed((x ^ x >> 30 ^ x >> 60) ^ 0x5851F42D4C957F2D)
