"""Reference implementation of the random initial values, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_M32 = np.uint64(0xFFFFFFFF)


def philox4x32(key: int, ids: NDArray[np.int64], quads: int) -> NDArray[np.uint32]:
    """Return Philox4x32-10 with counters (id, quad), uint32 ``[len(ids), 4 * quads]``.

    References:
        Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC11, section 3.3.
    """
    key &= 2**64 - 1
    low = np.repeat(ids.astype(np.uint64), quads)
    quad = np.tile(np.arange(quads, dtype=np.uint64), len(ids))
    c = [low & _M32, low >> np.uint64(32), quad & _M32, quad >> np.uint64(32)]
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & _M32,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & _M32,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=1).astype(np.uint32).reshape(len(ids), 4 * quads)


def uniform(key: int, ids: NDArray[np.int64], dim: int, low: float, high: float) -> NDArray[np.float32]:
    """Return initial values of Uniform(low, high), float32 ``[len(ids), dim]``, in float32 arithmetic."""
    unit = (philox4x32(key, ids, -(-dim // 4)) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    low32, high32 = np.float32(low), np.float32(high)
    return (low32 + (high32 - low32) * unit)[:, :dim]


def normal(key: int, ids: NDArray[np.int64], dim: int, mean: float, std: float) -> NDArray[np.float64]:
    """Return initial values of Normal(mean, std), float64, from the Box-Muller transform of adjacent words."""
    bits = philox4x32(key, ids, -(-dim // 4)).astype(np.float64)
    words = np.floor(bits / 256)
    u, v = (words[:, 0::2] + 1) * 2.0**-24, words[:, 1::2] * 2.0**-24
    radius = np.sqrt(-2 * np.log(u))
    pairs = np.stack([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)], axis=2)
    return (mean + std * pairs.reshape(len(ids), -1))[:, :dim]
