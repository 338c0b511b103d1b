"""Typed Python functions for the native operators, with one module per family, named as in ``csrc/ops``.

Importing this package loads the native library.
"""

from __future__ import annotations

from recis_hybrid.ops import (
    blocks as blocks,
    cache as cache,
    checksum as checksum,
    disk as disk,
    faults as faults,
    gather as gather,
    hash as hash,
    id_map as id_map,
    memory as memory,
    program as program,
    ragged as ragged,
    transform as transform,
    update as update,
)
from recis_hybrid.ops._library import feature_kernels as feature_kernels, table_kernels as table_kernels
