"""Publishing of trained models for ``recis_hybrid.serving``: bundles, and vector indexes."""

from __future__ import annotations

from recis_hybrid.publish.bundle import write_bundle as write_bundle
from recis_hybrid.publish.features import PublishError as PublishError
from recis_hybrid.publish.index import (
    HNSW as HNSW,
    IVF as IVF,
    Flat as Flat,
    IndexReport as IndexReport,
    table_vectors as table_vectors,
    tower_vectors as tower_vectors,
    write_index as write_index,
)
