"""Publishing of trained models for ``recis_hybrid.serving``: bundles of features, tables and tower."""

from __future__ import annotations

from recis_hybrid.publish.bundle import write_bundle as write_bundle
from recis_hybrid.publish.features import PublishError as PublishError
