"""Clock: where a step's time goes, measured in the steps that are logged and in no others."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from recis_hybrid.embedding import EmbeddingEngine

_NOTHING = nullcontext()


class Clock:
    """Times phases, each without those within it. While it measures, it waits for the GPU where phases meet."""

    def __init__(self) -> None:
        self.measures = False
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time what is done within, if the clock measures."""
        return self._phase(name) if self.measures else _NOTHING

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
        """Books the time since the last border for the innermost phase."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def measuring(self, engines: Sequence[EmbeddingEngine]) -> Iterator[None]:
        """Measures the step within: forward passes of engines as ``lookup``, their waits for ranks as ``exchange``."""
        self.measures, self.seconds, self._open = True, {}, []

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
            self.measures = False
            for engine in engines:
                engine.watch_exchange()
            for hook in hooks:
                hook.remove()
