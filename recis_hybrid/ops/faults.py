"""Elements that kernels of an accelerator have refused.

On the CPU an operator that refuses an element raises. On an accelerator the host would have to wait to learn of it, so
the kernel records the element, and a later call raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid.accelerator import FaultWord, is_accelerator

_WORDS: dict[tuple[str, torch.device], FaultWord] = {}


def check() -> None:
    """Raise if an operator has refused an element on an accelerator; waits for all accelerators in question.

    Raises:
        RuntimeError: One has, in a call since the last error of this kind; the message names the operator.
    """
    for device in {device for _, device in list(_WORDS)}:
        torch.accelerator.synchronize(device)
    for (reason, device), word in list(_WORDS.items()):
        _raise_if(word.take(), reason, device)


def words(values: Tensor, reason: str) -> Tensor | None:
    """Return where kernels record elements that they refuse: None on the CPU, where the operator raises.

    Args:
        values: The argument that determines the device.
        reason: Operator, and why it refuses an element, for the message.

    Returns:
        int64 ``[1]`` on the accelerator: the address of a word.

    Raises:
        RuntimeError: If a kernel of an earlier call has refused an element for this reason.
    """
    if values.is_cpu or not is_accelerator(values):
        return None
    if not torch.compiler.is_compiling():
        _raise_if(_word(reason, values.device).take(), reason, values.device)
    address: Tensor = _address(reason, values.device)
    return address


def _word(reason: str, device: torch.device) -> FaultWord:
    if (reason, device) not in _WORDS:
        _WORDS[reason, device] = FaultWord(device)
    return _WORDS[reason, device]


# A trace must not follow the creation of a word.
@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _address(reason: str, device: torch.device) -> Tensor:
    return _word(reason, device).address


def _raise_if(fault: int, reason: str, device: torch.device) -> None:
    if fault:
        raise RuntimeError(
            f"{reason}: element {fault - 1} of an earlier call on {device}, where errors are reported late; its result "
            f"and all that followed from it are invalid"
        )
