"""Conversion of tensors to JAX and of arrays to torch, in shared memory.

JAX's own conversion silently copies misaligned memory, and truncates int64 to int32 while x64 is off. Here both are
errors that state the cause and the remedy. README.md is the contract on lifetime and mutation.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final, cast, overload

import jax
import torch

from recis_hybrid.bridge.exchange._dlpack_fast import PUBLIC, cpu_conversions

ALIGNMENT: Final = 64
"""The alignment in bytes that XLA requires of a buffer."""

WIDE: Final = frozenset({torch.int64, torch.uint64, torch.float64, torch.complex128})
"""The dtypes that JAX supports only while ``jax_enable_x64`` is on."""

DTYPES: Final = WIDE | {
    torch.bool,
    *(torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32),
    *(torch.float16, torch.bfloat16, torch.float32, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
}
"""The dtypes that both sides support."""

_ARRAY_DTYPES: Final = frozenset(jax.numpy.dtype(str(dtype).removeprefix("torch.")) for dtype in DTYPES)

_STRIDED: Final = torch.strided

_NUMPY_DTYPES: Final = {torch.bfloat16: torch.int16} | {
    dtype: torch.uint8 for dtype in DTYPES if dtype.is_floating_point and dtype.itemsize == 1
}
"""Numpy-compatible dtypes of the same size for dtypes that numpy lacks."""

_lock = threading.Lock()
_copies = 0


def copies() -> int:
    """Return the number of tensors and arrays that this process has copied between torch and JAX.

    Returns:
        The number of copies so far: those requested with ``copy=True``, and gradients and tensors in compiled graphs
        that could not be shared (``JaxTower.copies`` counts the latter for one tower).

    Example:
        >>> before = copies()
        >>> _ = to_jax(torch.ones(3, 4).t(), copy=True)
        >>> copies() - before
        1
    """
    return _copies


def count_copy() -> None:
    """Add one to :func:`copies`."""
    global _copies
    with _lock:
        _copies += 1


@overload
def to_jax(tensor: torch.Tensor, *, copy: bool = False) -> jax.Array: ...
@overload
def to_jax(tensor: Any, *, copy: bool = False) -> Any: ...
def to_jax(tensor: Any, *, copy: bool = False) -> Any:
    """Convert a tensor to a JAX array in the same memory.

    The array and the tensor share one buffer, which lives as long as either does. JAX assumes that arrays are
    immutable: do not write to the tensor while the array is in use. A buffer on the CPU can no longer be resized
    (``resize_`` to more elements raises), because torch would free memory that JAX reads. Do not resize one on a GPU.

    Args:
        tensor: A tensor of any shape, or a pytree of tensors (dict, list, tuple, None, or any type registered with
            JAX). Tensors must be contiguous, aligned to 64 bytes, and detached. README.md lists the dtypes; 64-bit
            dtypes need ``jax_enable_x64``.
        copy: True to copy; the tensor may then be strided or misaligned. :func:`copies` counts each copy.

    Returns:
        A ``jax.Array`` of the same shape and dtype, committed to the tensor's device, or a pytree of arrays.

    Raises:
        TypeError: if a leaf is not a plain tensor.
        ValueError: if the memory is strided or misaligned, or if the tensor requires a gradient, is on a device that
            JAX lacks, or has a dtype that JAX lacks or supports only with x64 on.

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
    """Convert a JAX array to a tensor in the same memory.

    On the CPU this waits until the array has been computed. The tensor and the array share one buffer, which lives as
    long as either does. JAX assumes that the array is immutable, but torch does not enforce it: do not write to the
    tensor while the array is in use.

    Args:
        array: A ``jax.Array`` of any shape, on one device, or a pytree of arrays.
        copy: True to copy; the tensor may then be written to. :func:`copies` counts each copy.

    Returns:
        A tensor of the same shape and dtype, on the array's device, or a pytree of tensors.

    Raises:
        TypeError: if a leaf is not a ``jax.Array``, or is being traced.
        ValueError: if the array is sharded over several devices, has been deleted (or donated), or has a dtype that
            torch lacks.

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
    """Convert one tensor like :func:`to_jax`, even if it requires a gradient.

    Args:
        tensor: A tensor of any shape, contiguous and aligned to 64 bytes.
        where: The prefix of error messages.

    Returns:
        The array in the tensor's memory.

    Raises:
        TypeError: if it is not a plain tensor.
        ValueError: if the memory cannot be shared.
    """
    # All conditions are in one expression for speed. sharing_error finds the one that failed.
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
        raise sharing_error(tensor, where)
    shape = tensor.shape
    if 1 in shape or 0 in shape:
        # The strides of these dimensions are arbitrary, but XLA recompiles for different strides.
        strides = _canonical_strides(shape)
        if tensor.stride() != strides:
            tensor = tensor.as_strided(shape, strides)
    if tensor.is_cpu:
        return cpu_conversions().to_jax(tensor)
    try:
        return PUBLIC.to_jax(tensor)
    except RuntimeError as error:
        raise ValueError(f"{where}: the tensor is on {tensor.device}, which JAX cannot use: {error}") from error


def unshare(arrays: Sequence[jax.Array]) -> list[torch.Tensor]:
    """Convert arrays like :func:`to_torch`, all on one device and of dtypes that torch supports.

    Args:
        arrays: Arrays of any shapes, such as the results of a jitted call.

    Returns:
        The tensors in the arrays' memory.
    """
    if not arrays:
        return []
    (device,) = arrays[0].sharding.device_set
    to_torch = (cpu_conversions() if cast(Any, device).platform == "cpu" else PUBLIC).to_torch
    return to_torch(arrays)


def x64_is_on() -> bool:
    """Return whether ``jax_enable_x64`` is on in this thread."""
    return bool(cast(Any, jax.config).jax_enable_x64)


def sharing_error(tensor: object, where: str) -> TypeError | ValueError:
    """Return the error for a tensor that cannot be shared with JAX, with the cause and the remedy.

    Args:
        tensor: The tensor, or an object of another type.
        where: The prefix of the message.
    """
    if not isinstance(tensor, torch.Tensor):
        return TypeError(f"{where}: expected tensors, got {type(tensor).__qualname__}")
    got = f"(shape {tuple(tensor.shape)}, {_name(tensor.dtype)}, {tensor.device})"
    if not _is_plain(tensor):
        return TypeError(f"{where}: expected plain tensors, got the wrapper {type(tensor).__qualname__} {got}")
    if not (tensor.is_cpu or tensor.is_cuda):
        cause = f"its device, {tensor.device}, is not shared by torch and JAX; move it with .to('cpu') or .to('cuda')"
    elif tensor.layout is not torch.strided:
        cause = f"its layout is {tensor.layout}; pass its parts, or .to_dense()"
    elif tensor.dtype not in DTYPES:
        cause = "JAX lacks this dtype, or does not accept it through DLPack; cast it with .to(dtype)"
    elif tensor.dtype in WIDE and not x64_is_on():
        cause = (
            "JAX would truncate its 64-bit elements to 32 bits, because x64 is off; "
            "turn it on with jax.config.update('jax_enable_x64', True), or cast the tensor if its values allow it"
        )
    elif tensor.is_neg() or tensor.is_conj():
        cause = "it is a lazy negation or conjugate; materialize it with .resolve_neg().resolve_conj()"
    elif not tensor.is_contiguous():
        kind = "expanded (stride 0)" if 0 in tensor.stride() else "strided"
        cause = f"it is {kind}, strides {tuple(tensor.stride())}; copy it with .contiguous(), or pass copy=True"
        cause += ", or pass the whole buffer and slice it in JAX"
    elif tensor.untyped_storage().nbytes() < (tensor.storage_offset() + tensor.numel()) * tensor.itemsize:
        cause = (
            f"its storage has been freed to {tensor.untyped_storage().nbytes()} bytes (by a storage's resize_, or by "
            "FSDP between uses); pass it while its memory is allocated"
        )
    else:
        cause = (
            f"its memory starts {tensor.data_ptr() % ALIGNMENT} bytes past a multiple of {ALIGNMENT}; "
            f"copy it with .clone(), or pass copy=True (a slice of rows is aligned if first row × bytes per row is a "
            f"multiple of {ALIGNMENT})"
        )
    return ValueError(f"{where}: the tensor {got} cannot share memory with JAX: {cause}")


def _to_jax(tensor: object, copy: bool, where: str) -> jax.Array:
    """Convert one leaf; see :func:`to_jax`."""
    if not isinstance(tensor, torch.Tensor):
        raise sharing_error(tensor, where)
    if tensor.requires_grad:
        raise ValueError(
            f"{where}: the tensor (shape {tuple(tensor.shape)}, {_name(tensor.dtype)}) requires a gradient, which JAX "
            "would ignore; pass tensor.detach(), or use JaxTower for gradients through JAX functions"
        )
    if copy and _is_plain(tensor) and tensor.layout is torch.strided:
        tensor = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        array = share(tensor, where)
        count_copy()
        return array
    array = share(tensor, where)
    if tensor.is_cpu and tensor.untyped_storage().resizable():
        # A numpy view makes the storage permanently unresizable. torch offers no other way.
        (tensor.view(_NUMPY_DTYPES[tensor.dtype]) if tensor.dtype in _NUMPY_DTYPES else tensor).numpy()
    return array


def _to_torch(array: object, copy: bool, where: str) -> torch.Tensor:
    """Convert one leaf; see :func:`to_torch`."""
    if isinstance(array, jax.core.Tracer):
        raise TypeError(f"{where}: expected a concrete array, got {array}, which is being traced by jit, grad or vmap")
    if not isinstance(array, jax.Array):
        raise TypeError(f"{where}: expected JAX arrays, got {type(array).__qualname__}")
    devices = array.sharding.device_set
    if len(devices) != 1 or array.dtype not in _ARRAY_DTYPES or array.is_deleted():
        got = f"(shape {array.shape}, {array.dtype.name})"
        if array.is_deleted():
            cause = "it has been deleted; do not use an array after donating it to a jitted call"
        elif len(devices) != 1:
            cause = f"it is sharded over {len(devices)} devices; gather it with jax.device_put(array, device)"
        else:
            cause = "torch lacks this dtype; cast it with .astype, or pass jax.random.key_data of a PRNG key"
        raise ValueError(f"{where}: the array {got} cannot share memory with torch: {cause}")
    (tensor,) = unshare([array])
    if copy:
        tensor = tensor.clone()
        count_copy()
    return tensor


def _is_plain(tensor: object) -> bool:
    """Return whether an object is a tensor with its own memory, unlike fake, distributed and nested tensors."""
    if not isinstance(tensor, torch.Tensor):
        return False
    return type(tensor).__torch_dispatch__ is cast(Any, torch.Tensor).__torch_dispatch__


def _canonical_strides(shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a new contiguous tensor."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
