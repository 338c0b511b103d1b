"""Exports and bundles in production; needs NumPy at import, neither torch nor the native library."""

from __future__ import annotations

from recis_hybrid.serving.bundle import Bundle as Bundle
from recis_hybrid.serving.columns import InputColumn as InputColumn, Ragged as Ragged, Rows as Rows
from recis_hybrid.serving.errors import InputError as InputError, ServingError as ServingError
from recis_hybrid.serving.reader import Reader as Reader
from recis_hybrid.serving.tables import bucket_of as bucket_of
from recis_hybrid.serving.updates.follower import Follower as Follower
from recis_hybrid.serving.updates.redis_sink import RedisSink as RedisSink
