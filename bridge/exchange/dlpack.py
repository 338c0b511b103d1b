"""Tensors to JAX and arrays to torch: in the same memory, or not at all.

JAX's own import copies in silence when memory is not aligned, and cuts int64 to int32 while x64 is off. Here either
is an error that names the cause and the remedy. The contract of lifetime and mutation is in README.md.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final, cast, overload

import jax
import torch

from recis_hybrid.bridge.exchange._dlpack_fast import PUBLIC, cpu_roads

ALIGNMENT: Final = 64
"""Where a buffer must start, in bytes, for XLA to use it as it is."""

WIDE: Final = frozenset({torch.int64, torch.uint64, torch.float64, torch.complex128})
"""What JAX holds only while `jax_enable_x64` is on."""

DTYPES: Final = WIDE | {
    torch.bool,
    *(torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32),
    *(torch.float16, torch.bfloat16, torch.float32, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
}
"""What both sides can hold."""

_ARRAY_DTYPES: Final = frozenset(jax.numpy.dtype(str(dtype).removeprefix("torch.")) for dtype in DTYPES)

_STRIDED: Final = torch.strided

_NUMPY_DTYPES: Final = {torch.bfloat16: torch.int16} | {
    dtype: torch.uint8 for dtype in DTYPES if dtype.is_floating_point and dtype.itemsize == 1
}
"""For dtypes that numpy does not have, ones of the same size."""

_lock = threading.Lock()
_copies = 0


def copies() -> int:
    """How many tensors and arrays this process has copied on their way across.

    Returns:
        The number of copies since the start: those asked for by `copy=True`, and gradients and tensors in
        compiled graphs that could not be shared (`JaxTower.copies` has those of one tower).

    Example:
        >>> before = copies()
        >>> _ = to_jax(torch.ones(3, 4).t(), copy=True)
        >>> copies() - before
        1
    """
    return _copies


def count_copy() -> None:
    """Add one to `copies()`."""
    global _copies
    with _lock:
        _copies += 1


@overload
def to_jax(tensor: torch.Tensor, *, copy: bool = False) -> jax.Array: ...
@overload
def to_jax(tensor: Any, *, copy: bool = False) -> Any: ...
def to_jax(tensor: Any, *, copy: bool = False) -> Any:
    """Hands a tensor to JAX, in the same memory.

    The array and the tensor are one buffer, which lives as long as either does. JAX takes arrays to be constant: while
    the array is in use, do not write to the tensor. A buffer on the CPU cannot be resized from then on (`resize_` to
    more elements raises), because torch would free what JAX reads; on a GPU do not resize it.

    Args:
        tensor: a tensor of any shape, or a pytree of tensors (dict, list, tuple, None, or any other that JAX knows).
            Contiguous, starting at a multiple of 64 bytes, and detached. The dtypes are those of the table in
            README.md; 64-bit ones need `jax_enable_x64`.
        copy: whether to copy; then the tensor may be strided or misaligned. Each copy is counted by `copies()`.

    Returns:
        A `jax.Array` of the same shape and dtype, committed to the tensor's device, or a pytree of them.

    Raises:
        TypeError: if a leaf is not a plain tensor.
        ValueError: if the memory cannot be shared: it is strided or misaligned; if the tensor requires a gradient, is
            on a device that JAX does not have, or is of a dtype that JAX does not have, or has only with x64 on.

    Example:
        >>> tensor = torch.arange(4, dtype=torch.float32)
        >>> array = to_jax(tensor)
        >>> array.unsafe_buffer_pointer() == tensor.data_ptr()
        True
    """
    if type(tensor) is torch.Tensor:
        return _to_jax(tensor, copy, "to_jax")
    leaves, tree = jax.tree_util.tree_flatten_with_path(tensor)
    arrays = [_to_jax(leaf, copy, f"to_jax{jax.tree_util.keystr(path)}") for path, leaf in leaves]
    return jax.tree.unflatten(tree, arrays)


@overload
def to_torch(array: jax.Array, *, copy: bool = False) -> torch.Tensor: ...
@overload
def to_torch(array: Any, *, copy: bool = False) -> Any: ...
def to_torch(array: Any, *, copy: bool = False) -> Any:
    """Hands an array to torch, in the same memory.

    On the CPU this waits until the array has been computed. The tensor and the array are one buffer, which lives as
    long as either does. Torch does not know that JAX takes it to be constant: do not write to the tensor while the
    array is in use.

    Args:
        array: a `jax.Array` of any shape, on one device, or a pytree of them.
        copy: whether to copy; then the tensor may be written to. Each copy is counted by `copies()`.

    Returns:
        A tensor of the same shape and dtype, on the array's device, or a pytree of them.

    Raises:
        TypeError: if a leaf is not a `jax.Array`, or is one that is being traced.
        ValueError: if the array is spread over several devices, has been deleted (or donated), or is of a dtype that
            torch does not have.

    Example:
        >>> array = jax.numpy.ones((2, 3))
        >>> tensor = to_torch(array)
        >>> tensor.data_ptr() == array.unsafe_buffer_pointer()
        True
    """
    if isinstance(array, jax.Array):
        return _to_torch(array, copy, "to_torch")
    leaves, tree = jax.tree_util.tree_flatten_with_path(array)
    tensors = [_to_torch(leaf, copy, f"to_torch{jax.tree_util.keystr(path)}") for path, leaf in leaves]
    return jax.tree.unflatten(tree, tensors)


def share(tensor: torch.Tensor, where: str = "to_jax") -> jax.Array:
    """`to_jax` of one tensor whose gradient, if it has one, is somebody else's business.

    Args:
        tensor: a tensor; whether it requires a gradient is not looked at.
        where: what errors begin with.

    Returns:
        The array in the tensor's memory.

    Raises:
        TypeError: if it is not a plain tensor.
        ValueError: if the memory cannot be shared.
    """
    # Everything that can go wrong, quickly; `refusal` then finds out which of them did.
    kind = type(tensor)
    if (
        (kind is not torch.Tensor and kind is not torch.nn.Parameter and not _is_plain(tensor))
        or tensor.layout is not _STRIDED
        or tensor.dtype not in DTYPES
        or not tensor.is_contiguous()
        or tensor.data_ptr() % ALIGNMENT
        or (tensor.dtype in WIDE and not x64_is_on())
        or not (tensor.is_cpu or tensor.is_cuda)
        or tensor.untyped_storage().nbytes() < (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
        or tensor.is_neg()
        or tensor.is_conj()
    ):
        raise refusal(tensor, where)
    shape = tensor.shape
    if 1 in shape or 0 in shape:
        # The strides of such dimensions are arbitrary, but other strides are another layout to XLA: one more compile.
        strides = _canonical_strides(shape)
        if tensor.stride() != strides:
            tensor = tensor.as_strided(shape, strides)
    if tensor.is_cpu:
        return cpu_roads().to_jax(tensor)
    try:
        return PUBLIC.to_jax(tensor)
    except RuntimeError as error:
        raise ValueError(f"{where}: the tensor is on {tensor.device}, which JAX cannot use here: {error}") from error


def unshare(arrays: Sequence[jax.Array]) -> list[torch.Tensor]:
    """`to_torch` of arrays that lie on one device, which is the same for all, and are of dtypes that torch has.

    Args:
        arrays: what a jitted call returned, say.

    Returns:
        The tensors in the arrays' memory.
    """
    if not arrays:
        return []
    (device,) = arrays[0].sharding.device_set
    to_torch = (cpu_roads() if cast(Any, device).platform == "cpu" else PUBLIC).to_torch
    return to_torch(arrays)


def x64_is_on() -> bool:
    """Whether JAX holds 64-bit numbers, in this thread."""
    return bool(cast(Any, jax.config).jax_enable_x64)


def refusal(tensor: object, where: str) -> TypeError | ValueError:
    """The error that says why a tensor cannot be shared with JAX, and what to do about it."""
    if not isinstance(tensor, torch.Tensor):
        return TypeError(f"{where}: takes tensors, got {type(tensor).__qualname__}")
    got = f"(shape {tuple(tensor.shape)}, {_name(tensor.dtype)}, {tensor.device})"
    if not _is_plain(tensor):
        return TypeError(f"{where}: takes plain tensors, got {type(tensor).__qualname__} {got}, which wraps others")
    if not (tensor.is_cpu or tensor.is_cuda):
        cause = f"its device, {tensor.device}, is none that torch and JAX share; move it by .to('cpu') or .to('cuda')"
    elif tensor.layout is not torch.strided:
        cause = f"its layout is {tensor.layout}; pass its parts, or .to_dense()"
    elif tensor.dtype not in DTYPES:
        cause = "JAX has no such dtype, or takes none by DLPack; cast it by .to(dtype)"
    elif tensor.dtype in WIDE and not x64_is_on():
        cause = (
            "JAX would cut its 64-bit elements to 32 bits, because x64 is off; "
            "turn it on by jax.config.update('jax_enable_x64', True), or cast the tensor where the values allow it"
        )
    elif tensor.is_neg() or tensor.is_conj():
        cause = "it is a lazy negation or conjugate; materialise it by .resolve_neg().resolve_conj()"
    elif not tensor.is_contiguous():
        kind = "expanded (stride 0)" if 0 in tensor.stride() else "strided"
        cause = f"it is {kind}, strides {tuple(tensor.stride())}; copy it by .contiguous(), or pass copy=True"
        cause += ", or pass the whole buffer and slice it in JAX"
    elif tensor.untyped_storage().nbytes() < (tensor.storage_offset() + tensor.numel()) * tensor.itemsize:
        cause = (
            f"its memory has been taken away, {tensor.untyped_storage().nbytes()} bytes are left (a storage's resize_, "
            "or FSDP between uses); pass it while it has memory"
        )
    else:
        cause = (
            f"its memory starts {tensor.data_ptr() % ALIGNMENT} bytes past a multiple of {ALIGNMENT}; "
            "copy it by .clone(), or pass copy=True (a slice of rows is aligned if row bytes × first row is such a "
            "multiple)"
        )
    return ValueError(f"{where}: the tensor {got} cannot share memory with JAX: {cause}")


def _to_jax(tensor: object, copy: bool, where: str) -> jax.Array:
    if not isinstance(tensor, torch.Tensor):
        raise refusal(tensor, where)
    if tensor.requires_grad:
        raise ValueError(
            f"{where}: the tensor (shape {tuple(tensor.shape)}, {_name(tensor.dtype)}) requires a gradient, which JAX "
            "would not see; pass tensor.detach(), or use JaxTower for gradients across the border"
        )
    if copy and _is_plain(tensor) and tensor.layout is torch.strided:
        tensor = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        array = share(tensor, where)
        count_copy()
        return array
    array = share(tensor, where)
    if tensor.is_cpu and tensor.untyped_storage().resizable():
        # A view by numpy, which has the same worry, forbids resizing for good: torch has no other way to ask for that.
        (tensor.view(_NUMPY_DTYPES[tensor.dtype]) if tensor.dtype in _NUMPY_DTYPES else tensor).numpy()
    return array


def _to_torch(array: object, copy: bool, where: str) -> torch.Tensor:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(f"{where}: takes arrays with values, got {array}: it is being traced by jit, grad or vmap")
    if not isinstance(array, jax.Array):
        raise TypeError(f"{where}: takes arrays of JAX, got {type(array).__qualname__}")
    devices = array.sharding.device_set
    if len(devices) != 1 or array.dtype not in _ARRAY_DTYPES or array.is_deleted():
        got = f"(shape {array.shape}, {array.dtype.name})"
        if array.is_deleted():
            cause = "it has been deleted; an array donated to a jitted call is gone"
        elif len(devices) != 1:
            cause = f"it is spread over {len(devices)} devices; gather it by jax.device_put(array, device)"
        else:
            cause = "torch has no such dtype; cast it by .astype, or pass jax.random.key_data of a PRNG key"
        raise ValueError(f"{where}: the array {got} cannot share memory with torch: {cause}")
    (tensor,) = unshare([array])
    if copy:
        tensor = tensor.clone()
        count_copy()
    return tensor


def _is_plain(tensor: object) -> bool:
    """Whether it is a tensor with memory: fake, distributed and nested ones only stand for others."""
    if not isinstance(tensor, torch.Tensor):
        return False
    return type(tensor).__torch_dispatch__ is cast(Any, torch.Tensor).__torch_dispatch__


def _canonical_strides(shape: torch.Size) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
