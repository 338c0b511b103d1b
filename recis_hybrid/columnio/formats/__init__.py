"""File formats, one module each, behind the protocol ``Format``.

``columnio.files`` may import it; it builds on the Arrow types of ``columnio.convert`` but not on
batches or tensors.
"""

from __future__ import annotations

from recis_hybrid.columnio.formats.protocol import (
    SUFFIXES as SUFFIXES,
    Contents as Contents,
    Format as Format,
    compression_of as compression_of,
    format_of as format_of,
    is_known as is_known,
)
