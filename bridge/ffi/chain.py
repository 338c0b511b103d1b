"""The state of a chain of calls inside jit, in memory of the tables' device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from recis_hybrid.accelerator import is_accelerator, numbers_on
from recis_hybrid.bridge.exchange.dlpack import to_jax

_SERIALS = 1 << 24  # kSerials in csrc/core/chain.h


class Counts(NamedTuple):
    """Results that the calls of a chain have written."""

    serial: int
    """Serial number of the last call."""
    status: int
    """A status of ``csrc/core/chain.h``; 0 if no call was refused."""
    failed: int
    """Table of the first call that was refused, or -1."""
    steps: Sequence[int]
    """Updates of each table since :meth:`ChainState.start`."""
    unseen: Sequence[int]
    """For each table, training lookups without an update."""


class ChainState:
    """The state of a chain, which only its calls change while they may run; ``csrc/core/chain.h`` has the layout.

    Args:
        words: Size in words of 64 bits.
        tables: Number of tables.
        device: Device of the tables.
    """

    def __init__(self, words: int, tables: int, device: torch.device) -> None:
        # A tensor created in inference mode cannot be written outside of it.
        with torch.inference_mode(False):
            self._words = torch.zeros(words, dtype=torch.int64, device=device)
        self._head = self._words[: 3 + 2 * tables]
        self._counts = Counts(0, 0, -1, [0] * tables, [0] * tables)

    @property
    def address(self) -> int:
        """Address of the state."""
        return self._words.data_ptr()

    def read(self) -> Counts:
        """Return what the calls have written; waits for torch's current stream, but not for that of JAX."""
        serial, status, failed, *counts = self._head.tolist()
        self._counts = Counts(serial, status, failed, counts[::2], counts[1::2])
        return self._counts

    def start(self) -> jax.Array:
        """Forget the failure and the counts of the last calls, after :meth:`read`, and return the next token.

        Tokens of earlier calls are stale from now on. On a GPU, calls with the token run after what torch has queued on
        its current stream.
        """
        last = self._counts
        serial = last.serial % (_SERIALS - 1) + 1
        if any(last.unseen):
            self._words.zero_()
        self._counts = Counts(serial, 0, -1, [0] * len(last.steps), [0] * len(last.unseen))
        head = numbers_on(self._words.device, [serial, 0, -1, *[0] * (self._head.numel() - 3)])
        self._head.copy_(head)
        return _token(serial, self._words.device)


def _token(serial: int, device: torch.device) -> jax.Array:
    numbers = np.array([serial, 0], np.float32)
    if not is_accelerator(device):
        return jnp.asarray(numbers)
    token = torch.from_numpy(numbers).pin_memory().to(device, non_blocking=True)
    # The emulated device of the tests is not one of JAX, whose CPU waits for it.
    return to_jax(token) if device.type == "cuda" else jnp.asarray(token.cpu().numpy())
