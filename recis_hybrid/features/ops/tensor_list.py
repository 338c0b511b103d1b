"""How tensors go into the native operators on ragged columns."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_on(device: torch.device) -> bool:
    """Whether results have as many values as they need: a GPU, which nobody waits for, gives a bound of them."""
    return device.type == "cpu"


class TensorList:
    """Tensors in one list, and for each that might be there its number in it, -1 where it is not."""

    def __init__(self) -> None:
        self.list: list[Tensor] = []
        self.index: list[int] = []

    def add(self, *tensors: Tensor | None) -> None:
        """Add tensors to the end."""
        for tensor in tensors:
            if tensor is None:
                self.index.append(-1)
            else:
                self.index.append(len(self.list))
                self.list.append(tensor.contiguous())
