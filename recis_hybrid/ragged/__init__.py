"""RaggedTensor, rows of unequal length in few tensors, and Batch, what every stage takes and gives."""

from __future__ import annotations

from recis_hybrid.ragged.batch import Batch as Batch, batch_size as batch_size, batch_to as batch_to
from recis_hybrid.ragged.tensor import RaggedTensor as RaggedTensor
from recis_hybrid.ragged.torchrec import (
    from_keyed_jagged as from_keyed_jagged,
    to_keyed_jagged as to_keyed_jagged,
)
