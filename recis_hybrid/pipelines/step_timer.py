"""StepTimer: the time of a step by phase, measured only in logged steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from recis_hybrid.accelerator import is_initialized
from recis_hybrid.embedding import EmbeddingEngine

_NOTHING = nullcontext()


class StepTimer:
    """Times phases, excluding nested ones. While enabled, it synchronizes the GPU between phases."""

    def __init__(self) -> None:
        self.enabled = False
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time the block as a phase, if the timer is enabled."""
        return self._phase(name) if self.enabled else _NOTHING

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, name: str) -> None:
        self._charge()
        self._open.append(name)

    def _leave(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        """Add the time since the last phase boundary to the innermost open phase."""
        if is_initialized():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def measure(self, engines: Sequence[EmbeddingEngine]) -> Iterator[None]:
        """Time a step: forward passes of engines as ``lookup``, their waits for other ranks as ``exchange``."""
        self.enabled, self.seconds, self._open = True, {}, []

        def enter(module: nn.Module, args: Any) -> None:
            self._enter("lookup")

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._leave()

        hooks = [engine.register_forward_pre_hook(enter) for engine in engines]
        hooks += [engine.register_forward_hook(leave) for engine in engines]
        for engine in engines:
            engine.watch_exchange(lambda: self._phase("exchange"))
        try:
            yield
        finally:
            self.enabled = False
            for engine in engines:
                engine.watch_exchange()
            for hook in hooks:
                hook.remove()
