"""RaggedTensor, rows of unequal length in a few tensors, and Batch, the columns that every stage takes and returns.

Conversions to other frameworks (``to_arrow``, ``to_jagged``, ...) import them on first use.
"""

from __future__ import annotations

from recis_hybrid.ragged.arrow import from_arrow as from_arrow, to_arrow as to_arrow
from recis_hybrid.ragged.batch import Batch as Batch, batch_size as batch_size, batch_to as batch_to
from recis_hybrid.ragged.tensor import RaggedTensor as RaggedTensor
from recis_hybrid.ragged.torchrec import (
    from_jagged as from_jagged,
    from_keyed_jagged as from_keyed_jagged,
    to_jagged as to_jagged,
    to_keyed_jagged as to_keyed_jagged,
)
