"""Fake kernels, which compute only shapes, for torch.compile and tracing."""

from __future__ import annotations

from typing import Any

import torch

from recis_hybrid.ops import _library as _library  # registers the operators, which must exist before their fakes


def nothing_returned(*names: str) -> None:
    """Register fakes for operators that only write to their arguments and return nothing."""

    def fake(*args: Any, **kwargs: Any) -> None:
        return None

    for name in names:
        torch.library.register_fake(f"recis::{name}", fake)
