"""Checkpoints in safetensors and JSON: atomic, verified, never executed."""

from __future__ import annotations

from recis_hybrid.checkpointing import (
    JSON as JSON,
    PartState as PartState,
    Saveable as Saveable,
    TableState as TableState,
    WeightFiles as WeightFiles,
)
from recis_hybrid.saver.actions.pretrained import load_pretrained as load_pretrained
from recis_hybrid.saver.actions.selection import Loaded as Loaded
from recis_hybrid.saver.errors import (
    CheckpointError as CheckpointError,
    CheckpointMismatch as CheckpointMismatch,
    CorruptCheckpoint as CorruptCheckpoint,
)
from recis_hybrid.saver.format.location import Location as Location
from recis_hybrid.saver.parts.per_rank import PerRank as PerRank
from recis_hybrid.saver.saver import Saver as Saver
